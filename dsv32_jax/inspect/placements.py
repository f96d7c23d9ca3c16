"""Sharding of weights over a mesh, from their axis letters alone: needs neither devices nor weights."""

import itertools
from typing import NamedTuple

from ..config import Config
from ..errors import UsageError, pluralize, require
from ..layout import leaves
from ..parallel import partition


class Placement(NamedTuple):
    """A weight of `shape` with the axes `letters`, sharded over `mesh`.

    split   the mesh axis over which each axis of the weight is split, None for an axis that is whole
    shards  [start, stop) of each axis, for every device in mesh order
    """

    path: str
    letters: str
    shape: tuple[int, ...]
    mesh: dict[str, int]
    split: tuple[str | None, ...]
    shards: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def copies(self) -> int:
        """The number of devices that hold each shard."""
        return len(self.shards) // len(set(self.shards))

    def __repr__(self) -> str:
        mesh = partition.format_mesh(self.mesh)
        shards, copies = pluralize(len(set(self.shards)), "shard"), pluralize(self.copies, "copy", "copies")
        lines = [f"{self.path} {list(self.shape)} over {mesh}: {shards}, {copies} of each"]
        for device, shard in enumerate(self.shards):
            axes = zip(self.letters, self.shape, shard, strict=True)
            where = [f"{letter} {'all' if (a, b) == (0, size) else f'{a}:{b}'}" for letter, size, (a, b) in axes]
            lines.append(f"  device {device:3}  " + "  ".join(f"{text:12}" for text in where).rstrip())
        return "\n".join(lines)


def placement(cfg: Config, path: str, mesh: str) -> Placement:
    """Return the placement of a model's weight `path` on `mesh`, such as "expert=4,model=2". Raises UsageError, and
    CapacityError if the mesh does not divide the weight evenly."""
    require(cfg, Config, "cfg must be a Config, such as model.cfg")
    leaf = next((leaf for leaf in leaves(cfg) if leaf.path == path), None)
    if leaf is None:
        raise UsageError(f"the model has no weight {path!r}")
    sizes = partition.parse_mesh(mesh)
    partition.check_divisible(sizes, [(leaf, leaf.shape)])
    split = partition.find_leaf_axes(sizes, leaf, leaf.shape)
    shards = []
    for coordinates in itertools.product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, coordinates, strict=True))
        cuts = [(0, 1) if axis is None else (at[axis], sizes[axis]) for axis in split]
        shard = ((size * i // n, size * (i + 1) // n) for size, (i, n) in zip(leaf.shape, cuts, strict=True))
        shards.append(tuple(shard))
    return Placement(path, leaf.letters, leaf.shape, sizes, split, tuple(shards))
