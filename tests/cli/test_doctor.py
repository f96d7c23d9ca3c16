"""dsv32 doctor: what is there, for people and programs; problems are an exit code, and stop nothing."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from dsv32_jax.checkpoint.weight_shapes import read_weight_shapes
from dsv32_jax.cli import doctor
from dsv32_jax.kernels import dispatch


def test_for_people(dsv32, checkpoint):
    """Versions, devices, memory, disk, what would run, and the checkpoint."""
    code, out, err = dsv32("doctor", checkpoint)
    assert (code, err) == (0, "")
    for wanted in (jax.__version__, "free memory", "free disk, here", "device 7", "kernels", "fits on one device"):
        assert wanted in out
    assert out.endswith("no problems found\n") and "yes, " in out
    assert dispatch.describe() in out


def test_for_programs(dsv32, checkpoint):
    code, out, _ = dsv32("doctor", checkpoint, "--json")
    found = json.loads(out)
    assert code == 0 and found["problems"] == [] and found["devices"]["platform"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__ and found["machine"]["free memory"] > 0
    stored = read_weight_shapes(checkpoint).device_bytes({}, "bfloat16")
    assert found["checkpoint"]["weights in memory"] == sum(stored)
    assert found["runs"]["compiled programs"].startswith("not cached")


@pytest.fixture
def kept(tmp_path):
    """JAX keeps programs in this folder."""
    wanted = {"jax_compilation_cache_dir": str(tmp_path), "jax_enable_compilation_cache": True}
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_counted(dsv32, kept):
    (kept / "one").write_bytes(bytes(7))
    found = json.loads(dsv32("doctor", "--json")[1])
    assert found["runs"]["compiled programs"] == {"folder": str(kept), "files": 1, "size": 7}
    assert "checkpoint" not in found


def test_what_is_missing_is_said(dsv32, monkeypatch, tmp_path):
    """A library, JAX itself, the checkpoint: each a problem, and everything else is there all the same."""
    version = importlib.metadata.version

    def partly(name):
        if name in ("tokenizers", "orbax-checkpoint"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def broken():
        raise RuntimeError("no driver")

    monkeypatch.setattr(importlib.metadata, "version", partly)
    monkeypatch.setattr(jax, "default_backend", broken)
    code, out, err = dsv32("doctor", tmp_path / "nothing\x1b[2J")
    assert (code, err) == (4, "") and "\x1b" not in out and "problems (5)" in out
    for wanted in (
        "tokenizers is not installed; text needs it",
        "orbax-checkpoint is not installed",
        "devices: RuntimeError: no driver",
        "runs: RuntimeError: no driver",
        "is not a folder",
    ):
        assert wanted in out
    assert "free memory" in out


@pytest.mark.parametrize("damage", ["weights", "tokenizer"])
def test_a_checkpoint_that_is_not_well(dsv32, checkpoint, tmp_path, damage):
    """Files that are missing, and another model's tokenizer."""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    if damage == "weights":
        next(file for file in (folder / "weights").rglob("*") if file.is_file()).unlink()
    else:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = json.loads(dsv32("doctor", folder, "--json")[1])
    assert found["problems"] and str(folder) in found["problems"][0] and "layers" in found["checkpoint"]


def test_gpus_without_a_plugin(dsv32, monkeypatch):
    """Who is on the GPUs is told, and that JAX does not see them."""
    monkeypatch.setattr(doctor, "_list_gpu_processes", lambda: ["4711, 60000 MiB, python"])
    code, out, _ = dsv32("doctor")
    assert code == 4 and "4711, 60000 MiB, python" in out and "JAX computes on the CPU" in out


RUN_ALL = """
import contextlib, io, json, sys
from dsv32_jax import cli
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = cli.main(line)
    print(json.dumps([code, said.getvalue()]))
"""
"""Runs the commands of a JSON list, and prints the exit code and the output of each."""


def test_without_a_device(checkpoint):
    """Where JAX is told to use what is not there, a sentence says so."""
    lines = [["generate", str(checkpoint), "a"], ["fit", str(checkpoint)], ["bench", "model", "--layers", "1"]]
    command = [sys.executable, "-W", "ignore", "-c", RUN_ALL, json.dumps([["doctor"], *lines])]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "none"}, capture_output=True, text=True)
    found = list(map(json.loads, done.stdout.splitlines()))
    assert [code for code, _ in found] == [4, 5, 5, 5], done.stderr
    for _, said in found:
        assert said.count("JAX finds no device") == 1 and "JAX_PLATFORMS=none" in said and "Traceback" not in said
