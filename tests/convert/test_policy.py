"""Which weight becomes what: presets, files, and what cannot be asked for."""

import collections
import dataclasses
import json
import types
from pathlib import Path

import pytest

from convert.detect import Stored
from convert.header import Tensor
from convert.plan import plan
from convert.policy import DEFAULTS, LINEARS, PRESETS, Chooser, Policy, policy, recipe
from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError
from dsv32_jax.layout import leaves


def tensor(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name, Path("no-file"), dtype, shape, 0, 0)


def stored(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (32, 64)) -> Stored:
    if dtype == "F8_E4M3":
        grid = tensor(name + "_scale_inv", "F32", 1, 1)
        return Stored("deepseek-fp8", "fp8_block", shape, 128, tensor(name, dtype, *shape), grid)
    return Stored("dense", "dense", shape, 1, tensor(name, dtype, *shape))


def as_shipped(cfg: Config) -> types.SimpleNamespace:
    """The headers of a checkpoint of `cfg` as DeepSeek ships it: FP8 with grids of scales, the rest in bfloat16."""
    tensors = {}
    for leaf in leaves(cfg):
        for name in leaf.sources:
            quantized = name.split(".")[-2] in LINEARS
            tensors[name] = tensor(name, "F8_E4M3" if quantized else "BF16", *leaf.source_shape)
            if quantized:
                grid = (-(-size // 128) for size in leaf.source_shape)
                tensors[name + "_scale_inv"] = tensor(name + "_scale_inv", "F32", *grid)
    folder = Path("deepseek")
    return types.SimpleNamespace(config=cfg.to_dict(), tensors=tensors, notes=[], folder=folder, identity=[])


@pytest.fixture(scope="module")
def shipped(real):
    return as_shipped(real)


PUBLISHED = {
    # to, policy: weights that become NVFP4 (nvfp4.md, sections 0 and 1), and billions of bytes.
    ("nvfp4", "full"): (45_932, 391.2),
    ("nvfp4", "nvidia"): (58 * 3 * 257 + 9 + 61, 415.0),
    ("nvfp4", "default"): (58 * 3 * 257 + 9 + 61, 394.1),
    ("nvfp4", "experts-only"): (58 * 3 * 256, 398.4),
}


@pytest.mark.parametrize("to, preset", PUBLISHED)
def test_presets_give_the_checkpoints_that_are_published(to, preset, shipped):
    weights, size = PUBLISHED[to, preset]
    whole = plan(shipped, recipe=recipe(to, preset, "rtn", "own"))
    assert whole.conversions["fp8 -> nvfp4"] == weights
    assert whole.conversions.get("fp8 -> bf16", 0) == (45_932 - weights if preset == "nvidia" else 0)
    assert whole.nbytes / 1e9 == pytest.approx(size, rel=0.002)
