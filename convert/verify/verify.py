"""Verification: every array matches its SHA-256, and the source's tensors can be reconstructed bit for bit.

Tensors are computed back from the stored arrays (`inverse`) and compared with the SHA-256 that the conversion recorded
while it read them. With the source at hand its tensors are hashed again, so that no record has to be trusted.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv32_jax.checkpoint.checksums import find_damage, find_damaged_files
from dsv32_jax.checkpoint.reader import raw
from dsv32_jax.config import interpret
from dsv32_jax.errors import CheckpointError, ConfigError, DsvError, UsageError, VerificationError, kind_of, listing
from dsv32_jax.system.files import expand_path, hash_chunks
from dsv32_jax.system.host import count_cores
from dsv32_jax.system.progress import Progress

from ..name_folding import fold_details, fold_names
from ..read.converted import Components, Converted, Group, Weight
from ..read.provenance import SourceTensor, list_sources
from ..read.safetensors import DTYPES
from ..read.source import CONFIG, Source
from . import inverse

LEVELS = ("quick", "full")

OWN = ("num_hidden_layers", "num_nextn_predict_layers", "first_k_dense_replace", "eos_token_id")
"""Fields of the config that a conversion may set otherwise than its source does."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a verification that found nothing wrong. A quick one proves nothing: its `lossless` is None.

    `proven`: tensors of the source that were reconstructed; `changed`: the other weights, folded, by what was done to
    them; `ignored`: tensors that the model does not need; `against`: the source that was compared, or None.
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
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Check the converted checkpoint `folder`, and compare it with `against`, the Hugging Face folder it came from.

    Level "quick" compares files, dtypes and shapes; "full" reads every array. Raises VerificationError that lists
    everything damaged or different, CheckpointError where `folder` is no converted checkpoint, StorageError.
    """
    if level not in LEVELS:
        raise UsageError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if against is not None and level == "quick":
        raise UsageError("a comparison with the source reads everything: it needs the level full")
    start = time.perf_counter()
    converted = Converted(folder)
    source = None if against is None else _open_source(converted, against)
    proof = _Proof(converted, source, progress)
    if level == "full":
        proof.run()
    damaged = [proof.damaged[text] for text in sorted(proof.damaged)]
    if damaged or proof.differing:
        text = _describe_damage(converted.folder, damaged, sorted(proof.differing), source)
        raise kind_of([*damaged, *proof.differing], VerificationError)(text)
    ignored = [f"{count} {reason}" for reason, count in converted.manifest.report["ignored"].items()]
    if source is not None:
        ignored = fold_names(name for name in source.tensors if name not in proof.recorded)
    return Report(
        folder=str(converted.folder),
        level=level,
        files=len(converted.manifest.storage["files"]),
        arrays=len(converted.expected),
        nbytes=converted.nbytes,
        seconds=time.perf_counter() - start,
        lossless=None if level == "quick" else not proof.changed and proof.proven == len(proof.recorded),
        proven=proof.proven,
        changed={change: fold_names(names) for change, names in sorted(proof.changed.items())},
        ignored=ignored,
        against=None if source is None else str(source.folder),
    )


def _open_source(converted: Converted, folder: str | Path) -> Source:
    """Return the source in `folder`. Raises VerificationError if its config describes another model than `converted`,
    which may have fewer layers and more end tokens."""
    source = Source(expand_path(folder).absolute())
    ignored = converted.manifest.source.get("ignored_config", {})
    try:
        cfg = interpret(source.config, str(source.folder / CONFIG), ignored).config
    except (ConfigError, UsageError) as error:
        raise VerificationError(f"{source.folder} is another model, or has changed since: {error}") from error
    fields = [field.name for field in dataclasses.fields(cfg) if field.name not in OWN]
    pairs = [(name, getattr(converted.config, name), getattr(cfg, name)) for name in fields]
    if differing := [f"{name} {mine!r}, there {theirs!r}" for name, mine, theirs in pairs if mine != theirs]:
        raise VerificationError(f"{source.folder} is another model: {listing(differing)}. No weights were compared")
    return source


def _describe_damage(
    folder: Path, damaged: list[DsvError], differing: list[tuple[str, str]], source: Source | None
) -> str:
    verdict = "does not match what was converted: copy the folder again, or convert to a new one"
    if source is not None and not damaged:
        verdict = f"is as it was written: {source.folder} is another checkpoint, or has changed since"
    lines = [f"{folder} {verdict}. Nothing was changed"]
    if damaged:
        lines += [f"damaged ({len(damaged)}):", *(f"  {item}" for item in fold_names(map(str, damaged)))]
    if differing:
        lines += [f"different from the source ({len(differing)}):", *(f"  {item}" for item in fold_details(differing))]
    return "\n".join(lines)


class _Proof:
    """One full check, with a thread per core.

    `damaged` has the files and arrays that are not as written, by what is said of them, `differing` tensors that cannot
    be reconstructed or differ in the source, and how, `changed` weights by what was done to them; `recorded` are the
    source's tensors, by name.
    """

    def __init__(self, converted: Converted, source: Source | None, progress: Callable[[Progress], None]):
        self._converted, self._source = converted, source
        found = find_damaged_files(converted.folder, converted.manifest)
        self.damaged: dict[str, DsvError] = {str(problem): problem for problem in found}
        self.differing: list[tuple[str, str]] = []
        self.changed: dict[str, list[str]] = collections.defaultdict(list)
        self.proven = 0
        self._progress, self._lock, self._done, self._total = progress, threading.Lock(), 0, 0
        self.recorded = list_sources(converted.manifest.leaves.values())

    def run(self) -> None:
        """Read everything."""
        self._total = sum(map(self._converted.count_bytes, self._converted.groups))
        if self._source is not None:
            self._total += sum(tensor.nbytes for name, tensor in self._source.tensors.items() if name in self.recorded)
        self._progress(Progress(0, self._total))
        with ThreadPoolExecutor(count_cores()) as pool:
            tasks = [pool.submit(self._check_group, group) for group in self._converted.groups]
            if self._source is not None:
                tasks += [pool.submit(self._check_source, self._source, tensor) for tensor in self.recorded.values()]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _report(self, nbytes: int, name: str) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(Progress(self._done, self._total, name))

    def _check_group(self, group: Group) -> None:
        keys = self._converted.keys(group)
        entry = self._converted.expected[keys[0]]
        if _is_copied(group, entry.dtype):
            if problem := find_damage(self._converted.arrays, keys[0]):
                self._note_damage(problem)
            for source in group.weights[0].sources:
                self._compare(source.name, entry.sha256)
        else:
            for weight, parts in self._converted.read(group, self._note_damage):
                self._check_weight(weight, parts)
        self._report(self._converted.count_bytes(group), group.leaves[0].path)

    def _note_damage(self, problem: DsvError) -> None:
        """Note what is wrong with an array once, however many parameters share it."""
        self.damaged[str(problem)] = problem

    def _check_weight(self, weight: Weight, parts: list[Components]) -> None:
        if weight.change:
            with self._lock:
                self.changed[weight.change].append(weight.name)
            return
        try:
            stored = weight.storage()
            if stored is None:
                return
            joined = inverse.join_leaves(weight.leaves, parts, stored.format, stored.block)
            for name, array in inverse.restore_tensors(joined, stored, weight.sources).items():
                self._compare(name, hash_chunks([raw(array)]))
        except CheckpointError as error:
            self.differing.append((weight.name, str(error)))

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self.recorded[name].sha256:
            self.differing.append((name, "cannot be reconstructed"))
            return
        with self._lock:
            self.proven += 1

    def _check_source(self, source: Source, recorded: SourceTensor) -> None:
        tensor = source.tensors.get(recorded.name)
        if tensor is None:
            self.differing.append((recorded.name, f"not in {source.folder}"))
        elif (tensor.dtype, tensor.shape) != (recorded.dtype, recorded.shape):
            self.differing.append((recorded.name, f"{tensor.dtype} {list(tensor.shape)} in {tensor.file}"))
        elif hash_chunks(source.read_chunks(tensor)) != recorded.sha256:
            self.differing.append((recorded.name, f"other bytes in {tensor.file}"))
        self._report(0 if tensor is None else tensor.nbytes, recorded.name)


def _is_copied(group: Group, dtype: str) -> bool:
    """Return whether an array is the bytes of its source tensor: it is then read in slabs, and hashed once."""
    (leaf, *more), weight = group.leaves, group.weights[0]
    if more or leaf.stacked or leaf.cut is not None or weight.formats != ("dense",) or weight.change:
        return False
    return all(DTYPES[source.dtype].name == dtype for source in weight.sources)
