"""Screens of 80, 100 and 40 columns, as a real terminal shows them: golden files, and no line wider than the terminal.

`python -m tests.cli.test_terminal_widths` writes the golden files again.
"""

import contextlib
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest

from dsv32_jax.cli import demo
from dsv32_jax.cli.app import parser

from .test_json import list_commands

REPOSITORY = Path(__file__).parents[2]
SCREENS = REPOSITORY / "tests" / "data" / "screens"
WIDTHS = (80, 100, 40)
ROWS = 300
MARK = b"\r\n--drawn--"
"""Written when all is drawn."""

FACTS = """
import os, time
from convert import report
from dsv32_jax.system.progress import Progress
from dsv32_jax.system.reporter import BarReporter

model = {
    "layers": "61 + 1 MTP",
    "formats": {"bf16": 686, "fp8": 61, "nvfp4": 798},
    "notes": ["config.json: ignored quantization_config.activation_scheme, as activations are not quantized"],
    "ignored": {"activation scales: activations are not quantized": 45000},
    "conversions": {"fp8 -> nvfp4": 45056},
}
estimate = {
    **model, "source": "DeepSeek-V3.2/", "output": "/data/DeepSeek-V3.2 converted",
    "parameters": 685_355_329_792, "files": 163, "leaves": {},
    "would_read": 688_586_727_753, "would_write": 402_430_000_000, "saved": 12_000_000_000,
    "peak_memory": 7_921_000_000, "memory_limit": 8_000_000_000, "memory_free": 26_100_000_000, "workers": 2,
    "disk_needed": 410_545_000_000, "disk_reserve": 8_115_000_000, "disk_free": 61_190_000_000,
    "read_speed": 837_000_000, "write_speed": 241_000_000, "convert_seconds": 12600.0, "seconds": 14275.0,
}
converted = {
    **model, "output": "/data/DeepSeek-V3.2 converted", "bytes": 402_430_000_000, "seconds": 14302.5,
    "already_complete": False, "tokenizer": True,
    "digest": "dccb1dd11b85f4ce84d845951c853b81c02ab4f3d43d1e7fbe6ca4d36d46d2fc",
    "relative_rms_errors": {"mlp.experts.*.down_proj": 0.0816},
    "largest_errors": {"model.layers.4.mlp.experts.8.up_proj.weight": 0.0829},
    "nan_scale_bytes": 0, "zero_blocks": 3, "pairs_of_different_tensor_scales": 0,
}
print("$ dsv32 convert SRC DST --dry-run")
print(report.format_conversion(estimate))
print("$ dsv32 convert SRC DST")
print(report.format_conversion(converted), flush=True)
now = [0.0]
time.monotonic = lambda: now[0]
bar = BarReporter()
bar._open = lambda: None
for seconds in (0.0, 60.0):
    now[0] = 3600 + seconds
    bar(Progress(int(148e9 + 6.7e9 * seconds / 60), 402_430_000_000, "layers.23.ffn.w_gate_EMD", 140_000_000_000))
del bar._open
bar._open()
bar._live.refresh()
os.write(1, b"\\n--drawn--")
input()
"""
"""A dry run, the end of a conversion and its progress, with facts that are always the same. It waits for a line."""


def draw(width: int, *command: str, answer: bool = False) -> tuple[list[str], list[str]]:
    """What a terminal of this width shows after a command, or when it waits; and the lines that were written to it."""
    environment = {"TERM": "xterm", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/nowhere", "NO_COLOR": "1"}
    environment |= {"PYTHONPATH": f"{REPOSITORY}", "JAX_PLATFORMS": "cpu"}
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (ROWS, width))
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    child = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment, **streams)
    os.close(slave)
    content = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while not (answer and MARK in content) and (piece := os.read(master, 1 << 16)):
            content += piece
    child.kill()
    child.wait()
    os.close(master)
    written = (content.partition(MARK)[0] if answer else content).decode()
    screen = pyte.Screen(width, ROWS)
    pyte.Stream(screen).feed(written)
    plain = re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", written)
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n"), re.split(r"\r?\n|\r", plain)


def draw_facts(width: int) -> str:
    """The golden screen of this width."""
    shown, written = draw(width, "-c", FACTS, answer=True)
    assert max(map(len, written)) <= width
    return "\n".join(shown) + "\n"


@pytest.mark.parametrize("width", WIDTHS)
def test_screens(width):
    assert draw_facts(width) == (SCREENS / f"convert.{width}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_dry_run_is_not_wider_than_the_terminal(width, tmp_path):
    """And the summary stands last, on one screen."""
    command = ["-m", "dsv32_jax", "convert", str(demo.CHECKPOINT), str(tmp_path / "out"), "--dry-run"]
    shown, written = draw(width, *command)
    assert max(map(len, written)) <= width and len(shown) <= 24
    assert re.search(r"^time +about 0:0", "\n".join(shown), re.MULTILINE), shown


COMMANDS = """
import sys
from dsv32_jax import cli
for command in sys.argv[1].split(";"):
    try:
        cli.main(command.split())
    except SystemExit:
        pass
"""
"""Runs several command lines, one after the other."""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_command_writes_lines_wider_than_the_terminal(width):
    """Tables, errors and the help of every command."""
    folder = "dsv32_jax/demo_checkpoint"
    commands = [f"inspect {folder}", f"inspect {folder} --tensors *layers.3.*proj*", "fit configs/tiny.json"]
    commands += [f"convert {folder} {folder}/inside", f"inspect {folder} --tensors *norm* --stats", "genrate", ""]
    commands += [f"verify {folder}", f"doctor {folder}", "fit missing"]
    commands += [f"help {' '.join(words)}" for words in list_commands(parser())]
    _, written = draw(width, "-c", COMMANDS, ";".join(commands))
    assert len(written) > 500 and not [line for line in written if len(line) > width]


if __name__ == "__main__":
    for columns in WIDTHS:
        (SCREENS / f"convert.{columns}.txt").write_text(draw_facts(columns), encoding="utf-8")
