"""Which mesh axis splits which letter, in plain numbers. A leaf's name is its sharding rule.

    data    B rows of a batch, and with them the cache
    model   H heads, F and M feed-forward sizes, V vocabulary
    expert  E the stacked experts (the router, a few MB, is everywhere)

The indexer is on every device: all of them must select the same tokens. `sharding` makes JAX shardings of this; the
converter cuts chunks by it, so that a device reads its own bytes and little else.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from ..errors import CapacityError, UsageError, listing
from ..layout import Leaf
from ..quantization.quantize import FP8_BLOCK

AXES = {"B": "data", "H": "model", "F": "model", "M": "model", "V": "model", "E": "expert"}
NAMES = ("data", "model", "expert")

Mesh = Mapping[str, int]
"""Devices along each mesh axis."""


def parse(sizes: str | Mesh) -> dict[str, int]:
    """The mesh written as "expert=8,model=2", or as a mapping. Raises UsageError."""
    if not isinstance(sizes, str | Mapping):
        raise UsageError(f'a mesh is written as "expert=4,model=2" or {{"expert": 4, "model": 2}}, not {sizes!r:.200}')
    text = sizes if isinstance(sizes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())
    found: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in NAMES or not re.fullmatch("[1-9][0-9]{0,4}", size) or name in found:
            raise UsageError(
                f"the mesh {text!r} is not understood at {item.strip()!r}: write for example expert=8,model=2, "
                f"each of {', '.join(NAMES)} at most once"
            )
        found[name] = int(size)
    return found


def optional(sizes: str | Mesh | None) -> dict[str, int]:
    """`parse`, where None and an empty mapping stand for one device."""
    return {} if sizes is None or sizes == {} else parse(sizes)


def axes(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The mesh axis that splits each axis of one stored component of `leaf`, None where none does.

    `shape` has 1 where the component does not vary along an axis.
    """
    found = axes_of(mesh, leaf.letters, shape)
    return found if leaf.stacked else tuple(None if axis == "expert" else axis for axis in found)


def axes_of(mesh: Mesh, letters: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The same for an array whose axes have these letters."""
    named = (AXES.get(letter) for letter in letters)
    return tuple(axis if axis in mesh and size > 1 else None for axis, size in zip(named, shape, strict=True))


def split(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the piece that one device of `mesh` holds of a component; `check` has passed."""
    parts = (1 if axis is None else mesh[axis] for axis in axes(mesh, leaf, shape))
    return tuple(size // count for size, count in zip(shape, parts, strict=True))


def by_mesh(mesh: Mesh, leaves: Iterable[Leaf]) -> Callable[[tuple[str, str], tuple[int, ...]], tuple[int, ...]]:
    """What `store.Writer` lays chunks by: from an array's key (leaf path, component) and shape to the piece's shape."""
    table = {leaf.path: leaf for leaf in leaves}
    return lambda key, shape: split(mesh, table[key[0]], shape)


def check(mesh: Mesh, components: Iterable[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError with a table of everything that the mesh does not divide evenly, layers folded."""
    found: dict[tuple[str, str], set[str]] = {}
    for leaf, shape in components:
        whole = zip(leaf.letters, leaf.shape, shape, axes(mesh, leaf, shape), strict=True)
        for letter, logical, size, axis in whole:
            if axis is not None and not _cuts(mesh[axis], logical, size):
                pattern = re.sub(r"layers\.\d+\.", "layers.*.", leaf.path)
                what = f"{letter} {logical}" if size == logical else f"{letter} {logical} in {size} blocks"
                why = f"{what} over {axis}={mesh[axis]} (possible: {listing(_possible(logical, size), 6)})"
                found.setdefault((pattern, why), set()).add(leaf.path)
    if found:
        lines = [f"{len(paths):4} x {pattern}: {why}" for (pattern, why), paths in sorted(found.items())]
        shown = ", ".join(f"{name}={size}" for name, size in mesh.items())
        raise CapacityError(
            f"the mesh {shown} does not divide {len(set().union(*found.values()))} leaves evenly. "
            "Nothing was read; choose axis sizes that divide these:\n  " + "\n  ".join(lines)
        )


def _cuts(count: int, logical: int, size: int) -> bool:
    """Whether an axis that is stored as `size` blocks falls into `count` equal pieces of whole blocks. Where FP8's last
    block is shorter than the others, it falls into none."""
    shorter_last = logical % FP8_BLOCK and size == -(-logical // FP8_BLOCK)
    return count == 1 or (size % count == 0 and not shorter_last)


def _possible(logical: int, size: int) -> list[int]:
    return [count for count in range(1, size + 1) if _cuts(count, logical, size)]
