"""What a checkpoint says about its quantization, compared with what it is: the tensors decide, the rest is a note.

config.json (quantization_config) and ModelOpt's hf_quant_config.json often tell less than the files hold, or more.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsv32_jax.errors import listing

from .stored import Stored

FILE = "hf_quant_config.json"


def disagreements(config: Mapping[str, Any], beside: Any, stored: Iterable[Stored]) -> Iterator[str]:
    """Notes on NVFP4 blocks of another size than is announced, and on a format that is announced and not there.

    `config` is config.json, `beside` the content of FILE or None.
    """
    quantization = [found for found in (config.get("quantization_config"), beside) if isinstance(found, dict)]
    announced = {size for found in quantization for size in _group_sizes(found)}
    found: dict[int, list[str]] = {}
    for one in stored:
        if one.tensor_scale is not None:
            found.setdefault(one.block, []).append(one.name)
    for block, names in sorted(found.items()):
        if announced and block not in announced:
            yield (
                f"{len(names)} weights have a scale for {block} inputs, announced is a group_size of "
                f"{listing(sorted(announced))}: the scales count ({listing(names, 2)})"
            )
    if any("NVFP4" in str(part.get("quant_algo")) for part in map(_inner, quantization)) and not found:
        yield "quant_algo NVFP4 is announced, and no weight is NVFP4: the tensors count"


def _group_sizes(quantization: dict[str, Any]) -> Iterator[int]:
    """The sizes named for all weights, for groups of them, and for single layers."""
    inner = _inner(quantization)
    groups = (group.get("weights") for group in _values(inner.get("config_groups")))
    for part in (inner, *groups, *_values(inner.get("quantized_layers"))):
        size = part.get("group_size") if isinstance(part, dict) else None
        if type(size) is int and size > 0:
            yield size


def _inner(quantization: dict[str, Any]) -> dict[str, Any]:
    """FILE has it one level deeper."""
    inner = quantization.get("quantization")
    return inner if isinstance(inner, dict) else quantization


def _values(found: Any) -> list[dict[str, Any]]:
    return [value for value in found.values() if isinstance(value, dict)] if isinstance(found, dict) else []
