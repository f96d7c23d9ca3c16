"""Write a checkpoint with random weights in Hugging Face layout, for benches, notebooks and tests."""

import itertools
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..config import Config
from ..layout import COPIES, MODEL, Leaf, leaves
from ..quantization.quantize import fp8_quantize, nvfp4_quantize

DENSE_MATRICES = ("embed_tokens", "lm_head", "shared_head", "mlp.gate.", "weights_proj", "eh_proj")
"""Matrices that every published NVFP4 or FP8 checkpoint leaves in bfloat16."""

ORIGINALS = {path: name for name, _, path in MODEL}


def write(folder: Path, cfg: Config, storage: str = "nvfp4", seed: int = 0) -> None:
    """Write config.json, three shards and their index to `folder`, which must not exist.

    `storage` of the linear layers is "bf16", "fp8", "nvfp4" (ModelOpt's names) or "compressed-tensors" (NVFP4). The
    tensors of one layer are spread over the shards, as in large checkpoints.
    """
    shards: list[dict[str, np.ndarray]] = [{}, {}, {}]
    sources = {name: leaf for leaf in leaves(cfg) for name in leaf.sources}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: _generate(sources[name], name, storage, seed), sources)
        for i, (name, array) in enumerate(itertools.chain.from_iterable(found)):
            shards[i % len(shards)][name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for shard in shards for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=1))


def _generate(leaf: Leaf, name: str, storage: str, seed: int) -> list[tuple[str, np.ndarray]]:
    """Return the tensors of the weight `name`. A copy has the values of its original."""
    original = COPIES.get(leaf.path)
    values = _generate_values(leaf, ORIGINALS[original] if original else name, seed)
    return _encode(name, values, storage) if is_quantized(leaf) else [(name, values)]


def is_quantized(leaf: Leaf) -> bool:
    """Return whether published NVFP4 and FP8 checkpoints quantize the parameter."""
    return len(leaf.source_shape) == 2 and not any(part in leaf.sources[0] for part in DENSE_MATRICES)


def _generate_values(leaf: Leaf, name: str, seed: int) -> np.ndarray:
    """Return gains near 1, biases near 0, or a matrix that preserves scale (a head: peaked logits).

    The values depend on `name`, shape and `seed` alone.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(leaf.source_shape, np.float32)
    if len(leaf.source_shape) == 1:
        return (noise * 0.1 + (0 if "bias" in name else 1)).astype(np.float32)
    gain = 3.0 if "head" in name else 1.0
    return (noise * gain * leaf.source_shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)


def _encode(name: str, w: np.ndarray, storage: str) -> list[tuple[str, np.ndarray]]:
    if storage == "bf16":
        return [(name, w)]
    if storage == "fp8":
        values, grid = fp8_quantize(w)
        return [(name, values), (name + "_scale_inv", grid)]
    codes, block_scale, tensor_scale = nvfp4_quantize(w)
    if storage == "nvfp4":
        return [(name, codes), (name + "_scale", block_scale), (name + "_scale_2", tensor_scale.reshape(()))]
    inverse = 1 / tensor_scale.reshape(1)
    return [(name + "_packed", codes), (name + "_scale", block_scale), (name + "_global_scale", inverse)]
