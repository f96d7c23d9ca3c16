"""The configuration files that tell other software how an exported checkpoint is quantized.

They are written for the readers of vLLM, SGLang and TensorRT-LLM: a module is excluded by its exact name; where all
experts of a layer, or a whole layer, are alike, one pattern names them and nothing else.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_jax import __version__

from .targets import Target

EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.")
LAYER = re.compile(r"(model\.layers\.\d+)\.")

DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

Targets = Mapping[str, Target]
"""Module name (without ".weight") of every matrix, and what it is written as."""


def modelopt(targets: Targets) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(quantization_config of config.json, hf_quant_config.json) of ModelOpt; DeepSeek's own where all is FP8.

    The algorithm is the one of weights alone: there are no activation scales, and a reader that is told NVFP4 computes
    with whatever it has in their place (vLLM: uninitialized memory).
    """
    kinds = {target.kind for target in targets.values()}
    if "modelopt-nvfp4" not in kinds:
        return (dict(DEEPSEEK) if "deepseek-fp8" in kinds else None), None
    excluded = named({name for name, target in targets.items() if target.kind == "dense"}, targets)
    block = min(target.block for target in targets.values() if target.kind == "modelopt-nvfp4")
    quantization = {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None, "group_size": block}
    producer = {"name": "modelopt", "version": f"dsv32-jax {__version__}"}
    config = {"quant_method": "modelopt", "producer": producer, **quantization, "ignore": excluded}
    return config, {"producer": producer, "quantization": {**quantization, "exclude_modules": excluded}}


def compressed_tensors(targets: Targets) -> dict[str, Any] | None:
    """quantization_config of compressed-tensors: a group for each way of storing, everything else ignored."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, target in targets.items():
        if target.kind != "dense":
            strategy = "tensor_group" if target.kind == "packed-nvfp4" else target.strategy
            groups.setdefault((target.kind, strategy, target.block), []).append(name)
    if not groups:
        return None
    formats = {_format(kind) for kind, _, _ in groups}
    found = {}
    for i, ((kind, strategy, block), names) in enumerate(sorted(groups.items())):
        found[f"group_{i}"] = {
            "format": _format(kind),
            "targets": ["Linear"] if len(groups) == 1 else regexes(names),
            "weights": _weights(kind, strategy, block),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": _ignored([name for name, target in targets.items() if target.kind == "dense"]),
        "kv_cache_scheme": None,
    }


def named(chosen: set[str], everything: Iterable[str]) -> list[str]:
    """`chosen` modules: a layer or the experts of a layer by a pattern where all of it is chosen, others by name."""
    members: dict[str, set[str]] = {}
    for name in everything:
        for pattern in (LAYER, EXPERTS):
            if match := pattern.match(name):
                members.setdefault(match[1], set()).add(name)
    whole = {prefix for prefix, names in members.items() if names <= chosen}
    found: dict[str, None] = {}
    for name in sorted(chosen):
        prefixes = [match[1] for pattern in (LAYER, EXPERTS) if (match := pattern.match(name))]
        prefix = next((prefix for prefix in prefixes if prefix in whole), None)
        found[name if prefix is None else f"{prefix}*" if prefix.endswith(".experts") else f"{prefix}.*"] = None
    return list(found)


def regexes(names: Iterable[str]) -> list[str]:
    """Patterns "re:^...$" that match `names` and no other module: layers and experts are listed in them."""
    found: dict[tuple[str, str, str], dict[str, set[int]]] = {}
    for name in names:
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*?)(?:(experts\.)(\d+)(\..*))?", name)
        if match is None:
            found.setdefault((name, "", ""), {})
            continue
        head, layer, middle, experts, expert, rest = match.groups()
        layers = found.setdefault((head, middle + (experts or ""), rest or ""), {})
        layers.setdefault(layer, set()).update([int(expert)] if expert else [])
    return [text for key, layers in found.items() for text in _regex(*key, layers)]


def _regex(head: str, middle: str, rest: str, layers: dict[str, set[int]]) -> list[str]:
    if not layers:
        return [f"re:^{re.escape(head)}$"]
    by_experts: dict[frozenset[int], list[str]] = {}
    for layer, experts in layers.items():
        by_experts.setdefault(frozenset(experts), []).append(layer)
    texts = []
    for experts, chosen in by_experts.items():
        number = f"({'|'.join(map(str, sorted(experts)))})" if experts else ""
        texts.append(f"re:^{re.escape(head)}({'|'.join(chosen)}){re.escape(middle)}{number}{re.escape(rest)}$")
    return texts


def _ignored(names: list[str]) -> list[str]:
    """Modules by name, experts (of which a layer has hundreds) by pattern."""
    experts = [name for name in names if EXPERTS.match(name)]
    return [*(name for name in names if not EXPERTS.match(name)), *regexes(experts)]


def _format(kind: str) -> str:
    return "nvfp4-pack-quantized" if kind == "packed-nvfp4" else "float-quantized"


def _weights(kind: str, strategy: str, block: int) -> dict[str, Any]:
    common = {"type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    if kind == "packed-nvfp4":
        return {**common, "num_bits": 4, "group_size": block, "scale_dtype": "torch.float8_e4m3fn"}
    structure = {"block_structure": [128, 128]} if strategy == "block" else {}
    return {**common, "num_bits": 8, **structure}
