"""Group after group of leaves: read and converted by many threads, then hashed and written while the next is read.

The first exception of any thread ends everything; what was written and noted before stays good.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry

from ..plan import limits
from ..plan.limits import Budget, Group
from ..plan.plan import PlannedLeaf
from ..transform import array_facts, cut
from ..transform.requantize import ErrorStats, Requantizer
from .record import Recorder, with_passport

Arrays = dict[tuple[str, str], np.ndarray]
Components = dict[str, np.ndarray]
T = TypeVar("T")
R = TypeVar("R")


class Writer(Protocol):
    """What puts arrays on the disk (`dsv32_jax.checkpoint.store.Writer`)."""

    def save(self, part: str, group: Arrays) -> None: ...


class Part(NamedTuple):
    """A group that is on disk: its name, its leaves as the manifest will have them, and what was found on the way."""

    name: str
    leaves: dict[str, LeafEntry]
    facts: dict[str, int]
    outcomes: dict[str, ErrorStats]
    nbytes: int


class _Writing(NamedTuple):
    """A group that is on its way to the disk."""

    name: str
    nbytes: int
    saved: Future[None]
    described: dict[str, Future[tuple[LeafEntry, dict[str, int]]]]
    outcomes: dict[str, ErrorStats]

    def result(self) -> Part:
        """Wait until it is on disk."""
        self.saved.result()
        found = {path: future.result() for path, future in self.described.items()}
        counts: collections.Counter[str] = collections.Counter()
        for _, leaf_counts in found.values():
            counts.update(leaf_counts)
        return Part(
            self.name, {path: entry for path, (entry, _) in found.items()}, dict(counts), self.outcomes, self.nbytes
        )


class Pipeline:
    """Converts groups. `built` hears of every weight that was read (its leaf, bytes), `done` of every part on the disk.

    `entries` are the leaves of the parts before; `done` adds to them.
    """

    def __init__(
        self,
        read: Recorder,
        recaster: Requantizer,
        writer: Writer,
        budget: Budget,
        entries: dict[str, LeafEntry],
        built: Callable[[str, int], None],
        done: Callable[[Part], None],
    ):
        self._read, self._recaster, self._writer, self._budget = read, recaster, writer, budget
        self._entries, self._built, self._done = entries, built, done
        self._workers: ThreadPoolExecutor
        self._disk: ThreadPoolExecutor

    def run(self, parts: Iterable[tuple[str, Group]]) -> None:
        """Convert `parts` (name and group), at most two at a time."""
        with ThreadPoolExecutor(self._budget.workers) as self._workers, ThreadPoolExecutor(1) as self._disk:
            try:
                self._run(parts)
            except BaseException:
                self._workers.shutdown(wait=False, cancel_futures=True)
                self._disk.shutdown(wait=False, cancel_futures=True)
                raise

    def _run(self, parts: Iterable[tuple[str, Group]]) -> None:
        before: _Writing | None = None
        for name, group in parts:
            copies = any(leaf.copy_of is not None for leaf in group)
            if before is not None and (copies or not limits.fits_beside(group, before.nbytes, self._budget.limit)):
                self._done(before.result())
                before = None
            arrays = self._build(group, before.nbytes if before is not None else 0)
            after = self._write(name, group, arrays)
            del arrays
            if before is not None:
                self._done(before.result())
            before = after
        if before is not None:
            self._done(before.result())

    def _build(self, group: Group, before: int) -> dict[str, Components]:
        """The arrays of each leaf of `group`."""
        resident = limits.FIXED + before + limits.size_of(group)
        window = self._budget.count_workers(group, resident)

        def spread(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            return _bounded(self._workers, window, function, items)

        found: dict[str, Components] = {leaf.leaf.path: {} for leaf in group}
        stored = [leaf for leaf in group if leaf.same_as is None]
        for stacked, run in itertools.groupby(stored, key=lambda leaf: leaf.leaf.stacked):
            leaves = list(run)
            each = (self._stack(leaf, spread) for leaf in leaves) if stacked else self._single(leaves, spread)
            for leaf, components in zip(leaves, each, strict=True):
                arrays = {name: (array.dtype.name, array.shape) for name, array in components.items()}
                assert arrays == leaf.arrays, f"{leaf.leaf.path}: {arrays} was built, {leaf.arrays} was planned"
                found[leaf.leaf.path] = components
        return found

    def _stack(self, leaf: PlannedLeaf, spread: Callable[..., Iterator]) -> Components:
        """A leaf of many experts, by many workers."""

        def told(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            for result in spread(function, items):
                self._built(leaf.leaf.path, leaf.nbytes // len(leaf.sources))
                yield result

        return cut.build(leaf.leaf, leaf.sources, leaf.form, self._read, self._recaster, told)

    def _single(self, leaves: list[PlannedLeaf], spread: Callable[..., Iterator]) -> Iterator[Components]:
        """Leaves of one weight each, by a worker each."""
        each = spread(lambda p: cut.build(p.leaf, p.sources, p.form, self._read, self._recaster), leaves)
        for leaf, components in zip(leaves, each, strict=True):
            self._built(leaf.leaf.path, leaf.nbytes)
            yield components

    def _write(self, name: str, group: Group, built: dict[str, Components]) -> _Writing:
        """Begin to hash and to save `built`. A copy with its original's bytes is not saved."""
        described: dict[str, Future[tuple[LeafEntry, dict[str, int]]]] = {}
        arrays: Arrays = {}
        for leaf in group:
            path, original = leaf.leaf.path, None
            if leaf.copy_of is not None:
                original = self._entries.get(leaf.copy_of) or described[leaf.copy_of].result()[0]
            described[path] = self._workers.submit(self._describe, leaf, built[path], original)
            if original is None or described[path].result()[0].same_as is None:
                arrays |= {(path, component): array for component, array in built[path].items()}
        saved = self._disk.submit(self._save, name, arrays)
        return _Writing(name, limits.size_of(group), saved, described, self._recaster.take_errors())

    def _save(self, name: str, arrays: Arrays) -> None:
        if arrays:
            self._writer.save(name, arrays)

    def _describe(
        self, planned: PlannedLeaf, built: Components, original: LeafEntry | None
    ) -> tuple[LeafEntry, dict[str, int]]:
        """The manifest's entry of a leaf, and what was counted in it. A copy with the bytes of `original` is that.

        Raises CheckpointError on values that cannot be right.
        """
        self._read.require_written(planned)
        array_facts.require_finite(planned.leaf.path, built)
        form = planned.form.format
        entry = LeafEntry(
            form, {name: array_facts.describe_array(array) for name, array in built.items()}, planned.same_as
        )
        if entry == original:
            entry = LeafEntry(form, {}, planned.copy_of)
        return with_passport(planned, entry, built, self._read), array_facts.count_odd_scales(built)


def _bounded(pool: ThreadPoolExecutor, window: int, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` by the threads of `pool`, never more than `window` results ahead."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        if len(pending) >= window:
            yield pending.popleft().result()
        pending.append(pool.submit(function, item))
    while pending:
        yield pending.popleft().result()
