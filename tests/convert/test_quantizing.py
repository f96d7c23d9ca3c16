"""Quantizing and dequantizing while converting: ModelOpt's bytes, and every leaf as the policy says."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
import dsv32_jax as ds
from convert.plan.policy import LINEARS
from convert.read.source import Source
from convert.read.weights import StoredWeight, detect
from convert.transform import cut
from convert.transform.requantize import Requantizer, find_pairs
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.config import Config
from dsv32_jax.layout import leaves
from dsv32_jax.quantization.quantize import fp8_dequantize, fp8_quantize, nvfp4_dequantize, nvfp4_quantize
from dsv32_jax.quantization.scale_search import SCALINGS
from tests import golden
from tests.conftest import DATA
from tests.golden import having, routed, sets
from tests.test_units import signless_zeros

from . import fakes
from .test_job import stored, values

BF16 = ml_dtypes.bfloat16

# -------------------------------------------------------------------------------------------------- against ModelOpt


def fp8_golden(request) -> Path:
    return (request.config.getoption("--shared") or DATA) / "golden_nvfp4" / "v5_fp8_source"


def check_bytes(recaster: Requantizer, folder: Path, expected: dict[str, np.ndarray]) -> None:
    source = Source(folder)
    for name in (name for name in expected if name.endswith(".weight")):
        one = dataclasses.replace(detect(name, source.tensors), wanted="nvfp4")
        parts = recaster.load(one, source.read)
        assert parts["tensor_scale"].item() == expected[name + "_scale_2"], name
        np.testing.assert_array_equal(parts["block_scale"].view(np.uint8), expected[name + "_scale"].view(np.uint8))
        np.testing.assert_array_equal(signless_zeros(parts["codes"]), signless_zeros(expected[name]))


def test_an_fp8_checkpoint_gets_the_bytes_of_modelopt(request):
    folder = fp8_golden(request)
    expected = golden.read(folder / "expected_nvfp4.safetensors")
    check_bytes(Requantizer(), folder, expected)
    assert sum(name.endswith(".weight") for name in expected) == 44


def test_shared_tensor_scales_give_the_bytes_of_modelopt(request):
    folder = fp8_golden(request)
    if not (folder / "expected_nvfp4_shared.safetensors").exists():
        pytest.skip("only in the whole golden sets")
    expected = golden.read(folder / "expected_nvfp4.safetensors")
    tensors = Source(folder).tensors
    linears = [detect(name, tensors) for name in expected if name.endswith(".weight")]
    together = find_pairs(dataclasses.replace(one, wanted="nvfp4") for one in linears)
    changed = golden.read(folder / "expected_nvfp4_shared.safetensors")
    check_bytes(Requantizer(pairs=together), folder, expected | changed)
    assert len(changed) == 33


def test_fp8_goes_to_nvfp4_by_way_of_bfloat16():
    """Which makes a difference where scales are no powers of two."""
    rng = np.random.default_rng(0)
    quantized, grid = fp8_quantize(rng.standard_normal((256, 384), np.float32))
    grid *= rng.uniform(0.5, 1, grid.shape).astype(np.float32)
    arrays = {"a.weight": quantized, "a.weight_scale_inv": grid}
    one = dataclasses.replace(detect("a.weight", fakes.tensors(arrays)), wanted="nvfp4")
    parts = Requantizer().load(one, lambda tensor: arrays[tensor.name])
    product = quantized.astype(np.float32) * np.repeat(np.repeat(grid, 128, 0), 128, 1)
    for part, want, unrounded in zip(
        parts.values(), nvfp4_quantize(product.astype(BF16)), nvfp4_quantize(product), strict=True
    ):
        assert part.tobytes() == want.tobytes()
        assert part.size == 1 or part.tobytes() != unrounded.tobytes()


@having("nvfp4.")
def test_the_converted_checkpoint_computes_as_the_reference(case, tmp_path):
    manifest = convert.convert(case.folder, tmp_path / "out", to="nvfp4", policy="full")
    assert manifest.report["conversions"] == {"fp8 -> nvfp4": 44}
    model = ds.load(tmp_path / "out", dtype=jnp.float32)
    length = case.ids.shape[1]
    out = ds.forward(model, np.concatenate([case.ids, case["nvfp4.decode.gen_ids"][:, :-1]], axis=1), seen=True)
    case.close("nvfp4.logits, quantized here", out.logits[:, :length], case["nvfp4.logits"], 1e-3)
    np.testing.assert_array_equal(np.asarray(out.logits)[:, length - 1 :].argmax(-1), case["nvfp4.decode.gen_ids"])
    for layer, want in case.layers("nvfp4.L{}.idx_topk").items():
        assert sets(out.seen[layer].selected_BTk[:, :length]) == sets(want)
    for layer, want in case.layers("nvfp4.L{}.gate_ids").items():
        np.testing.assert_array_equal(routed(out.seen[layer].routing)[0][:, :length], want)


# ----------------------------------------------------------------------------------------------- formats and policies


def quantized_whole(source: dict[str, np.ndarray], name: str, format: str, scales: str = "rtn") -> np.ndarray:
    """float32 of the matrix `name` of a BF16 or FP8 checkpoint, brought to `format` in one piece."""
    w = source[name]
    if (grid := source.get(name + "_scale_inv")) is not None:
        w = fp8_dequantize(w, np.repeat(grid, 128, axis=0)[: len(w)]).astype(BF16)
    if format == "nvfp4":
        return nvfp4_dequantize(*nvfp4_quantize(w, SCALINGS[scales]))
    if format == "fp8":
        quantized, grid = fp8_quantize(w)
        return fp8_dequantize(quantized, np.repeat(grid, 128, axis=0)[: len(w)])
    return w.astype(np.float32)


def check_leaves(folder: Path, source: dict[str, np.ndarray], format_of, scales: str = "rtn") -> None:
    """Every leaf of a conversion has the values of its sources in the formats that `format_of` names."""
    manifest, arrays = Manifest.read(folder), stored(folder)
    for leaf in leaves(Config.from_dict(manifest.config)):
        entry = manifest.leaves[leaf.path]
        if entry.same_as is not None:
            continue
        whole = {name: quantized_whole(source, name, format_of(name), scales) for name in leaf.sources}
        dense = [
            StoredWeight("dense", "dense", w.shape, 1, fakes.tensors({name: w})[name]) for name, w in whole.items()
        ]
        form = cut.LeafFormat("dense", 1, "float32")
        want = cut.build(leaf, dense, form, lambda tensor, whole=whole: whole[tensor.name])["values"]
        np.testing.assert_array_equal(values(entry.format, arrays[leaf.path]), want, err_msg=leaf.path)


def linear(name: str) -> str:
    return name.split(".")[-2] if name.endswith(".weight") and name.split(".")[-2] in LINEARS else ""


def by_preset(preset: str, to: str, otherwise: str):
    """The format of each weight of configs/tiny.json, whose MTP layer is layer 3, spelled out."""

    def format_of(name: str) -> str:
        kind, mtp = linear(name), name.startswith("model.layers.3.")
        feed_forward = kind in ("gate_proj", "up_proj", "down_proj")
        if not kind:
            return "bf16"
        if preset == "full":
            return to
        if preset == "experts-only":
            return to if ".experts." in name and not mtp else otherwise
        kept = "bf16" if preset == "nvidia" else otherwise
        return to if (feed_forward or kind == "o_proj") and not mtp else kept

    return format_of


CASES = [
    ("bf16", "nvfp4", "default", "rtn"),
    ("fp8", "nvfp4", "default", "mse"),
    ("bf16", "nvfp4", "full", "four-over-six"),
    ("fp8", "nvfp4", "nvidia", "rtn"),
    ("fp8", "nvfp4", "experts-only", "rtn"),
    ("bf16", "fp8", None, "rtn"),
    ("fp8", "bf16", None, "rtn"),
]


@pytest.mark.parametrize("storage, to, preset, scales", CASES)
def test_every_leaf_has_the_format_and_values_of_the_policy(storage, to, preset, scales, checkpoints, tmp_path):
    manifest = convert.convert(checkpoints[storage], tmp_path / "out", to=to, policy=preset, scales=scales)
    format_of = by_preset(preset or "full", to, storage)
    check_leaves(tmp_path / "out", fakes.load(checkpoints[storage]), format_of, scales)
    linears = {name for name in Source(checkpoints[storage]).tensors if linear(name)}
    changed = [name for name in linears if format_of(name) != storage]
    assert sum(manifest.report["conversions"].values()) == len(changed)
    assert sum(kind["weights"] for kind in manifest.report["errors"]["kinds"].values()) == len(changed)


def test_nvfp4_becomes_bfloat16_by_rounding_its_exact_values(checkpoints, tmp_path):
    convert.convert(checkpoints["nvfp4"], tmp_path / "kept")
    manifest = convert.convert(checkpoints["nvfp4"], tmp_path / "out", to="bf16")
    assert manifest.report["formats"].keys() == {"bf16", "f32"} and set(manifest.report["conversions"]) == {
        "nvfp4 -> bf16"
    }
    kept, got = stored(tmp_path / "kept"), stored(tmp_path / "out")
    for path, leaf in Manifest.read(tmp_path / "kept").leaves.items():
        if leaf.format == "nvfp4":
            np.testing.assert_array_equal(got[path]["values"], values("nvfp4", kept[path]).astype(BF16))


@pytest.mark.parametrize(
    "storage, to", [("nvfp4", "nvfp4"), ("compressed-tensors", "nvfp4"), ("fp8", "fp8"), ("bf16", "bf16")]
)
def test_what_is_in_a_format_already_keeps_its_bytes(storage, to, checkpoints, tmp_path):
    kept = convert.convert(checkpoints[storage], tmp_path / "kept")
    manifest = convert.convert(checkpoints[storage], tmp_path / "out", to=to, policy="full", scales="mse")
    assert manifest.digest == kept.digest
    assert manifest.report["conversions"] == {} and manifest.report["errors"] == {"kinds": {}, "worst": {}}


def test_a_file_may_mix_formats(checkpoints, tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(
        json.dumps({"formats": {"*.experts.*": "nvfp4", "*.o_proj.weight": "fp8", "lm_head.weight": "fp8"}})
    )
    manifest = convert.convert(checkpoints["bf16"], tmp_path / "out", policy=file)
    formats = {path: leaf.format for path, leaf in manifest.leaves.items()}
    assert formats["layers.1.ffn.w_up_EMD"] == "nvfp4" and formats["layers.1.ffn.shared_up_MD"] == "dense"
    assert formats["head_VD"] == "fp8_block" and formats["mtp.head_VD"] == "dense"
    assert manifest.report["conversions"] == {"bf16 -> fp8": 5, "bf16 -> nvfp4": 3 * 3 * 12}
    model = ds.load(tmp_path / "out", dtype=jnp.float32)
    assert np.isfinite(np.asarray(ds.forward(model, [[1, 2, 3]]).logits)).all()


def test_experts_that_are_stored_differently_become_one_format(tiny):
    """Some in FP8, some dense, one in NVFP4: after quantizing they are a stack like any other."""
    leaf = next(leaf for leaf in leaves(tiny) if leaf.path == "layers.1.ffn.w_down_EDM")
    rng, arrays = np.random.default_rng(0), {}
    for i, name in enumerate(leaf.sources):
        w = rng.standard_normal(leaf.source_shape, np.float32).astype(BF16)
        if i == 5:
            codes, scale, scalar = nvfp4_quantize(w)
            arrays |= {name: codes, name + "_scale": scale, name + "_scale_2": scalar.reshape(())}
        elif i % 2:
            arrays[name], arrays[name + "_scale_inv"] = fp8_quantize(w)
        else:
            arrays[name] = w
    found = [detect(name, fakes.tensors(arrays)) for name in leaf.sources]
    kept = Requantizer()
    cut.build(leaf, found, cut.choose_format(leaf, found), lambda tensor: arrays[tensor.name], kept)
    assert kept.errors.keys() == {one.name for one in found if one.format != "dense"}
    wanted = [one if one.is_in("nvfp4") else dataclasses.replace(one, wanted="nvfp4") for one in found]
    form = cut.choose_format(leaf, wanted)
    recaster = Requantizer()
    built = cut.build(leaf, wanted, form, lambda tensor: arrays[tensor.name], recaster)
    assert form.format == "nvfp4" and len(recaster.errors) == 11
    assert built["codes"][5].tobytes() == arrays[leaf.sources[5]].tobytes()


def test_a_leaf_that_no_cut_can_hold_is_not_quantized_first(tiny):
    """Pieces of 24 inputs do not respect blocks of 16: bfloat16 of the source itself, not of what was rounded."""
    cfg = dataclasses.replace(tiny, v_head_dim=24, num_attention_heads=4)
    leaf = next(leaf for leaf in leaves(cfg) if leaf.path == "layers.0.mla.w_o_DHP")
    w = np.random.default_rng(0).standard_normal(leaf.source_shape, np.float32).astype(BF16)
    arrays = {leaf.sources[0]: w}
    wanted = [dataclasses.replace(detect(leaf.sources[0], fakes.tensors(arrays)), wanted="nvfp4")]
    form = cut.choose_format(leaf, wanted)
    assert form.format == "dense" and "straddle" in str(form.dequantized)
    assert cut.build(leaf, wanted, form, lambda tensor: w)["values"].tobytes() == w.tobytes()
