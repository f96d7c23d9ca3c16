"""The conversion itself: plan, then group by group read, cut, hash, save, note. Killed anywhere, a rerun continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from dsv32_jax.checkpoint.manifest import JOURNAL, Manifest, is_complete
from dsv32_jax.errors import CheckpointError, OutputExistsError, listing, writing_failed
from dsv32_jax.parallel import partition
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.progress import ByteMeter, Progress, ignore_progress

from ..plan.limits import raise_open_file_limit, require_disk_space, require_free_memory
from ..plan.output import lock_folder, require_ours
from ..plan.plan import Plan, PlannedLeaf
from ..plan.prepare import Options, Prepared, prepare
from ..read.source import Source, verify_downloads
from ..read.weights import read_tensor_scale
from ..transform.requantize import Requantizer, find_partners
from .complete import complete
from .identity import basis_of, differences, require_same_bytes
from .journal import Journal
from .pipeline import Part, Pipeline
from .record import Recorder


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Callable[[Progress], None] = ignore_progress,
    **options: Unpack[Options],
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`; the manifest of what was written.

    A `dst` that holds a part of the same conversion is continued, one that holds all of it is returned as it is.
    Raises CheckpointError, ConfigError, UsageError, OutputExistsError, CapacityError or StorageError; `src` is never
    written, what `dst` holds is never deleted.
    """
    prepared = prepare(src, dst, options)
    require_ours(prepared.dst)
    with lock_folder(prepared.dst):
        if (finished := _finished(prepared)) is not None:
            return finished
        require_free_memory(prepared.peak)
        if options.get("verify_source"):
            verify_downloads(prepared.source.files, prepared.budget.workers, progress)
        return _run(prepared, progress)


def _finished(prepared: Prepared) -> Manifest | None:
    """The manifest of the output when the same conversion is complete there."""
    dst = prepared.dst
    if not is_complete(dst):
        return None
    manifest = Manifest.read(dst)
    if manifest.source.get("plan") != prepared.digest:
        changed = differences(basis_of(manifest), prepared.basis) or ["the weights that the options name"]
        raise OutputExistsError(
            f"{dst} holds a converted checkpoint (of {manifest.source.get('folder')!r}) that was made from other "
            f"files or with other options; nothing was touched. Convert to another folder, or delete this one "
            f"yourself. What differs: {listing(changed)}"
        )
    require_same_bytes(prepared.source, manifest.leaves.values())
    (dst / JOURNAL).unlink(missing_ok=True)
    return manifest


def _run(prepared: Prepared, progress: Callable[[Progress], None]) -> Manifest:
    """Write every leaf that is not there yet, then the manifest."""
    from dsv32_jax.checkpoint.store import Writer

    source, dst, planned = prepared.source, prepared.dst, prepared.plan
    journal = Journal(dst, prepared.digest, source.folder.name, prepared.basis, source.stamps)
    touched = [name for name, stamp in source.stamps.items() if journal.stamps.get(name) != stamp]
    require_same_bytes(source, [entry for part in journal.leaves.values() for entry in part.values()], touched)
    writer = Writer(dst, partition.by_mesh(prepared.mesh, [leaf.leaf for leaf in planned.leaves]))
    journal.forget(part for part, leaves in journal.leaves.items() if _stored(leaves) and not writer.has(part))
    writer.keep(journal.leaves)
    entries = {path: entry for part in journal.leaves.values() for path, entry in part.items()}
    missing = [leaf for leaf in planned.leaves if leaf.leaf.path not in entries]
    require_disk_space(dst, sum(leaf.nbytes for leaf in missing))
    raise_open_file_limit(prepared.budget.workers)
    _require_scales(source, missing)
    meter = ByteMeter(progress, planned.nbytes, planned.nbytes - sum(leaf.nbytes for leaf in missing))

    meter.report()

    def done(part: Part) -> None:
        journal.add(part.name, part.leaves, part.facts, part.outcomes)
        entries.update(part.leaves)
        meter.add_written(part.nbytes)

    pipeline = Pipeline(
        Recorder(source.read), _recaster(planned), writer, prepared.budget, entries, meter.add_read, done
    )
    try:
        pipeline.run(zip(journal.new_parts(), prepared.group_leaves(missing), strict=False))
        writer.finish()
        return complete(prepared, journal)
    except OSError as error:
        raise error if hasattr(error, "exit_code") else writing_failed(dst, error) from error


def _recaster(planned: Plan) -> Requantizer:
    """What quantizes and dequantizes as the plan's recipe says."""
    together = {}
    if planned.recipe.tensor_scales == "shared":
        together = find_partners(s for leaf in planned.leaves for s in leaf.sources if s.wanted == "nvfp4")
    return Requantizer(SCALINGS[planned.recipe.scales], together)


def _stored(leaves: dict) -> bool:
    """Whether a part of these leaves has a folder of its own."""
    return any(leaf.arrays for leaf in leaves.values())


def _require_scales(source: Source, leaves: list[PlannedLeaf]) -> None:
    """Raise CheckpointError that lists every tensor scale which cannot be one, before hours of work."""
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
