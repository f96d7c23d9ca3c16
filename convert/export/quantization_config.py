"""The configuration files that tell other software how an exported checkpoint is quantized.

vLLM, SGLang and TensorRT-LLM look up every module in them. The real model has 44,000 experts' matrices, so whole layers
and experts are named by patterns, which match nothing else.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_jax import __version__

from .encode import Target

MODULE = re.compile(r"(model\.layers\.)(\d+)(\..*?)(?:(experts\.)(\d+)(\..*))?")
"""A module of a layer; an expert's has its number in a group of its own."""

PREFIXES = (re.compile(r"model\.layers\.\d+(?=\.)"), re.compile(r"model\.layers\.\d+\.mlp\.experts(?=\.\d)"))
"""The groups that one pattern of ModelOpt can name: a layer, the experts of a layer."""

DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

Targets = Mapping[str, Target]
"""The target of every matrix, by module name (without ".weight")."""


def modelopt_config(targets: Targets) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """ModelOpt's (quantization_config of config.json, hf_quant_config.json); DeepSeek's own where all is FP8.

    The algorithm quantizes weights alone. There are no activation scales, and a reader that is told NVFP4 computes
    with whatever it finds in their place (vLLM: uninitialized memory).
    """
    kinds = {target.kind for target in targets.values()}
    if "modelopt-nvfp4" not in kinds:
        return (dict(DEEPSEEK) if "deepseek-fp8" in kinds else None), None
    excluded = list_globs({name for name, target in targets.items() if target.kind == "dense"}, targets)
    block = min(target.block for target in targets.values() if target.kind == "modelopt-nvfp4")
    quantization = {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None, "group_size": block}
    producer = {"name": "modelopt", "version": f"dsv32-jax {__version__}"}
    config = {"quant_method": "modelopt", "producer": producer, **quantization, "ignore": excluded}
    return config, {"producer": producer, "quantization": {**quantization, "exclude_modules": excluded}}


def compressed_tensors_config(targets: Targets) -> dict[str, Any] | None:
    """compressed-tensors' quantization_config: a group for each kind of storage, everything else ignored."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, target in targets.items():
        if target.kind != "dense":
            groups.setdefault((target.kind, _strategy(target), target.block), []).append(name)
    if not groups:
        return None
    found = {}
    for i, ((kind, strategy, block), names) in enumerate(sorted(groups.items())):
        weights: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
        if kind == "packed-nvfp4":
            weights |= {"num_bits": 4, "group_size": block, "scale_dtype": "torch.float8_e4m3fn"}
        else:
            weights |= {"num_bits": 8, **({"block_structure": [128, 128]} if strategy == "block" else {})}
        found[f"group_{i}"] = {
            "format": "nvfp4-pack-quantized" if kind == "packed-nvfp4" else "float-quantized",
            "targets": ["Linear"] if len(groups) == 1 else list_regexes(names),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    formats = {group["format"] for group in found.values()}
    dense = [name for name, target in targets.items() if target.kind == "dense"]
    experts = dict.fromkeys(name for name in dense if (match := MODULE.fullmatch(name)) and match[4])
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": [*(name for name in dense if name not in experts), *list_regexes(experts)],
        "kv_cache_scheme": None,
    }


def _strategy(target: Target) -> str:
    if target.kind == "packed-nvfp4":
        return "tensor_group"
    (rows, width), shape = target.tensors[0].shape, target.tensors[1].shape
    if shape in ((), (1,)) or (shape == (1, 1) and max(rows, width) > target.block):
        return "tensor"
    return "channel" if shape == (rows, 1) and rows > 1 else "block"


def list_globs(chosen: set[str], modules: Iterable[str]) -> list[str]:
    """Shell patterns for the `chosen` ones of all `modules`: one for a layer, or a layer's experts, of which all are
    chosen, and the names of the others."""
    members: dict[str, set[str]] = {}
    for name in modules:
        for match in filter(None, (prefix.match(name) for prefix in PREFIXES)):
            members.setdefault(match[0], set()).add(name)
    whole = {prefix: f"{prefix}*" if prefix.endswith(".experts") else f"{prefix}.*" for prefix in members}
    whole = {prefix: pattern for prefix, pattern in whole.items() if members[prefix] <= chosen}
    found: dict[str, None] = {}
    for name in sorted(chosen):
        matches = filter(None, (prefix.match(name) for prefix in PREFIXES))
        found[next((whole[match[0]] for match in matches if match[0] in whole), name)] = None
    return list(found)


def list_regexes(names: Iterable[str]) -> list[str]:
    """Patterns "re:^...$" that match `names` and no other module: layers and experts are listed in them."""
    experts_by_layer: dict[tuple[str, ...], dict[str, list[str]]] = {}
    found = []
    for name in names:
        match = MODULE.fullmatch(name)
        if match is None:
            found.append(f"re:^{re.escape(name)}$")
            continue
        head, layer, middle, experts, expert, rest = match.groups(default="")
        experts_by_layer.setdefault((head, middle + experts, rest), {}).setdefault(layer, []).append(expert)
    for (head, middle, rest), by_layer in experts_by_layer.items():
        layers_by_experts: dict[str, list[str]] = {}
        for layer, experts in by_layer.items():
            numbers = f"({'|'.join(sorted(experts, key=int))})" if experts[0] else ""
            layers_by_experts.setdefault(numbers, []).append(layer)
        for numbers, layers in layers_by_experts.items():
            text = f"{re.escape(head)}({'|'.join(layers)}){re.escape(middle)}{numbers}{re.escape(rest)}"
            found.append(f"re:^{text}$")
    return found
