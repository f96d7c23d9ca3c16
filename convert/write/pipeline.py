"""Group after group of parameters: read and converted by many threads, then hashed and written while the next is read.

The first exception of any thread ends everything; parts that were yielded before stay good.
"""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry, Place

from ..plan.limits import Budget, Group, fits_beside, size_of
from ..transform import cut
from ..transform.cut import PlannedLeaf
from ..transform.requantize import ErrorStats, Requantizer
from .journal import Part
from .provenance import HashingReader, describe

Components = dict[str, np.ndarray]
T = TypeVar("T")
R = TypeVar("R")


class Writer(Protocol):
    """Writes the arrays of a part, by parameter and component, and returns where they lie
    (`dsv32_jax.checkpoint.writer.Writer`)."""

    def save(self, part: str, arrays: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], Place]: ...


class _Write(NamedTuple):
    """A part on its way to the disk."""

    name: str
    nbytes: int
    saved: Future[dict[tuple[str, str], Place]]
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


class Pipeline:
    """Converts groups of parameters. `entries` finds the entry of a parameter in an earlier part; `on_read` is called
    with the path and bytes of every weight that was read."""

    def __init__(
        self,
        read: HashingReader,
        requantizer: Requantizer,
        writer: Writer,
        budget: Budget,
        entries: Callable[[str], LeafEntry | None],
        on_read: Callable[[str, int], None],
    ):
        self._read, self._requantizer, self._writer, self._budget = read, requantizer, writer, budget
        self._entries, self._on_read = entries, on_read
        self._workers: ThreadPoolExecutor
        self._disk: ThreadPoolExecutor

    def run(self, groups: Iterable[tuple[Group, str]]) -> Generator[tuple[Part, int]]:
        """Convert `groups` with the names of their parts, at most two at a time, and yield each part, with its bytes,
        once it is on disk."""
        with ThreadPoolExecutor(self._budget.workers) as self._workers, ThreadPoolExecutor(1) as self._disk:
            try:
                yield from self._run(groups)
            except BaseException:
                self._workers.shutdown(wait=False, cancel_futures=True)
                self._disk.shutdown(wait=False, cancel_futures=True)
                raise

    def _run(self, groups: Iterable[tuple[Group, str]]) -> Iterator[tuple[Part, int]]:
        before: _Write | None = None
        for group, name in groups:
            copies = any(leaf.copy_of is not None for leaf in group)
            if before is not None and (copies or not fits_beside(group, before.nbytes, self._budget)):
                yield before.result()
                before = None
            arrays = self._build(group, before.nbytes if before is not None else 0)
            after = self._write(name, group, arrays)
            del arrays
            if before is not None:
                yield before.result()
            before = after
        if before is not None:
            yield before.result()

    def _build(self, group: Group, before: int) -> dict[str, Components]:
        """Read, convert and cut: the components of each parameter of `group`."""
        resident = self._budget.fixed + before + size_of(group)
        window = self._budget.count_workers(group, resident)

        def spread(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            return _map_bounded(self._workers, window, function, items)

        found: dict[str, Components] = {leaf.leaf.path: {} for leaf in group}
        stored = [leaf for leaf in group if leaf.same_as is None]
        for stacked, run in itertools.groupby(stored, key=lambda leaf: leaf.leaf.stacked):
            leaves = list(run)
            built = (
                (self._build_stack(leaf, spread) for leaf in leaves) if stacked else self._build_each(leaves, spread)
            )
            for leaf, components in zip(leaves, built, strict=True):
                arrays = {name: (array.dtype.name, array.shape) for name, array in components.items()}
                assert arrays == leaf.arrays, f"{leaf.leaf.path}: {arrays} was built, {leaf.arrays} was planned"
                found[leaf.leaf.path] = components
        return found

    def _build_stack(self, leaf: PlannedLeaf, spread: Callable[..., Iterator]) -> Components:
        """A parameter of many experts, a thread per expert."""

        def spread_experts(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            for result in spread(function, items):
                self._on_read(leaf.leaf.path, leaf.nbytes // len(leaf.sources))
                yield result

        return cut.build(leaf.leaf, leaf.sources, leaf.form, self._read, self._requantizer, spread_experts)

    def _build_each(self, leaves: list[PlannedLeaf], spread: Callable[..., Iterator]) -> Iterator[Components]:
        """Parameters of one weight each, a thread per parameter."""
        built = spread(lambda p: cut.build(p.leaf, p.sources, p.form, self._read, self._requantizer), leaves)
        for leaf, components in zip(leaves, built, strict=True):
            self._on_read(leaf.leaf.path, leaf.nbytes)
            yield components

    def _write(self, name: str, group: Group, built: dict[str, Components]) -> _Write:
        """Begin to hash and to save a group. A copy with its original's bytes is not saved."""
        described: dict[str, Future[tuple[LeafEntry, dict[str, int]]]] = {}
        arrays: dict[tuple[str, str], np.ndarray] = {}
        for leaf in group:
            path, original = leaf.leaf.path, None
            if leaf.copy_of is not None:
                earlier = described.get(leaf.copy_of)
                original = self._entries(leaf.copy_of) if earlier is None else earlier.result()[0]
            described[path] = self._workers.submit(describe, leaf, built[path], original, self._read)
            if original is None or described[path].result()[0].same_as is None:
                arrays |= {(path, component): array for component, array in built[path].items()}
        saved = self._disk.submit(self._save, name, arrays)
        return _Write(name, size_of(group), saved, described, self._requantizer.take_errors())

    def _save(self, name: str, arrays: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], Place]:
        return self._writer.save(name, arrays) if arrays else {}


def _map_bounded(pool: ThreadPoolExecutor, window: int, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` by the threads of `pool`, never more than `window` results ahead."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        if len(pending) >= window:
            yield pending.popleft().result()
        pending.append(pool.submit(function, item))
    while pending:
        yield pending.popleft().result()
