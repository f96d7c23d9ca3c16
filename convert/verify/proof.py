"""The proof of "lossless": the tensors of the source are computed back from the stored arrays (`inverse`), and their
SHA-256 are those that the conversion noted while it read them.

With the source at hand it is hashed once more, so that nothing noted has to be believed. Groups of leaves and tensors
of the source are read several at a time, by a thread for each core.
"""

import collections
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsv32_jax.checkpoint.arrays import raw
from dsv32_jax.checkpoint.manifest import ArrayEntry
from dsv32_jax.errors import CheckpointError
from dsv32_jax.system.progress import Progress

from ..read.safetensors import DTYPES, NUMPY_DTYPES
from ..read.source import Source
from . import inverse
from .converted import Converted, Group, Weight, nbytes_of
from .originals import difference

MOST_WORKERS = 8


class Proof:
    """One full check. `damaged` arrays do not have their SHA-256, `differing` tensors cannot be computed back or are
    others in the source; `changed` are weights, by what was done to them, `recorded` the source's tensors, by name.
    """

    def __init__(self, converted: Converted, source: Source | None, progress: Callable[[Progress], None]):
        self._converted, self._source = converted, source
        self.damaged: list[str] = []
        self.differing: list[str] = []
        self.changed: dict[str, list[str]] = collections.defaultdict(list)
        self.proven = 0
        self._progress, self._lock, self._done = progress, threading.Lock(), 0
        self.recorded = {
            tensor.name: tensor
            for leaf in converted.manifest.leaves.values()
            if leaf.passport is not None
            for tensor in leaf.passport.sources
        }

    def run(self) -> None:
        """Read everything."""
        self._progress(Progress(0, self._converted.nbytes, ""))
        with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
            tasks = [pool.submit(self._group, group) for group in self._converted.groups]
            if self._source is not None:
                tasks += [pool.submit(self._original, name) for name in self.recorded]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.damaged.sort()
        self.differing.sort()

    def _group(self, group: Group) -> None:
        """Check the arrays of one group, and the tensors that follow from them."""
        entries = [self._converted.expected[key] for key in self._converted.keys(group)]
        if not self._converted.readable(group):
            return
        if _is_copied(group, entries):
            self._copied(group)
        else:
            for weight, parts in self._converted.read(group, self.damaged.append):
                self._weight(weight, parts)
        nbytes = sum(map(nbytes_of, entries))
        with self._lock:
            self._done += nbytes
            self._progress(Progress(self._done, self._converted.nbytes, group.leaves[0].path))

    def _copied(self, group: Group) -> None:
        """A leaf that is a tensor of the source as it is: its digest is the tensor's."""
        (key,) = self._converted.keys(group)
        if group.leaves[0].path == key[0]:
            self._converted.hash(key, self.damaged.append)
        for source in group.weights[0].sources:
            self._compare(source.name, self._converted.expected[key].sha256)

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
        if sha256 != self.recorded[name].sha256:
            self.differing.append(f"{name} cannot be computed back")
            return
        with self._lock:
            self.proven += 1

    def _original(self, name: str) -> None:
        """Compare one tensor of the source, as it is now, with what was noted when it was converted."""
        assert self._source is not None
        if (found := difference(self._source, self.recorded[name])) is not None:
            self.differing.append(found)


def _is_copied(group: Group, entries: list[ArrayEntry]) -> bool:
    """Whether the one array of `group` has the bytes of the one tensor it was made of."""
    weight = group.weights[0]
    if len(group.weights) != 1 or len(entries) != 1 or weight.change:
        return False
    same = all(DTYPES[source.dtype] == NUMPY_DTYPES[entries[0].dtype] for source in weight.sources)
    return same and all(leaf.cut is None and not leaf.stacked for leaf in group.leaves)
