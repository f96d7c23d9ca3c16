"""Which layers' routed experts stay in host memory: as told, or as few as the devices cannot hold."""

import re
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from ..config import Config
from ..errors import CapacityError, UsageError, argument, pluralize
from ..layout import Leaf
from ..parallel import multihost
from ..system import compilation

WEIGHT_SHARE = 0.85
"""The share of a device's memory that weights may take; caches and temporaries need the rest."""


def choose(cfg: Config, table: Mapping[str, Leaf], sizes: Mapping[str, int], experts: str, mesh: Mesh | None) -> int:
    """Return of how many MoE layers, from the first, the routed experts stay in host memory for "device", "host" or
    "host:N", where `sizes` are the bytes that each weight takes on each device. Devices that are CPUs hold none of the
    experts that may stay, and whatever they are told to.

    Raises UsageError for another word or a number of layers that there are not, CapacityError if the devices could not
    hold the rest.
    """
    each, total = measure_layers(cfg, table, sizes), sum(sizes.values())
    count, free = parse(experts, len(each)), compilation.get_device_memory()
    free = None if free is None else multihost.agree_on_minimum(mesh, free)
    fewest = len(each) if free is None else count_layers(total, each, WEIGHT_SHARE * free)
    count = fewest if count is None else count
    if count is None or (free is not None and total - sum(each[:count]) > free):
        held, least = total - sum(each[:count]), total - sum(each)
        other = f"more devices: the weights that are no routed experts take {least / 1e9:.1f} GB"
        raise CapacityError(
            f"with {argument('experts', experts)} the weights take {held / 1e9:.1f} GB of each device, and "
            f"{(free or 0) / 1e9:.1f} GB are free, of which caches and temporaries need "
            f"{1 - WEIGHT_SHARE:.0%}; nothing was read. "
            f"Use {other if fewest is None else argument('experts', f'host:{fewest}')}"
        )
    return count


def parse(experts: str, layers: int) -> int | None:
    """Return the number of layers in "device", which is 0, or "host:N", None for "host". Raises UsageError for another
    word, or more than `layers`."""
    word = re.fullmatch(r"device|host(?::([0-9]{1,4}))?", experts) if isinstance(experts, str) else None
    if word is None or int(word[1] or 0) > layers:
        raise UsageError(
            f'experts must be "device", "host" or "host:N" with at most {pluralize(layers, "MoE layer")}, not '
            f"{experts!r}; nothing was read"
        )
    return 0 if experts == "device" else None if word[1] is None else int(word[1])


def count_layers(total: float, each: Sequence[int], room: float) -> int | None:
    """Return of how few layers, from the first, the experts must be elsewhere for weights of `total` bytes to have
    room, if those of a layer take `each`; None if the others have none either."""
    return next((count for count in range(len(each) + 1) if total - sum(each[:count]) <= room), None)


def measure_layers(cfg: Config, table: Mapping[str, Leaf], sizes: Mapping[str, int]) -> list[int]:
    """Return the bytes of each MoE layer's routed experts, the sum of their `sizes`."""
    layers = cfg.num_hidden_layers - cfg.first_k_dense_replace
    return [sum(sizes[path] for path in list_experts(cfg, table, i, i + 1)) for i in range(layers)]


def list_experts(cfg: Config, table: Mapping[str, Leaf], start: int, stop: int) -> list[str]:
    """Return the paths of the routed experts of the MoE layers `start`, ..., `stop` - 1."""
    first = cfg.first_k_dense_replace
    prefixes = tuple(f"layers.{first + i}.ffn." for i in range(start, stop))
    return [path for path, leaf in table.items() if leaf.stacked and path.startswith(prefixes)]
