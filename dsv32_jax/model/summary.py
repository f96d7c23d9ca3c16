"""Short representations of modules: parameters, bytes by format, and devices with the memory used on each."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from ..quantization.formats import NVFP4, Fp8Block
from ..quantization.host_weight import HostWeight
from ..system.progress import format_count, format_size
from ..system.summary import Summarized, format_table

FORMATS = {NVFP4: "nvfp4", Fp8Block: "fp8", HostWeight: "in host memory"}


class Module(Summarized, nnx.Module):
    """A flax module, used as a plain pytree of weights. Subclasses are dataclasses without their own repr."""

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return parameters, bytes by format, and devices with the memory used on each."""
        return type(self).__name__, measure(self)


def measure(module: Any) -> dict[str, str]:
    """Return parameters, bytes by format, and devices with the memory used on each, of all weights of a pytree."""
    weights = find_weights(module)
    parameters = sum(math.prod(weight.shape) for weight in weights)
    sizes = collections.Counter[str]()
    for weight in weights:
        arrays: Any = weight.arrays.weight if isinstance(weight, HostWeight) else weight
        sizes[FORMATS.get(type(weight)) or str(arrays.dtype)] += sum(map(nbytes, jax.tree.leaves(arrays)))
    formats = ", ".join(f"{format_size(size)} {name}" for name, size in sizes.most_common())
    return {
        "parameters": f"{format_count(parameters)}, {format_size(sizes.total())}",
        "formats": formats or "none",
        "devices": describe_devices(jax.tree.leaves(weights)),
    }


def tabulate(parts: Mapping[str, Any]) -> str:
    """Return an HTML table of the parts of a model: their sizes, formats and devices. Neighbours that are equal in all
    of these are one row."""
    rows: list[tuple[list[str], tuple[str, ...]]] = []
    for name, part in parts.items():
        values = tuple(measure(part).values())
        if rows and rows[-1][1] == values:
            rows[-1][0].append(name)
        else:
            rows.append(([name], values))
    names = [each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}, each" for each, _ in rows]
    cells = [(name, *values) for name, (_, values) in zip(names, rows, strict=True)]
    return format_table(cells, ("part", "parameters", "formats", "devices"))


def find_weights(module: Any) -> list[Any]:
    """Return the weights of a module, each once although the MTP head may share the model's."""
    leaves = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, tuple(FORMATS)))
    return list({id(leaf): leaf for leaf in leaves if hasattr(leaf, "shape")}.values())


def nbytes(array: Any) -> int:
    """Return the size of an array, or of one that is only described by shape and dtype."""
    return math.prod(array.shape) * array.dtype.itemsize


def describe_devices(arrays: Iterable[Any]) -> str:
    """Return the devices that hold the arrays, with the memory used on each."""
    held = [array for array in arrays if isinstance(array, jax.Array) and not isinstance(array, Tracer)]
    if not held:
        return "none"
    devices = set().union(*(array.sharding.device_set for array in held))
    each = sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in held)
    kind = min(devices, key=lambda device: device.id).device_kind
    return f"{len(devices)} x {kind}, {format_size(each)} on each"
