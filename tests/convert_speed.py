"""Conversion beside `cp` of the same bytes, both flushed to the disk: `python -m tests.convert_speed [SOURCE]`.

In pairs, so that other work on the machine meets both. Without SOURCE, a random checkpoint of about 1 GB whose formats
are kept. Prints a line for each pair, then the best of each and their ratio.
"""

import dataclasses
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import configs
import convert
from dsv32_jax.bench.load import SIZES
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.config import Config

ROUNDS = 5


def measure(run: Callable[[], object], who: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process or of its children (`who`)."""
    before, start = resource.getrusage(who), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - start, resource.getrusage(who)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def copy(source: Path, target: Path) -> None:
    """Copy the files and flush them."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)


def main(scratch: Path, given: list[str]) -> None:
    """Print the pairs."""
    source = Path(given[0]) if given else scratch / "source"
    if not given:
        cfg = dataclasses.replace(Config.from_json(configs.path("deepseek_v32")), **SIZES)
        random_checkpoint.write(source, cfg)
    pairs = []
    for _ in range(ROUNDS):
        copied, copying = measure(lambda: copy(source, scratch / "copy"), resource.RUSAGE_CHILDREN)
        converted, converting = measure(lambda: convert.convert(source, scratch / "out"), resource.RUSAGE_SELF)
        pairs.append((copied, converted))
        print(f"cp {copied:.2f} s ({copying:.2f} CPU)  convert {converted:.2f} s ({converting:.2f} CPU)", flush=True)
        shutil.rmtree(scratch / "copy")
        shutil.rmtree(scratch / "out")
    fastest = [min(times) for times in zip(*pairs, strict=True)]
    print(f"best: cp {fastest[0]:.2f} s, convert {fastest[1]:.2f} s, ratio {fastest[0] / fastest[1]:.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dsv32-speed-", dir=".") as folder:
        main(Path(folder), sys.argv[1:])
