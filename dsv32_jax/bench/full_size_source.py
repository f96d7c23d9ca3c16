"""A checkpoint of the true dimensions, written in little memory, for `dsv32 bench convert`.

Every tensor is a window of the same Gaussian numbers in its format, so errors are those of Gaussian weights.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..checkpoint.random_checkpoint import DENSE_MATRICES
from ..config import Config
from ..layout import leaves
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK, fp8_quantize, nvfp4_quantize

SUFFIXES = {"fp8": ("", "_scale_inv"), "nvfp4": ("", "_scale", "_scale_2")}
"""Suffixes of a weight's tensors, by storage (DeepSeek's FP8, ModelOpt's NVFP4)."""

POOL_SHAPE = (4096, 7168)
DEVIATION = 0.02
SHARD_BYTES = 1_000_000_000

Pools = dict[str, np.ndarray]
"""Flat numbers to cut windows from, by the suffix of a tensor; "dense" and "vector" for what is not quantized."""


def write(folder: Path, cfg: Config, storage: str) -> None:
    """Write config.json, shards of about 1 GB and their index to a new `folder`; linears are in "fp8" or "nvfp4".

    Takes the memory of two shards.
    """
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_make_shards(cfg, _make_pools(storage)), 1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=1))


def _make_shards(cfg: Config, pools: Pools) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, shape in {name: leaf.source_shape for leaf in leaves(cfg) for name in leaf.sources}.items():
        for tensor, size, pool in _list_tensors(name, shape, pools):
            start = zlib.crc32(tensor.encode()) % (1 + pool.size // 2)
            shard[tensor] = np.resize(pool[start:], size)
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    yield shard


def _list_tensors(name: str, shape: tuple[int, ...], pools: Pools) -> Iterator[tuple[str, tuple, np.ndarray]]:
    """Yield name, shape and pool of every tensor of a weight."""
    if len(shape) == 1 or any(part in name for part in DENSE_MATRICES):
        yield name, shape, pools["vector" if len(shape) == 1 else "dense"]
        return
    out, width = shape
    sizes = {
        "": (out, width * pools[""].size // math.prod(POOL_SHAPE)),
        "_scale_inv": (-(-out // FP8_BLOCK), -(-width // FP8_BLOCK)),
        "_scale": (out, width // NVFP4_BLOCK),
        "_scale_2": (),
    }
    yield from ((name + suffix, size, pools[suffix]) for suffix, size in sizes.items() if suffix in pools)


def _make_pools(storage: str) -> Pools:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(POOL_SHAPE, np.float32) * np.float32(DEVIATION)).astype(ml_dtypes.bfloat16)
    stored = fp8_quantize(w) if storage == "fp8" else nvfp4_quantize(w)
    pools = {suffix: array.reshape(-1) for suffix, array in zip(SUFFIXES[storage], stored, strict=True)}
    return {**pools, "dense": w.reshape(-1), "vector": 1 + w[0].astype(np.float32)}
