"""Which layers' routed experts stay in host memory: as told, or as few as the devices cannot hold."""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from ..config import Config
from ..errors import CapacityError, UsageError, pluralize
from ..layout import Leaf
from ..parallel import partition
from .manifest import LeafEntry

WEIGHT_SHARE = 0.85
"""The share of a device's memory that weights may take; caches and temporaries need the rest."""


def choose(cfg: Config, table: Mapping[str, Leaf], sizes: Mapping[str, int], experts: str) -> list[str]:
    """Return the paths of the routed experts that stay in host memory for "device", "host" or "host:N".

    `sizes` are the bytes that each weight takes on each device.

    Raises UsageError for another word or a number of layers that there are not, CapacityError if the devices could not
    hold the rest.
    """
    layers = [f"layers.{i}.ffn." for i in range(cfg.first_k_dense_replace, cfg.num_hidden_layers)]
    word = re.fullmatch(r"device|host(?::([0-9]{1,4}))?", experts) if isinstance(experts, str) else None
    if word is None or int(word[1] or 0) > len(layers):
        raise UsageError(
            f'experts must be "device", "host" or "host:N" with at most {pluralize(len(layers), "MoE layer")}, not '
            f"{experts!r}; nothing was read"
        )
    if experts == "device":
        return []
    count = count_host_layers(table, sizes, layers) if word[1] is None else int(word[1])
    chosen = tuple(layers[:count])
    return [path for path, leaf in table.items() if leaf.stacked and path.startswith(chosen)] if chosen else []


def count_host_layers(table: Mapping[str, Leaf], sizes: Mapping[str, int], layers: list[str]) -> int:
    """Return how many layers' experts the devices have no room for: all of them on a CPU, whose memory is the host's.

    Raises CapacityError if the devices cannot hold the other weights.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return len(layers)
    stats = device.memory_stats() or {}
    free = WEIGHT_SHARE * (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))
    total = sum(sizes.values())
    for count, layer in enumerate(["", *layers]):
        total -= sum(sizes[path] for path in sizes if layer and table[path].stacked and path.startswith(layer))
        if total <= free:
            return count
    raise CapacityError(
        f"without routed experts the weights take {total / 1e9:.1f} GB of each device, and {free / 1e9:.1f} GB are "
        f"free for them; nothing was read. Use more devices"
    )


def count_device_bytes(
    table: Mapping[str, Leaf], entries: Mapping[str, LeafEntry], mesh: Mesh | None
) -> dict[str, int]:
    """Return the bytes that each weight of a checkpoint takes on each device."""
    sizes = {} if mesh is None else dict(mesh.shape)

    def count(path: str, entry: LeafEntry) -> int:
        shards = (partition.shard_shape(sizes, table[path], array.shape) for array in entry.arrays.values())
        each = [array.nbytes // max(1, math.prod(array.shape)) for array in entry.arrays.values()]
        return sum(math.prod(shard) * size for shard, size in zip(shards, each, strict=True))

    return {path: count(path, entry) for path, entry in entries.items() if entry.same_as is None}
