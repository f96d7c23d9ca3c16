"""Group after group of parameters: read and converted by many threads, then hashed and written while the next is read.

The first exception of any thread ends everything; parts that were yielded before stay good.
"""

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry, Place
from dsv32_jax.checkpoint.reader import Key
from dsv32_jax.checkpoint.writer import Writer

from ..plan.limits import Budget, Group, fits_beside, size_of
from ..transform import cut
from ..transform.requantize import ErrorStats, Requantizer
from .journal import Part
from .provenance import HashingReader, describe

Components = dict[str, np.ndarray]


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
