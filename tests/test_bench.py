"""The benches at tiny sizes: what they count is right, whatever they time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.bench import load as bench_load, measure
from dsv32_jax.checkpoint import random_weights
from dsv32_jax.errors import CheckpointError
from dsv32_jax.layout import leaves
from dsv32_jax.model.experts import apply_experts
from dsv32_jax.quantization.formats import NVFP4, dequantize


def test_random_leaves(tiny):
    """Standard deviation (inputs)^-0.5, every code, every scale a number; repeatable, and different for every path."""
    make, other = random_weights.leaf_maker(tiny), random_weights.leaf_maker(tiny, seed=1)
    firsts = set()
    for leaf in leaves(tiny):
        weight = make(leaf.path)
        values = np.asarray(dequantize(weight, np.float32))
        assert values.shape == leaf.shape and np.isfinite(values).all()
        firsts.add(tuple(values.flat[:8]))
        again, differs = make(leaf.path), other(leaf.path)
        assert all(map(np.array_equal, jax.tree.leaves(weight), jax.tree.leaves(again)))
        assert not np.array_equal(values, dequantize(differs, np.float32))
        if len(leaf.letters) == 1:
            assert abs(values.mean() - (0 if "bias" in leaf.path else 1)) < 0.1
        else:
            assert abs(values.std() * leaf.source_shape[-1] ** 0.5 - 1) < 0.2
        if isinstance(weight, NVFP4):
            codes = np.asarray(weight.codes)
            assert set((codes & 15).flat) == set((codes >> 4).flat) == set(range(16))
            assert not np.isnan(np.asarray(weight.block_scale, np.float32)).any()
            assert weight.tensor_scale.shape == (leaf.shape[0] if leaf.stacked else 1, *[1] * (len(leaf.shape) - 1))
    assert len(firsts) == len(leaves(tiny))


def test_hash_is_even():
    """Bytes of a hash are uniform, and neighbours along every axis are independent."""
    bits = np.asarray(random_weights.hash_indices((64, 64, 64), jax.numpy.uint32(7))).astype(np.uint8)
    assert abs(np.bincount(bits.ravel(), minlength=256) / bits.size * 256 - 1).max() < 0.2
    for axis in range(3):
        following = np.roll(bits, 1, axis)
        assert abs(np.corrcoef(bits.ravel(), following.ravel())[0, 1]) < 0.01


def test_load_rows(tiny):
    """A plain read, a copied load with its memory, a mapped load and the first token after it."""
    cfg = dataclasses.replace(tiny, num_nextn_predict_layers=0, num_hidden_layers=2)
    found = bench_load.measure_load(cfg=cfg)
    speeds = ("plain_read_gbps", "copied_gbps", "mapped_seconds", "checked_gbps", "first_token_seconds")
    assert all(found[key] > 0 for key in speeds) and found["peak_over_model_bytes"] >= 0
    assert found["bytes"] > cfg.vocab_size * cfg.hidden_size * 2
    rows = bench_load.list_rows(found)
    assert [row["part"] for row in rows] == ["plain read", "copied", "mapped", "checked", "first token"]
    assert list(measure.format_table(bench_load.COLUMNS, rows))[2].startswith("copied ")


def test_load_of_something_else(tmp_path):
    """A folder that was not converted is an error, not a slow load."""
    with pytest.raises(CheckpointError, match="not a converted checkpoint"):
        bench_load.measure_load(tmp_path)


def test_temporaries_do_not_grow_with_the_experts():
    """What the program needs besides the bank is the same for 16 and 64 experts: it picks before it converts."""

    def temporaries(experts: int) -> int:
        codes = jax.ShapeDtypeStruct((experts, 64, 48), jnp.uint8)
        scale = jax.ShapeDtypeStruct((experts, 64, 6), jnp.float8_e4m3fn)
        wide = NVFP4(codes, scale, jax.ShapeDtypeStruct((experts, 1, 1), jnp.float32))
        codes = jax.ShapeDtypeStruct((experts, 96, 32), jnp.uint8)
        scale = jax.ShapeDtypeStruct((experts, 96, 4), jnp.float8_e4m3fn)
        tall = NVFP4(codes, scale, jax.ShapeDtypeStruct((experts, 1, 1), jnp.float32))
        x = jax.ShapeDtypeStruct((1, 96), jnp.bfloat16)
        ids, gates = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 4), jnp.float32)
        lowered = jax.jit(apply_experts).lower(x, ids, gates, wide, wide, tall)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) <= temporaries(16) + 1024
