"""Which mesh axis splits which letter. A leaf's name is its sharding rule.

    data    B rows of a batch, and with them the cache
    model   H heads, F and M feed-forward sizes, V vocabulary
    expert  E the stacked experts (the router, a few MB, is everywhere)

The indexer is on every device: all of them must select the same tokens.
"""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .errors import CapacityError, listing
from .layout import Leaf

AXES = {"B": "data", "H": "model", "F": "model", "M": "model", "V": "model", "E": "expert"}


def of_leaf(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one stored component of `leaf`; its shape has 1 where it does not vary along an axis."""
    axes = [AXES.get(letter) for letter in leaf.letters]
    if not leaf.stacked:
        axes = [None if axis == "expert" else axis for axis in axes]
    present = (axis if axis in mesh.shape and n > 1 else None for axis, n in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*present))


def check(mesh: Mesh, components: list[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError that lists every leaf the mesh does not divide evenly."""
    wrong = []
    for leaf, shape in components:
        for letter, size, axis in zip(leaf.letters, shape, of_leaf(mesh, leaf, shape).spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                wrong.append(f"{leaf.path} ({letter}: {size} over {axis}={mesh.shape[axis]})")
    if wrong:
        raise CapacityError(
            f"the mesh {dict(mesh.shape)} does not divide {len(wrong)} stored arrays: {listing(wrong)}. "
            "Nothing was read; choose axis sizes that divide these"
        )
