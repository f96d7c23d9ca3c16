"""Signals: gone within seconds wherever it stands, with the command that continues."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convert

REPOSITORY = Path(__file__).parents[2]

HELD = """
import sys, time
import convert
from convert.write import pipeline
pipeline.describe_array = lambda array: time.sleep(60)
sys.exit(convert.program(sys.argv[1:]))
"""
"""A conversion that stands still in its worker threads once it has read the first group."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}


def start(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, seconds", [(signal.SIGTERM, 0), (signal.SIGINT, 0.6), (signal.SIGHUP, 3)])
def test_a_signal_ends_it_at_once(number, seconds, checkpoints, tmp_path):
    """While it reads headers, imports JAX, and works."""
    process = start(HELD, checkpoints["nvfp4"], tmp_path / "a b", "--json")
    assert json.loads(process.stderr.readline())["event"] == "start"
    time.sleep(seconds)
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=10)
    assert process.returncode == CODES[number] and time.monotonic() - began < 5
    last = json.loads(said.splitlines()[-1])
    assert last["event"] == "interrupted" and last["code"] == CODES[number]
    assert number.name in last["message"] and f"'{tmp_path}/a b' --json" in last["message"]
    assert convert.main([str(checkpoints["nvfp4"]), str(tmp_path / "a b")]) == 0


def test_one_that_is_done_is_not_interrupted_any_more(checkpoints, tmp_path):
    code = "import atexit, sys, time, convert; atexit.register(lambda: (print('last', flush=True), time.sleep(0.5)))"
    code += "; sys.exit(convert.program(sys.argv[1:]))"
    process = start(code, checkpoints["nvfp4"], tmp_path / "out", "--dry-run", "--json")
    assert json.loads(process.stdout.readline())["layers"] == "3 + 1 MTP"
    assert process.stdout.readline() == "last\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.communicate()


def test_before_anything_is_imported(checkpoints, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "convert", str(checkpoints["nvfp4"]), str(tmp_path / "out")],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("convert.signals" in line for line in iter(process.stderr.readline, ""))
    while "numpy" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 75 and "SIGTERM: stopped" in said
