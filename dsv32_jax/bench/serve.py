"""`dsv32 bench serve`: many clients of `dsv32 serve`, and the same requests in an engine without HTTP."""

import argparse
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..chat import Tokenizer
from ..checkpoint.load import load
from ..generation.engine import Engine, engine as make_engine
from ..generation.options import Sampling

LONGEST_PROMPT, LONGEST_ANSWER, CONTEXT = 128, 64, 256
MOST_WARM = 10
"""Rounds that may pass before others are counted."""

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/")

EXPLANATION = """\
Rounds of {clients} requests that come at once, prompts of 4-128 tokens, answers of 1-64, drawn in float32 with seeds;
whole answers and streams in turn. ratio: tokens the server makes in a second of processor time, beside an engine that
is given the same requests without HTTP. first_token: seconds to the first token of a stream. wrong: answers other than
the engine's. Rounds are counted once two in a row compiled nothing, or after {most} of them. compile_s: seconds of
compilation in counted rounds; programs take memory."""


class Ask(NamedTuple):
    """A request: token ids, the most new tokens, and the seed."""

    prompt: list[int]
    limit: int
    seed: int


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port

    def fetch(self, ask: Ask, stream: bool) -> tuple[str, float]:
        """Return the answer, and the seconds to its first token if it is a stream. Raises OSError if it is refused."""
        body = {"model": "bench", "prompt": ask.prompt, "max_tokens": ask.limit, "seed": ask.seed, "stream": stream}
        begun, first = time.perf_counter(), 0.0
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps({**body, "temperature": 1.0}))
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"the server answered {answer.status}: {answer.read(500)!r}")
            if not stream:
                return json.loads(answer.read())["choices"][0]["text"], first
            text = ""
            for line in answer:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - begun
                    text += json.loads(line[6:])["choices"][0]["text"]
            return text, first

    def read_metric(self, name: str) -> float:
        """Return one of the server's metrics."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request("GET", "/metrics")
            (line,) = re.findall(rf"^dsv32_{name}(?:_total)? (\S+)$", connection.getresponse().read().decode(), re.M)
        return float(line)

    def read_cpu(self) -> float:
        """Return the processor seconds of all its threads so far."""
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def read_memory(self) -> int:
        """Return the bytes that it holds."""
        (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(kilobytes) * 1024


@contextlib.contextmanager
def serve(checkpoint: Path, rows: int, clients: int) -> Iterator[Server]:
    """Run `dsv32 serve` inside the `with`, then end it. Raises OSError if it does not start or end well."""
    words = ["--name", "bench", "--port", "0", "--dtype", "float32", "--context", str(CONTEXT)]
    words += ["--rows", str(rows), "--waiting", str(clients)]
    command = [sys.executable, "-m", "dsv32_jax", "serve", str(checkpoint), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        try:
            while (found := ADDRESS.search(said)) is None:
                if not (line := process.stderr.readline()):
                    raise OSError(f"the server did not start: {said}")
                said += line
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
            yield Server(process, int(found[1]))
            process.terminate()
            if code := process.wait(timeout=60):
                raise OSError(f"the server ended with exit code {code} after SIGTERM, not 0")
        finally:
            process.kill()


def draw_asks(rng: np.random.Generator, vocab_size: int, count: int) -> list[Ask]:
    """Return ragged requests."""
    lengths, limits = rng.integers(4, LONGEST_PROMPT + 1, count), rng.integers(1, LONGEST_ANSWER + 1, count)
    return [
        Ask([0, *rng.integers(3, vocab_size, length - 1).tolist()], int(limit), int(rng.integers(1 << 31)))
        for length, limit in zip(lengths, limits, strict=True)
    ]


def run_engine(engine: Engine, tokenizer: Tokenizer, asks: Sequence[Ask]) -> tuple[list[str], int, float]:
    """Return the engine's answers, their tokens, and its processor seconds."""
    begun = time.process_time()
    streams = [
        engine.submit(
            ask.prompt,
            max_new_tokens=ask.limit,
            sampling=Sampling(temperature=1.0, seed=ask.seed),
            tokenizer=tokenizer,
        )
        for ask in asks
    ]
    made = [[token.text or "" for token in stream] for stream in streams]
    return ["".join(texts) for texts in made], sum(map(len, made)), time.process_time() - begun


class Round(NamedTuple):
    """Costs of one round: processor seconds of the engine and of the server, wall seconds of the clients."""

    stream: bool
    tokens: int
    wrong: int
    engine_cpu: float
    server_cpu: float
    wall: float
    first_tokens: list[float]


def run_round(engine: Engine, tokenizer: Tokenizer, server: Server, asks: Sequence[Ask], stream: bool) -> Round:
    """Answer the requests in the engine, then in the server, for clients that ask at the same time."""
    expected, tokens, engine_cpu = run_engine(engine, tokenizer, asks)
    begun, cpu = time.perf_counter(), server.read_cpu()
    with ThreadPoolExecutor(len(asks)) as pool:
        found = list(pool.map(lambda ask: server.fetch(ask, stream), asks))
    wall, cpu = time.perf_counter() - begun, server.read_cpu() - cpu
    wrong = sum(text != told for (text, _), told in zip(found, expected, strict=True))
    return Round(stream, tokens, wrong, engine_cpu, cpu, wall, [first for _, first in found])


def measure(checkpoint: Path, clients: int, seconds: float, rows: int) -> dict[str, float]:
    """Return all figures of rounds that take about so many seconds, two at least, after those that compile."""
    model = load(checkpoint, dtype=jnp.float32)
    tokenizer, rng = Tokenizer.load(checkpoint, model.cfg), np.random.default_rng(0)
    rounds: list[Round] = []
    with make_engine(model, rows=rows, capacity=CONTEXT) as engine, serve(checkpoint, rows, clients) as server:

        def add_round() -> float:
            """Return the seconds that the server has spent on compilation after one more round."""
            asks = draw_asks(rng, tokenizer.vocab_size, clients)
            rounds.append(run_round(engine, tokenizer, server, asks, stream=len(rounds) % 2 == 1))
            return server.read_metric("compile_seconds")

        compiled = [add_round(), add_round()]
        while len(rounds) < MOST_WARM and len({*compiled[-3:]}) > 1 or len(rounds) % 2:
            compiled.append(add_round())
        warm, memory, begun = len(rounds), server.read_memory(), time.perf_counter()
        while len(rounds) < warm + 2 or time.perf_counter() < begun + seconds:
            compiled.append(add_round())
        growth, leaked = server.read_memory() - memory, server.read_metric("pages_of_rows")
    wrong, rounds = sum(one.wrong for one in rounds), rounds[warm:]
    wall = sum(one.wall for one in rounds)
    firsts = [first for one in rounds if one.stream for first in one.first_tokens]
    ratios = {
        kind: statistics.median(one.engine_cpu / one.server_cpu for one in rounds if one.stream == (kind == "streams"))
        for kind in ("whole", "streams")
    }
    return {
        "requests_per_s": len(rounds) * clients / wall,
        "tokens_per_s": sum(one.tokens for one in rounds) / wall,
        **{f"ratio_{kind}": ratio for kind, ratio in ratios.items()},
        **{f"first_token_p{q}": float(np.percentile(firsts, q)) for q in (50, 90, 99)},
        "memory_growth_mb": growth / 1e6,
        "compile_s": compiled[-1] - compiled[warm - 1],
        "pages_leaked": leaked,
        "wrong": wrong,
        "rounds": len(rounds),
    }


def run(arguments: argparse.Namespace) -> None:
    """Print the figures as a table or as one JSON object."""
    figures = measure(arguments.checkpoint, arguments.clients, arguments.seconds, arguments.rows)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(EXPLANATION.format(clients=arguments.clients, most=MOST_WARM))
    for name, value in figures.items():
        print(f"{name:22}{value:10.3f}")
