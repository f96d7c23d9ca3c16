"""Whether a converted checkpoint is what was written, and whether it still holds every bit of its source.

The proof of "lossless": the tensors of the source are computed back from the stored arrays (`inverse`), and their
SHA-256 are those that the conversion noted while it read them. `against` hashes the source once more, so that nothing
noted has to be believed.
"""

import collections
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsv32_jax.errors import CheckpointError, UsageError, VerificationError
from dsv32_jax.storage.arrays import raw
from dsv32_jax.storage.integrity import damaged_files, require_manifest
from dsv32_jax.storage.manifest import FILE, ArrayEntry

from ..meter import Progress, no_progress
from ..names import grouped
from ..read.header import BY_NAME, DTYPES
from ..read.source import Source
from . import inverse
from .converted import Converted, Group, Weight, nbytes_of
from .originals import difference

LEVELS = ("quick", "full")
MOST_WORKERS = 8


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
    progress: Callable[[Progress], None] = no_progress,
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
    converted = _opened(Path(folder).expanduser().absolute())
    damaged = damaged_files(converted.folder, converted.manifest) + converted.damaged_arrays()
    run = _Run(converted, None if against is None else Source(Path(against).expanduser().absolute()), progress)
    if level == "full":
        run.all()
        damaged += run.damaged
    if damaged or run.differing:
        raise VerificationError(_message(converted.folder, damaged, run.differing))
    return run.report(level, time.perf_counter() - start)


def _opened(folder: Path) -> Converted:
    """The checkpoint; a manifest that is there and not as it was written is damage, and nothing can be told by it."""
    try:
        converted = Converted(folder)
    except CheckpointError as error:
        if (folder / FILE).exists() and not isinstance(error.__cause__, PermissionError):
            raise VerificationError(str(error)) from error
        raise
    require_manifest(folder)
    return converted


def _message(folder: Path, damaged: list[str], differing: list[str]) -> str:
    lines = [f"{folder} is not what was converted"]
    if damaged:
        lines += [f"damaged ({len(damaged)}):", *(f"  {item}" for item in damaged)]
    if differing:
        lines += [f"different from the source ({len(differing)}):", *(f"  {item}" for item in differing)]
    return "\n".join([*lines, "Nothing was changed. Copy the folder again, or convert to a new one"])


class _Run:
    """One full check: groups of leaves and tensors of the source, several at a time."""

    def __init__(self, converted: Converted, source: Source | None, progress: Callable[[Progress], None]):
        self.converted, self.source = converted, source
        self.damaged: list[str] = []
        self.differing: list[str] = []
        self.changed: dict[str, list[str]] = collections.defaultdict(list)
        self.proven = 0
        self._progress, self._lock, self._done = progress, threading.Lock(), 0
        self._recorded = {
            tensor.name: tensor
            for leaf in converted.manifest.leaves.values()
            if leaf.passport is not None
            for tensor in leaf.passport.sources
        }

    def all(self) -> None:
        """Read everything."""
        with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
            tasks = [pool.submit(self._group, group) for group in self.converted.groups]
            if self.source is not None:
                tasks += [pool.submit(self._original, name) for name in self._recorded]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.damaged.sort()
        self.differing.sort()

    def report(self, level: str, seconds: float) -> Report:
        """What was found, nothing being wrong."""
        ignored = self.converted.manifest.report.get("ignored", {})
        lines = [f"{count} {reason}" for reason, count in ignored.items()]
        if self.source is not None:
            lines = grouped(name for name in self.source.tensors if name not in self._recorded)
        return Report(
            folder=str(self.converted.folder),
            level=level,
            files=len(self.converted.manifest.storage.get("files", {})),
            arrays=len(self.converted.expected),
            nbytes=self.converted.nbytes,
            seconds=seconds,
            lossless=None if level == "quick" else not self.changed and self.proven == len(self._recorded),
            proven=self.proven,
            changed={what: grouped(names) for what, names in sorted(self.changed.items())},
            ignored=lines,
            against=None if self.source is None else str(self.source.folder),
        )

    def _group(self, group: Group) -> None:
        """Check the arrays of one group, and the tensors that follow from them."""
        entries = [self.converted.expected[key] for key in self.converted.keys(group)]
        if not self.converted.readable(group):
            return
        if _is_copied(group, entries):
            self._copied(group)
        else:
            for weight, parts in self.converted.read(group, self.damaged.append):
                self._weight(weight, parts)
        nbytes = sum(map(nbytes_of, entries))
        with self._lock:
            self._done += nbytes
            self._progress(Progress(self._done, self.converted.nbytes, group.leaves[0].path))

    def _copied(self, group: Group) -> None:
        """A leaf that is a tensor of the source as it is: its digest is the tensor's."""
        (key,) = self.converted.keys(group)
        if group.leaves[0].path == key[0]:
            self.converted.hash(key, self.damaged.append)
        for source in group.weights[0].sources:
            self._compare(source.name, self.converted.expected[key].sha256)

    def _weight(self, weight: Weight, parts: list[dict[str, np.ndarray]]) -> None:
        """Compute the tensors of one weight back and compare their digests with the noted ones."""
        if weight.change:
            with self._lock:
                self.changed[weight.change].append(weight.name)
            return
        if not weight.sources:
            return
        try:
            stored = inverse.described(weight.name, weight.sources)
            joined = inverse.join(weight.leaves, parts, stored.format, stored.block)
            for name, array in inverse.restored(joined, stored, weight.sources).items():
                self._compare(name, hashlib.sha256(raw(array)).hexdigest())
        except CheckpointError as error:
            self.differing.append(str(error))

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self._recorded[name].sha256:
            self.differing.append(f"{name} cannot be computed back")
            return
        with self._lock:
            self.proven += 1

    def _original(self, name: str) -> None:
        """Compare one tensor of the source, as it is now, with what was noted when it was converted."""
        assert self.source is not None
        if (found := difference(self.source, self._recorded[name])) is not None:
            self.differing.append(found)


def _is_copied(group: Group, entries: list[ArrayEntry]) -> bool:
    """Whether the one array of `group` has the bytes of the one tensor it was made of."""
    weight = group.weights[0]
    if len(group.weights) != 1 or len(entries) != 1 or weight.change:
        return False
    same = all(DTYPES[source.dtype] == BY_NAME[entries[0].dtype] for source in weight.sources)
    return same and all(leaf.cut is None and not leaf.stacked for leaf in group.leaves)
