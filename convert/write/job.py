"""A conversion from start to finish. Killed at any point, the same command continues where it stopped."""

import collections
import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from dsv32_jax.checkpoint.checksums import find_changed_files, list_files
from dsv32_jax.checkpoint.manifest import JOURNAL, WEIGHTS, LeafEntry, Manifest, is_complete
from dsv32_jax.checkpoint.writer import Writer
from dsv32_jax.errors import CheckpointError, OutputExistsError, VerificationError, listing, writing_failed
from dsv32_jax.parallel import partition
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.progress import ByteMeter, Progress, ignore_progress

from ..plan.limits import raise_open_file_limit, require_disk_space, require_free_memory, size_of
from ..plan.output import copy_companions, lock_folder, require_ours
from ..plan.plan import Plan, PlannedLeaf
from ..plan.prepare import Options, Prepared, prepare
from ..read.source import Source, verify_downloads
from ..read.weights import read_tensor_scale
from ..transform.requantize import Requantizer, find_partners, sum_odd_scales, summarize_errors
from .journal import Journal, describe_differences, manifest_basis, require_same_bytes
from .pipeline import Pipeline
from .provenance import HashingReader


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Callable[[Progress], None] = ignore_progress,
    **options: Unpack[Options],
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`, and return the manifest of what was written.

    An unfinished `dst` of the same conversion is continued, a finished one is left as it is. `src` is never modified;
    nothing is deleted in `dst` but parts that this conversion began. Raises CheckpointError, ConfigError, UsageError,
    OutputExistsError, CapacityError or StorageError.
    """
    prepared = prepare(src, dst, options)
    require_ours(prepared.dst)
    with lock_folder(prepared.dst):
        if is_complete(prepared.dst):
            return _read_finished(prepared)
        require_free_memory(prepared.peak)
        if options.get("verify_source"):
            verify_downloads(prepared.source.files, prepared.budget.workers, progress)
        journal = _begin_or_resume(prepared)
        with _storage_errors(prepared.dst):
            _write_parts(prepared, journal, progress)
            return _finish(prepared, journal)


def _read_finished(prepared: Prepared) -> Manifest:
    """The manifest of a finished output. Raises OutputExistsError where it is another conversion's."""
    dst = prepared.dst
    manifest = Manifest.read(dst)
    if manifest.source.get("plan") != prepared.digest:
        changed = describe_differences(manifest_basis(manifest), prepared.basis)
        raise OutputExistsError(
            f"{dst} holds a converted checkpoint (of {manifest.source.get('folder')!r}) that was made from other "
            f"files or with other options; nothing was touched. Convert to another folder, or delete this one "
            f"yourself. The differences: {listing(changed)}"
        )
    require_same_bytes(prepared.source, manifest.leaves.values())
    if damaged := find_changed_files(dst, manifest):
        raise VerificationError(
            f"{dst} holds this conversion and is damaged: {listing(damaged)}. Nothing was touched; delete the "
            "folder and convert again, or convert to another one"
        )
    (dst / JOURNAL).unlink(missing_ok=True)
    return manifest


def _begin_or_resume(prepared: Prepared) -> Journal:
    """The journal of the output, once its parts are known to come from the source as it is now."""
    source, dst = prepared.source, prepared.dst
    journal = Journal(dst, prepared.digest, source.folder.name, prepared.basis, source.stamps)
    touched = [name for name, stamp in source.stamps.items() if journal.stamps.get(name) != stamp]
    require_same_bytes(source, journal.entries.values(), touched)
    journal.reconcile(dst / WEIGHTS)
    return journal


def _write_parts(prepared: Prepared, journal: Journal, progress: Callable[[Progress], None]) -> None:
    """Write every parameter that is not on disk yet: read, cut, hash, save, and note each part in the journal."""
    source, dst, planned = prepared.source, prepared.dst, prepared.plan
    done = journal.entries
    missing = [leaf for leaf in planned.leaves if leaf.leaf.path not in done]
    nbytes = size_of(missing)
    require_disk_space(dst, nbytes)
    raise_open_file_limit(prepared.budget.workers)
    _require_tensor_scales(source, missing)
    meter = ByteMeter(progress, planned.nbytes, planned.nbytes - nbytes)
    meter.report()

    journal.start()
    writer = Writer(dst, partition.by_mesh(prepared.mesh, [leaf.leaf for leaf in planned.leaves]))
    read = HashingReader(source.read)
    pipeline = Pipeline(read, _requantizer(planned), writer, prepared.budget, done.get, meter.add_read)
    groups = zip(prepared.group_leaves(missing), journal.begin_new(), strict=False)
    with contextlib.closing(pipeline.run(groups)) as parts:
        for part, nbytes in parts:
            journal.add(part)
            done |= part.entries
            meter.add_written(nbytes)
    writer.finish()


def _requantizer(planned: Plan) -> Requantizer:
    """The quantizer for the plan's recipe."""
    together = {}
    if planned.recipe.tensor_scales == "shared":
        together = find_partners(s for leaf in planned.leaves for s in leaf.sources if s.wanted == "nvfp4")
    return Requantizer(SCALINGS[planned.recipe.scales], together)


def _require_tensor_scales(source: Source, leaves: list[PlannedLeaf]) -> None:
    """Raise CheckpointError that lists every invalid tensor scale, before hours of work."""
    stored = {s.values.name: s for leaf in leaves for s in leaf.sources if s.tensor_scale is not None}
    problems = []
    for weight in stored.values():
        try:
            read_tensor_scale(weight, source.read)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"{source.folder} has {len(problems)} unusable tensor scales; nothing new was written: {listing(problems)}"
        )


def _finish(prepared: Prepared, journal: Journal) -> Manifest:
    """Read back what was written, then write the manifest, which makes the folder a converted checkpoint."""
    planned, source, dst = prepared.plan, prepared.source, prepared.dst
    written = journal.entries
    entries = {leaf.leaf.path: written[leaf.leaf.path] for leaf in planned.leaves}
    companions = copy_companions(source.folder, dst)
    manifest = Manifest(
        config=planned.config,
        leaves=entries,
        source=_describe_source(prepared),
        report=_report(planned, journal, entries, companions),
        versions=_versions(),
        storage={"files": list_files(dst, companions, entries), "mesh": prepared.mesh},
    )
    journal.complete(manifest)
    return manifest


def _report(planned: Plan, journal: Journal, entries: Mapping[str, LeafEntry], companions: list[str]) -> dict[str, Any]:
    outcomes = {name: outcome for part in journal.parts.values() for name, outcome in part.outcomes.items()}
    counts: collections.Counter[str] = collections.Counter({"nan_scale_bytes": 0, "zero_blocks": 0})
    for found in (*(part.counts for part in journal.parts.values()), sum_odd_scales(outcomes)):
        counts.update(found)
    return {
        "formats": planned.formats,
        "notes": list(planned.notes),
        "ignored": planned.ignored,
        "conversions": planned.conversions,
        "errors": summarize_errors(outcomes),
        "dequantized": {p.leaf.path: p.form.dequantized for p in planned.leaves if p.form.dequantized},
        "pairs_of_different_tensor_scales": _count_differing_pairs(planned, entries),
        "companions": companions,
        **counts,
    }


def _count_differing_pairs(planned: Plan, entries: Mapping[str, LeafEntry]) -> int:
    """How many pairs of gate and up, or q_a and kv_a, have different tensor scales in the source."""
    digests = {t.name: t.sha256 for entry in entries.values() if entry.passport for t in entry.passport.sources}
    stored = {s.name: s for leaf in planned.leaves for s in leaf.sources if s.tensor_scale is not None}
    scales = {name: digests[s.tensor_scale.name] for name, s in stored.items() if s.tensor_scale is not None}
    pairs = {frozenset((name, s.name)) for name, others in find_partners(stored.values()).items() for s in others}
    return sum(len({scales[name] for name in pair}) > 1 for pair in pairs)


def _describe_source(prepared: Prepared) -> dict[str, Any]:
    kinds = {s.values.name: s.kind for leaf in prepared.plan.leaves for s in leaf.sources}
    return {
        "folder": prepared.source.folder.name,
        "files": prepared.basis["files"],
        "quantization_config": prepared.source.config.get("quantization_config"),
        "stored": dict(sorted(collections.Counter(kinds.values()).items())),
        "recipe": prepared.basis["recipe"],
        "plan": prepared.digest,
    }


def _versions() -> dict[str, str]:
    """Versions of everything that decides about the bytes."""
    versions = {"python": platform.python_version()}
    for package in ("dsv32-jax", "numpy", "ml_dtypes", "orbax-checkpoint"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@contextlib.contextmanager
def _storage_errors(dst: Path) -> Iterator[None]:
    """Raise an OSError as the CapacityError or StorageError it means for `dst`."""
    try:
        yield
    except OSError as error:
        raise error if hasattr(error, "exit_code") else writing_failed(dst, error) from error
