"""Formats: the error of quantizing, exactness of everything else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dsv32_jax.model import ops
from dsv32_jax.quantization import quantize
from dsv32_jax.quantization.formats import NVFP4, Fp8Block, dequantize
from tests import models

FULL_WIDTH = st.sampled_from([16, 48, 96])
"""Few shapes, so that few programs are compiled."""

EVERYDAY = st.floats(min_value=-1e4, max_value=1e4, width=32)


def matrices(columns=FULL_WIDTH, elements=EVERYDAY):
    """float32 matrices of 1 to 3 rows."""

    def of_size(width):
        return st.lists(st.lists(elements, min_size=width, max_size=width), min_size=3, max_size=3)

    return columns.flatmap(of_size).map(lambda rows: np.asarray(rows, np.float32))


@given(matrices())
def test_nvfp4_error_bound(w):
    """Every element is off by at most one part in six of its block's largest element (half the widest gap, and the
    scale's own rounding), or by what the smallest scale can tell apart."""
    codes, block_scale, tensor_scale = quantize.nvfp4_quantize(w)
    got = quantize.nvfp4_dequantize(codes, block_scale, tensor_scale)
    blocks = np.abs(w).reshape(3, -1, 16)
    largest = np.repeat(blocks.max(-1), 16, axis=-1)
    smallest = quantize.E4M3_TINY * float(tensor_scale.item()) * 0.25
    assert np.all(np.abs(got - w) <= largest / 6 * 1.07 + smallest)
    assert np.all(np.sign(got) * np.sign(w) >= 0)


@given(matrices())
def test_fp8_error_bound(w):
    """Every element is off by at most one part in sixteen of itself, or by half the smallest FP8 value."""
    values, grid = quantize.fp8_quantize(w)
    got = quantize.fp8_dequantize(values, np.repeat(grid, 128, axis=0)[:3])
    step = np.float32(grid[0, 0])
    assert np.all(np.abs(got - w) <= np.abs(w) / 16 + step * quantize.E4M3_TINY / 2)
    assert np.log2(grid).tolist() == np.round(np.log2(grid)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_error_of_a_gaussian(seed):
    """Round-to-nearest NVFP4 of Gaussian weights is 9.5 % off in norm, FP8 2.6 %."""
    w = np.random.default_rng(seed).standard_normal((256, 2048), np.float32) * np.float32(0.02)
    got = quantize.nvfp4_dequantize(*quantize.nvfp4_quantize(w))
    assert np.linalg.norm(got - w) / np.linalg.norm(w) == pytest.approx(0.095, abs=0.002)
    values, grid = quantize.fp8_quantize(w)
    got = quantize.fp8_dequantize(values, np.repeat(grid, 128, axis=0))
    assert np.linalg.norm(got - w) / np.linalg.norm(w) == pytest.approx(0.026, abs=0.003)


@given(matrices(), st.integers(0, 2), st.integers(0, 5))
def test_zero_blocks(w, row, block):
    """A block of zeros reads as zeros and leaves every other block as it was."""
    start = block * 16 % w.shape[-1]
    emptied = w.copy()
    emptied[row, start : start + 16] = 0
    got = quantize.nvfp4_dequantize(*quantize.nvfp4_quantize(emptied))
    assert not got[row, start : start + 16].any()
    if np.abs(emptied).max() == np.abs(w).max():
        others = np.ones_like(w, bool)
        others[row, start : start + 16] = False
        np.testing.assert_array_equal(got[others], quantize.nvfp4_dequantize(*quantize.nvfp4_quantize(w))[others])


@given(matrices(elements=st.floats(min_value=-(2.0**-100), max_value=2.0**-100, width=32)))
def test_tiny_matrices(w):
    """Weights near the bottom of float32 lose precision, and never become infinite or NaN."""
    codes, block_scale, tensor_scale = quantize.nvfp4_quantize(w)
    assert np.isfinite(block_scale.astype(np.float32)).all() and np.isfinite(tensor_scale).all()
    got = quantize.nvfp4_dequantize(codes, block_scale, tensor_scale)
    assert np.isfinite(got).all() and np.abs(got).max() <= 1.1 * max(np.abs(w).max(), 1e-37)


@given(st.sampled_from([16, 32, 96]), st.binary(min_size=3 * 54, max_size=3 * 54), st.floats(2.0**-20, 2.0, width=32))
def test_nvfp4_on_device_is_the_numpy_twin(width, raw, tensor_scale):
    """Any bytes at all, NaN scales included, mean the same to both, bit for bit, compiled or not."""
    raw = np.frombuffer(raw, np.uint8).reshape(3, -1)
    codes = raw[:, : width // 2]
    block_scale = raw[:, 48 : 48 + width // 16].copy().view(ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), tensor_scale, np.float32)
    on_host = quantize.nvfp4_dequantize(codes, block_scale, scale)
    on_device = dequantize(NVFP4(jnp.asarray(codes), jnp.asarray(block_scale), jnp.asarray(scale)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(on_device).view(np.uint32), on_host.view(np.uint32))


@given(st.sampled_from([1, 127, 128, 129, 192, 256, 300]), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_fp8_on_device_is_the_numpy_twin(width, seed):
    """Partial last blocks and scales of any kind: both multiply in float32 and round to bfloat16."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 127, (5, width), np.uint8) | (rng.integers(0, 2, (5, width), np.uint8) << 7)
    values = values.view(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1e-4, 2, (5, -(-width // 128))).astype(np.float32)
    on_host = quantize.fp8_dequantize(values, scale)
    on_device = dequantize(Fp8Block(jnp.asarray(values), jnp.asarray(scale)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(on_device), on_host)
    literal = np.array(
        [[float(values[i, k]) * float(scale[i, k // 128]) for k in range(width)] for i in range(5)], np.float32
    )
    np.testing.assert_array_equal(on_host, literal.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (130, 300), (64, 129), (192, 256), (1, 1)])
def test_fp8_partial_blocks(rows, columns):
    """Blocks are counted by 128 from the start; the last ones hold what is left."""
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    w[128:] *= 1000
    values, grid = quantize.fp8_quantize(w)
    assert grid.shape == (-(-rows // 128), -(-columns // 128)) and grid.dtype == np.float32
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scaled = np.abs(w[block]).max() / grid[i, j]
            assert 224 < scaled <= 448
            np.testing.assert_array_equal(values[block], (w[block] / grid[i, j]).astype(ml_dtypes.float8_e4m3fn))
    weight = models.quantized(jnp.asarray(w), "fp8")
    assert weight.block_scale.shape == (rows, grid.shape[1])
    np.testing.assert_array_equal(weight.block_scale, np.repeat(grid, 128, axis=0)[:rows])


@pytest.mark.parametrize("storage", ["nvfp4", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("spec", "shape"), [("btd,hnd->bthn", (3, 24, 96)), ("btd,fd->btf", (5, 96))])
def test_einsum_over_a_quantized_weight(storage, dtype, spec, shape):
    """The product with a stored weight is that with its exact values in float32, whatever the activations are in:
    neither code x scale nor the tensor scale is rounded to bfloat16."""
    rng = np.random.default_rng(1)
    w = models.quantized(jnp.asarray(rng.standard_normal(shape, np.float32)), storage)
    assert w.shape == shape
    x = jnp.asarray(rng.standard_normal((2, 3, 96), np.float32)).astype(dtype)
    assert dequantize(w, dtype).shape == shape and dequantize(w, dtype).dtype == dtype
    plain = np.asarray(dequantize(w, jnp.float32), np.float64)
    want = np.einsum(spec, np.asarray(x, np.float64), plain)
    size = np.einsum(spec, np.abs(np.asarray(x, np.float64)), np.abs(plain))
    got = jax.jit(ops.einsum32, static_argnums=0)(spec, x, w)
    assert got.dtype == jnp.float32 and np.all(np.abs(got - want) <= 1e-6 * size)
    np.testing.assert_array_equal(jax.jit(ops.einsum, static_argnums=0)(spec, x, w), got.astype(dtype))


def test_stacks_have_a_scale_for_each_matrix():
    """Experts are stacked with their own tensor scales; one expert's matrix is what it was alone."""
    w = np.random.default_rng(2).standard_normal((3, 4, 32)).astype(np.float32) * np.array([1, 10, 100])[:, None, None]
    stack = models.quantized(jnp.asarray(w, jnp.float32), "nvfp4", stacked=True)
    assert stack.tensor_scale.shape == (3, 1, 1) and len(np.unique(stack.tensor_scale)) == 3
    for i in range(3):
        alone = models.quantized(jnp.asarray(w[i], jnp.float32), "nvfp4")
        np.testing.assert_array_equal(dequantize(stack, jnp.float32)[i], dequantize(alone, jnp.float32))


def test_blocks_of_32():
    """The block is what the scales say: one scale for 32 elements is read as such."""
    codes = np.random.default_rng(3).integers(0, 256, (2, 32), np.uint8)
    scale = np.array([[1, 2], [4, 8]], ml_dtypes.float8_e4m3fn)
    got = quantize.nvfp4_dequantize(codes, scale, np.ones((1, 1), np.float32))
    want = quantize.nvfp4_dequantize(codes, np.repeat(scale, 2, axis=-1), np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(got, want)
    on_device = dequantize(NVFP4(*map(jnp.asarray, (codes, scale, np.ones((1, 1), np.float32)))), jnp.float32)
    np.testing.assert_array_equal(on_device, want)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantizer", [quantize.nvfp4_quantize, quantize.fp8_quantize])
def test_values_that_are_not_finite_are_refused(bad, quantizer):
    """They are counted, and nothing is quantized."""
    w = np.ones((2, 32), np.float32)
    w[0, 3] = w[1, 5] = bad
    with pytest.raises(ValueError, match="2 of 64 values are not finite"):
        quantizer(w)


def test_a_partial_nvfp4_block_is_refused():
    """NVFP4 has no partial blocks: the message names the size."""
    with pytest.raises(ValueError, match="16.*24"):
        quantize.nvfp4_quantize(np.ones((2, 24), np.float32))


def test_storage_sizes():
    """4.5 bits a weight and one float32; FP8 a byte and 32 bits for 128."""

    def size(weight):
        return sum(part.nbytes for part in jax.tree.leaves(weight))

    w = jnp.ones((128, 256))
    assert size(models.quantized(w, "nvfp4")) == 128 * 256 * 9 // 16 + 4
    assert size(models.quantized(w, "fp8")) == 128 * 256 + 128 * 2 * 4
