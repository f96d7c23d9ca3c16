"""The way back to other software: byte for byte where the layout is the source's, value for value where it is not."""

import dataclasses
import errno
import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from safetensors import safe_open

import convert
from convert.export.export import export
from convert.export.quantization_config import list_globs, list_regexes
from convert.export.shards import ShardsWriter
from convert.export.shared_scales import rescale_bytes
from convert.plan import limits
from convert.read import weights
from convert.read.safetensors import DTYPES
from convert.read.source import Source
from convert.read.weights import detect
from convert.transform import requantize
from convert.verify.verify import verify
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.errors import CapacityError, OutputExistsError, UsageError, VerificationError
from dsv32_jax.quantization.quantize import nvfp4_dequantize, nvfp4_quantize
from dsv32_jax.system.locks import LOCK

from . import fakes

FAMILY = {"fp8": "modelopt", "nvfp4": "modelopt", "compressed-tensors": "compressed-tensors", "bf16": "bf16"}
"""The layout in which each storage is written as it was."""


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def values(folder: Path) -> dict[str, np.ndarray]:
    """The exact value of every weight of a Hugging Face folder."""
    source = Source(folder)
    found = {}
    for name in source.tensors:
        if name.endswith((".weight", ".weight_packed", ".bias", "_bias")):
            stored = detect(name.removesuffix("_packed"), source.tensors)
            found[stored.name] = requantize.dequantize(weights.read_components(stored, source.read)).astype(np.float32)
    return found


def same_bytes(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert (array.dtype, array.shape) == (second[name].dtype, second[name].shape), name
        assert array.tobytes() == second[name].tobytes(), name


def test_a_dry_run_writes_nothing(converted, tmp_path, capsys, monkeypatch):
    """It says what the export says, and refuses what the export refuses."""
    words = [converted["nvfp4"], tmp_path / "hf", "--format", "bf16"]
    planned, written = (run(capsys, *words, *flags) for flags in (["--dry-run"], []))
    assert planned[0] == written[0] == 0 and planned[1].replace("planned", "written") == written[1]
    assert {file.name for file in tmp_path.iterdir()} == {"hf"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, free, code in (("full", 10**12, 6), ("disk", 1, 5)):
        monkeypatch.setattr(limits.shutil, "disk_usage", lambda path, free=free: (10**13, 0, free))
        words[1] = tmp_path / out
        planned, written = (run(capsys, *words, *flags) for flags in (["--dry-run"], []))
        assert planned == written and planned[0] == code
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("storage", FAMILY)
def test_the_own_layout_is_written_byte_for_byte(storage, originals, converted, tmp_path):
    exported = export(converted[storage], tmp_path / "hf", FAMILY[storage])
    same_bytes(fakes.load(originals[storage]), fakes.load(tmp_path / "hf"))
    assert not exported.changed and exported.tensors == len(fakes.load(originals[storage]))
    again = convert.convert(tmp_path / "hf", tmp_path / "again")
    assert again.digest == Manifest.read(converted[storage]).digest


def test_golden_checkpoints_come_back_byte_for_byte(case, tmp_path):
    source = fakes.load(case.folder)
    family = "compressed-tensors" if any("_packed" in name for name in source) else "modelopt"
    exported = export(case.converted, tmp_path / "hf", family)
    ignored = {name for name in source if name.endswith(".input_scale")}
    same_bytes({name: array for name, array in source.items() if name not in ignored}, fakes.load(tmp_path / "hf"))
    assert any(f"{len(ignored)} tensor" in note and "of the source" in note for note in exported.notes) == bool(ignored)
    assert convert.convert(tmp_path / "hf", tmp_path / "again").digest == Manifest.read(case.converted).digest


@pytest.mark.parametrize("storage, family", [("nvfp4", "compressed-tensors"), ("compressed-tensors", "modelopt"),
                                             ("fp8", "compressed-tensors"),
                                             ("quantized", "compressed-tensors")])  # fmt: skip
def test_another_layout_has_the_same_values(storage, family, originals, converted, tmp_path):
    exported = export(converted[storage], tmp_path / "hf", family)
    assert not exported.changed
    export(converted[storage], tmp_path / "same", "modelopt")
    found, want = values(tmp_path / "hf"), values(tmp_path / "same")
    assert found.keys() == want.keys()
    inexact = " ".join(note for note in exported.notes if "no exact inverse" in note)
    for name, array in want.items():
        if (found[name] != array).any():
            assert "no exact inverse" in inexact, name
            np.testing.assert_allclose(found[name], array, rtol=2.0**-22, atol=0)
    again = convert.convert(tmp_path / "hf", tmp_path / "again")
    assert (again.digest == Manifest.read(converted[storage]).digest) == (not inexact)


def test_bf16_has_the_rounded_values(converted, originals, tmp_path):
    exported = export(converted["quantized"], tmp_path / "hf", "bf16")
    export(converted["quantized"], tmp_path / "exact", "modelopt")
    arrays = fakes.load(tmp_path / "hf")
    for name, array in values(tmp_path / "exact").items():
        assert (arrays[name].astype(np.float32) == array.astype(arrays[name].dtype).astype(np.float32)).all(), name
    dtypes = {array.dtype.name for name, array in arrays.items() if array.ndim == 2}
    assert dtypes == {"bfloat16"} and not any("scale" in name for name in arrays)
    assert exported.changed.keys() == {"dequantized to bf16: nvfp4, as asked", "dequantized to bf16: fp8, as asked"}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config and not (tmp_path / "hf" / "hf_quant_config.json").exists()


def test_shards_are_whole_aligned_and_indexed(converted, tmp_path):
    exported = export(converted["quantized"], tmp_path / "hf", "modelopt", shard_bytes=150_000)
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(files) == exported.files > 3
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    places, total = {}, 0
    for file in files:
        assert file.stat().st_size < 150_000 + 50_000
        with safe_open(file, "np") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
            assert opened.metadata() == {"format": "pt"}
        for tensor in fakes.header_of(file).tensors:
            assert tensor.offset % DTYPES[tensor.dtype].itemsize == 0
            total += tensor.nbytes
    assert index["weight_map"] == dict(sorted(places.items()))
    assert index["metadata"]["total_size"] == total == exported.nbytes
    same_bytes(fakes.load(tmp_path / "hf"), fakes.load(exported_whole(converted, tmp_path)))


def exported_whole(converted, tmp_path) -> Path:
    export(converted["quantized"], tmp_path / "whole", "modelopt")
    return tmp_path / "whole"


def test_fp8_beside_nvfp4_becomes_bf16_in_modelopt(converted, tmp_path):
    """Readers of ModelOpt's names take what is neither NVFP4 nor plain for plain, without its scales."""
    exported = export(converted["quantized"], tmp_path / "hf", "modelopt")
    ((why, names),) = exported.changed.items()
    assert "FP8 blocks beside NVFP4" in why and any("self_attn.kv_b_proj" in name for name in names)
    assert {tensor.dtype for tensor in Source(tmp_path / "hf").tensors.values()} == {"U8", "F8_E4M3", "F32", "BF16"}
    assert all("_scale" in name for name, t in Source(tmp_path / "hf").tensors.items() if t.dtype == "F8_E4M3")
    export(converted["quantized"], tmp_path / "other", "compressed-tensors")
    found, want = values(tmp_path / "hf"), values(tmp_path / "other")
    assert found.keys() == want.keys()
    assert all((found[name] == want[name]).all() for name in found if "kv_b_proj" in name)


@pytest.mark.parametrize("storage", ["nvfp4", "quantized", "fp8"])
def test_modelopt_excludes_exactly_what_is_not_quantized(storage, converted, tmp_path):
    export(converted[storage], tmp_path / "hf", "modelopt")
    source = Source(tmp_path / "hf")
    matrices = {name: t for name, t in source.tensors.items() if name.endswith(".weight") and len(t.shape) == 2}
    modules = {name.removesuffix(".weight") for name in matrices}
    nvfp4 = {name for name in modules if source.tensors[name + ".weight"].dtype == "U8"}
    if not nvfp4:
        assert source.config["quantization_config"] == {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }  # fmt: skip
        assert not (tmp_path / "hf" / "hf_quant_config.json").exists()
        return
    config = json.loads((tmp_path / "hf" / "hf_quant_config.json").read_text())
    quantization = config["quantization"]
    excluded = quantization["exclude_modules"]
    matched = {name for name in modules if any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)}
    assert matched == modules - nvfp4
    assert (config["producer"]["name"], quantization["group_size"]) == ("modelopt", 16)
    assert source.config["quantization_config"]["quant_method"] == "modelopt"
    assert source.config["quantization_config"]["ignore"] == excluded
    assert quantization["quant_algo"] == source.config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    assert not any("input_scale" in name for name in source.tensors)


@pytest.mark.parametrize("storage", ["compressed-tensors", "quantized", "fp8", "bf16"])
def test_compressed_tensors_targets_exactly_what_is_quantized(storage, converted, tmp_path):
    export(converted[storage], tmp_path / "hf", "compressed-tensors")
    source = Source(tmp_path / "hf")
    modules = {re.sub(r"\.weight(_packed)?$", "", name): t for name, t in source.tensors.items()
               if re.search(r"\.weight(_packed)?$", name) and len(t.shape) == 2}  # fmt: skip
    quantized = {name for name, t in modules.items() if t.dtype in ("U8", "F8_E4M3")}
    config = source.config.get("quantization_config")
    if storage == "bf16":
        assert config is None and not quantized
        return
    assert config["quant_method"] == "compressed-tensors"

    def matched(patterns) -> set[str]:
        whole = {p for p in patterns if not p.startswith("re:")}
        regex = [re.compile(p[3:]) for p in patterns if p.startswith("re:")]
        return {name for name in modules if name in whole or any(r.match(name) for r in regex)}

    assert matched(config["ignore"]) == modules.keys() - quantized
    groups = list(config["config_groups"].values())
    if len(groups) == 1:
        assert groups[0]["targets"] == ["Linear"] and config["format"] == groups[0]["format"]
    else:
        assert config["format"] == "mixed-precision"
        for group in groups:
            dtype = "U8" if group["weights"]["num_bits"] == 4 else "F8_E4M3"
            assert matched(group["targets"]) == {name for name in quantized if modules[name].dtype == dtype}
    bits = {group["weights"]["num_bits"]: group["weights"] for group in groups}
    assert 4 not in bits or (bits[4]["strategy"], bits[4]["group_size"]) == ("tensor_group", 16)
    assert 8 not in bits or (bits[8]["strategy"], bits[8]["block_structure"]) == ("block", [128, 128])


LAYERS = (1, 2, 11, 12)
PARTS = ("gate", "experts.0.up_proj", "experts.1.up_proj", "experts.10.up_proj", "shared_experts.up_proj")
MODULES = [f"model.layers.{layer}.mlp.{part}" for layer in LAYERS for part in PARTS] + ["lm_head"]


@given(st.sets(st.sampled_from(MODULES)))
def test_patterns_match_what_they_stand_for_and_nothing_else(chosen):
    everything = MODULES
    patterns = list_globs(set(chosen), everything)
    assert {name for name in everything if any(fnmatch.fnmatchcase(name, p) for p in patterns)} == chosen
    expressions = [re.compile(text.removeprefix("re:")) for text in list_regexes(sorted(chosen))]
    assert {name for name in everything if any(e.match(name) for e in expressions)} == chosen


def changed_source(originals, tmp_path, change) -> Path:
    """The NVFP4 checkpoint after `change` to its tensors, converted."""
    arrays, config = fakes.load(originals["nvfp4"]), json.loads((originals["nvfp4"] / "config.json").read_text())
    change(arrays)
    convert.convert(fakes.write_checkpoint(tmp_path / "changed", config, arrays), tmp_path / "out")
    return tmp_path / "out"


GATE, UP = (f"model.layers.1.mlp.experts.5.{name}_proj.weight" for name in ("gate", "up"))


def test_scales_are_shared_only_where_that_is_exact(originals, tmp_path):
    def change(arrays):
        """Expert 5: gate's scale is four times up's, and up's block scales leave room for that."""
        arrays[GATE + "_scale_2"] = arrays[UP + "_scale_2"] * np.float32(4)

    out = changed_source(originals, tmp_path, change)
    apart = export(out, tmp_path / "apart", "modelopt")
    assert any("of gate and up" in note and "share_scales=True" in note for note in apart.notes)
    shared = export(out, tmp_path / "shared", "modelopt", share_scales=True)
    assert any(note == "rescaled exactly to the tensor scale of the partner: 1 weight" for note in shared.notes)
    assert any("own tensor scales kept in" in note for note in shared.notes)
    arrays, before = fakes.load(tmp_path / "shared"), fakes.load(tmp_path / "apart")
    assert arrays[GATE + "_scale_2"] == arrays[UP + "_scale_2"]
    changed = {name for name in arrays if arrays[name].tobytes() != before[name].tobytes()}
    assert changed in ({UP + "_scale", UP + "_scale_2"}, {GATE + "_scale", GATE + "_scale_2"})
    first, second = values(tmp_path / "apart"), values(tmp_path / "shared")
    assert all((array == second[name]).all() for name, array in first.items())
    packed = export(out, tmp_path / "packed", "compressed-tensors", share_scales=True)
    arrays = fakes.load(tmp_path / "packed")
    assert arrays[GATE + "_global_scale"] == arrays[UP + "_global_scale"] and packed.family == "compressed-tensors"


@given(own=st.floats(2.0**-20, 1, width=32), shift=st.integers(-9, 9), used=st.sets(st.integers(0, 255), min_size=1))
def test_a_power_of_two_is_exact_where_nothing_is_lost(own, shift, used):
    own, other = np.float32(own), np.float32(own) * np.float32(2.0) ** shift
    table = rescale_bytes(used, own, other)
    before = np.array(sorted(used), np.uint8)
    scales = before.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scales = np.where(np.isnan(scales), 448.0, scales)
    wanted = scales / 2.0**shift
    fits = (wanted == wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)).all() and (np.abs(wanted) <= 448).all()
    assert (table is not None) == fits
    if table is not None:
        after = table[before].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        assert (after == wanted).all()


def test_other_ratios_are_rarely_exact():
    third = np.float32(1) / np.float32(3)
    assert rescale_bytes([0x38], np.float32(1), third) is None
    assert rescale_bytes([0x38], np.float32(1.5), np.float32(1)) is not None
    assert rescale_bytes([0x3D], np.float32(1.5), np.float32(1)) is None
    assert rescale_bytes([0x38], np.float32(1), np.float32(0)) is None
    assert rescale_bytes([0x38], np.float32(0), np.float32(1)) is None


def test_zero_matrices_stay_zero_in_every_layout(originals, tmp_path):
    """What ModelOpt writes for one: tensor scale 0, NaN block scales, codes 0x77."""

    def change(arrays):
        arrays[UP][:] = 0x77
        arrays[UP + "_scale"].view(np.uint8)[:] = 0xFF
        arrays[UP + "_scale_2"] = np.zeros((), np.float32)

    out = changed_source(originals, tmp_path, change)
    for family in ("modelopt", "compressed-tensors", "bf16"):
        exported = export(out, tmp_path / family, family)
        assert (values(tmp_path / family)[UP] == 0).all()
        assert any("of zeros" in note for note in exported.notes) == (family == "compressed-tensors")
    convert.convert(tmp_path / "compressed-tensors", tmp_path / "again")
    exported = export(out, tmp_path / "shared", "compressed-tensors", share_scales=True)
    assert any("own tensor scales kept in" in note for note in exported.notes)
    assert (values(tmp_path / "shared")[UP] == 0).all()


def test_zeros_of_compressed_tensors_are_no_hole_in_a_file(originals, tmp_path):
    """Codes 0 with the divisor 1 and block scales that are all the same: proven, and the same in every layout."""
    arrays = fakes.load(originals["compressed-tensors"])
    config = json.loads((originals["compressed-tensors"] / "config.json").read_text())
    arrays[UP + "_packed"][:] = 0
    arrays[UP + "_scale"].view(np.uint8)[:] = 0x20
    arrays[UP + "_global_scale"][:] = 1
    source = fakes.write_checkpoint(tmp_path / "a", config, arrays)
    convert.convert(source, tmp_path / "out")
    assert verify(tmp_path / "out", against=source).lossless
    for family in ("compressed-tensors", "modelopt", "bf16"):
        export(tmp_path / "out", tmp_path / family, family)
        found = values(tmp_path / family)
        assert (found[UP] == 0).all() and all(np.isfinite(array).all() for array in found.values())
    same_bytes(arrays, fakes.load(tmp_path / "compressed-tensors"))
    convert.convert(tmp_path / "modelopt", tmp_path / "again")
    assert verify(tmp_path / "again", against=tmp_path / "modelopt").lossless


def test_blocks_of_32_beside_16_are_written_twice(originals, tmp_path):
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight_scale" for name in ("up", "gate"))

    def change(arrays):
        arrays[up] = np.ascontiguousarray(arrays[up][:, ::2])

    out = changed_source(originals, tmp_path, change)
    exported = export(out, tmp_path / "hf", "modelopt")
    assert any(note.endswith("scales for 32 inputs are written twice in 1 weight") for note in exported.notes)
    arrays = fakes.load(tmp_path / "hf")
    assert arrays[up].shape == arrays[gate].shape
    first = values(tmp_path / "changed")
    assert all((array == first[name]).all() for name, array in values(tmp_path / "hf").items())
    export(out, tmp_path / "packed", "compressed-tensors")
    groups = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["group_size"] for group in groups.values()) == [16, 32]


def test_fp8_with_a_scale_for_each_row_becomes_bf16_in_modelopt(originals, tmp_path):
    arrays, config = fakes.load(originals["fp8"]), json.loads((originals["fp8"] / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    del arrays[name + "_scale_inv"]
    arrays[name + "_scale"] = np.linspace(0.5, 2, len(arrays[name]), dtype=np.float32).reshape(-1, 1)
    convert.convert(fakes.write_checkpoint(tmp_path / "a", config, arrays), tmp_path / "out")
    exported = export(tmp_path / "out", tmp_path / "hf", "modelopt")
    ((why, names),) = exported.changed.items()
    assert "a scale for each row" in why and names == [name]
    first, second = values(tmp_path / "a"), values(tmp_path / "hf")
    assert all((array == second[name]).all() for name, array in first.items())
    export(tmp_path / "out", tmp_path / "packed", "compressed-tensors")
    strategies = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["strategy"] for group in strategies.values()) == ["block", "channel"]


def test_one_fp8_scale_of_a_large_matrix_is_the_tensors(originals, tmp_path):
    """Of shape [1, 1]; that of a matrix within one block is a block's. The values are the same in every layout."""
    arrays, config = fakes.load(originals["fp8"]), json.loads((originals["fp8"] / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    assert max(arrays[name].shape) > 128 and arrays.pop(name + "_scale_inv").shape == (1, 2)
    arrays[name + "_scale"] = np.array([[0.37]], np.float32)
    convert.convert(fakes.write_checkpoint(tmp_path / "a", config, arrays), tmp_path / "out")
    want = (arrays[name].astype(np.float32) * np.float32(0.37)).astype(ml_dtypes.bfloat16)
    for family in ("compressed-tensors", "modelopt", "bf16"):
        exported = export(tmp_path / "out", tmp_path / family, family)
        assert (values(tmp_path / family)[name] == want.astype(np.float32)).all()
        assert bool(exported.changed) == (family == "bf16")
    packed = fakes.load(tmp_path / "compressed-tensors")
    assert packed[name + "_scale"].tobytes() == arrays[name + "_scale"].tobytes()
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    targets = {group["weights"]["strategy"]: group["targets"] for group in config["config_groups"].values()}
    assert targets.keys() == {"block", "tensor"}
    (expression,) = targets["tensor"]
    single = [other for other in packed if other.endswith(".weight_scale") and packed[other].shape == (1, 1)]
    modules = [other.removesuffix(".weight_scale") for other in single]
    assert len(modules) > 1
    assert [m + ".weight" for m in modules if re.match(expression.removeprefix("re:"), m)] == [name]


def test_halves_that_are_stored_differently_become_bf16(small, tmp_path):
    """eh_proj in FP8 with halves of 192 inputs: the second straddles blocks and was dequantized."""
    cfg = dataclasses.replace(small, hidden_size=192)
    random_checkpoint.write(tmp_path / "hf", cfg, "fp8")
    arrays = fakes.load(tmp_path / "hf")
    name = "model.layers.2.eh_proj.weight"
    from dsv32_jax.quantization.quantize import fp8_quantize

    arrays[name], arrays[name + "_scale_inv"] = fp8_quantize(arrays[name])
    convert.convert(fakes.write_checkpoint(tmp_path / "a", cfg.to_dict(), arrays), tmp_path / "out")
    exported = export(tmp_path / "out", tmp_path / "back", "modelopt")
    assert exported.changed == {"dequantized to bf16: its parts are stored as dense and fp8": [name]}
    first, second = values(tmp_path / "a"), values(tmp_path / "back")
    assert all((array == second[name]).all() for name, array in first.items())


def test_copies_are_written_as_the_source_had_them(originals, small, tmp_path):
    arrays = fakes.load(originals["bf16"])
    name = "model.layers.2.shared_head.head.weight"
    arrays["model.layers.2.embed_tokens.weight"] = arrays["model.embed_tokens.weight"]
    del arrays[name]
    convert.convert(fakes.write_checkpoint(tmp_path / "a", small.to_dict(), arrays), tmp_path / "out")
    assert {leaf.same_as for leaf in Manifest.read(tmp_path / "out").leaves.values()} == {None, "embed_VD", "head_VD"}
    export(tmp_path / "out", tmp_path / "hf", "bf16")
    same_bytes(arrays, fakes.load(tmp_path / "hf"))


def test_companions_go_along(originals, tmp_path):
    source = shutil.copytree(originals["bf16"], tmp_path / "a")
    companions = fakes.companions(source)
    convert.convert(source, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "hf", "bf16")
    assert {name: (tmp_path / "hf" / name).read_text() for name in companions} == companions


def test_existing_output_is_never_touched(converted, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        code, out, err = run(capsys, converted["bf16"], tmp_path / name, "--format", "bf16")
        assert code == 6 and not out and "nothing was touched" in err
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link"]
    with pytest.raises(UsageError, match="separate folders"):
        export(converted["bf16"], converted["bf16"] / "hf", "bf16")
    with pytest.raises(UsageError, match="format must be one of"):
        export(converted["bf16"], tmp_path / "hf", "gguf")


def test_what_an_export_would_clear_is_its_own(converted, tmp_path):
    (tmp_path / ".hf.unfinished").mkdir()
    (tmp_path / ".hf.unfinished" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="in the way"):
        export(converted["bf16"], tmp_path / "hf", "bf16")
    assert [file.name for file in (tmp_path / ".hf.unfinished").iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_not_exported(converted, tmp_path):
    folder = shutil.copytree(converted["nvfp4"], tmp_path / "copy")
    file = max((folder / "weights").rglob("c.*"), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"\(weights/0000[0-9]\) has changed"):
        export(folder, tmp_path / "hf", "modelopt")
    assert not (tmp_path / "hf").exists()


def test_an_interrupted_export_leaves_nothing_that_looks_complete(converted, tmp_path, monkeypatch):
    from convert.export import shards

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardsWriter, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(converted["bf16"], tmp_path / "hf", "bf16")
    assert not (tmp_path / "hf").exists() and (tmp_path / ".hf.unfinished").exists()
    (tmp_path / ".hf.unfinished" / "model-00001-of-00001.safetensors").touch()
    export(converted["bf16"], tmp_path / "hf", "bf16")
    assert os.listdir(tmp_path) == ["hf"]
    with pytest.raises(OutputExistsError):
        export(converted["bf16"], tmp_path / "hf", "bf16")


def test_a_full_disk_is_told(converted, tmp_path, monkeypatch):
    """With the exit code of too little disk; what was written is of no use and takes no room."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardsWriter, "add", full)
        with pytest.raises(CapacityError, match="hf.unfinished cannot be written: .*Nothing of the export was kept"):
            export(converted["bf16"], tmp_path / "hf", "bf16")
    assert os.listdir(tmp_path) == [".hf.unfinished"] and os.listdir(tmp_path / ".hf.unfinished") == [LOCK]
    export(converted["bf16"], tmp_path / "hf", "bf16")


@pytest.mark.parametrize("when", ["while it is written", "at the last moment"])
def test_what_another_process_put_there_meanwhile_is_not_touched(when, converted, tmp_path, monkeypatch):
    """What was written stays aside with its lock file, by which the next export knows it and begins anew."""
    out, rename = tmp_path / "hf", os.rename

    def intrude(*_):
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("precious")

    def late(*names):
        intrude()
        rename(*names)

    with monkeypatch.context() as patch:
        if when == "at the last moment":
            patch.setattr(os, "rename", late)
        with pytest.raises(OutputExistsError, match=f"{out} was made by something else .* stays in .*hf.unfinished"):
            export(
                converted["bf16"], out, "bf16", progress=intrude if when == "while it is written" else lambda _: None
            )
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("thesis.tex", "precious")]
    assert sorted(os.listdir(tmp_path)) == [".hf.unfinished", "hf"] and (tmp_path / ".hf.unfinished" / LOCK).exists()
    shutil.rmtree(out)
    export(converted["bf16"], out, "bf16")
    assert os.listdir(tmp_path) == ["hf"] and not (out / LOCK).exists()


def test_the_command_says_what_was_written(converted, tmp_path, capsys):
    code, out, _ = run(capsys, converted["quantized"], tmp_path / "hf", "--format", "bf16")
    assert code == 0 and f"\nwritten    {tmp_path / 'hf'} (bf16): " in out
    assert "changed    8 x mlp.experts.*.up_proj.weight (layers 1): dequantized to bf16: nvfp4, as asked" in out
    code, out, _ = run(capsys, converted["nvfp4"], tmp_path / "b", "--format", "modelopt", "--share-scales")
    assert code == 0 and "own tensor scales kept in" in out and "sharing one would change values" in out


def test_two_exact_products_are_one(tmp_path):
    """(e2m1 x e4m3) x float32: with another split of the same scale, the same float32."""
    rng = np.random.default_rng(0)
    codes, scale, factor = nvfp4_quantize(rng.standard_normal((32, 64)).astype(np.float32))
    used = np.unique(scale.view(np.uint8)).tolist()
    table = rescale_bytes(used, factor[0, 0], factor[0, 0] * np.float32(2))
    assert table is not None
    other = table[scale.view(np.uint8)].view(scale.dtype)
    assert (nvfp4_dequantize(codes, other, factor * np.float32(2)) == nvfp4_dequantize(codes, scale, factor)).all()
