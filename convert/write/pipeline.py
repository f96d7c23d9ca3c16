"""Group after group of parameters: read and converted by many threads, then hashed, checked and written while the next
is read.

The first exception of any thread ends everything; parts that were yielded before stay good.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry, Place
from dsv32_jax.checkpoint.reader import Key, raw
from dsv32_jax.checkpoint.writer import Writer
from dsv32_jax.errors import CheckpointError, pluralize

from ..plan.limits import Budget, Group, fits_beside, size_of
from ..read.provenance import HashingReader, Provenance
from ..transform import cut
from ..transform.cut import PlannedLeaf, name_format
from ..transform.requantize import ErrorStats, Requantizer, count_odd_scales
from .journal import Part

PIECE_BYTES = 1 << 20
"""Bytes looked at together."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e4m3fn": 0x7F}
"""The bits that are all ones in NaN and infinity (float8_e4m3fn has NaN alone)."""

Components = dict[str, np.ndarray]


def describe(
    planned: PlannedLeaf, arrays: Components, original: LeafEntry | None, read: HashingReader
) -> tuple[LeafEntry, dict[str, int]]:
    """The manifest entry of a parameter whose components are `arrays`, and the counts of odd scales in it.

    A copy with the bytes of its `original` shares its arrays. Raises CheckpointError on values that cannot be right.
    """
    read.require_downloaded(planned.leaf.path, planned.sources)
    require_finite(planned.leaf.path, arrays)
    entry = LeafEntry(planned.form.format, {n: describe_array(a) for n, a in arrays.items()}, planned.same_as)
    if entry == original:
        entry = LeafEntry(entry.format, {}, planned.copy_of)
    sources = tuple(read.list_sources(planned.sources))
    provenance = Provenance(describe_change(planned), planned.leaf.cut, sources)
    return dataclasses.replace(entry, provenance=provenance.to_json()), count_odd_scales(arrays)


def describe_change(planned: PlannedLeaf) -> str:
    """How the conversion changes the values of a parameter; empty where every bit is kept."""
    form = planned.form
    if form.dequantized is not None:
        return f"dequantized to {form.dtype}: {form.dequantized}"
    exact = {form.name, "bf16", "f16"} if form.name == "f32" else {form.name}
    formats = {name_format(stored.format, stored.values.dtype.lower()) for stored in planned.sources} - exact
    return f"{' and '.join(sorted(formats))} became {form.name}" if formats else ""


def describe_array(array: np.ndarray) -> ArrayEntry:
    """Return the dtype, shape and SHA-256 of an array."""
    return ArrayEntry(array.dtype.name, array.shape, hashlib.sha256(raw(array)).hexdigest())


def require_finite(path: str, components: dict[str, np.ndarray]) -> None:
    """Raise CheckpointError if a float array or FP8 values contain NaN or infinity; NVFP4 block scales may."""
    for name, array in components.items():
        mask = EXPONENTS.get(array.dtype.name)
        if mask is None or (array.dtype.itemsize == 1 and name == "block_scale"):
            continue
        bits = array.reshape(-1).view(UNSIGNED[array.dtype.itemsize])
        pieces = (bits[at : at + PIECE_BYTES] for at in range(0, bits.size, PIECE_BYTES))
        if count := sum(int(np.count_nonzero((piece & mask) == mask)) for piece in pieces):
            raise CheckpointError(
                f"{path}.{name} ({array.dtype.name} {list(array.shape)}) has {pluralize(count, 'value')} that "
                f"{'is' if count == 1 else 'are'} NaN or infinite: the source is damaged. "
                "What was written so far is kept"
            )


class _Write(NamedTuple):
    """A part on its way to the disk."""

    name: str
    nbytes: int
    saved: Future[dict[Key, Place]]
    described: dict[str, Future[tuple[LeafEntry, dict[str, int]]]]
    outcomes: dict[str, ErrorStats]

    def result(self) -> tuple[Part, int]:
        """Wait until the part is on disk; the part and its bytes."""
        places = self.saved.result()
        entries, counts = {}, collections.Counter[str]()
        for path, future in self.described.items():
            entry, found = future.result()
            entries[path] = entry.at(path, places)
            counts.update(found)
        return Part(self.name, entries, dict(counts), self.outcomes), self.nbytes


@dataclasses.dataclass
class Pipeline:
    """Converts groups of parameters. `find_entry` returns the entry of a parameter in an earlier part; `on_read` is
    called with the path and bytes of every weight that was read."""

    read: HashingReader
    requantizer: Requantizer
    writer: Writer
    budget: Budget
    find_entry: Callable[[str], LeafEntry | None]
    on_read: Callable[[str, int], None]

    def run(self, groups: Iterable[tuple[Group, str]]) -> Generator[tuple[Part, int]]:
        """Convert `groups` with the names of their parts, at most two at a time, and yield each part, with its bytes,
        once it is on disk."""
        with ThreadPoolExecutor(self.budget.workers) as workers, ThreadPoolExecutor(1) as disk:
            try:
                yield from self._run(groups, workers, disk)
            except BaseException:
                workers.shutdown(wait=False, cancel_futures=True)
                disk.shutdown(wait=False, cancel_futures=True)
                raise

    def _run(
        self, groups: Iterable[tuple[Group, str]], workers: ThreadPoolExecutor, disk: ThreadPoolExecutor
    ) -> Iterator[tuple[Part, int]]:
        before: _Write | None = None
        for group, name in groups:
            copies = any(leaf.copy_of is not None for leaf in group)
            if before is not None and (copies or not fits_beside(group, before.nbytes, self.budget)):
                yield before.result()
                before = None
            built = self._build(group, before.nbytes if before is not None else 0, workers)
            after = self._write(name, group, built, workers, disk)
            del built
            if before is not None:
                yield before.result()
            before = after
        if before is not None:
            yield before.result()

    def _build(self, group: Group, writing: int, workers: ThreadPoolExecutor) -> dict[str, Components]:
        """Read, convert and cut: the components of each parameter of `group`, while `writing` bytes are written."""
        built: dict[str, Components] = {}
        steps: collections.deque[tuple[Callable[[], None], str, int]] = collections.deque()
        for leaf in group:
            path = leaf.leaf.path
            built[path], found = cut.plan_build(leaf.leaf, leaf.sources, leaf.form, self.read, self.requantizer)
            steps.extend((step, path, leaf.nbytes // len(found)) for step in found)
        window = self.budget.count_workers(group, self.budget.fixed + writing + size_of(group))
        pending: collections.deque[tuple[Future[None], str, int]] = collections.deque()
        while steps or pending:
            while steps and len(pending) < window:
                step, path, nbytes = steps.popleft()
                pending.append((workers.submit(step), path, nbytes))
            future, path, nbytes = pending.popleft()
            future.result()
            self.on_read(path, nbytes)
        for leaf in group:
            arrays = {name: (array.dtype.name, array.shape) for name, array in built[leaf.leaf.path].items()}
            assert arrays == leaf.arrays, f"{leaf.leaf.path}: {arrays} was built, {leaf.arrays} was planned"
        return built

    def _write(
        self,
        name: str,
        group: Group,
        built: dict[str, Components],
        workers: ThreadPoolExecutor,
        disk: ThreadPoolExecutor,
    ) -> _Write:
        """Begin to hash and to save a group. A copy with its original's bytes is not saved."""
        described: dict[str, Future[tuple[LeafEntry, dict[str, int]]]] = {}
        arrays: dict[Key, np.ndarray] = {}
        for leaf in group:
            path, original = leaf.leaf.path, None
            if leaf.copy_of is not None:
                earlier = described.get(leaf.copy_of)
                original = self.find_entry(leaf.copy_of) if earlier is None else earlier.result()[0]
            described[path] = workers.submit(describe, leaf, built[path], original, self.read)
            if original is None or described[path].result()[0].same_as is None:
                arrays |= {(path, component): array for component, array in built[path].items()}
        saved = disk.submit(lambda: self.writer.save(name, arrays) if arrays else {})
        return _Write(name, size_of(group), saved, described, self.requantizer.take_errors())
