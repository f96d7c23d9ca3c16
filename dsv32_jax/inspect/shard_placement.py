"""Which part of a weight lies on which device of a mesh, from the letters alone: no device is needed, nor a weight."""

import itertools
import math
from typing import NamedTuple

from ..config import Config
from ..errors import UsageError, require
from ..layout import COPIES, Leaf, leaves
from ..parallel import partition


class Placement(NamedTuple):
    """A weight of `shape` with the axes `letters`, cut into pieces: `split` says by which mesh axis each of its axes is
    split (None: not at all), `parts` [start, stop) of each axis for every device, in the order of the mesh."""

    path: str
    letters: str
    shape: tuple[int, ...]
    mesh: dict[str, int]
    split: tuple[str | None, ...]
    parts: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def copies(self) -> int:
        """How many devices hold each piece."""
        return len(self.parts) // len(set(self.parts))

    def __repr__(self) -> str:
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [f"{self.path} {list(self.shape)} over {mesh}: {len(set(self.parts))} pieces, {self.copies} x each"]
        for device, part in enumerate(self.parts):
            axes = zip(self.letters, self.shape, part, strict=True)
            where = [f"{letter} {'all' if (a, b) == (0, size) else f'{a}:{b}'}" for letter, size, (a, b) in axes]
            lines.append(f"  device {device:3}  " + "  ".join(f"{text:12}" for text in where).rstrip())
        return "\n".join(lines)


def placement(cfg: Config, path: str, mesh: str) -> Placement:
    """Where the leaf `path` of a model goes on `mesh` ("expert=4,model=2"). Raises UsageError, and CapacityError where
    the mesh does not divide it evenly."""
    require(cfg, Config, "cfg must be a Config, as model.cfg is")
    found: list[Leaf] = [leaf for leaf in leaves(cfg) if leaf.path == path]
    if not found:
        raise UsageError(f"the model has no weight {path!r}")
    (leaf,) = found
    sizes = partition.parse(mesh)
    partition.check(sizes, [(leaf, leaf.shape)])
    split = partition.axes(sizes, leaf, leaf.shape)
    parts = []
    for place in itertools.product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, place, strict=True))
        cut = [(0, 1) if axis is None else (at[axis], sizes[axis]) for axis in split]
        part = ((size * i // n, size * (i + 1) // n) for size, (i, n) in zip(leaf.shape, cut, strict=True))
        parts.append(tuple(part))
    return Placement(path, leaf.letters, leaf.shape, sizes, split, tuple(parts))


def held(cfg: Config, mesh: str) -> dict[str, int]:
    """Parameters that one device of `mesh` holds, by what they are for, those of the drafting layer among them; what it
    shares with the model counts once. Raises CapacityError where the mesh does not divide the leaves evenly."""
    require(cfg, Config, "cfg must be a Config, as model.cfg is")
    sizes = partition.parse(mesh)
    found: dict[str, int] = dict.fromkeys(("embedding, head", "attention", "indexer", "dense, shared", "experts"), 0)
    own = [leaf for leaf in leaves(cfg) if leaf.path not in COPIES]
    partition.check(sizes, [(leaf, leaf.shape) for leaf in own])
    for leaf in own:
        name = "embedding, head"
        for mark, what in ((".mla.", "attention"), (".indexer.", "indexer"), (".ffn.", "dense, shared")):
            name = what if mark in leaf.path else name
        name = "experts" if leaf.stacked else name
        found[name] += math.prod(partition.split(sizes, leaf, leaf.shape))
    return found
