"""`dsv32 serve` as a process: the README's curl line, a draining end, and what is refused before weights are read."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from dsv32_jax import cli
from dsv32_jax.cli import serve_command
from dsv32_jax.serve import connections, driver

README = (Path(__file__).parents[2] / "README.md").read_text()
CURL = next(line for line in README.splitlines() if line.startswith("curl "))


SLOW = """
import asyncio
from dsv32_jax.cli import serve_command
from dsv32_jax.serve import connections, request_log
from prometheus_client import Counter

async def answer(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await asyncio.sleep(1000)

say = lambda text: print(text, flush=True)
requests = Counter("requests", "requests by status", ["status"])
config = connections.configure(request_log.RequestLog(answer, requests, say), connections.Limits())
with serve_command.bind("127.0.0.1", 0) as listener:
    listener.listen()
    say(listener.getsockname()[1])
    asyncio.run(connections.DrainingServer(config, lambda: 1, say).serve(sockets=[listener]))
"""
"""A server whose answers do not end."""


@pytest.fixture(scope="module")
def process(model, scratch):
    """The command, its address and its key: (process, url, key)."""
    folder = scratch / "served" / ".." / "converted-for-serve"
    folder = folder.resolve()
    folder.symlink_to(scratch / "served")
    keys = scratch / "keys.txt"
    keys.write_text("first-key\nsecond-key\n")
    words = ["serve", str(folder), "--name", "converted", "--port", "0", "--api-key-file", str(keys)]
    words += ["--host", "0.0.0.0", "--rows", "2", "--context", "128", "--timeout", "100"]
    command = [sys.executable, "-m", "dsv32_jax", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"serving converted at http://0\.0\.0\.0:(\d+)/v1", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "warning" not in said and "compiled what first requests need" in said
        yield process, f"http://127.0.0.1:{found[1]}", "second-key"
        process.kill()


def test_the_curl_line_and_the_end(process):
    """As in the README, with a key; nothing is compiled for it, nor for JSON. After SIGTERM the answer that is running
    ends first; the exit code is 0."""
    process, url, key = process

    def read_compile_seconds() -> str:
        metrics = httpx2.get(f"{url}/metrics", headers={"x-api-key": key}).text
        return re.search(r"^dsv32_compile_seconds_total (\S+)$", metrics, re.M)[1]

    compiled = read_compile_seconds()
    words = [word.replace("localhost:8000", url) for word in shlex.split(CURL)]
    done = subprocess.run([*words, "-s", "-H", f"Authorization: Bearer {key}"], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant", done
    form = {"response_format": {"type": "json_object"}, "messages": [{"role": "user", "content": "hi"}]}
    formed = httpx2.post(f"{url}/v1/chat/completions", json=form, headers={"x-api-key": key}, timeout=60)
    assert formed.json()["choices"][0]["message"]["content"].lstrip().startswith("{")
    assert read_compile_seconds() == compiled
    assert httpx2.get(f"{url}/no%0Asuch").status_code == 401
    assert httpx2.get(f"{url}/no%0Asuch", headers={"x-api-key": key}).status_code == 404
    body = {"model": "converted", "prompt": "def", "max_tokens": 100, "stream": True, "logit_bias": {"1": -1000}}
    headers = {"x-api-key": key}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(process.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out and "Traceback" not in err and key not in err
    assert "finishing 1 answer; Ctrl-C cuts it off" in err
    assert all(re.search(rf" GET /no%0Asuch {status}, 0\.\d s$", err, re.M) for status in (401, 404)), err
    assert re.search(r"^\d\d:\d\d:\d\d 127\.0\.0\.1 POST /v1/completions 200, 100 tokens, \d+\.\d s$", err, re.M), err


def test_a_second_interrupt():
    """The first says what it waits for, the second ends the process with one line."""
    command, pipe = [sys.executable, "-c", SLOW], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with httpx2.stream("GET", url, timeout=60) as answer:
            next(answer.iter_bytes())
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "finishing 1 answer; Ctrl-C again cuts it off\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--port", "99999"], "--port must be an integer from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--timeout", "0"], "--timeout must be more than 0"),
        (["--waiting", "-1"], "--waiting must be an integer"),
        (["--rows", "0"], "--rows must be an integer"),
        (["--context", "9999999"], "--context must be an integer from 1 to"),
        (["--api-key-file", "{empty}"], "must hold keys"),
    ],
)
def test_what_is_refused(model, scratch, tmp_path, capsys, words, message):
    """With exit code 2, and what to change."""
    (tmp_path / "empty").write_text("\n")
    words = [word.format(empty=tmp_path / "empty") for word in words]
    assert cli.main(["serve", str(scratch / "served"), "--port", "0", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("host, is_open", [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_may_ask(model, scratch, monkeypatch, capsys, host, is_open):
    """A warning where other machines reach a server that wants no key."""
    drivers, real = [], driver.Driver

    async def serve(self, sockets):
        pass

    monkeypatch.setattr(connections.DrainingServer, "serve", serve)
    monkeypatch.setattr(driver, "warm_up", lambda engine, room: None)
    monkeypatch.setattr(driver, "Driver", lambda *given: drivers.append(real(*given)) or drivers[0])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["--host", host, "--port", "0", "--rows", "1", "--context", "64"]
    assert cli.main(["serve", str(scratch / "served"), *words]) == 0
    drivers[0].close()
    assert (f"warning: anybody who reaches {host}" in capsys.readouterr().err) == is_open


def test_a_port_that_is_taken():
    """An error that says which, and what to choose."""
    with serve_command.bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(serve_command.UsageError, match="--port"):
            serve_command.bind("127.0.0.1", listener.getsockname()[1])
