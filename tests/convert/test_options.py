"""What can be asked for: the first layers, a mesh, a dry run of the real thing."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import convert
import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.errors import UsageError
from dsv32_jax.layout import leaves

from . import fakes

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("asked, layers, dense", [("0", 1, 1), ("0-2", 3, 1)])
def test_the_first_layers_are_a_model_that_runs(asked, layers, dense, checkpoints, tmp_path):
    manifest = convert.convert(checkpoints["nvfp4"], tmp_path / "out", layers=asked)
    config = manifest.config
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (layers, 0)
    assert config["first_k_dense_replace"] == dense
    assert any(f"the first {layers} of 3 layers" in note and "left out" in note for note in manifest.report["notes"])
    model = ds.load(tmp_path / "out", dtype=jnp.float32)
    assert ds.forward(model, jnp.array([[0, 5, 9]])).logits.shape == (1, 3, config["vocab_size"])


def test_layers_keep_their_bytes(checkpoints, tmp_path):
    whole = convert.convert(checkpoints["fp8"], tmp_path / "whole")
    small = convert.convert(checkpoints["fp8"], tmp_path / "small", layers="0-1")
    assert all(entry == whole.leaves[path] for path, entry in small.leaves.items())


def test_damage_in_layers_that_are_left_out_does_not_matter(checkpoints, tmp_path):
    config, arrays = json.loads((checkpoints["bf16"] / "config.json").read_text()), fakes.load(checkpoints["bf16"])
    del arrays["model.layers.2.mlp.gate.weight"]
    source = fakes.write_checkpoint(tmp_path / "hf", config, arrays)
    assert convert.convert(source, tmp_path / "out", layers="0-1").config["num_hidden_layers"] == 2


def test_a_mesh_cuts_the_files_and_keeps_the_digest(originals, tmp_path):
    plain = convert.convert(originals["nvfp4"], tmp_path / "plain")
    meshed = convert.convert(originals["nvfp4"], tmp_path / "meshed", mesh="expert=4,model=2")
    assert meshed.digest == plain.digest and meshed.storage["mesh"] == {"expert": 4, "model": 2}
    stored = meshed.leaves["layers.1.ffn.w_gate_EMD"].arrays["codes"]
    assert stored.piece == (stored.shape[0], stored.shape[1] // 2, stored.shape[2]) and len(stored.place.files) == 2
    again = convert.convert(originals["nvfp4"], tmp_path / "meshed", mesh={"model": 2, "expert": 4})
    assert again == meshed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dry_run": True, "layer": "0-1"}, "unknown options: dry_run, layer .do you mean layers"),
        ({"To": "nvfp4"}, "unknown option: To .do you mean to"),
        ({"layers": 3}, "invalid layers=3: write 0-N"),
        ({"workers": "2"}, "workers must be an integer of at least 1, not '2'"),
        ({"mesh": 4}, "a mesh must be like .*, not 4"),
        ({"mesh": ""}, "invalid mesh ''"),
        ({"mesh": {"rows": 2}}, "invalid mesh 'rows=2'"),
        ({"to": "nvfp4", "policy": 5}, "a path must be a string or a Path, not 5"),
        ({"to": "nvfp4", "policy": {"a": "b"}}, "a path must be a string or a Path, not {'a': 'b'}"),
    ],
    ids=str,
)
def test_wrong_options_of_python(checkpoints, tmp_path, options, said):
    """What is not known or of another kind is refused, and nothing is written."""
    with pytest.raises(UsageError, match=said):
        convert.convert(checkpoints["bf16"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "empty path"), (None, "a string or a Path, not None"), (b"a\xff".decode(errors="surrogateescape"), "UTF-8")],
    ids=repr,
)
def test_paths_that_are_none(checkpoints, tmp_path, monkeypatch, path, said):
    """An empty one, of a variable that is not set, would be the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        convert.convert(checkpoints["bf16"], path)
    with pytest.raises(UsageError, match=said):
        convert.convert(path, "out")
    with pytest.raises(UsageError, match=said):
        ds.load(path)
    if path == "":
        assert convert.main([str(checkpoints["bf16"]), path]) == 2
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_the_command_is_answered(checkpoints, tmp_path, capsys):
    """With what may be meant; so does every `dsv32` command."""
    assert convert.main([str(checkpoints["bf16"]), str(tmp_path / "out"), "--polcy", "full"]) == 2
    assert "--polcy (do you mean --policy?)" in capsys.readouterr().err
    assert cli.main(["generate", "folder", "--max-token=5", "--sistem", "x"]) == 2
    told = capsys.readouterr().err
    assert "usage: dsv32 generate" in told and "--sistem (do you mean --system?)" in told
    assert "--max-token=5 (do you mean --max-new-tokens?)" in told
    for short, option in (("--api-key", "--api-key-file"), ("--cont", "--context"), ("--hel", "--help")):
        assert cli.main(["serve", "folder", short, "word"]) == 2
        assert f"{short} (do you mean {option}?)" in capsys.readouterr().err
    assert cli.main(["generat", "folder"]) == 2
    assert "invalid choice: generat (do you mean generate?); choose from convert, " in capsys.readouterr().err


def test_a_conversion_that_is_complete_says_so(checkpoints, tmp_path, capsys):
    for said in ("written", "complete"):
        assert convert.main([str(checkpoints["bf16"]), str(tmp_path / "out")]) == 0
        note, done, digest, command = capsys.readouterr().out.splitlines()[-4:]
        assert note == "note       the source has no tokenizer.json: prompts are token ids"
        assert (
            done.startswith(f"{said:<11}{tmp_path / 'out'}: 3 + 1 MTP layers, ") and "nothing" in done or said[0] == "w"
        )
        assert digest.split() == ["digest", Manifest.read(tmp_path / "out").digest]
        assert command == f"next       dsv32 generate {tmp_path / 'out'} --ids 0,17,42"


@pytest.fixture(scope="module")
def enormous(tmp_path_factory, real):
    """DeepSeek-V3.2 in NVFP4 as ModelOpt writes it: 163 shards with real headers and holes for data."""
    folder = tmp_path_factory.mktemp("enormous")
    names = {name: leaf.source_shape for leaf in leaves(real) for name in leaf.sources}
    shards: list[dict] = [{} for _ in range(163)]
    ends = [0] * len(shards)
    for number, (name, shape) in enumerate(names.items()):
        kinds = {name: ("BF16", shape, 2)}
        if "_proj" in name and len(shape) == 2 and "weights_proj" not in name and "eh_proj" not in name:
            out, width = shape
            kinds = {name: ("U8", (out, width // 2), 1), name + "_scale": ("F8_E4M3", (out, width // 16), 1)}
            kinds |= {name + "_scale_2": ("F32", (), 4), name.removesuffix("weight") + "input_scale": ("F32", (), 4)}
        at = number * len(shards) // len(names)
        for tensor, (dtype, size, width) in kinds.items():
            nbytes = width
            for axis in size:
                nbytes *= axis
            shards[at][tensor] = {"dtype": dtype, "shape": size, "data_offsets": [ends[at], ends[at] + nbytes]}
            ends[at] += nbytes
    for number, (shard, end) in enumerate(zip(shards, ends, strict=True), 1):
        file = folder / f"model-{number:05d}-of-00163.safetensors"
        header = json.dumps(shard).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(file, 8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(real.to_dict()))
    return folder, sum(map(len, shards))


def test_a_dry_run_tells_what_each_device_holds(checkpoints, tmp_path, capsys):
    assert (
        convert.main([str(checkpoints["nvfp4"]), str(tmp_path / "out"), "--dry-run", "--verbose", "--mesh", "expert=4"])
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if "layers.1.ffn.w_gate_EMD" in line)
    assert "codes uint8 [12, 80, 48] in shards of [3, 80, 48], block_scale" in line


COUNTED = """
import cProfile, pstats, sys, convert
profile = cProfile.Profile(builtins=False)
code = profile.runcall(convert.main, sys.argv[1:])
assert "jax" not in sys.modules
print("calls", pstats.Stats(profile).total_calls, file=sys.stderr)
sys.exit(code)
"""
"""A command line that tells how many functions of Python it called: that is what takes the time, without its noise."""


def test_a_dry_run_of_the_real_thing_takes_seconds(enormous, tmp_path):
    """180,000 tensors in under 22 calls each: under 3 seconds."""
    folder, count = enormous
    assert 180_000 < count < 190_000
    options = ["--dry-run", "--json", "--max-memory", "8GB"]
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(folder), str(tmp_path / "out"), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, calls = done.stderr.split()
    assert int(calls) < 22 * count
    result = json.loads(done.stdout)
    assert 380e9 < result["would_write"] < 420e9 and result["peak_memory"] < 8 << 30
    assert done.returncode == result["code"] in (3, 5)
    assert ("zero throughout" if result["code"] == 3 else " free. Nothing new") in result["error"]
    assert len(result["leaves"]) == len(leaves(ds.Config.from_json(folder / "config.json")))
    assert result["leaves"]["layers.3.ffn.w_gate_EMD"].startswith("nvfp4, 2.11 GB: codes uint8 [256, 2048, 3584]")
    assert result["write_speed"] > 0 and result["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_a_manifest_says_how_it_was_made(checkpoints, tmp_path):
    convert.convert(checkpoints["bf16"], tmp_path / "out", to="nvfp4")
    recipe = Manifest.read(tmp_path / "out").source["recipe"]
    assert recipe[1:] == ["nvfp4", "rtn", "own"]
