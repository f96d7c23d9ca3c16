"""ModelOpt's AWQ and SVDQuant: what stands beside a matrix becomes part of it."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.read.weights import MissingTensorsError, detect
from convert.transform.requantize import Requantizer, relative_rms
from dsv32_jax.errors import CheckpointError
from dsv32_jax.quantization.quantize import nvfp4_dequantize, nvfp4_quantize

from . import fakes
from .test_job import stored, values

BF16 = ml_dtypes.bfloat16


def beside(rank: int | None, out: int = 64, width: int = 96):
    """One linear as ModelOpt stores it with AWQ (`rank` None) or SVDQuant, and its values in float64."""
    rng = np.random.default_rng(0)
    codes, scale, scalar = nvfp4_quantize(rng.standard_normal((out, width), np.float32))
    pre = rng.uniform(0.5, 2, width).astype(BF16)
    arrays = {
        "m.weight": codes,
        "m.weight_scale": scale,
        "m.weight_scale_2": scalar.reshape(()),
        "m.pre_quant_scale": pre,
    }
    exact = nvfp4_dequantize(codes, scale, scalar).astype(np.float64)
    if rank is not None:
        a, b = rng.standard_normal((rank, width)).astype(BF16), rng.standard_normal((out, rank)).astype(BF16)
        arrays |= {"m.svdquant_lora_a": a, "m.svdquant_lora_b": b}
        exact += b.astype(np.float64) @ a.astype(np.float64)
    return arrays, exact * pre.astype(np.float64)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("wanted", [None, "bf16", "fp8", "nvfp4"])
def test_what_stands_beside_a_matrix_is_folded_into_it(rank, wanted):
    arrays, exact = beside(rank)
    one = detect("m.weight", fakes.tensors(arrays))
    assert one.kind == f"modelopt-nvfp4-{'awq' if rank is None else 'svd'}"
    assert {tensor.name for tensor in one.tensors} == set(arrays)
    one = one if wanted is None else dataclasses.replace(one, wanted=wanted)
    recaster = Requantizer()
    parts = recaster.load(one, lambda tensor: arrays[tensor.name])
    kind = one.becomes[0]
    assert kind == {"fp8": "fp8_block", "nvfp4": "nvfp4"}.get(str(wanted), "dense")
    error = np.linalg.norm(values(kind, parts) - exact) / np.linalg.norm(exact)
    assert error < {"nvfp4": 0.11, "fp8": 0.03}.get(str(wanted), 0.003)
    assert relative_rms(list(recaster.errors.values())) == pytest.approx(error, rel=1e-3)


def test_a_checkpoint_with_awq_is_converted_and_reported(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["nvfp4"] / "config.json").read_text()), fakes.load(checkpoints["nvfp4"])
    pre = np.random.default_rng(0).uniform(0.5, 2, 96).astype(np.float32)
    names = [name for name in arrays if name.endswith("experts.3.up_proj.weight") and "layers.1" in name]
    arrays |= {name.removesuffix("weight") + "pre_quant_scale": pre for name in names}
    arrays["model.layers.0.self_attn.q_b_proj.pre_quant_scale"] = np.ones(64, np.float16)
    manifest = convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out")
    assert repr(manifest).startswith("Manifest of ") and len(repr(manifest)) < 300 and manifest.digest in repr(manifest)
    report = manifest.report
    assert "pre_quant_scale, AWQ" in report["dequantized"]["layers.0.mla.w_uq_HNQ"]
    assert "its experts are stored as" in report["dequantized"]["layers.1.ffn.w_up_EMD"]
    assert report["conversions"] == {"nvfp4 -> bf16": 11, "nvfp4-awq -> bf16": 2}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    exact = nvfp4_dequantize(arrays[name], arrays[name + "_scale"], arrays[name + "_scale_2"].reshape(1, 1)) * pre
    got = stored(tmp_path / "out")["layers.1.ffn.w_up_EMD"]["values"][3]
    np.testing.assert_array_equal(got, exact.astype(BF16))


WRONG = [
    ("m.pre_quant_scale", np.ones(95, np.float32), r"m.pre_quant_scale is F32 \[95\], not floats \[96\]"),
    ("m.pre_quant_scale", np.ones(96, np.uint8), r"m.pre_quant_scale is U8 \[96\], not floats \[96\]"),
    ("m.svdquant_lora_a", np.ones((8, 95), BF16), r"not floats \[8, 96\]"),
    ("m.svdquant_lora_b", np.ones((64, 7), BF16), r"not floats \[64, 8\]"),
    ("m.svdquant_lora_a", np.ones((), BF16), "m.svdquant_lora_a is BF16"),
]


@pytest.mark.parametrize("name, array, message", WRONG)
def test_what_does_not_fit_the_matrix_is_refused(name, array, message):
    arrays, _ = beside(8)
    with pytest.raises(CheckpointError, match=message):
        detect("m.weight", fakes.tensors(arrays | {name: array}))


@pytest.mark.parametrize("absent", ["pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"])
def test_what_is_missing_beside_a_matrix_is_named(absent):
    arrays, _ = beside(8)
    del arrays["m." + absent]
    with pytest.raises(MissingTensorsError) as caught:
        detect("m.weight", fakes.tensors(arrays))
    assert caught.value.names == ("m." + absent,)
