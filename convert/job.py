"""The conversion itself: plan, then group by group read, cut, hash, save, note. Killed anywhere, a rerun continues.

Peak memory is about twice the largest group: what was read and cut, and the copy that is being written.
"""

import collections
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv32_jax.errors import CheckpointError, OutputExistsError, listing
from dsv32_jax.integrity import files
from dsv32_jax.manifest import FILE, JOURNAL, LeafEntry, Manifest
from dsv32_jax.quantize_search import SCALINGS

from . import cut, facts, weights
from .journal import Journal
from .outcome import odd_scales, summary
from .output import copy_companions, locked, require_apart, require_ours, require_space
from .plan import GROUP_BYTES, Plan, PlannedLeaf, plan
from .policy import recipe
from .recast import Recaster, partners
from .record import Recorder, with_passport
from .source import Source


class Progress(NamedTuple):
    """Bytes done, of all, and the leaf they belong to."""

    done: int
    total: int
    leaf: str


class _Meter:
    """Adds up what is done, and tells it."""

    def __init__(self, tell: Callable[[Progress], None], total: int, done: int):
        self._tell, self._total, self._done = tell, total, done

    def add(self, leaf: PlannedLeaf) -> None:
        self._done += leaf.nbytes
        self._tell(Progress(self._done, self._total, leaf.leaf.path))


def no_progress(progress: Progress) -> None:
    """For callers who do not watch."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    policy: str | Path | None = None,
    scales: str = "rtn",
    tensor_scales: str = "own",
    progress: Callable[[Progress], None] = no_progress,
    group_bytes: int = GROUP_BYTES,
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`; the manifest of what was written.

    Weights keep their format unless `to` ("nvfp4", "fp8", "bf16") or `policy` (a preset or a file, see `policy.py`)
    says otherwise. NVFP4 block scales are chosen by `scales` ("rtn", "mse", "four-over-six"); `tensor_scales` are each
    matrix's "own", or "shared" by gate and up and by q_a and kv_a.
    About `group_bytes` (or one larger leaf) are in work at a time. A `dst` that holds a part of the same conversion
    is continued, one that holds all of it is returned as it is. Raises CheckpointError, ConfigError, UsageError,
    OutputExistsError, CapacityError or StorageError; `src` is never written, what `dst` holds is never deleted.
    """
    src, dst = Path(src).expanduser().absolute(), Path(dst).expanduser().absolute()
    wanted = recipe(to, policy, scales, tensor_scales)
    require_apart(src, dst)
    source = Source(src)
    planned = plan(source, group_bytes, wanted)
    require_ours(dst)
    with locked(dst):
        return _finished(dst, planned) or _run(source, dst, planned, progress)


def _finished(dst: Path, planned: Plan) -> Manifest | None:
    """The manifest of `dst` when the same conversion is complete there."""
    if not (dst / FILE).exists():
        return None
    manifest = Manifest.read(dst)
    if manifest.source.get("plan") != planned.digest:
        raise OutputExistsError(
            f"{dst} holds a converted checkpoint (of {manifest.source.get('folder')!r}) that was made from other "
            "files or with other options; nothing was touched. Convert to another folder, or delete this one yourself"
        )
    (dst / JOURNAL).unlink(missing_ok=True)
    return manifest


def _run(source: Source, dst: Path, planned: Plan, progress: Callable[[Progress], None]) -> Manifest:
    """Write every group that is not there yet, then the manifest."""
    from dsv32_jax.store import Writer

    journal = Journal(dst, planned.digest, {"source": source.folder.name})
    writer = Writer(dst)
    parts = {f"{number:05d}": group for number, group in enumerate(planned.groups)}
    done = {part for part, leaves in journal.leaves.items() if writer.has(part) or not _stored(leaves)}
    ready = sum(leaf.nbytes for part in done for leaf in parts[part])
    require_space(dst, planned.nbytes - ready)
    _require_scales(source, [leaf for part in parts if part not in done for leaf in parts[part]])
    entries = {path: leaf for part in sorted(done) for path, leaf in journal.leaves[part].items()}
    meter, read, recaster = _Meter(progress, planned.nbytes, ready), Recorder(source.read), _recaster(planned)
    for part in sorted(set(parts) - done):
        arrays, leaves, counts = _group(parts[part], read, recaster, entries, meter)
        if arrays:
            writer.save(part, arrays)
        del arrays
        journal.add(part, leaves, counts, recaster.take_outcomes())
        entries |= leaves
    writer.finish()
    return _complete(source, dst, planned, journal)


def _recaster(planned: Plan) -> Recaster:
    """What quantizes and dequantizes as the plan's recipe says."""
    together = {}
    if planned.recipe.tensor_scales == "shared":
        together = partners(stored for leaf in planned.leaves for stored in leaf.sources)
    return Recaster(SCALINGS[planned.recipe.scales], together)


def _group(
    group: tuple[PlannedLeaf, ...],
    read: Recorder,
    recaster: Recaster,
    entries: dict[str, LeafEntry],
    meter: _Meter,
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, LeafEntry], dict[str, int]]:
    """The arrays of `group` to be saved, its leaves' manifest entries, and what was counted.

    `entries` are those of the groups before.
    """
    arrays: dict[tuple[str, str], np.ndarray] = {}
    leaves: dict[str, LeafEntry] = {}
    counts: collections.Counter[str] = collections.Counter()
    for leaf in group:
        built = _build(leaf, read, recaster, counts)
        entry = with_passport(leaf, _entry(leaf, built, entries | leaves), built, read)
        leaves[leaf.leaf.path] = entry
        arrays |= {(leaf.leaf.path, name): built[name] for name in entry.arrays}
        meter.add(leaf)
    return arrays, leaves, dict(counts)


def _build(
    planned: PlannedLeaf, read: Recorder, recaster: Recaster, counts: collections.Counter[str]
) -> dict[str, np.ndarray]:
    """The arrays of one leaf; none for a copy that the source leaves out."""
    if planned.same_as is not None:
        return {}
    built = cut.build(planned.leaf, planned.sources, planned.form, read, recaster)
    found = {name: (array.dtype.name, array.shape) for name, array in built.items()}
    assert found == planned.arrays, f"{planned.leaf.path}: {found} was built, {planned.arrays} was planned"
    facts.require_finite(planned.leaf.path, built)
    counts.update(facts.scale_facts(built))
    return built


def _entry(planned: PlannedLeaf, built: dict[str, np.ndarray], entries: dict[str, LeafEntry]) -> LeafEntry:
    """The manifest's entry. A copy with its original's bytes is that original."""
    form = planned.form.format
    if planned.same_as is not None:
        return LeafEntry(form, {}, planned.same_as)
    arrays = {name: facts.entry(array) for name, array in built.items()}
    if planned.copy_of is not None and entries[planned.copy_of] == LeafEntry(form, arrays):
        return LeafEntry(form, {}, planned.copy_of)
    return LeafEntry(form, arrays)


def _stored(leaves: dict[str, LeafEntry]) -> bool:
    return any(leaf.arrays for leaf in leaves.values())


def _require_scales(source: Source, leaves: list[PlannedLeaf]) -> None:
    """Raise CheckpointError that lists every tensor scale which cannot be one, before hours of work."""
    stored = {s.values.name: s for leaf in leaves for s in leaf.sources if s.tensor_scale is not None}
    problems = []
    for weight in stored.values():
        try:
            weights.tensor_scale(weight, source.read)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"{source.folder} has {len(problems)} unusable tensor scales; nothing new was written: {listing(problems)}"
        )


def _complete(source: Source, dst: Path, planned: Plan, journal: Journal) -> Manifest:
    """Write the manifest: from now on the folder is a converted checkpoint."""
    leaves = {path: leaf for _, part in sorted(journal.leaves.items()) for path, leaf in part.items()}
    counts: collections.Counter[str] = collections.Counter({"nan_scale_bytes": 0, "zero_blocks": 0})
    for part in (*journal.facts.values(), odd_scales(journal.outcomes)):
        counts.update(part)
    report = {
        "formats": planned.formats,
        "notes": list(planned.notes),
        "ignored": planned.ignored,
        "conversions": planned.conversions,
        "errors": summary(journal.outcomes),
        "dequantized": {p.leaf.path: p.form.dequantized for p in planned.leaves if p.form.dequantized},
        "companions": copy_companions(source.folder, dst),
        **counts,
    }
    storage = {"files": files(dst), "mesh": {}}
    manifest = Manifest(planned.config, leaves, _origin(source, planned), report, _versions(), storage)
    manifest.write(dst)
    journal.file.unlink()
    return manifest


def _origin(source: Source, planned: Plan) -> dict[str, Any]:
    """What the checkpoint was made from."""
    weights = {s.values.name: s.kind for leaf in planned.leaves for s in leaf.sources}
    headers = source.header_sha256
    return {
        "folder": source.folder.name,
        "files": {
            file.name: {"size": identity.size, "header_sha256": headers[file]}
            for file, identity in sorted(source.files.items())
        },
        "quantization_config": source.config.get("quantization_config"),
        "stored": dict(sorted(collections.Counter(weights.values()).items())),
        "plan": planned.digest,
    }


def _versions() -> dict[str, str]:
    """The versions of everything that had a hand in the bytes."""
    versions = {"python": platform.python_version()}
    for package in ("dsv32-jax", "numpy", "ml_dtypes", "orbax-checkpoint"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
