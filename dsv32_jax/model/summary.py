"""Short representations of modules: parameters, bytes by format, and devices with the memory used on each."""

import collections
import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from ..quantization.formats import NVFP4, Fp8Block
from ..quantization.host_weight import HostWeight
from ..system.progress import format_count, format_size
from ..system.summary import Summarized

FORMATS = {NVFP4: "nvfp4", Fp8Block: "fp8", HostWeight: "in host memory"}


class Module(Summarized, nnx.Module):
    """A flax module, used as a plain pytree of weights. Subclasses are dataclasses without their own repr."""

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return parameters, bytes by format, and devices with the memory used on each."""
        weights = find_weights(self)
        parameters = sum(math.prod(weight.shape) for weight in weights)
        sizes = collections.Counter[str]()
        for weight in weights:
            arrays: Any = weight.arrays.weight if isinstance(weight, HostWeight) else weight
            sizes[FORMATS.get(type(weight)) or str(arrays.dtype)] += sum(map(nbytes, jax.tree.leaves(arrays)))
        formats = ", ".join(f"{format_size(size)} {name}" for name, size in sizes.most_common())
        return type(self).__name__, {
            "parameters": f"{format_count(parameters)}, {format_size(sizes.total())}",
            "formats": formats or "none",
            "devices": describe_devices(jax.tree.leaves(weights)),
        }


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
