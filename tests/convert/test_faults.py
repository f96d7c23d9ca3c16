"""The fault catalogue of the converter: what goes wrong in real life, one row a fault, and how each ends.

ELSEWHERE names the tests of the other faults, and says which cannot be made on one machine.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.plan import limits
from convert.read import source_file
from convert.read.source import Source
from convert.read.source_file import DOWNLOADS
from convert.write import pipeline
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.system.progress import Progress
from dsv32_jax.system.reporter import BarReporter, Reporter

from . import fakes

ELSEWHERE = {
    "F03": "test_kills.py",
    "F06": "test_interrupts.py",
    "F08": "test_job.py::test_other_content_is_never_touched, test_a_finished_folder_is_left_as_it_is",
    "F10": "test_plan.py::test_unknown_tensors_are_an_error, test_tensors_the_model_does_not_need_are_counted",
    "F11": "every test: random_checkpoint deals the tensors of a weight out over the shards",
    "F17": "test_reshard.py::test_any_checkpoint_loads_on_any_number_of_devices",
    "F19": "no device memory here to run out of",
    "F20": "test_source.py::test_only_regular_files_are_opened",
    "F23": "test_job.py::test_a_second_converter_is_refused",
    "F24": "test_job.py::test_a_second_converter_is_refused: the lock is the kernel's",
    "F26": "test_kills.py",
    "F27": "test_kills.py",
    "F28": "test_manifest.py::test_a_folder_without_one_is_called_what_it_is",
    "F31": "test_source.py::test_strays_are_ignored_and_noted",
    "F32": "test_source.py::test_a_tensor_in_two_shards_is_noted_where_equal_and_refused_where_not",
    "F33": "test_job.py::test_values_that_are_not_finite_stop_it",
    "F34": "test_job.py::test_values_that_are_not_finite_stop_it",
    "F35": "test_job.py::test_odd_scales_are_kept_and_counted; test_detect.py",
    "F36": "test_cut.py::test_every_expert_keeps_its_tensor_scale",
    "F37": "test_job.py::test_inverted_scales_are_all_told_before_anything_is_written",
    "F38": "test_detect.py::test_other_storage_is_refused_by_name",
    "F39": "test_detect.py::test_other_storage_is_refused_by_name",
    "F40": "test_cut.py::test_fp8_rows_keep_their_scale_across_partial_blocks",
    "F41": "test_job.py::test_golden_checkpoints_convert_to_the_values_of_the_reference",
    "F42": "test_cut.py::test_experts_that_are_stored_differently_become_bfloat16",
    "F43": "test_formats.py",
    "F47": "test_verify.py::test_a_flipped_bit_anywhere_is_named",
    "F48": "test_store.py::test_what_is_not_the_file_that_was_written_is_refused",
    "F49": "test_manifest.py::test_a_malformed_one_is_refused",
    "F50": "no text is read or written here",
    "F53": "test_kills.py::test_everything_is_flushed_before_the_manifest",
    "F57": "test_source.py::test_a_malformed_shard_is_refused_by_name",
    "F58": "test_source.py::test_a_malformed_shard_is_refused_by_name",
    "F59": "test_source.py::test_a_malformed_shard_is_refused_by_name",
    "F60": "test_source.py::test_a_malformed_shard_is_refused_by_name",
    "F61": "test_source.py::test_a_malformed_shard_is_refused_by_name",
    "F62": "test_source.py::test_the_number_of_tensors_is_limited, test_a_malformed_shard_is_refused_by_name",
    "F64": "test_source.py::test_the_index_cannot_name_files_outside",
    "F68": "test_source.py::test_only_regular_files_are_opened",
    "F69": "test_job.py::test_source_and_output_must_be_apart",
    "F71": "no date is stored, and progress counts by a clock that does not jump",
}

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def truncated(folder: Path):
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 4096)


def changed_json(name: str, change):
    def damage(folder: Path):
        raw = json.loads((folder / name).read_text())
        change(raw)
        (folder / name).write_text(json.dumps(raw))

    return damage


def content(data: bytes, name: str = SHARD):
    return lambda folder: (folder / name).write_bytes(data)


def tensor_bytes(name: str, value: bytes):
    """Every byte of a tensor becomes `value`."""

    def damage(folder: Path):
        tensor = Source(folder).tensors[name]
        with open(tensor.file, "r+b") as file:
            file.seek(tensor.offset)
            file.write(value * tensor.nbytes)

    return damage


def another_tensor(name: str):
    """One more shard, in a folder without an index: a complete one would decide that it does not belong."""

    def damage(folder: Path):
        (folder / INDEX).unlink()
        fakes.write_shard(folder / "model-more.safetensors", {name: np.ones(3, np.float32)})

    return damage


def dangling(folder: Path):
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("nowhere")


def pickled(folder: Path):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def nothing(folder: Path):
    pass


ROWS = {
    "F01": (truncated, [], 3, [SHARD, "truncated: 4096 of", "download it again", "nothing was written"]),
    "F02": (
        lambda f: (f / SHARD).unlink(),
        [],
        3,
        ["missing: 1 of the 3 shards", SHARD, "tensors", "nothing was written"],
    ),
    "F04": (nothing, ["--max-memory", "100MB"], 5, ["embed_VD", "100.00 MB", "--max-memory", "Nothing was written"]),
    "F09": (
        changed_json(INDEX, lambda raw: raw["weight_map"].pop(NAME + "_scale")),
        ["--strict-index"],
        3,
        [NAME + "_scale", INDEX + " does not list 1 tensor of the shards"],
    ),
    "F12": (changed_json("config.json", lambda raw: raw.update(model_type="deepseek_v3")), [], 3, ["'deepseek_v3'"]),
    "F13": (content(b"version https://git-lfs.github.com/spec/v1\noid"), [], 3, [SHARD, "git lfs pull"]),
    "F14": (content(b"<!DOCTYPE html><html></html>"), [], 3, [SHARD, "HTML", "download the file again"]),
    "F14 empty": (content(b""), [], 3, [SHARD, "empty (0 bytes)"]),
    "F15": (
        changed_json("config.json", lambda raw: raw.update(num_hidden_layers=5)),
        [],
        3,
        ["missing ", " tensors", "model.layers.4", "nothing was written"],
    ),
    "F16": (lambda f: (f / "config.json").unlink(), [], 3, ["config.json is missing", "nothing was written"]),
    "F16 other": (
        changed_json("config.json", lambda raw: raw.update(moe_intermediate_size=32)),
        [],
        3,
        ["mlp.experts.*.up_proj.weight", "config.json says [32, 96]"],
    ),
    "F18": (nothing, ["--mesh", "expert=5"], 5, ["expert=5", "w_gate_EMD", "E 12", "possible: 1, 2, 3, 4, 6, 12"]),
    "F21": (dangling, [], 3, [SHARD]),
    **{
        f"{what} as {name}": (content(begin, name), [], 3, [name, said])
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", INDEX)
        for what, begin, said in (
            ("a pointer", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            ("a page", b"\xef\xbb\xbf <!DOCTYPE html>", "HTML"),
            ("UTF-16", '{"a": 1}'.encode("utf-16"), "UTF-8"),
        )
    },
    "F21 beside": (lambda f: (f / "tokenizer.json").symlink_to("nowhere"), [], 3, ["tokenizer.json", "dangling"]),
    "F29": (tensor_bytes(NAME, b"\0"), [], 3, [NAME, "zero throughout", "download them again"]),
    "F29 scale": (tensor_bytes(NAME + "_scale", b"\0"), [], 3, [NAME + "_scale", "zero throughout"]),
    "F63": (changed_json("config.json", lambda raw: raw.update({"\x1b[31mred": 1})), [], 3, ["[31mred"]),
    "F65": (another_tensor("../../etc/passwd"), [], 3, ["1 unknown tensor", "../../etc/passwd"]),
    "F66": (changed_json("config.json", lambda raw: raw.update(hidden_size=10**30)), [], 3, ["hidden_size"]),
    "F67": (pickled, [], 3, ["pytorch_model.bin", "not supported"]),
    "F72": (content(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(99)), [], 3, [SHARD, "gzip"]),
    "layers": (nothing, ["--layers", "1-2"], 2, ["--layers 1-2", "0-N"]),
    "memory": (nothing, ["--max-memory", "lots"], 2, ["invalid size 'lots'", "8GB"]),
    "workers": (nothing, ["--workers", "0"], 2, ["--workers must be an integer of at least 1, not 0"]),
    "mesh": (nothing, ["--mesh", "pipeline=2"], 2, ["pipeline=2", "expert"]),
}


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(checkpoints["nvfp4"], tmp_path / "hf")


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(folder: Path, out: Path, *options: str) -> int:
    return convert.main([str(folder), str(out), *options])


@pytest.mark.parametrize("fault", ROWS)
def test_fault(fault, folder, tmp_path, capsys):
    damage, options, code, parts = ROWS[fault]
    damage(folder)
    before = bytes_of(folder)
    assert run(folder, tmp_path / "out", *options) == code
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and "\x1b" not in printed.err
    assert [part for part in parts if part not in printed.err] == []
    assert bytes_of(folder) == before
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_every_fault_has_a_test():
    folder = Path(__file__).parent
    for text in ELSEWHERE.values():
        file = re.match(r"(test_\w+\.py)", text)
        named = re.findall(r"\btest_\w+(?!\w|\.py)", text) if file else []
        assert file is None or [name for name in named if f"def {name}(" not in _text(folder, file[1])] == [], text
    here = {fault.split()[0] for fault in ROWS} | set(re.findall(r"def test_(f\d\d)", Path(__file__).read_text()))
    assert {name.upper() for name in here if name[1:].isdigit()} | set(ELSEWHERE) == {f"F{n:02}" for n in range(1, 73)}


def _text(folder: Path, name: str) -> str:
    return next(file for file in (folder / name, folder.parent / name) if file.exists()).read_text()


def test_f04_too_little_memory_for_what_is_allowed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(limits, "get_free_memory", lambda: 100 << 20)
    for options in (["--max-memory", "1GB", "--dry-run"], ["--max-memory", "1GB"]):
        assert run(folder, tmp_path / "out", *options) == 5
        printed = capsys.readouterr()
        assert "104.86 MB free" in printed.err and "--max-memory 83MB" in printed.err
        assert ("104.86 MB free; " in printed.out) == ("--dry-run" in options)


def test_f05_a_disk_that_fills_up(folder, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert run(folder, tmp_path / "out") == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert "is full" in message and "run the same command again to continue" in message
    assert run(folder, tmp_path / "out") == 0
    assert "100 %" in capsys.readouterr().err


def test_a_system_that_starts_no_more_threads(folder, tmp_path, monkeypatch, capsys):
    """It is told, with the exit code of what the machine lacks, in either command line; any other error is a bug."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert run(folder, tmp_path / "out") == 5
        assert "starts no more threads" in capsys.readouterr().err
        assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 5
    with monkeypatch.context() as patch:
        patch.setattr("convert.conversion.Pipeline.run", refuse)
        assert run(folder, tmp_path / "out") == 5 and "run the same command again" in capsys.readouterr().err
    assert run(folder, tmp_path / "out") == 0
    monkeypatch.setattr("dsv32_jax.cli.doctor.run", refuse)
    assert cli.main(["doctor"]) == 5 and "starts no more threads" in capsys.readouterr().err
    monkeypatch.setattr("dsv32_jax.cli.doctor.run", lambda _: dict(x=1)[1])
    with pytest.raises(KeyError):
        cli.main(["doctor"])


SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", INDEX)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("text", ['{"":0},', "[],", "9,"])
def test_json_that_would_fill_the_memory(folder, tmp_path, capsys, name, text):
    """Its parts are counted before it is parsed."""
    (folder / name).write_text(f"[{text * 6_000_000}0]")
    tracemalloc.start()
    assert run(folder, tmp_path / "out") == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6 and "too large a JSON text" in capsys.readouterr().err


@pytest.mark.parametrize("name", SMALL)
def test_a_sparse_file_of_four_tebibytes(folder, tmp_path, capsys, name):
    """Sizes are compared before anything is read."""
    with open(folder / name, "wb") as file:
        file.truncate(4 << 40)
    assert run(folder, tmp_path / "out") == 3 and "the limit is" in capsys.readouterr().err
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert run(folder, tmp_path / "out") == 3 and "not a regular file" in capsys.readouterr().err


CALLS = (
    "assert convert.main([source, out]) == 0",
    "convert.convert(source, out)",
    "convert.convert(source, out); assert cli.main(['reshard', out, out + '2', '--mesh', 'expert=2']) == 0",
    "convert.convert(source, out); assert cli.main(['export', out, out + '3', '--format', 'bf16']) == 0",
)


@pytest.mark.parametrize("call", CALLS)
def test_f07_no_accelerator_is_taken(call, folder, tmp_path):
    """Nothing asks JAX for a device, so nothing has to change the caller's environment to prevent that."""
    code = f"""
import os, sys
import convert
from dsv32_jax import cli
source, out = sys.argv[1:]
before = dict(os.environ)
{call}
assert os.environ == before, set(os.environ.items()) ^ set(before.items())
assert not {{"jax", "orbax"}} & sys.modules.keys()
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_f21_an_output_that_cannot_be_written(folder, capsys):
    assert run(folder, Path("/proc/nowhere/out")) == 74
    assert "cannot write to /proc/nowhere/out" in capsys.readouterr().err


def test_f22_paths_of_every_kind(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(Path("hf/"), Path("~/ünï cödé/../ünï cödé/")) == 0
    assert (tmp_path / "ünï cödé" / "manifest.json").exists()


def test_f25_another_conversion_in_the_same_place(folder, tmp_path, capsys, tiny):
    assert run(folder, tmp_path / "out") == 0
    capsys.readouterr()
    assert run(folder, tmp_path / "out", "--to", "bf16") == 6
    assert "--to" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--layers", "0-1") == 6
    assert "config.json: num_hidden_layers was 3, now 2" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--mesh", "expert=2") == 6
    assert "--mesh: expert was absent, now 2" in capsys.readouterr().err
    random_checkpoint.write(tmp_path / "retrained", tiny, "nvfp4", seed=1)
    before = bytes_of(tmp_path / "out")
    assert run(tmp_path / "retrained", tmp_path / "out") == 6
    assert "3 of 3 tensors that were read again have other bytes" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == before


def hub(folder: Path, revisions: dict[str, str], damaged: str = "") -> None:
    """What `hf download` leaves beside the shards it downloads."""
    (folder / DOWNLOADS).mkdir(parents=True)
    for name, revision in revisions.items():
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest() if name != damaged else "0" * 64
        (folder / DOWNLOADS / f"{name}.metadata").write_text(f"{revision}\n{sha256}\n1761000000.0\n")


def test_f30_shards_of_several_revisions(folder, tmp_path, capsys):
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    hub(folder, {**dict.fromkeys(shards, "a" * 40), SHARD: "b" * 40})
    assert run(folder, tmp_path / "out", "--dry-run") == 0
    said = f"2 revisions of the repository: aaaaaaaaaaaa ({shards[0]}, {shards[2]}), bbbbbbbbbbbb ({SHARD})"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["folder", "cache"])
def test_f46_bit_rot_in_the_source(layout, folder, tmp_path, capsys):
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert run(folder, tmp_path / "out", "--verify-source") == 2
    assert "missing for 3 shards" in capsys.readouterr().err
    if layout == "folder":
        hub(folder, dict.fromkeys(shards, "a" * 40))
    for file in folder.glob("*.safetensors") if layout == "cache" else []:
        file.symlink_to(file.rename(tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()))
    tensor = Source(folder).tensors[NAME]
    with open(tensor.file, "r+b") as file:
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, tensor.offset)[0] ^ 1]), tensor.offset)
    assert run(folder, tmp_path / "out", "--verify-source") == 3
    printed = capsys.readouterr().err
    assert f"1 shard with another SHA-256 than `hf download` recorded: {tensor.file.name}. Nothing" in printed
    with open(tensor.file, "r+b") as file:
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, tensor.offset)[0] ^ 1]), tensor.offset)
    assert run(folder, tmp_path / "out", "--verify-source") == 0


def test_f44_a_disk_that_hangs(folder, tmp_path, monkeypatch, capsys):
    """The read answers only once a person has been warned."""
    preadv, warning, heard = os.preadv, Reporter.warning, threading.Event()

    def hanging(*arguments):
        assert heard.wait(30)
        return preadv(*arguments)

    def hear(self, message):
        warning(self, message)
        heard.set()

    monkeypatch.setattr(source_file, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(os, "preadv", hanging)
    monkeypatch.setattr(Reporter, "warning", hear)
    assert run(folder, tmp_path / "out", "--workers", "1") == 0
    assert re.search(rf"warning: no data from {folder}/model-\S+ for \d+ s: .*Still waiting", capsys.readouterr().err)


@pytest.mark.parametrize("times, code", [(2, 0), (99, 74)])
def test_f44_a_disk_that_fails_to_read(times, code, folder, tmp_path, monkeypatch, capsys):
    preadv, calls = os.preadv, []

    def failing(*arguments):
        calls.append(1)
        if 100 < len(calls) <= 100 + times:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.setattr(source_file, "RETRY_SECONDS", (0, 0))
    assert run(folder, tmp_path / "out", "--workers", "1") == code
    assert code == 0 or re.search(
        r"cannot read \S+model-\S+ at byte \d+, tensor \S+: .*Input/output", capsys.readouterr().err
    )


def test_f45_a_source_that_changes(folder, tmp_path, monkeypatch, capsys):
    entry = pipeline.describe_array
    monkeypatch.setattr(limits, "GROUP_BYTES", 60_000)
    monkeypatch.setattr(pipeline, "describe_array", lambda array: os.utime(folder / SHARD) or entry(array))
    assert run(folder, tmp_path / "out", "--workers", "1") == 74
    assert f"{SHARD} changed while it was being read" in capsys.readouterr().err


def test_f51_few_open_files(folder, tmp_path):
    """A conversion has one file open per worker, and few others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 16, before[1]))
    try:
        assert run(folder, tmp_path / "out", "--workers", "4") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_f52_no_room_for_temporary_files(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert run(folder, tmp_path / "out") == 0


def test_f54_an_exception_in_a_worker(folder, tmp_path, monkeypatch):
    entry, calls = pipeline.describe_array, []

    def failing(array):
        calls.append(1)
        if len(calls) == 30:
            raise RuntimeError("lost")
        return entry(array)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "describe_array", failing)
        with pytest.raises(RuntimeError, match="lost"):
            convert.convert(folder, tmp_path / "out", group_bytes=60_000)
    whole = convert.convert(folder, tmp_path / "whole")
    assert convert.convert(folder, tmp_path / "out").digest == whole.digest


def test_f55_consoles_of_every_kind(folder, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stderr", console)
    assert run(folder, tmp_path / "ключ" / "out") == 0
    assert run(folder / "漢", tmp_path / "out") == 3
    console.flush()
    printed = console.buffer.getvalue()
    assert b"100 %" in printed and rb"\u6f22 is not a folder" in printed


def _until_closed(master: int) -> Iterator[bytes]:
    """What is written to a terminal; at its end Linux calls it broken."""
    with contextlib.suppress(OSError):
        while piece := os.read(master, 1 << 16):
            yield piece


def test_f55_a_terminal(folder, tmp_path, monkeypatch):
    """One bar, warnings above it, and the cursor is back in the end."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    said = []
    reader = threading.Thread(target=lambda: said.extend(_until_closed(master)))
    reader.start()
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(folder, tmp_path / "out") == 0
        bar = BarReporter()
        for progress in (Progress(0, 100, "a"), Progress(50, 100, "b"), Progress(0, 200, "another")):
            bar(progress)
            bar.warning(f"[/x] at \x1b[31m{progress.leaf}")
        bar.close()
        print("error: lost", file=sys.stderr, flush=True)
    reader.join()
    os.close(master)
    text = b"".join(said).decode()
    assert "0/200 B" in text and text.count("\x1b[?25h") == text.count("\x1b[?25l") > 0
    assert "warning: [/x] at \\x1b[31manother" in text and text.rstrip().endswith("error: lost")


def test_f56_a_file_system_without_locks(folder, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(folder, tmp_path / "out") == 74
    assert "cannot lock" in capsys.readouterr().err


def test_f67_nothing_imports_pickle():
    package = Path(convert.__file__).parents[1]
    files = [*package.glob("convert/**/*.py"), *package.glob("dsv32_jax/**/*.py")]
    assert not [
        file for file in files if re.search(r"^\s*(import|from) (pickle|torch)", file.read_text(), re.MULTILINE)
    ]


def test_f70_names_in_the_output_are_plain(folder, tmp_path):
    assert run(folder, tmp_path / "out") == 0
    names = {part for file in (tmp_path / "out").rglob("*") for part in file.relative_to(tmp_path / "out").parts}
    assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) < 64
