"""A checkpoint with random weights in Hugging Face layout: for the demo, the notebooks and the tests."""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..config import Config
from ..layout import COPIES, MODEL, Leaf, leaves
from ..quantization.quantize import fp8_quantize, nvfp4_quantize
from ..system.host import count_cores

DENSE_MATRICES = ("embed_tokens", "lm_head", "shared_head", "mlp.gate.", "weights_proj", "eh_proj")
"""What every published NVFP4 or FP8 checkpoint leaves in bfloat16."""

ORIGINALS = {path: name for name, _, path in MODEL}


def write(folder: Path, cfg: Config, storage: str = "nvfp4", seed: int = 0) -> None:
    """Write config.json, three shards and their index to `folder`, which must not exist.

    `storage` of the linears: "bf16", "fp8", "nvfp4" (ModelOpt's names) or "compressed-tensors" (NVFP4).
    The tensors of one linear are dealt out over the shards, as large checkpoints do.
    """
    folder.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for i, (name, array) in enumerate(_tensors(cfg, storage, seed)):
        shards[i % len(shards)][name] = np.ascontiguousarray(array)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for shard in shards for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=1))


def _tensors(cfg: Config, storage: str, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint under its own name, made by a thread for each core."""
    encode = {"bf16": _bf16, "fp8": _fp8, "nvfp4": _modelopt, "compressed-tensors": _compressed_tensors}[storage]
    sources = {name: leaf for leaf in leaves(cfg) for name in leaf.sources}

    def tensors_of(name: str) -> list[tuple[str, np.ndarray]]:
        leaf = sources[name]
        original = COPIES.get(leaf.path)
        value = _values(leaf, ORIGINALS[original] if original else name, seed)
        matrix = value.ndim == 2 and not any(part in name for part in DENSE_MATRICES)
        return encode(name, value) if matrix else [(name, value)]

    with ThreadPoolExecutor(count_cores()) as pool:
        for tensors in pool.map(tensors_of, sources):
            yield from tensors


def _values(leaf: Leaf, name: str, seed: int) -> np.ndarray:
    """Gains near 1, biases near 0, matrices that keep the scale of what they multiply, peaked logits.

    They depend on `name`, the shape and `seed` alone.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(leaf.source_shape, np.float32)
    if len(leaf.source_shape) == 1:
        return (noise * 0.1 + (0 if "bias" in name else 1)).astype(np.float32)
    gain = 3.0 if "head" in name else 1.0
    return (noise * gain * leaf.source_shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)


def _bf16(name: str, w: np.ndarray):
    return [(name, w)]


def _fp8(name: str, w: np.ndarray):
    values, grid = fp8_quantize(w)
    return [(name, values), (name + "_scale_inv", grid)]


def _modelopt(name: str, w: np.ndarray):
    codes, block_scale, tensor_scale = nvfp4_quantize(w)
    return [(name, codes), (name + "_scale", block_scale), (name + "_scale_2", tensor_scale.reshape(()))]


def _compressed_tensors(name: str, w: np.ndarray):
    codes, block_scale, tensor_scale = nvfp4_quantize(w)
    inverse = 1 / tensor_scale.reshape(1)
    return [(name + "_packed", codes), (name + "_scale", block_scale), (name + "_global_scale", inverse)]
