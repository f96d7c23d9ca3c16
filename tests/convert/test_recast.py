"""Quantizing as a job: what it reports, what stops it, how it goes on."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.export.shared_scales import rescale_bytes
from convert.read.source import Source
from convert.read.weights import detect
from convert.transform import cut
from convert.transform.requantize import ErrorStats, count_odd_scales, relative_rms, summarize_errors
from convert.verify.verify import verify
from dsv32_jax.errors import CheckpointError, OutputExistsError, UsageError
from dsv32_jax.layout import leaves
from dsv32_jax.quantization.quantize import fp8_quantize

from . import fakes
from .test_job import stored
from .test_quantizing import linear, quantized_whole


def test_the_report_has_the_errors_of_what_is_stored(checkpoints, tmp_path):
    source = fakes.load(checkpoints["bf16"])
    manifest = convert.convert(checkpoints["bf16"], tmp_path / "out", to="nvfp4", policy="full")
    errors = manifest.report["errors"]
    assert errors["kinds"]["mlp.experts.*.down_proj"]["weights"] == 3 * 12
    single, kinds = {}, {}
    for name in filter(linear, source):
        exact = source[name].astype(np.float64)
        off = quantized_whole(source, name, "nvfp4").astype(np.float64) - exact
        single[name] = np.linalg.norm(off) / np.linalg.norm(exact)
        rest = name.split(".", 3)[3].removesuffix(".weight")
        kind = ".".join("*" if part.isdigit() else part for part in rest.split("."))
        kinds.setdefault(kind, []).append((np.square(off).sum(), np.square(exact).sum()))
    assert errors["kinds"].keys() == kinds.keys()
    for kind, sums in kinds.items():
        want = np.sqrt(sum(off for off, _ in sums) / sum(norm for _, norm in sums))
        assert errors["kinds"][kind]["relative_rms"] == pytest.approx(want, rel=1e-5)
        assert 0.09 < want < 0.103
    assert list(errors["worst"]) == sorted(single, key=lambda name: -single[name])[:5]


def test_a_matrix_of_zeros_has_no_error():
    zero, one = ErrorStats(0.0, 0.0), ErrorStats(1.0, 4.0, 2, 3)
    assert relative_rms([zero]) == 0 and relative_rms([zero, one]) == 0.5
    assert summarize_errors({"a.weight": zero, "model.layers.3.b.weight": one}) == {
        "kinds": {"a": {"weights": 1, "relative_rms": 0.0}, "b": {"weights": 1, "relative_rms": 0.5}},
        "worst": {"model.layers.3.b.weight": 0.5, "a.weight": 0.0},
    }


def test_gate_and_up_share_a_tensor_scale_when_asked(checkpoints, tmp_path):
    convert.convert(checkpoints["fp8"], tmp_path / "own", to="nvfp4", policy="full")
    convert.convert(checkpoints["fp8"], tmp_path / "one", to="nvfp4", policy="full", tensor_scales="shared")
    own, one = stored(tmp_path / "own"), stored(tmp_path / "one")
    for prefix in ("layers.0.ffn.w_{}_FD", "layers.1.ffn.w_{}_EMD", "layers.1.ffn.shared_{}_MD"):
        gate, up = (one[prefix.format(name)]["tensor_scale"] for name in ("gate", "up"))
        both = [own[prefix.format(name)]["tensor_scale"] for name in ("gate", "up")]
        np.testing.assert_array_equal(gate, up)
        np.testing.assert_array_equal(gate, np.maximum(*both))
    assert one["layers.0.mla.w_dq_QD"]["tensor_scale"].item() == one["layers.0.mla.w_dkv_CD"]["tensor_scale"].item()
    np.testing.assert_array_equal(one["layers.0.ffn.w_down_DF"]["codes"], own["layers.0.ffn.w_down_DF"]["codes"])


def test_odd_scales_that_are_dequantized_away_are_counted(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["nvfp4"] / "config.json").read_text()), fakes.load(checkpoints["nvfp4"])
    scale = arrays["model.layers.0.self_attn.q_b_proj.weight_scale"].view(np.uint8)
    scale[0, :3], scale[1, 0] = 0, 0x7F
    manifest = convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out", to="bf16")
    assert (manifest.report["nan_scale_bytes"], manifest.report["zero_blocks"]) == (1, 3)


@pytest.mark.parametrize("storage, tensor_scales", [("bf16", "own"), ("fp8", "own"), ("fp8", "shared")])
def test_values_that_are_not_finite_are_told_by_name(storage, tensor_scales, checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints[storage] / "config.json").read_text()), fakes.load(checkpoints[storage])
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    arrays[name][3, 5] = np.nan
    with pytest.raises(CheckpointError, match=f"{name}: 1 of 7680 values are not finite"):
        source = fakes.write_checkpoint(tmp_path / "hf", config, arrays)
        convert.convert(source, tmp_path / "out", to="nvfp4", tensor_scales=tensor_scales)


OTHER = [{}, {"to": "bf16"}, {"to": "nvfp4", "policy": "full"}, {"to": "nvfp4", "scales": "mse"},
         {"to": "nvfp4", "tensor_scales": "shared"}]  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(checkpoints, tmp_path_factory) -> Path:
    """A conversion to NVFP4 that stopped half way."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    original, calls = cut.plan_build, []

    def build(*rest):
        calls.append(rest)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return original(*rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cut, "plan_build", build)
        convert.convert(checkpoints["fp8"], out, to="nvfp4", group_bytes=60_000)
    return out


def test_scales_without_nvfp4_are_refused(checkpoints, tmp_path):
    for options in ({"scales": "mse"}, {"tensor_scales": "shared"}, {"scales": "mse", "to": "bf16"}):
        with pytest.raises(UsageError, match='add to="nvfp4"'):
            convert.convert(checkpoints["fp8"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nan_scales_are_shared_as_what_they_stand_for():
    """Both NaN bytes mean 448, neither is negative."""
    table = rescale_bytes([0x7F, 0xFF, 0xB8], np.float32(1), np.float32(2))
    assert table is not None and table[0x7F] == table[0xFF] == 0x76 and table[0xB8] == 0xB0


def test_zero_blocks_of_any_width():
    """By their scale or by their codes, in blocks of 16 and of 32 inputs."""
    for block in (16, 32):
        codes = np.full((2, 64), 0x11, np.uint8)
        codes[0, : block // 2] = 0x80
        scale = np.full((2, 128 // block), 0x38, np.uint8)
        scale[1, 1] = 0x80
        assert count_odd_scales({"codes": codes, "block_scale": scale}) == {
            "nan_scale_bytes": 0,
            "zero_blocks": 2,
        }


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
def test_a_flipped_bit_in_the_journal_is_told(share, unfinished, checkpoints, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "damaged")
    raw = bytearray((out / "journal.jsonl").read_bytes())
    raw[int(share * len(raw))] ^= 1
    (out / "journal.jsonl").write_bytes(raw)
    with pytest.raises(OutputExistsError, match="journal.jsonl is damaged.*Nothing was touched"):
        convert.convert(checkpoints["fp8"], out, to="nvfp4", group_bytes=60_000)


def test_a_shard_that_was_downloaded_again_is_read_again(unfinished, checkpoints, tmp_path):
    """Copied as it was, the conversion goes on; with other bytes in any tensor that was converted, it does not."""
    source = shutil.copytree(checkpoints["fp8"], tmp_path / checkpoints["fp8"].name)
    out = shutil.copytree(unfinished, tmp_path / "out")
    lines = [json.loads(line)["line"] for line in (out / "journal.jsonl").read_text().splitlines()]
    entries = [line["leaves"] for line in lines if "leaves" in line]
    names = [tensor[0] for leaves in entries for leaf in leaves.values() for tensor in leaf["provenance"]["sources"]]
    tensor = min((Source(source).tensors[name] for name in names), key=lambda tensor: tensor.nbytes)
    raw = bytearray(tensor.file.read_bytes())
    tensor.file.write_bytes(raw)
    shutil.copytree(out, tmp_path / "same")
    convert.convert(source, tmp_path / "same", to="nvfp4", group_bytes=60_000)
    raw[tensor.offset] ^= 1
    tensor.file.write_bytes(raw)
    with pytest.raises(OutputExistsError, match="the source has changed since this conversion began: 1 of"):
        convert.convert(source, out, to="nvfp4", group_bytes=60_000)


@pytest.mark.parametrize("options", OTHER)
def test_other_options_do_not_continue_it(options, unfinished, checkpoints):
    before = {file: file.read_bytes() for file in unfinished.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(OutputExistsError, match="with another plan: .*. Nothing was touched"):
        convert.convert(checkpoints["fp8"], unfinished, **options, group_bytes=60_000)
    assert before == {file: file.read_bytes() for file in before}


def test_the_same_options_continue_it_with_the_same_report(unfinished, checkpoints, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "continued")
    manifest = convert.convert(checkpoints["fp8"], out, to="nvfp4", group_bytes=60_000)
    whole = convert.convert(checkpoints["fp8"], tmp_path / "whole", to="nvfp4", group_bytes=60_000)
    assert manifest.digest == whole.digest and manifest.report == whole.report
    with pytest.raises(OutputExistsError, match="with other options"):
        convert.convert(checkpoints["fp8"], out, to="nvfp4", scales="mse", group_bytes=60_000)


def test_a_stray_file_among_the_parts_does_not_stop_it(unfinished, checkpoints, tmp_path):
    """What a file manager leaves in the folder stays there, and is none of the checkpoint's files."""
    out = shutil.copytree(unfinished, tmp_path / "out")
    names = (
        ".DS_Store",
        "._00000",
        "lost+found/x",
        ".Trash-1000/y",
        "Thumbs.db",
        ".nfs00ab",
        "@eaDir/z",
        ".snapshot/s",
    )
    strays = [folder / name for folder in (out, out / "weights") for name in names]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("precious")
    manifest = convert.convert(checkpoints["fp8"], out, to="nvfp4", group_bytes=60_000)
    verify(out)
    assert all(stray.read_text() == "precious" for stray in strays)
    assert manifest.digest == convert.convert(checkpoints["fp8"], tmp_path / "whole", to="nvfp4").digest


def test_a_fresh_disk_is_an_empty_folder(checkpoints, tmp_path):
    """Its root has lost+found, which must stay."""
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "disk" / ".DS_Store").touch()
    convert.convert(checkpoints["nvfp4"], tmp_path / "disk")
    verify(tmp_path / "disk")
    assert (tmp_path / "disk" / "lost+found").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lost+founds").touch()
    with pytest.raises(OutputExistsError, match=r"1 entry: lost\+founds"):
        convert.convert(checkpoints["nvfp4"], tmp_path / "other")


def test_experts_are_quantized_one_by_one(tiny):
    """Peak: the leaf and what one expert takes on its way."""
    cfg = dataclasses.replace(tiny, hidden_size=512, moe_intermediate_size=256, n_routed_experts=48)
    leaf = next(leaf for leaf in leaves(cfg) if leaf.path == "layers.1.ffn.w_up_EMD")
    w = np.random.default_rng(0).standard_normal(leaf.source_shape, np.float32)
    quantized, grid = fp8_quantize(w)
    arrays = {name: part for one in leaf.sources for name, part in ((one, quantized), (one + "_scale_inv", grid))}
    tensors = fakes.tensors(arrays)
    wanted = [dataclasses.replace(detect(name, tensors), wanted="nvfp4") for name in leaf.sources]
    tracemalloc.start()
    built = cut.build(leaf, wanted, cut.choose_format(leaf, wanted), lambda tensor: arrays[tensor.name].copy())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(array.nbytes for array in built.values())
    assert peak < whole + 24 * w.size


def test_the_command_line_quantizes_and_reports(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    source, options = str(checkpoints["fp8"]), ["--to", "nvfp4", "--policy", "experts-only", "--scales", "mse"]
    assert convert.main([source, str(tmp_path / "out"), *options, "--dry-run", "--verbose"]) == 0
    dry = capsys.readouterr().out
    assert (
        "72 weights fp8 -> nvfp4" in dry and "layers.1.ffn.w_up_EMD: nvfp4" in dry and not (tmp_path / "out").exists()
    )
    assert convert.main([source, str(tmp_path / "out"), *options]) == 0
    done = capsys.readouterr().out
    assert "72 weights fp8 -> nvfp4" in done and "mlp.experts.*.down_proj 8." in done


@pytest.mark.parametrize("options", [["--policy", "nvidia"], ["--to", "nvfp4", "--policy", "none.json"]])
def test_misuse_ends_with_exit_code_2(options, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert convert.main([str(checkpoints["fp8"]), str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
