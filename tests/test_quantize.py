"""The host's quantizers against short versions of themselves: the same bytes, whatever the values and the pieces."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from dsv32_jax.quantization import quantize
from dsv32_jax.quantization.quantize import E2M1, E4M3, RTN, nvfp4_dequantize, nvfp4_quantize
from dsv32_jax.quantization.scale_search import SCALINGS, SquaredError, rounding_error

BF16, F8, F4 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def short_nvfp4(w):
    """Round to nearest in the fewest lines: what `nvfp4_quantize` must equal bit for bit."""
    w = w.astype(np.float32)
    tensor_scale = np.float32(np.abs(w).max() / np.float32(2688)) or np.float32(1)
    blocks = w.reshape(len(w), -1, 16)
    scale = np.abs(blocks).max(axis=-1) / np.float32(np.float32(6) * tensor_scale)
    scale = np.clip(np.where(scale == 0, np.float32(1), scale), np.float32(2**-9), np.float32(448)).astype(F8)
    codes = (blocks / (scale.astype(np.float32) * tensor_scale)[..., None]).astype(F4).view(np.uint8) & 15
    codes = codes.reshape(w.shape)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale, np.full((1, 1), tensor_scale)


def short_fp8(w):
    """FP8 of whole blocks in the fewest lines."""
    blocks = w.astype(np.float32).reshape(w.shape[0] // 128, 128, w.shape[1] // 128, 128)
    amax = np.maximum(np.abs(blocks).max(axis=(1, 3)), np.float32(1e-4))
    grid = np.exp2(np.ceil(np.log2(amax / np.float32(448)))).astype(np.float32)
    return (blocks / grid[:, None, :, None]).astype(F8).reshape(w.shape), grid


def same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


def relative_rms(w, components):
    exact = w.astype(np.float32)
    return np.linalg.norm(nvfp4_dequantize(*components) - exact) / np.linalg.norm(exact)


@given(st.binary(min_size=256, max_size=256), st.sampled_from([BF16, np.float32, np.float16]))
def test_rounding_to_nearest_is_the_short_version(raw, dtype):
    """Any finite bits at all, of matrices whose largest element is not below 1e-30."""
    w = np.frombuffer(raw, dtype).reshape(4, -1).copy()
    w[~np.isfinite(w.astype(np.float32))] = 0
    w[np.abs(w.astype(np.float32)) > 1e37] = 1
    w[0, 0] = 3 if np.abs(w.astype(np.float32)).max() < 1e-30 else w[0, 0]
    same(nvfp4_quantize(w), short_nvfp4(w))


@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (160, 1024), (7, 16 * 8200)])
def test_pieces_of_any_size_make_the_same_bytes(dtype, shape, monkeypatch):
    w = (np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)).astype(dtype)
    whole = nvfp4_quantize(w)
    same(whole, short_nvfp4(w))
    decoded = nvfp4_dequantize(*whole)
    monkeypatch.setattr(quantize, "PIECE", 1000)
    same(nvfp4_quantize(w), whole)
    same([nvfp4_dequantize(*whole)], [decoded])


def test_ties_of_an_fp8_source():
    """An FP8 source is full of quotients that lie exactly halfway."""
    w = np.random.default_rng(1).standard_normal((256, 512), np.float32)
    values, grid = quantize.fp8_quantize(w)
    source = quantize.fp8_dequantize(values, np.repeat(grid, 128, axis=0), BF16)
    same(nvfp4_quantize(source), short_nvfp4(source))


NEAR = np.concatenate([np.arange(0, 1 << 16, dtype=np.uint32) << 16, (np.arange(0, 1 << 16, dtype=np.uint32) << 16) + 1,
                       (np.arange(1, 1 << 16, dtype=np.uint32) << 16) - 1]).view(np.float32)  # fmt: skip
"""Every float32 whose lower half is zero, and both neighbours of each: all thresholds are among them."""
QUOTIENTS = np.resize(NEAR[np.isfinite(NEAR) & ~np.signbit(NEAR)], (16, 6120))


def test_every_threshold():
    """Codes are those of the cast in ml_dtypes: just below, at and just above every halfway point."""
    codes = quantize.pack_codes(QUOTIENTS, QUOTIENTS)
    want = QUOTIENTS.astype(F4).view(np.uint8)
    np.testing.assert_array_equal(codes, want[0::2] | want[1::2] << 4)
    with np.errstate(over="ignore"):
        error = rounding_error(QUOTIENTS, *np.empty((2, *QUOTIENTS.shape), np.float32))
        np.testing.assert_array_equal(error, E2M1[want] - QUOTIENTS)


def test_signs_are_kept_and_zero_may_have_one():
    w = np.array([[-0.0, 0.0, -1e-30, 1e-30, -6, 6, 1, -1] * 2], np.float32)
    codes, _, _ = nvfp4_quantize(w)
    assert [codes[0, 0] & 15, codes[0, 0] >> 4, codes[0, 1] & 15, codes[0, 1] >> 4] == [8, 0, 8, 0]
    assert [codes[0, 2] & 15, codes[0, 2] >> 4] == [15, 7]


@pytest.mark.parametrize("amax", [0.0, 2.0**-149, 2.0**-130, 2.0**-110])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_matrices_near_the_bottom_of_float32(scaling, amax):
    """Scales stay positive and finite, nothing divides by zero."""
    w = np.full((2, 32), amax, np.float32)
    codes, block_scale, tensor_scale = nvfp4_quantize(w, SCALINGS[scaling])
    assert tensor_scale.item() > 0 and (block_scale.astype(np.float32) > 0).all()
    assert np.abs(nvfp4_dequantize(codes, block_scale, tensor_scale) - w).max() <= max(amax / 6, 2.0**-126)


def test_an_amax_from_elsewhere_fixes_the_tensor_scale():
    w = np.random.default_rng(2).standard_normal((8, 64), np.float32)
    larger = np.float32(10)
    codes, block_scale, tensor_scale = nvfp4_quantize(w, amax=larger)
    both = nvfp4_quantize(np.concatenate([w, np.full((1, 64), larger)]))
    assert tensor_scale.item() == both[2].item() == larger / np.float32(2688)
    same((codes, block_scale), (both[0][:8], both[1][:8]))


@given(st.binary(min_size=64, max_size=64), st.floats(2.0**-20, 2.0**20, width=32))
def test_dequantizing_to_bfloat16_rounds_the_exact_value_once(raw, tensor_scale):
    codes = np.frombuffer(raw, np.uint8).reshape(2, -1)
    scale = np.full((2, 4), 1.5, F8)
    parts = codes, scale, np.full((1, 1), tensor_scale, np.float32)
    same([nvfp4_dequantize(*parts, BF16)], [nvfp4_dequantize(*parts).astype(BF16)])


def test_fp8_is_the_short_version():
    w = np.random.default_rng(3).standard_normal((384, 512), np.float32) * np.float32(3)
    same(quantize.fp8_quantize(w), short_fp8(w))
    same(quantize.fp8_quantize(w.astype(BF16)), short_fp8(w.astype(BF16)))


# ------------------------------------------------------------------------------------------------ how scales are chosen

BANDS = {"rtn": (0.090, 0.103), "mse": (0.078, 0.089), "four-over-six": (0.086, 0.0895)}
GAUSSIAN = {"rtn": 0.0951, "mse": 0.0812, "four-over-six": 0.0870}


def drawn(distribution):
    rng, shape = np.random.default_rng(4), (256, 2048)
    draw = {
        "gauss": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape),
        "t5": lambda: rng.standard_t(5, shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
    }
    return (draw[distribution]() * 0.02).astype(BF16)


@pytest.mark.parametrize("distribution", ["gauss", "laplace", "t5", "uniform"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_relative_error(scaling, distribution):
    w = drawn(distribution)
    error = relative_rms(w, nvfp4_quantize(w, SCALINGS[scaling]))
    low, high = BANDS[scaling]
    assert low <= error <= high
    assert distribution != "gauss" or error == pytest.approx(GAUSSIAN[scaling], abs=0.0007)


def block_errors(w, components):
    off = nvfp4_dequantize(*components).astype(np.float64) - w.astype(np.float64)
    return np.square(off).reshape(-1, 16).sum(-1)


@pytest.mark.parametrize("distribution", ["gauss", "t5"])
def test_the_window_finds_the_best_of_all_scales(distribution):
    """No positive finite E4M3 code gives any block less error, but for float32's own rounding."""
    w = drawn(distribution)[:16]
    codes, block_scale, tensor_scale = nvfp4_quantize(w, SCALINGS["mse"])
    magnitude = np.ascontiguousarray(np.abs(w.astype(np.float32)).reshape(-1, 16).T)
    blocks = magnitude.shape[1]
    squared_error = SquaredError(magnitude, tensor_scale.item())
    every = [squared_error(np.full(blocks, code, np.uint8)) for code in range(1, 127)]
    found = squared_error(block_scale.view(np.uint8).ravel())
    beaten = np.min(every, axis=0) < found * (1 - 1e-6)
    assert beaten.mean() < (0.0001 if distribution == "gauss" else 0.01)
    nearest = block_errors(w, nvfp4_quantize(w))
    assert (block_errors(w, (codes, block_scale, tensor_scale)) <= nearest * (1 + 1e-6)).all()


def test_equal_scales_stay_nearest():
    """Where several scales make no error, the nearest is kept: blocks of zeros and of powers of two."""
    w = np.zeros((4, 64), np.float32)
    w[1, :16] = 6
    w[2, :16] = np.tile([3, 1.5], 8)
    nearest, searched = nvfp4_quantize(w), nvfp4_quantize(w, SCALINGS["mse"])
    same(searched, nearest)


def test_four_over_six_takes_the_better_of_both():
    w = drawn("gauss")
    components = nvfp4_quantize(w, SCALINGS["four-over-six"])
    tensor_scale = components[2].item()
    assert tensor_scale == np.float32(np.abs(w.astype(np.float32)).max() / np.float32(6 * 256))
    six = nvfp4_quantize(w, RTN._replace(largest=256.0))
    amax = np.abs(w.astype(np.float32)).reshape(-1, 16).max(-1)
    four_scale = (amax / np.float32(np.float32(4) * np.float32(tensor_scale))).astype(F8)
    taken, six_scale = components[1].view(np.uint8).ravel(), six[1].view(np.uint8).ravel()
    assert ((taken == six_scale) | (taken == four_scale.view(np.uint8))).all()
    assert 0.40 < (taken != six_scale).mean() < 0.50
    assert E4M3[taken].max() <= 384
    assert (block_errors(w, components) <= block_errors(w, six) * (1 + 1e-6)).all()
