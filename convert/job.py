"""The conversion itself: plan, then group by group read, cut, hash, save, note. Killed anywhere, a rerun continues."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Unpack

from dsv32_jax import pieces
from dsv32_jax.errors import CheckpointError, OutputExistsError, listing, writing_failed
from dsv32_jax.manifest import FILE, JOURNAL, Manifest
from dsv32_jax.quantize_search import SCALINGS

from . import weights
from .complete import complete
from .identity import basis_of, differences, require_same_bytes
from .journal import Journal
from .output import locked, require_files, require_ours, require_space
from .pipeline import Part, Pipeline
from .plan import Plan, PlannedLeaf
from .prepare import Options, Prepared, prepare
from .recast import Recaster, partners
from .record import Recorder
from .source import Source


class Progress(NamedTuple):
    """Bytes done, of all, and the leaf they belong to. A leaf that is read but not yet on disk is done by half."""

    done: int
    total: int
    leaf: str


def no_progress(progress: Progress) -> None:
    """For callers who do not watch."""


class _Meter:
    """Adds up what is done, and tells it."""

    def __init__(self, tell: Callable[[Progress], None], total: int, ready: int):
        self._tell, self._total = tell, total
        self._built = self._written = ready
        self._leaf = ""

    def built(self, leaf: PlannedLeaf, nbytes: int) -> None:
        self._leaf = leaf.leaf.path
        self._built = min(self._built + nbytes, self._total)
        self.report()

    def written(self, nbytes: int) -> None:
        self._written += nbytes
        self._built = max(self._built, self._written)
        self.report()

    def report(self) -> None:
        """Tell how far it is."""
        self._tell(Progress((self._built + self._written) // 2, self._total, self._leaf))


def convert(
    src: str | Path, dst: str | Path, *, progress: Callable[[Progress], None] = no_progress, **options: Unpack[Options]
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`; the manifest of what was written.

    A `dst` that holds a part of the same conversion is continued, one that holds all of it is returned as it is.
    Raises CheckpointError, ConfigError, UsageError, OutputExistsError, CapacityError or StorageError; `src` is never
    written, what `dst` holds is never deleted.
    """
    prepared = prepare(src, dst, options)
    require_ours(prepared.dst)
    with locked(prepared.dst):
        return _finished(prepared) or _run(prepared, progress)


def _finished(prepared: Prepared) -> Manifest | None:
    """The manifest of the output when the same conversion is complete there."""
    dst = prepared.dst
    if not (dst / FILE).exists():
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
    from dsv32_jax.store import Writer

    source, dst, planned = prepared.source, prepared.dst, prepared.plan
    journal = Journal(dst, prepared.digest, source.folder.name, prepared.basis)
    require_same_bytes(source, [entry for part in journal.leaves.values() for entry in part.values()])
    writer = Writer(dst, pieces.by_mesh(prepared.mesh, [leaf.leaf for leaf in planned.leaves]))
    journal.forget(part for part, leaves in journal.leaves.items() if _stored(leaves) and not writer.has(part))
    writer.keep(journal.leaves)
    entries = {path: entry for part in journal.leaves.values() for path, entry in part.items()}
    missing = [leaf for leaf in planned.leaves if leaf.leaf.path not in entries]
    require_space(dst, sum(leaf.nbytes for leaf in missing))
    require_files(prepared.budget.workers)
    _require_scales(source, missing)
    meter = _Meter(progress, planned.nbytes, planned.nbytes - sum(leaf.nbytes for leaf in missing))

    meter.report()

    def done(part: Part) -> None:
        journal.add(part.name, part.leaves, part.facts, part.outcomes)
        entries.update(part.leaves)
        meter.written(part.nbytes)

    pipeline = Pipeline(Recorder(source.read), _recaster(planned), writer, prepared.budget, entries, meter.built, done)
    try:
        pipeline.run(zip(journal.new_parts(), prepared.groups(missing), strict=False))
        writer.finish()
        return complete(prepared, journal)
    except OSError as error:
        raise error if hasattr(error, "exit_code") else writing_failed(dst, error) from error


def _recaster(planned: Plan) -> Recaster:
    """What quantizes and dequantizes as the plan's recipe says."""
    together = {}
    if planned.recipe.tensor_scales == "shared":
        together = partners(stored for leaf in planned.leaves for stored in leaf.sources)
    return Recaster(SCALINGS[planned.recipe.scales], together)


def _stored(leaves: dict) -> bool:
    """Whether a part of these leaves has a folder of its own."""
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
