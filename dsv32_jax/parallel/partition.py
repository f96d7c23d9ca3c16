"""The mesh axis that shards each letter of a parameter's name, in plain numbers: the name is the sharding rule.

    data    B rows of a batch, and with them the cache
    model   H heads, F and M feed-forward sizes, V vocabulary
    expert  E stacked experts (the router, a few MB, is replicated)

The indexer is replicated, because all devices must select the same tokens. `sharding` makes JAX shardings of this; the
converter cuts chunks by it, so that a device reads its own shard and little else.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from ..errors import CapacityError, UsageError, listing, pluralize
from ..layout import Leaf
from ..quantization.quantize import FP8_BLOCK

LETTER_AXES = {"B": "data", "H": "model", "F": "model", "M": "model", "V": "model", "E": "expert"}
MESH_AXES = ("data", "model", "expert")

MeshShape = Mapping[str, int]
"""The number of devices along each mesh axis."""


def parse_mesh(sizes: str | MeshShape) -> dict[str, int]:
    """Parse a mesh, "expert=8,model=2" or a mapping. Raises UsageError."""
    if not isinstance(sizes, str | Mapping):
        raise UsageError(f'a mesh must be like "expert=4,model=2" or {{"expert": 4, "model": 2}}, not {sizes!r:.200}')
    text = sizes if isinstance(sizes, str) else format_mesh(sizes)
    found: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = item.strip().partition("=")
        if axis not in MESH_AXES or not re.fullmatch("[1-9][0-9]{0,4}", size) or axis in found:
            raise UsageError(
                f"invalid mesh {text!r} at {item.strip()!r}: write for example expert=8,model=2, with each of "
                f"{', '.join(MESH_AXES)} at most once"
            )
        found[axis] = int(size)
    return found


def parse_optional_mesh(sizes: str | MeshShape | None) -> dict[str, int]:
    """Parse a mesh; None and an empty mapping are a single device."""
    return {} if sizes is None or sizes == {} else parse_mesh(sizes)


def format_mesh(mesh: MeshShape) -> str:
    """Return "expert=8, model=2"."""
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def find_leaf_axes(mesh: MeshShape, leaf: Leaf, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the mesh axis that shards each axis of one stored component of `leaf`, or None.

    `shape` has 1 where the component does not vary along an axis.
    """
    found = find_axes(mesh, leaf.letters, shape)
    return found if leaf.stacked else tuple(None if axis == "expert" else axis for axis in found)


def find_axes(mesh: MeshShape, letters: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the mesh axis that shards each axis of an array with these letters, or None."""
    axes = (LETTER_AXES.get(letter) for letter in letters)
    return tuple(axis if axis in mesh and size > 1 else None for axis, size in zip(axes, shape, strict=True))


def shard_shape(mesh: MeshShape, leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the shard that a device holds of a component; `check_divisible` has passed."""
    parts = (1 if axis is None else mesh[axis] for axis in find_leaf_axes(mesh, leaf, shape))
    return tuple(size // count for size, count in zip(shape, parts, strict=True))


def make_shard_shape(
    mesh: MeshShape, leaves: Iterable[Leaf]
) -> Callable[[tuple[str, str], tuple[int, ...]], tuple[int, ...]]:
    """Return a function from an array's key (leaf path, component) and shape to the shape of its shard."""
    table = {leaf.path: leaf for leaf in leaves}
    return lambda key, shape: shard_shape(mesh, table[key[0]], shape)


def check_divisible(mesh: MeshShape, components: Iterable[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError that lists every parameter the mesh does not divide evenly, layers folded."""
    found: dict[tuple[str, str], set[str]] = {}
    for leaf, shape in components:
        for letter, logical, size, axis in zip(
            leaf.letters, leaf.shape, shape, find_leaf_axes(mesh, leaf, shape), strict=True
        ):
            if axis is not None and not _divides(mesh[axis], logical, size):
                pattern = re.sub(r"layers\.\d+\.", "layers.*.", leaf.path)
                what = f"{letter} {logical}" if size == logical else f"{letter} {logical} in {size} blocks"
                why = f"{what} over {axis}={mesh[axis]} (possible: {listing(_divisors(logical, size), 6)})"
                found.setdefault((pattern, why), set()).add(leaf.path)
    if found:
        lines = [f"{len(paths):4} x {pattern}: {why}" for (pattern, why), paths in sorted(found.items())]
        count = pluralize(len(set().union(*found.values())), "parameter")
        raise CapacityError(
            f"the mesh {format_mesh(mesh)} does not divide {count} evenly. Nothing was read; choose axis sizes that "
            "divide these:\n  " + "\n  ".join(lines)
        )


def _divides(count: int, logical: int, size: int) -> bool:
    """Return whether an axis stored as `size` blocks divides into `count` equal shards of whole blocks. It does not if
    the last block of FP8 is shorter than the others."""
    shorter_last = logical % FP8_BLOCK and size == -(-logical // FP8_BLOCK)
    return count == 1 or (size % count == 0 and not shorter_last)


def _divisors(logical: int, size: int) -> list[int]:
    return [count for count in range(1, size + 1) if _divides(count, logical, size)]
