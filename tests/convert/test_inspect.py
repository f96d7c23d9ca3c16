"""What a folder holds: names, sizes and formats from headers, statistics from bytes, and never a terminal command."""

import cProfile
import dataclasses
import json
import math
import pstats
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import dsv32_jax as ds
from convert.inspect.folder_tree import inspect, inspect_source, source_items
from convert.inspect.tensors import compute_statistics, list_tensors
from convert.read.safetensors import Tensor
from convert.read.source import Source
from dsv32_jax import cli
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, UsageError, VerificationError, printable
from dsv32_jax.layout import leaves
from dsv32_jax.quantization.quantize import E2M1, nvfp4_dequantize

from . import fakes
from .conftest import STORAGES

REPOSITORY = Path(__file__).parents[2]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["inspect", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def parameters(cfg: Config) -> int:
    """Of all tensors of the source, copies too."""
    sizes = {name: math.prod(leaf.source_shape) for leaf in leaves(cfg) for name in leaf.sources}
    return sum(sizes.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_totals_are_those_of_the_files(storage, originals, converted, small):
    found = inspect(originals[storage])
    arrays = fakes.load(originals[storage])
    assert found.parameters == parameters(small)
    assert found.nbytes == sum(array.nbytes for array in arrays.values())
    assert sum(row.nbytes for branch in found.tree for row in branch.rows) == found.nbytes
    assert sum(size[3] for size in found.sizes) == found.nbytes
    assert [branch.layers for branch in found.tree] == [None, [0], [1], [2]]
    there = inspect(converted[storage])
    shared = sum(arrays[f"model.layers.2.{name}.weight"].size for name in ("embed_tokens", "shared_head.head"))
    assert there.parameters == found.parameters - shared
    stored = Manifest.read(converted[storage]).leaves.values()
    sizes = {"float8_e4m3fn": 1, "uint8": 1, "bfloat16": 2, "float32": 4}
    entries = [array for leaf in stored for array in leaf.arrays.values()]
    assert there.nbytes == sum(int(np.prod(array.shape)) * sizes[array.dtype] for array in entries)


def test_the_tree_is_folded_over_layers_and_experts(checkpoints, capsys):
    code, out, err = run(capsys, checkpoints["nvfp4"])
    lines = out.splitlines()
    assert code == 0 and not err
    assert any(line.split() == "model.embed_tokens.weight [320, 96] bf16 30.72 k 61.44 kB".split() for line in lines)
    layers = lines.index("layers 1-2")
    assert lines.index("layer 0") < layers < lines.index("layer 3")
    experts = next(line for line in lines[layers:] if "mlp.experts.*.gate_proj" in line)
    assert experts.split() == "mlp.experts.*.gate_proj.weight 24 x [80, 96] nvfp4 184.32 k 103.78 kB".split()
    sizes = next(line for line in lines if line.startswith("experts"))
    assert sizes.split() == "experts nvfp4 552.96 k 311.33 kB 4.50".split()
    assert [line.split()[0] for line in lines if line.startswith(("kind", "total", "MTP"))] == [
        "kind",
        *["MTP"] * 3,
        "total",
    ]


def test_a_converted_checkpoint_is_shown_by_its_leaves(converted, capsys):
    code, out, _ = run(capsys, converted["quantized"])
    assert code == 0 and "(converted): model_type deepseek_v32" in out
    assert "= embed_VD" in out and "ffn.w_gate_EMD" in out and "[8, 64, 96]" in out
    assert "note: made from fp8; digest " + Manifest.read(converted["quantized"]).digest in out
    found = inspect(converted["quantized"])
    assert {format for kind, format, *_ in found.sizes if kind == "experts"} == {"nvfp4"}
    assert {format for kind, format, *_ in found.sizes if kind == "attention"} == {"nvfp4", "fp8"}


def test_formats_are_told_weight_by_weight(tmp_path, small):
    arrays = {
        "model.layers.0.mlp.up_proj.weight": np.zeros((32, 16), np.uint8),
        "model.layers.0.mlp.up_proj.weight_scale": np.zeros((32, 2), ml_dtypes.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_2": np.zeros((), np.float32),
        "model.layers.0.mlp.up_proj.input_scale": np.zeros((), np.float32),
        "model.layers.1.mlp.up_proj.weight": np.zeros((32, 32), ml_dtypes.bfloat16),
        "model.layers.0.mlp.down_proj.weight": np.zeros((32, 32), ml_dtypes.float8_e4m3fn),
    }
    folder = fakes.write_checkpoint(tmp_path / "a", small.to_dict(), arrays)
    found = {(item.layer, item.name): item for item in source_items(Source(folder).tensors, 2)}
    assert {key: (item.format, item.shape, item.parameters) for key, item in found.items()} == {
        (0, "mlp.up_proj.weight"): ("nvfp4", (32, 32), 1024),
        (0, "mlp.up_proj.input_scale"): ("f32", (), 0),
        (1, "mlp.up_proj.weight"): ("bf16", (32, 32), 1024),
        (0, "mlp.down_proj.weight"): ("f8_e4m3", (32, 32), 1024),
    }
    assert found[0, "mlp.up_proj.weight"].nbytes == 32 * 16 + 32 * 2 + 4
    assert found[0, "mlp.up_proj.input_scale"].kind == "no weight"


def test_notes_tell_what_is_odd(tmp_path, originals, small, capsys):
    config = small.to_dict() | {"model_type": "deepseek_v3"}
    folder = fakes.write_checkpoint(tmp_path / "a", config, fakes.load(originals["bf16"]))
    (folder / "consolidated.safetensors").touch()
    code, out, _ = run(capsys, folder)
    assert code == 0
    assert "note: ignored 1 non-shard file: consolidated.safetensors" in out
    assert "model_type is 'deepseek_v3'" in out


def test_broken_headers_are_told(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    code, out, err = run(capsys, tmp_path)
    assert code == 3 and not out and "git-lfs pointer" in err
    assert run(capsys, tmp_path / "nothing")[0] == 3


@pytest.mark.parametrize("storage", ["nvfp4", "compressed-tensors", "fp8", "bf16"])
def test_single_tensors_are_listed(storage, originals, converted, capsys):
    arrays = fakes.load(originals[storage])
    rows = {row["name"]: row for row in list_tensors(originals[storage], "*layers.1.mlp.experts.3.*")}
    assert rows.keys() == {name for name in arrays if "layers.1.mlp.experts.3." in name}
    for name, row in rows.items():
        assert row["shape"] == list(arrays[name].shape) and row["bytes"] == arrays[name].nbytes
        assert fakes.header_of(originals[storage] / row["place"])
    code, out, _ = run(capsys, converted[storage], "--tensors", "layers.1.ffn.w_up_EMD")
    entries = Manifest.read(converted[storage]).leaves["layers.1.ffn.w_up_EMD"].arrays
    assert code == 0 and len(out.splitlines()) == len(entries)
    assert [line.split()[0] for line in out.splitlines()] == [f"layers.1.ffn.w_up_EMD.{name}" for name in entries]
    assert all(line.endswith("weights/00000") for line in out.splitlines())


def test_what_no_tensor_is_called_is_an_error(originals, converted, capsys):
    for folder in (originals["bf16"], converted["bf16"]):
        with pytest.raises(UsageError, match="no tensor of .* matches nothing"):
            list_tensors(folder, "nothing")
        with pytest.raises(UsageError, match="no tensor of .* matches nothing"):
            list(compute_statistics(folder, "nothing"))
    code, _, err = run(capsys, originals["bf16"], "--stats")
    assert code == 2 and "select them with --tensors" in err


def test_statistics_are_those_of_the_bytes(tmp_path, originals, small, capsys):
    arrays = fakes.load(originals["nvfp4"])
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    scale = arrays[name + "_scale"].view(np.uint8)
    scale[0, 0], scale[1, :2], scale[2, 0] = 0x7F, 0, 0xFF
    arrays[name][3, 8:16], arrays[name][1, :8] = 0x88, 0
    folder = fakes.write_checkpoint(tmp_path / "a", small.to_dict(), arrays)
    (row,) = compute_statistics(folder, "*layers.1.mlp.experts.2.down_proj.weight_scale")
    parts = [arrays[name], scale.view(ml_dtypes.float8_e4m3fn), arrays[name + "_scale_2"]]
    assert row["name"] == name and row["amax"] == np.abs(nvfp4_dequantize(*parts)).max()
    assert (row["nan_scales"], row["zero_blocks"], row["not_finite"]) == (2, 3, 0)
    codes = np.stack([arrays[name] & 15, arrays[name] >> 4])
    assert row["codes"] == {f"{value:g}": int((codes == code).sum()) for code, value in enumerate(E2M1)}
    assert row["zeros"] == ((codes & 7) == 0).sum()
    values = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = values[np.isfinite(values) & (values > 0)]
    exponents, counts = np.unique(np.floor(np.log2(finite)).astype(int), return_counts=True)
    assert row["scale_exponents"] == {str(e): int(n) for e, n in zip(exponents, counts, strict=True)}
    code, out, _ = run(capsys, folder, "--tensors", "*layers.1.mlp.experts.2.down_proj*", "--stats")
    assert code == 0 and "3 zero blocks" in out and "2 nan scales" in out and "scale exponents" in out and "#" in out


def test_statistics_of_other_formats(tmp_path, originals, converted, small):
    arrays = fakes.load(originals["fp8"])
    name = "model.layers.0.mlp.up_proj.weight"
    arrays["model.norm.weight"][:3] = np.nan, np.inf, 0
    folder = fakes.write_checkpoint(tmp_path / "a", small.to_dict(), arrays)
    (row,) = compute_statistics(folder, name)
    assert sum(row["codes"].values()) + row["zeros"] == arrays[name].size and row["scale_exponents"]
    (norm,) = compute_statistics(folder, "model.norm.weight")
    assert (norm["not_finite"], norm["zeros"]) == (2, 1)
    assert norm["amax"] == np.abs(arrays["model.norm.weight"][3:]).max()
    (leaf,) = compute_statistics(converted["nvfp4"], "layers.1.ffn.w_up_EMD*")
    one = list(compute_statistics(originals["nvfp4"], "*layers.1.mlp.experts.*.up_proj.weight"))
    assert leaf["amax"] == max(row["amax"] for row in one) and leaf["zeros"] == sum(row["zeros"] for row in one)
    assert leaf["codes"] == {code: sum(row["codes"][code] for row in one) for code in leaf["codes"]}


def test_statistics_of_damaged_arrays_are_not_given(converted, tmp_path):
    import shutil

    folder = shutil.copytree(converted["bf16"], tmp_path / "copy")
    manifest = Manifest.read(folder)
    entry = manifest.leaves["norm_D"]
    arrays = {"values": dataclasses.replace(entry.arrays["values"], sha256="0" * 64)}
    leaves = manifest.leaves | {"norm_D": dataclasses.replace(entry, arrays=arrays)}
    dataclasses.replace(manifest, leaves=leaves).write(folder)
    with pytest.raises(VerificationError, match="norm_D.values .* has changed"):
        list(compute_statistics(folder, "norm_D"))


@pytest.mark.parametrize("argv", [[], ["--tensors", "*norm*"], ["--tensors", "*wk*", "--stats"]])
def test_json_is_one_object(argv, originals, converted, capsys):
    for folder in (originals["nvfp4"], converted["nvfp4"]):
        wanted = [argument.replace("wk", "w_k") if folder == converted["nvfp4"] else argument for argument in argv]
        code, out, _ = run(capsys, folder, "--json", *wanted)
        found = json.loads(out)
        assert code == 0 and (isinstance(found, list) if argv else found["parameters"] > 0)


def test_inspecting_needs_no_jax(originals, converted):
    code = "import sys; from dsv32_jax import cli; sys.exit(cli.main(sys.argv[1:]) or 'jax' in sys.modules)"
    for folder, *rest in ([originals["fp8"]], [converted["fp8"]], [converted["fp8"], "--tensors", "norm_D", "--stats"]):
        command = [sys.executable, "-W", "error", "-c", code, "inspect", str(folder), *rest]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_nothing_steers_the_terminal(tmp_path, originals, small, capsys):
    """Names of files, values of the configuration, notes and errors are escaped; tensor names are refused."""
    assert printable("a\x1b[31mb\u202e\nc") == "a\\x1b[31mb\\u202e\nc"
    evil = "\x1b]0;owned\x07"
    config = small.to_dict() | {"model_type": evil}
    folder = fakes.write_checkpoint(tmp_path / "a", config, fakes.load(originals["bf16"]))
    (folder / f"consolidated{evil}.safetensors").touch()
    (folder / "model.safetensors").rename(folder / f"model{evil}.safetensors")
    outputs = [run(capsys, folder), run(capsys, folder, "--tensors", "lm_head*"), run(capsys, tmp_path / evil)]
    (folder / f"model{evil}.safetensors").write_bytes(fakes.file_bytes({evil: {}}))
    outputs.append(run(capsys, folder))
    for code, out, err in outputs:
        assert "\x1b" not in out + err and "\x07" not in out + err
        assert "owned" in out + err or code == 0
    assert [code for code, *_ in outputs] == [0, 0, 3, 3]


def test_a_large_checkpoint_takes_seconds(real, tmp_path):
    """138,357 tensors in one table, in under 6 calls each."""
    tensors = {}
    for leaf in leaves(real):
        for name in leaf.sources:
            out, *rest = leaf.source_shape
            if not rest:
                tensors[name] = ("F32", (out,))
            else:
                tensors[name] = ("U8", (out, rest[0] // 2))
                tensors[name + "_scale"] = ("F8_E4M3", (out, rest[0] // 16))
                tensors[name + "_scale_2"] = ("F32", ())
    source = object.__new__(Source)
    source.folder, source.notes, source.config = tmp_path, [], real.to_dict()
    sizes = {"F32": 4, "U8": 1, "F8_E4M3": 1}
    source.tensors = {
        name: Tensor(name, tmp_path, dtype, shape, 0, math.prod(shape) * sizes[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    profile = cProfile.Profile(builtins=False)
    found = profile.runcall(inspect_source, source)
    assert pstats.Stats(profile).total_calls < 6 * len(tensors)
    assert found.parameters == parameters(real) and len(found.tree) == 4
    assert [branch.layers and (branch.layers[0], branch.layers[-1]) for branch in found.tree] == [
        None, (0, 2), (3, 60), (61, 61),
    ]  # fmt: skip


def test_malformed_folders_are_refused_in_both_layouts(converted, tmp_path):
    import shutil

    folder = shutil.copytree(converted["bf16"], tmp_path / "copy")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(VerificationError, match="manifest.json"):
        inspect(folder)
    (folder / "manifest.json").rename(folder / "journal.jsonl")
    for look in (inspect, lambda folder: list_tensors(folder, "*"), ds.inspect.Folder):
        with pytest.raises(CheckpointError, match="is an unfinished conversion"):
            look(folder)
