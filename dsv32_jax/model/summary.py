"""Short representations: a model, a cache or an output shows its sizes instead of its arrays, in a notebook too."""

import collections
import dataclasses
import html
import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from ..quantization.formats import NVFP4, Fp8Block
from ..quantization.host_weight import HostWeight
from ..system.progress import format_count, format_size

FORMATS = {NVFP4: "nvfp4", Fp8Block: "fp8", HostWeight: "in host memory"}


class Summarized:
    """A mixin whose `repr`, as text and as HTML, is a title and some named values."""

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the title and the named values; by default the shapes of the fields of a dataclass."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self).__name__, {field.name: describe(getattr(self, field.name)) for field in fields}

    def __repr__(self) -> str:
        title, values = self.summary()
        width = max(map(len, values), default=0)
        return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in values.items())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        title, values = self.summary()
        rows = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in values.items()]
        return f"<div>{html.escape(title)}</div><table>{''.join(rows)}</table>"


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


def describe(value: Any) -> str:
    """Return the dtype and shape of an array, the title of what has a summary, the number of things in a tuple."""
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"{len(value)} x {type(value[0]).__name__}" if value else "none"
    return value.summary()[0] if isinstance(value, Summarized) else repr(value)
