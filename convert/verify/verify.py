"""Whether a converted checkpoint is what was written, and whether it still holds every bit of its source.

`proof` reads the arrays; here is what it finds, as a report or as an error that lists all damage.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from dsv32_jax.checkpoint.checksums import damaged_files, require_manifest
from dsv32_jax.checkpoint.manifest import is_complete
from dsv32_jax.errors import CheckpointError, UsageError, VerificationError
from dsv32_jax.system.files import expand_path
from dsv32_jax.system.progress import Progress, ignore_progress

from ..names import fold_lines, fold_names
from ..read.source import Source
from .converted import Converted
from .proof import Proof

LEVELS = ("quick", "full")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked. Of a quick check `lossless` is None: nothing was read that could prove it.

    `proven`: tensors of the source computed back; `changed`: the others, folded, by what was done to them; `ignored`:
    what the model does not need of the source. `against`: the source that was compared, or None.
    """

    folder: str
    level: str
    files: int
    arrays: int
    nbytes: int
    seconds: float
    lossless: bool | None
    proven: int
    changed: dict[str, list[str]]
    ignored: list[str]
    against: str | None


def verify(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    level: str = "full",
    progress: Callable[[Progress], None] = ignore_progress,
) -> Report:
    """Check the converted checkpoint `folder`, and with `against` compare it with the Hugging Face folder it came from.

    `level` "quick" compares files, dtypes and shapes, "full" reads every array. Raises VerificationError that lists
    everything that is damaged or differs, CheckpointError where `folder` is no converted checkpoint.
    """
    if level not in LEVELS:
        raise UsageError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if against is not None and level == "quick":
        raise UsageError("a comparison with the source reads everything: it needs the level full")
    start = time.perf_counter()
    converted = _opened(expand_path(folder).absolute())
    damaged = damaged_files(converted.folder, converted.manifest) + converted.damaged_arrays()
    source = None if against is None else Source(expand_path(against).absolute())
    proof = Proof(converted, source, progress)
    if level == "full":
        proof.run()
        damaged += proof.damaged
    if damaged or proof.differing:
        raise VerificationError(_message(converted.folder, damaged, proof.differing, source))
    return _report(converted, source, proof, level, time.perf_counter() - start)


def _report(converted: Converted, source: Source | None, proof: Proof, level: str, seconds: float) -> Report:
    """What was found, nothing being wrong."""
    ignored = [f"{count} {reason}" for reason, count in converted.manifest.report.get("ignored", {}).items()]
    if source is not None:
        ignored = fold_names(name for name in source.tensors if name not in proof.recorded)
    return Report(
        folder=str(converted.folder),
        level=level,
        files=len(converted.manifest.storage.get("files", {})),
        arrays=len(converted.expected),
        nbytes=converted.nbytes,
        seconds=seconds,
        lossless=None if level == "quick" else not proof.changed and proof.proven == len(proof.recorded),
        proven=proof.proven,
        changed={what: fold_names(names) for what, names in sorted(proof.changed.items())},
        ignored=ignored,
        against=None if source is None else str(source.folder),
    )


def _opened(folder: Path) -> Converted:
    """The checkpoint; a manifest that is there and not as it was written is damage, and nothing can be told by it."""
    try:
        converted = Converted(folder)
    except CheckpointError as error:
        if is_complete(folder) and not isinstance(error.__cause__, PermissionError):
            raise VerificationError(str(error)) from error
        raise
    require_manifest(folder)
    return converted


def _message(folder: Path, damaged: list[str], differing: list[str], source: Source | None) -> str:
    lines = [f"{folder} is not what was converted"]
    if damaged:
        lines += [f"damaged ({len(damaged)}):", *(f"  {item}" for item in fold_lines(damaged))]
    if differing:
        lines += [f"different from the source ({len(differing)}):", *(f"  {item}" for item in differing)]
    advice = "Copy the folder again, or convert to a new one"
    if source is not None and not damaged:
        advice = f"{folder} is as it was written: {source.folder} is another checkpoint, or has changed since"
    return "\n".join([*lines, f"Nothing was changed. {advice}"])
