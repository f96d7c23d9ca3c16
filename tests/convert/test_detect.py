"""How a weight is stored, from names and dtypes alone."""

import ml_dtypes
import numpy as np
import pytest

from convert.read import weights
from convert.read.weights import MissingTensorsError, detect
from convert.verify import inverse
from dsv32_jax.errors import CheckpointError
from dsv32_jax.quantization.quantize import fp8_dequantize, nvfp4_dequantize, nvfp4_quantize

from . import fakes

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
OUT, IN = 192, 320


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


ACCEPTED = {
    "bf16": ({"": zeros(BF16, OUT, IN)}, "dense", 1),
    "f16": ({"": zeros(np.float16, OUT, IN)}, "dense", 1),
    "f32": ({"": zeros(np.float32, OUT, IN)}, "dense", 1),
    "deepseek": ({"": zeros(E4M3, OUT, IN), "_scale_inv": zeros(np.float32, 2, 3)}, "fp8_block", 128),
    "fp8 grid": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(BF16, 2, 3)}, "fp8_block", 128),
    "fp8 channel": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32, OUT, 1)}, "fp8_block", 128),
    "fp8 rows": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32, OUT)}, "fp8_block", 128),
    "fp8 blocks of ModelOpt": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32, 2, 1, 3, 1)}, "fp8_block", 128),
    "deepseek, powers of two": ({"": zeros(E4M3, OUT, IN), "_scale_inv": zeros(E8M0, 2, 3)}, "fp8_block", 128),
    "deepseek, rows": ({"": zeros(E4M3, OUT, IN), "_scale_inv": zeros(np.float32, OUT)}, "fp8_block", 128),
    "fp8 rows, powers of two": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(E8M0, OUT)}, "fp8_block", 128),
    "fp8 tensor": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32)}, "fp8_block", 128),
    "fp8 tensor [1]": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32, 1)}, "fp8_block", 128),
    "fp8 tensor [1, 1]": ({"": zeros(E4M3, OUT, IN), "_scale": zeros(np.float32, 1, 1)}, "fp8_block", 128),
    "modelopt": (
        {"": zeros(np.uint8, OUT, IN // 2), "_scale": zeros(E4M3, OUT, IN // 16), "_scale_2": zeros(np.float32)},
        "nvfp4",
        16,
    ),
    "modelopt, bytes and bf16 [1]": (
        {"": zeros(np.uint8, OUT, IN // 2), "_scale": zeros(np.uint8, OUT, IN // 16), "_scale_2": zeros(BF16, 1)},
        "nvfp4",
        16,
    ),
    "modelopt, blocks of 32": (
        {"": zeros(np.uint8, OUT, IN // 2), "_scale": zeros(E4M3, OUT, IN // 32), "_scale_2": zeros(np.float16)},
        "nvfp4",
        32,
    ),
    "packed": (
        {
            "_packed": zeros(np.uint8, OUT, IN // 2),
            "_scale": zeros(E4M3, OUT, IN // 16),
            "_global_scale": zeros(np.float32, 1),
        },
        "nvfp4",
        16,
    ),
}


def named(arrays, stem="m.q_proj"):
    return {f"{stem}.weight{suffix}": array for suffix, array in arrays.items()}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_known_storage_is_recognised(kind):
    arrays, format, block = ACCEPTED[kind]
    tensors = fakes.tensors(named(arrays) | {"m.q_proj.input_scale": zeros(np.float32)})
    stored = detect("m.q_proj.weight", tensors)
    assert (stored.format, stored.block, stored.shape) == (format, block, (OUT, IN))
    assert {tensor.name for tensor in stored.tensors} == set(named(arrays))


MODELOPT = ACCEPTED["modelopt"][0]
PACKED = ACCEPTED["packed"][0]
REFUSED = {
    "E5M2": ({"": zeros(ml_dtypes.float8_e5m2, OUT, IN)}, "F8_E5M2"),
    "INT32": ({"": zeros(np.int32, OUT, IN // 8)}, "I32"),
    "two scales": (ACCEPTED["deepseek"][0] | {"_scale": zeros(BF16, 2, 3)}, "both weight_scale_inv and weight_scale"),
    "E8M0 scale": (
        {"": zeros(E4M3, OUT, IN), "_scale": zeros(ml_dtypes.float8_e8m0fnu, OUT, 10)},
        "weight_scale is F8_E8M0",
    ),
    "grid of another size": ({"": zeros(E4M3, OUT, IN), "_scale_inv": zeros(np.float32, 1, 2)}, r"must be \[2, 3\]"),
    "MXFP4": ({"": zeros(np.uint8, OUT, IN // 2), "_scale": zeros(np.uint8, OUT, IN // 32)}, "MXFP4"),
    "E5M3": ({"_packed": zeros(np.uint8, OUT, IN // 2), "_scale": zeros(np.uint8, OUT, IN // 16)}, "NVFP4_E5M3"),
    "packed with bytes as scales": (PACKED | {"_scale": zeros(np.uint8, OUT, IN // 16)}, "weight_scale is U8"),
    "packed int32": (PACKED | {"_packed": zeros(np.int32, OUT, IN // 8)}, "weight_packed is I32"),
    "weight and weight_packed": (PACKED | {"": zeros(BF16, OUT, IN)}, "both weight and weight_packed"),
    "swizzled": (MODELOPT | {"_scale": zeros(np.uint8, OUT * IN // 16)}, "swizzled"),
    "padded": (MODELOPT | {"_scale": zeros(E4M3, 256, 20)}, r"must be \[192, 20\] or \[192, 10\]"),
    "blocks of 64": (MODELOPT | {"_scale": zeros(E4M3, OUT, IN // 64)}, r"must be \[192, 20\]"),
    "float scales": (MODELOPT | {"_scale": zeros(np.float16, OUT, IN // 16)}, "weight_scale is F16"),
    "a scalar for each row": (MODELOPT | {"_scale_2": zeros(np.float32, OUT)}, "not one floating-point number"),
    "three axes": (MODELOPT | {"": zeros(np.uint8, 2, OUT, IN // 2)}, "quantized weights are matrices"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_storage_is_refused_by_name(kind):
    arrays, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        detect("m.q_proj.weight", fakes.tensors(named(arrays)))
    assert "m.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    "sibling", ["weight_quantizer._svdquant_lora_a", "input_scale_2", "qweight", "packed", "blocks"]
)
def test_siblings_of_formats_that_are_not_read_are_refused(sibling):
    tensors = fakes.tensors(named(MODELOPT) | {f"m.q_proj.{sibling}": zeros(np.float32, 1)})
    with pytest.raises(CheckpointError, match=f"{sibling}.* not supported"):
        detect("m.q_proj.weight", tensors)


@pytest.mark.parametrize(
    "arrays, missing",
    [
        ({}, ["weight"]),
        ({"": zeros(E4M3, OUT, IN)}, ["weight_scale_inv"]),
        ({"": MODELOPT[""]}, ["weight_scale", "weight_scale_2"]),
        ({"": MODELOPT[""], "_scale": MODELOPT["_scale"]}, ["weight_scale_2"]),
        ({"_packed": PACKED["_packed"]}, ["weight_scale", "weight_global_scale"]),
    ],
)
def test_missing_scales_are_named(arrays, missing):
    with pytest.raises(MissingTensorsError) as caught:
        detect("m.q_proj.weight", fakes.tensors(named(arrays)))
    assert caught.value.names == tuple(f"m.q_proj.{name}" for name in missing)


def scale_of(arrays):
    arrays = named(arrays)
    return weights.read_tensor_scale(
        detect("m.q_proj.weight", fakes.tensors(arrays)), lambda tensor: arrays[tensor.name]
    )


def test_scalars_of_both_conventions_multiply_in_the_end():
    assert scale_of(MODELOPT | {"_scale_2": np.array([0.25], BF16)}) == np.float32(0.25)
    assert scale_of(PACKED | {"_global_scale": np.array([3], np.float32)}) == np.float32(1) / np.float32(3)
    assert scale_of(PACKED | {"_global_scale": np.array([1], np.float32)}) == 1


@pytest.mark.parametrize("value", [2688.0, -0.5, np.nan, np.inf])
def test_a_divisor_under_the_name_of_a_factor_is_noticed(value):
    with pytest.raises(CheckpointError, match="looks like compressed-tensors' weight_global_scale"):
        scale_of(MODELOPT | {"_scale_2": np.array(value, np.float32)})


@pytest.mark.parametrize("value", [0.0004, 0, -3, np.nan, np.inf])
def test_a_factor_under_the_name_of_a_divisor_is_noticed(value):
    with pytest.raises(CheckpointError, match="looks like ModelOpt's weight_scale_2"):
        scale_of(PACKED | {"_global_scale": np.array([value], np.float32)})


def test_a_matrix_of_zeros_may_have_the_scale_zero():
    void = np.full((OUT, IN // 16), 0xFF, np.uint8)
    assert scale_of(MODELOPT | {"_scale": void, "_scale_2": np.array(0, np.float32)}) == 0
    with pytest.raises(CheckpointError, match="is 0, but"):
        scale_of(MODELOPT | {"_scale": void - 0x80 - 0x40, "_scale_2": np.array(0, np.float32)})


def test_both_nvfp4_conventions_give_the_same_components():
    w = np.random.default_rng(1).standard_normal((OUT, IN), np.float32)
    codes, scale, scalar = nvfp4_quantize(w)
    modelopt = named({"": codes, "_scale": scale.view(np.uint8), "_scale_2": scalar.reshape(())})
    packed = named({"_packed": codes, "_scale": scale, "_global_scale": 1 / scalar.reshape(1)})
    for arrays in (modelopt, packed):
        stored = detect("m.q_proj.weight", fakes.tensors(arrays))
        parts = weights.read_components(stored, lambda tensor, arrays=arrays: arrays[tensor.name])
        np.testing.assert_allclose(nvfp4_dequantize(**parts), nvfp4_dequantize(codes, scale, scalar), rtol=2e-7)


@pytest.mark.parametrize(
    "kind, shape",
    [
        *(("_scale_inv", (2, 3)), ("_scale", (2, 3)), ("_scale", (OUT, 1)), ("_scale", (1, 1)), ("_scale", ())),
        *(("_scale_inv", (2, 1, 3, 1)), ("_scale", (2, 1, 3, 1)), ("_scale", (OUT,)), ("_scale_inv", (OUT,))),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, BF16, E8M0])
def test_fp8_scales_are_expanded_to_rows(kind, shape, dtype):
    """Exactly, whatever the shape; and the proof that nothing was lost finds them again."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((OUT, IN), np.float32).astype(E4M3)
    scale = rng.random(shape, np.float32).astype(dtype)
    arrays = named({"": values, kind: scale})
    stored = detect("m.q_proj.weight", fakes.tensors(arrays))
    parts = weights.read_components(stored, lambda tensor: arrays[tensor.name])
    assert parts["block_scale"].shape == (OUT, 3)
    row, column = np.arange(OUT)[:, None], np.arange(IN)[None]
    again = inverse.restore_tensors(parts, stored, [])[f"m.q_proj.weight{kind}"]
    assert (again.dtype, again.shape, again.tobytes()) == (scale.dtype, shape, scale.tobytes())
    scale = scale.astype(np.float32)
    grid = scale.reshape(2, 3) if scale.size == 6 else np.broadcast_to(scale.reshape(-1, 1), (OUT, 1))
    step = grid[row // 128, column // 128] if scale.size == 6 else np.broadcast_to(grid, (OUT, IN))
    expected = (values.astype(np.float32) * step).astype(BF16)
    assert (fp8_dequantize(*parts.values()) == expected.astype(np.float32)).all()
