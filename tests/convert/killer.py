"""Jobs in processes that are killed: forked from one that has imported everything, so that each costs little.

As a program it reads one request a line and answers each with a line; `Killer` is the other end.
"""

import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.fsync"}
SESSION = "dsv32_jax session 0"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """Starts jobs ("convert", "reshard", "export" or "save") with a source, an output and options."""

    def __init__(self, job: str = "convert"):
        command = [sys.executable, str(Path(__file__)), job]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def trace(self, *arguments) -> list[str]:
        """What a whole conversion does to the files below its output: one text for each step, of its kind."""
        return self._ask(arguments, "trace", 0)["steps"]

    def before(self, *arguments, step: str | int | tuple[str, int]) -> int:
        """Kill a job before its first step of a kind, its step of a number, or so many steps after the first one of a
        kind; how it ended: -SIGKILL, or 0."""
        return self._ask(arguments, "step", step)["status"]

    def after(self, *arguments, seconds: float) -> int:
        """Kill a conversion after some time."""
        return self._ask(arguments, "seconds", seconds)["status"]

    def finish(self, *arguments) -> str:
        """Run a job to its end: the manifest's digest, once every array on the disk has its SHA-256; of an export the
        SHA-256 of all files."""
        return self._ask(arguments, "finish", 0)["digest"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, arguments, how: str, value: object) -> dict:
        src, dst, options = arguments
        request = {"src": str(src), "dst": str(dst), "options": options, "how": how, "value": value}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer


def kind(event: str, path: str, dst: str) -> str:
    """A step without what differs between steps of one kind: numbers, random names, process ids."""
    relative = re.sub(r"[0-9a-f]{16,}|[0-9a-f]{8}(?=\.tmp)", "*", os.path.relpath(path, dst))
    return f"{event} {re.sub(r'[0-9]+', '#', relative)}"


def watch(dst: str, on_step) -> None:
    """Call `on_step` with its kind before every step that this process takes below `dst` from Python."""

    def step(event: str, path) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if text.startswith(dst):
            on_step(kind(event, text, dst))

    def hook(event: str, arguments) -> None:
        if event in EVENTS and not (event == "open" and not (arguments[2] or 0) & WRITING):
            step(event, arguments[0])

    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        step("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched_fsync
    sys.addaudithook(hook)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def run(job: str, src: str, dst: str, options: dict) -> None:
    """One job from start to end."""
    if job == "convert":
        import convert

        convert.convert(src, dst, **options)
    elif job == "reshard":
        from convert.export.reshard import reshard

        reshard(src, dst, **options)
    elif job == "save":
        from dsv32_jax.system.array_file import write_arrays

        write_arrays(Path(dst), SESSION, {"tokens": [7]}, {"cache": np.arange(options["size"])})
    else:
        from convert.export.export import export

        export(src, dst, **options)


def digest(job: str, dst: str) -> str:
    """What tells one output from another."""
    from dsv32_jax.checkpoint.checksums import find_damaged_files
    from dsv32_jax.checkpoint.manifest import Manifest
    from dsv32_jax.checkpoint.reader import Reader

    if job == "save":
        from dsv32_jax.system.array_file import read_arrays

        return hashlib.sha256(read_arrays(Path(dst), SESSION, {"tokens": [int]})[1]["cache"].tobytes()).hexdigest()
    if job == "export":
        files = sorted(Path(dst).iterdir())
        return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
    manifest = Manifest.read(dst)
    reader = Reader(dst, manifest.leaves)
    assert not find_damaged_files(dst, manifest), find_damaged_files(dst, manifest)
    for key, entry in reader.entries.items():
        assert hashlib.sha256(reader.read(key).tobytes()).hexdigest() == entry.sha256, key
    return manifest.digest


def child(job: str, request: dict, answer: int) -> None:
    """One job that may be killed."""
    steps: list[str] = []

    def on_step(text: str) -> None:
        steps.append(text)
        value, number = request["value"], len(steps) - 1
        if isinstance(value, list):
            first, more = value
            value = steps.index(first) + more if first in steps else None
        if request["how"] == "step" and value in (text, number):
            die()

    result = {}
    try:
        if request["how"] in ("trace", "step"):
            watch(os.path.dirname(request["dst"]) if job in ("export", "save") else request["dst"], on_step)
        run(job, request["src"], request["dst"], request["options"])
        if request["how"] == "trace":
            result["steps"] = list(steps)
        if request["how"] == "finish":
            result["digest"] = digest(job, request["dst"])
    except Exception as error:
        result["error"] = repr(error)
    os.write(answer, json.dumps(result).encode())
    os._exit(0)


def main() -> None:
    job = sys.argv[1]
    import dsv32_jax.checkpoint.writer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        began = time.monotonic()
        if (pid := os.fork()) == 0:
            child(job, request, writing)
        os.close(writing)
        if request["how"] == "seconds":
            if not select.select([reading], [], [], request["value"])[0]:  # a job that ends sooner is not waited for
                os.kill(pid, signal.SIGKILL)
        with open(reading, "rb") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {"status": status, "seconds": time.monotonic() - began, **(json.loads(said) if said else {})}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
