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
from dsv32_jax.manifest import FILE, JOURNAL, LeafEntry, Manifest

from . import cut, facts, weights
from .journal import Journal
from .output import copy_companions, locked, require_apart, require_ours, require_space
from .plan import GROUP_BYTES, Plan, PlannedLeaf, plan
from .source import Source


class Progress(NamedTuple):
    """Bytes done, of all, and the leaf they belong to."""

    done: int
    total: int
    leaf: str


def no_progress(progress: Progress) -> None:
    """For callers who do not watch."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Callable[[Progress], None] = no_progress,
    group_bytes: int = GROUP_BYTES,
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`; the manifest of what was written.

    About `group_bytes` (or one larger leaf) are in work at a time. A `dst` that holds a part of the same conversion
    is continued, one that holds all of it is returned as it is. Raises CheckpointError, ConfigError, UsageError,
    OutputExistsError, CapacityError or StorageError; `src` is never written, what `dst` holds is never deleted.
    """
    src, dst = Path(src).expanduser().absolute(), Path(dst).expanduser().absolute()
    require_apart(src, dst)
    source = Source(src)
    planned = plan(source, group_bytes)
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
    for part, group in parts.items():
        if part in done:
            continue
        arrays: dict[tuple[str, str], np.ndarray] = {}
        counts: collections.Counter[str] = collections.Counter()
        for leaf in group:
            built = _build(leaf, source, counts)
            entry = _entry(leaf, built, entries)
            entries[leaf.leaf.path] = entry
            arrays |= {(leaf.leaf.path, name): built[name] for name in entry.arrays}
            ready += leaf.nbytes
            progress(Progress(ready, planned.nbytes, leaf.leaf.path))
        if arrays:
            writer.save(part, arrays)
        journal.add(part, {leaf.leaf.path: entries[leaf.leaf.path] for leaf in group}, dict(counts))
    writer.finish()
    return _complete(source, dst, planned, journal)


def _build(planned: PlannedLeaf, source: Source, counts: collections.Counter[str]) -> dict[str, np.ndarray]:
    """The arrays of one leaf; none for a copy that the source leaves out."""
    if planned.same_as is not None:
        return {}
    built = cut.build(planned.leaf, planned.sources, planned.form, source.read)
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
    for part in journal.facts.values():
        counts.update(part)
    report = {
        "formats": planned.formats,
        "notes": list(planned.notes),
        "ignored": planned.ignored,
        "dequantized": {p.leaf.path: p.form.dequantized for p in planned.leaves if p.form.dequantized},
        "companions": copy_companions(source.folder, dst),
        **counts,
    }
    manifest = Manifest(planned.config, leaves, _origin(source, planned), report, _versions())
    manifest.write(dst)
    journal.file.unlink()
    return manifest


def _origin(source: Source, planned: Plan) -> dict[str, Any]:
    """What the checkpoint was made from."""
    weights = {s.values.name: s.kind for leaf in planned.leaves for s in leaf.sources}
    return {
        "folder": source.folder.name,
        "files": {file.name: identity.size for file, identity in sorted(source.files.items())},
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
