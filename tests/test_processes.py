"""One program over two processes on this host, each with two devices: the tokens of one process, and no hang."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dsv32_jax.convert import convert

from dsv32_jax.checkpoint import random_checkpoint
from tests.conftest import QUICK

REQUESTS = [{"ids": [0, 5, 6]}, {"ids": [0, 9]}, {"ids": [0, 7, 7, 7, 9]}]
FLAGS = " ".join(["--xla_force_host_platform_device_count=2", *QUICK])


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A checkpoint of one layer in sizes that the mesh divides, and a file of requests."""
    folder = tmp_path_factory.mktemp("processes")
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    random_checkpoint.write(folder / "source", cfg)
    convert(folder / "source", folder / "converted")
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in REQUESTS))
    return folder


class Started:
    """`dsv32 generate` in so many processes that know each other."""

    def __init__(self, folder: Path, *options: str, differing: str | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        shared = [str(folder / "converted"), "--file", str(folder / "requests.jsonl"), "--ids", "--dtype", "float32"]
        together = ["--mesh", "data=2,expert=2", "--coordinator", address, "--processes", "2"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "dsv32_jax", "generate", *shared, *together, "--process-id", str(i), *options]
                + ([differing] if differing and i else []),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for i in (0, 1)
        ]

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            self.kill(process)
            process.communicate()

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        """With the process that does its work."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def ends(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each."""
        said = [process.communicate(timeout=120) for process in self.processes]
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]


def test_two_processes_are_one(folder):
    """The tokens of one process, printed by the first; stdout holds nothing else."""
    with Started(folder, "--max-new-tokens", "8") as started:
        (code, out, err), (other_code, other_out, _) = started.ends()
    assert (code, other_code, other_out) == (0, 0, ""), err
    alone = [sys.executable, "-m", "dsv32_jax", "generate", str(folder / "converted"), "--ids", "--dtype", "float32"]
    alone += ["--file", str(folder / "requests.jsonl"), "--max-new-tokens", "8"]
    want = subprocess.run(alone, capture_output=True, text=True, check=True).stdout

    def made(text: str) -> dict[int, list[int]]:
        return {found["line"]: found["tokens"] for found in map(json.loads, text.splitlines())}

    assert made(out) == made(want) and len(made(out)) == 3


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_ends_the_others(folder, gone):
    """Within the heartbeat, with exit code 74 and a sentence."""
    with Started(folder, "--max-new-tokens", "4000", "--stream") as started:
        first = started.processes[0].stdout
        assert first is not None and first.readline()
        start = time.monotonic()
        started.kill(started.processes[gone])
        code, _, err = started.ends()[1 - gone]
        assert code == 74 and "error: another process of this run has ended" in err
        assert time.monotonic() - start < 60


def test_processes_that_were_asked_different_things(folder):
    with Started(folder, "--max-new-tokens", "8", differing="--temperature=0.5") as started:
        ends = started.ends()
    assert [code for code, _, _ in ends] == [2, 2]
    assert all("1 process of 2 got another request than process 0: 1" in err for _, _, err in ends)
