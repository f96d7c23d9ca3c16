"""A bank of matrices that stays in host memory, whatever device the model is on. Imports no kernels."""

import dataclasses
from typing import Any

import jax
import numpy as np

from .formats import NVFP4, Fp8Block


@dataclasses.dataclass(frozen=True, eq=False)
class HostArrays:
    """The arrays of a weight [E, out, in] in host memory: those of NVFP4 or Fp8Block, or one.

    Layers with arrays of the same shapes share their programs, so such objects are equal to each other: a program
    finds its arrays by the ids in `HostWeight.matrix`, not here.
    """

    weight: Any

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The format, and the shape and dtype of each array."""
        return type(self.weight), *((part.shape, part.dtype) for part in jax.tree.leaves(self.weight))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostArrays) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(self.shapes)


@dataclasses.dataclass(frozen=True)
class HostWeight:
    """A stacked weight [E, out, in] in host memory.

    matrix  int32 [E, 1, 1]: the id by which the kernels find each matrix. Over a mesh axis that shards `out` or `in`
            it is [E, m, 1] or [E, 1, m], and -1 on all devices but the one that has the matrix to itself
    arrays  where they are
    """

    matrix: jax.Array
    arrays: HostArrays

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: of the whole bank, or of a device's experts inside a shard_map."""
        return (self.matrix.shape[0], *self.arrays.weight.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(part.nbytes for part in jax.tree.leaves(self.arrays.weight))


jax.tree_util.register_dataclass(HostWeight, data_fields=["matrix"], meta_fields=["arrays"])


def find_host_weights(tree: Any) -> list[HostWeight]:
    """Return the weights of a model, or of a part of one, that are in host memory."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, HostWeight))
    return [leaf for leaf in leaves if isinstance(leaf, HostWeight)]


def divide_matrices(first: int, experts: int, letters: str, parts: int) -> np.ndarray:
    """Return `HostWeight.matrix` of matrices with the ids first, first + 1, ..., for `parts` devices along the axis M
    of `letters` ("EMD" or "EDM"): each has every parts-th matrix."""
    expert = np.arange(experts, dtype=np.int32)[:, None]
    ids = np.where(expert % parts == np.arange(parts), first + expert, -1)
    return np.expand_dims(ids, 3 - letters.index("M"))


def format_of(arrays: HostArrays) -> int:
    """Return the number of the format in the kernels' source."""
    return {NVFP4: 0, Fp8Block: 1}.get(type(arrays.weight), 2)
