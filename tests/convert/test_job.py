"""The conversion: bytes arrive as they were, and whatever stops it, nothing is lost or taken for finished."""

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.plan import limits
from convert.read.safetensors import Tensor
from convert.read.weights import StoredWeight
from convert.transform import cut
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.config import Config
from dsv32_jax.errors import CapacityError, CheckpointError, ConfigError, OutputExistsError, UsageError
from dsv32_jax.layout import leaves
from dsv32_jax.quantization.quantize import fp8_dequantize, nvfp4_dequantize
from dsv32_jax.system.locks import LOCK

from . import fakes
from .conftest import STORAGES

REPOSITORY = Path(__file__).parents[2]
GROUP = 60_000
"""Bytes saved together: small enough for several parts."""


def stored(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every array of a converted checkpoint, by leaf."""
    manifest = Manifest.read(folder)
    reader = Reader(folder, manifest.leaves)
    return {path: {name: reader.read((path, name)) for name in leaf.arrays} for path, leaf in manifest.leaves.items()}


def values(format: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if format == "nvfp4":
        return nvfp4_dequantize(**arrays)
    return fp8_dequantize(*arrays.values()) if format == "fp8_block" else arrays["values"].astype(np.float32)


def dense(name: str, array: np.ndarray) -> StoredWeight:
    return StoredWeight("dense", "dense", array.shape, 1, Tensor(name, Path(), "F32", array.shape, 0, array.nbytes))


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Each small checkpoint, converted in several parts."""
    root = tmp_path_factory.mktemp("converted")
    for storage in STORAGES:
        convert.convert(checkpoints[storage], root / storage, group_bytes=GROUP)
    return {storage: root / storage for storage in STORAGES}


def test_golden_checkpoints_convert_to_the_values_of_the_reference(case):
    manifest, arrays = Manifest.read(case.converted), stored(case.converted)
    compared = 0
    for leaf in leaves(Config.from_dict(manifest.config)):
        for expert, source in enumerate(leaf.sources):
            if (want := case.tensors.get(f"dequant.{source.removesuffix('.weight')}")) is None:
                want = case.tensors.get(f"dequant.{source}")
            if want is None:
                continue
            one = leaf._replace(shape=leaf.shape[leaf.stacked :], sources=(source,), stacked=False)
            want = cut.build(
                one, [dense(source, want)], cut.LeafFormat("dense", 1, "float32"), lambda t, want=want: want
            )
            got = values(manifest.leaves[leaf.path].format, arrays[leaf.path])
            got = got[expert] if leaf.stacked else got
            np.testing.assert_allclose(got, want["values"], rtol=4e-7, atol=0)
            compared += 1
    assert compared >= sum(name.startswith("dequant.") for name in case.tensors)


def test_golden_bytes_are_kept(case):
    """Every byte of a tensor that is not cut is found again in its leaf."""
    source, arrays = fakes.load(case.folder), stored(case.converted)
    manifest = Manifest.read(case.converted)
    compared = 0
    for leaf in leaves(Config.from_dict(manifest.config)):
        entry = manifest.leaves[leaf.path]
        leaf_arrays = arrays[entry.same_as or leaf.path]
        if leaf.cut is not None or entry.format == "fp8_block":
            continue
        codes = leaf_arrays.get("codes", leaf_arrays.get("values"))
        packed = [source.get(name + "_packed", source.get(name)) for name in leaf.sources]
        assert codes.tobytes() == b"".join(array.tobytes() for array in packed)
        if entry.format == "nvfp4":
            scales = b"".join(source[name + "_scale"].tobytes() for name in leaf.sources)
            assert leaf_arrays["block_scale"].tobytes() == scales
        compared += 1
    assert compared >= 19


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_what_the_manifest_says(storage, converted, checkpoints, tmp_path):
    manifest = Manifest.read(converted[storage])
    assert len(list((converted[storage] / "weights").iterdir())) > 4
    for path, arrays in stored(converted[storage]).items():
        for name, entry in manifest.leaves[path].arrays.items():
            array = arrays[name]
            assert (array.dtype.name, array.shape) == (entry.dtype, entry.shape)
            assert hashlib.sha256(array.tobytes()).hexdigest() == entry.sha256
    assert {path for path, leaf in manifest.leaves.items() if leaf.same_as} == {"mtp.embed_VD", "mtp.head_VD"}
    again = convert.convert(checkpoints[storage], tmp_path / "whole")
    assert again.digest == manifest.digest


def test_both_names_of_nvfp4_give_the_same_bytes(converted):
    first, second = stored(converted["nvfp4"]), stored(converted["compressed-tensors"])
    for path, arrays in first.items():
        for name, array in arrays.items():
            if name == "tensor_scale":
                np.testing.assert_allclose(array, second[path][name], rtol=2e-7)
            else:
                assert array.tobytes() == second[path][name].tobytes()


def test_a_copy_that_differs_is_stored(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["bf16"] / "config.json").read_text()), fakes.load(checkpoints["bf16"])
    name = "model.layers.3.shared_head.head.weight"
    arrays[name] = (arrays[name].astype(np.float32) * 2).astype(ml_dtypes.bfloat16)
    manifest = convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out")
    assert manifest.leaves["mtp.head_VD"].same_as is None and manifest.leaves["mtp.embed_VD"].same_as == "embed_VD"
    assert stored(tmp_path / "out")["mtp.head_VD"]["values"].tobytes() == arrays[name].tobytes()


def test_odd_scales_are_kept_and_counted(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["nvfp4"] / "config.json").read_text()), fakes.load(checkpoints["nvfp4"])
    name = "model.layers.0.mlp.up_proj.weight"
    scale = arrays[name + "_scale"].view(np.uint8)
    scale[0, :3], scale[1, 0], scale[2, 0] = 0, 0x7F, 0xFF
    manifest = convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out")
    assert (manifest.report["nan_scale_bytes"], manifest.report["zero_blocks"]) == (2, 3)
    kept = stored(tmp_path / "out")["layers.0.ffn.w_up_FD"]["block_scale"]
    assert kept.tobytes() == scale.tobytes()


def test_tensor_scales_that_differ_within_a_pair_are_counted(checkpoints, tmp_path, capsys):
    config, arrays = json.loads((checkpoints["nvfp4"] / "config.json").read_text()), fakes.load(checkpoints["nvfp4"])
    scales = {name: array for name, array in arrays.items() if name.endswith("_scale_2")}
    arrays |= {name: np.full_like(array, 0.001) for name, array in scales.items()}
    for name in ("0.mlp.up_proj", "2.mlp.experts.3.gate_proj", "0.mlp.down_proj", "1.self_attn.q_a_proj"):
        arrays[f"model.layers.{name}.weight_scale_2"] = np.array(0.0005, np.float32)
    source = fakes.write_checkpoint(tmp_path / "hf", config, arrays)
    assert convert.main([str(source), str(tmp_path / "out")]) == 0
    assert "odd        3 pairs of different tensor scales\n" in capsys.readouterr().out


@pytest.mark.parametrize("storage, name", [("bf16", "lm_head.weight"), ("fp8", "model.layers.0.mlp.up_proj.weight")])
def test_values_that_are_not_finite_stop_it(storage, name, checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints[storage] / "config.json").read_text()), fakes.load(checkpoints[storage])
    arrays[name][3, 5] = np.nan
    with pytest.raises(CheckpointError, match="1 value that is NaN or infinite"):
        convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out")


def test_inverted_scales_are_all_told_before_anything_is_written(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["nvfp4"] / "config.json").read_text()), fakes.load(checkpoints["nvfp4"])
    names = [name for name in arrays if "experts" in name and name.endswith("gate_proj.weight_scale_2")]
    arrays |= {name: 1 / arrays[name] for name in names}
    with pytest.raises(
        CheckpointError, match=f"{len(names)} unusable tensor scales.*weight_global_scale, which divides"
    ):
        convert.convert(fakes.write_checkpoint(tmp_path / "hf", config, arrays), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_left_as_it_is(checkpoints, converted, tmp_path):
    def files() -> dict[Path, tuple[int, int]]:
        found = {file: file.stat() for file in converted["fp8"].rglob("*") if file.name != LOCK}
        return {file: (status.st_ino, status.st_mtime_ns) for file, status in found.items()}

    before = files()
    assert convert.convert(checkpoints["fp8"], converted["fp8"], group_bytes=GROUP) == Manifest.read(converted["fp8"])
    assert files() == before


@pytest.mark.parametrize("content", ["foreign", "another", "another unfinished", "file", "damaged journal"])
def test_other_content_is_never_touched(content, checkpoints, converted, tmp_path):
    out = tmp_path / "out"
    if content == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    elif content == "file":
        out.write_text("precious")
    else:
        shutil.copytree(converted["fp8"], out)
    if content in ("another unfinished", "damaged journal"):
        (out / "manifest.json").unlink()
        (out / "journal.jsonl").write_text('{"plan": "0", "source": "x"}\n' if content != "damaged journal" else "{\n")
    before = {file: file.read_bytes() for file in [out, *out.rglob("*")] if file.is_file() and file.name != ".lock"}
    with pytest.raises(OutputExistsError, match="[Nn]othing was touched"):
        convert.convert(checkpoints["nvfp4"], out)
    assert before == {file: file.read_bytes() for file in before}
    assert content != "foreign" or [file.name for file in out.iterdir()] == ["thesis.tex"]


def test_a_second_converter_is_refused(checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 42 on somewhere")
        lock.flush()
        with pytest.raises(OutputExistsError, match="pid 42 on somewhere"):
            convert.convert(checkpoints["bf16"], tmp_path / "out")
    convert.convert(checkpoints["bf16"], tmp_path / "out")


def test_source_and_output_must_be_apart(checkpoints, tmp_path):
    source = checkpoints["bf16"]
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", source.parent, tmp_path / "link"):
        with pytest.raises(UsageError, match="separate folders"):
            convert.convert(source, out)


def test_too_little_disk_is_told_before_the_work(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CapacityError, match="need .*, 1 B free"):
        convert.convert(checkpoints["bf16"], tmp_path / "out")


def test_companions_are_copied(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints["bf16"], tmp_path / "hf")
    companions = fakes.companions(source)
    (source / "modeling_deepseek.py").write_text("import os")
    manifest = convert.convert(source, tmp_path / "out")
    assert manifest.report["companions"] == list(companions)
    assert {name: (tmp_path / "out" / name).read_text() for name in companions} == companions
    assert not (tmp_path / "out" / "modeling_deepseek.py").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a tokenizer: not valid JSON: Expecting value"),
        ("{}", "is not a tokenizer (it has no 'model')"),
        ('{"model": {"vocab": {"a": 0}}}', "does not belong to this model: it has no eos_token_id"),
    ],
)
def test_a_tokenizer_of_no_use_is_told_before_the_work(checkpoints, tmp_path, text, why):
    """What `load` would refuse is not copied."""
    source = shutil.copytree(checkpoints["bf16"], tmp_path / "hf")
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(why)):
        convert.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run(*arguments, code: str = "") -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "convert"]
    command = [sys.executable, "-W", "error", *start, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_dry_run_needs_no_jax_and_writes_nothing(checkpoints, tmp_path):
    code = "import sys, convert; code = convert.main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(code)"
    done = run(checkpoints["nvfp4"], tmp_path / "out", "--dry-run", code=code)
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "out").exists()
    assert re.search(r"^formats +bf16 .*nvfp4 \d+$", done.stdout, re.MULTILINE) and "embed_VD" not in done.stdout
    done = run(checkpoints["nvfp4"], tmp_path / "out", "--dry-run", "--verbose", code=code)
    assert "parameter  embed_VD: bf16, 61.44 kB: values bfloat16 [320, 96]" in done.stdout


def test_the_command_line(checkpoints, converted, tmp_path):
    done = run(checkpoints["nvfp4"], tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == Manifest.read(converted["nvfp4"]).digest
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events] == ["start", "begin", "progress", "done"]
    assert events[2]["done"] == events[2]["total"] == events[1]["total"]
    assert set(events[2]) >= {"rate", "seconds_left", "memory", "leaf", "saved"}


@pytest.mark.parametrize("storage, code", [("missing", 3), ("bf16", 6)])
def test_errors_end_with_their_exit_code(storage, code, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert convert.main([str(checkpoints["bf16"].parent / storage), str(tmp_path / "out")]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and not printed.out


def settings(folder, **generation):
    """Write a generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture
def source(originals, tmp_path):
    """A copy of a checkpoint, whose settings can be changed."""
    return shutil.copytree(originals["nvfp4"], tmp_path / "source")


def test_end_tokens_are_those_of_both_files(source, tmp_path, small):
    """config.json and generation_config.json, also where the first has none; the note says so."""
    first = small.eos_token_id[0]
    manifest = convert.convert(settings(source, eos_token_id=[first, 7, 9]), tmp_path / "a")
    assert Config.from_dict(manifest.config).eos_token_id == (first, 7, 9)
    assert any("end tokens in addition to those of config.json: 7, 9" in note for note in manifest.report["notes"])
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"eos_token_id": None}))
    manifest = convert.convert(settings(source, eos_token_id=5), tmp_path / "b")
    assert Config.from_dict(manifest.config).eos_token_id == (5,)
    for wrong, said in ((["x"], "no token id"), (-1, "no token id"), (10**6, "outside the vocabulary")):
        with pytest.raises((CheckpointError, ConfigError), match=f"generation_config.json.*\n?.*{said}"):
            convert.convert(settings(source, eos_token_id=wrong), tmp_path / "c")


def test_settings_that_are_not_followed_are_noted(source, tmp_path):
    """What the sampler does not have, and what contradicts the config; neutral values are no news."""
    settings(source, bos_token_id=5, num_beams=4, max_new_tokens=9, do_sample=True, temperature=0.6, top_k=50, x=None)
    config = {"add_bos_token": True, "add_eos_token": True, "eos_token": {"content": "t9"}, "bos_token": "t0"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads(fakes.tokenizer(source))
    tokenizer["added_tokens"] = [{"id": i, "content": f"t{i}"} for i in (0, 1, 9)]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    notes = "; ".join(convert.convert(source, tmp_path / "a").report["notes"])
    for part in ("not used: max_new_tokens=9, num_beams=4", "bos_token_id is 5", "eos_token 't9' has the id 9"):
        assert part in notes, notes
    assert "add_eos_token=True" in notes and "add_bos_token" not in notes and "'t0'" not in notes


def test_what_the_user_ignores_is_recorded(source, tmp_path):
    """Keys with their values, patterns, and in the notes; the converted config does not have the keys."""
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        "\ufeff" + json.dumps(raw | {"sliding_window": 9, "n_layers": 2, "mlp_bias": False})
    )
    fakes.write_shard(source / "model-more.safetensors", {"x.lora_A": np.ones(1, np.float32)})
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match='ignore_config="sliding_window"'):
        convert.convert(source, tmp_path / "a")
    options = {"ignore_config": "sliding_window", "ignore_tensors": ["*.lora_A"]}
    manifest = convert.convert(source, tmp_path / "a", **options)
    assert manifest.source["ignored_config"] == {"sliding_window": 9}
    assert manifest.source["ignored_tensors"] == ["*.lora_A"]
    assert not {"sliding_window", "n_layers", "mlp_bias"} & set(manifest.config)
    notes = "; ".join(manifest.report["notes"])
    assert "ignored sliding_window as requested" in notes and "ignored mlp_bias, which is false" in notes
    assert Manifest.read(tmp_path / "a").digest == manifest.digest
    assert convert.convert(source, tmp_path / "a", **options).digest == manifest.digest
    with pytest.raises(UsageError, match="must be text"):
        convert.convert(source, tmp_path / "b", ignore_config=[5])


def test_a_checkpoint_that_transformers_saved(tmp_path):
    """It converts with the config as it was saved."""
    file = Path(__file__).parents[1] / "data" / "config_saved_by_transformers_5.json"
    random_checkpoint.write(tmp_path / "hf", Config.from_json(file), "fp8")
    shutil.copy(file, tmp_path / "hf" / "config.json")
    manifest = convert.convert(tmp_path / "hf", tmp_path / "out")
    assert Config.from_dict(manifest.config) == Config.from_json(file)
    assert "config.json: ignored mlp_bias, which is false" in manifest.report["notes"]


def test_the_first_layers_of_a_config_that_lists_every_layer(source, tmp_path):
    raw = json.loads((source / "config.json").read_text())
    kinds = {"layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]}
    (source / "config.json").write_text(json.dumps(raw | kinds))
    assert convert.convert(source, tmp_path / "a", layers="0").config["num_hidden_layers"] == 1
