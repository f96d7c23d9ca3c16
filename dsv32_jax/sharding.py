"""Shardings from the letters of a leaf's name: `pieces` says which mesh axis splits which letter."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .layout import Leaf
from .storage import pieces


def of_leaf(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one stored component of `leaf`; its shape has 1 where it does not vary along an axis."""
    return NamedSharding(mesh, PartitionSpec(*pieces.axes(mesh.shape, leaf, shape)))


def check(mesh: Mesh, components: list[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError that lists every leaf the mesh does not divide evenly."""
    pieces.check(mesh.shape, components)
