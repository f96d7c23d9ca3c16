"""Servers in this process: of a model, and of rows that say what they are told."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence

import uvicorn

import dsv32_jax as ds
from dsv32_jax.cli import serve_command
from dsv32_jax.generation.row import Row
from dsv32_jax.serve.app import Server
from dsv32_jax.serve.connections import Limits, configure
from dsv32_jax.serve.driver import Driver, Job
from dsv32_jax.serve.reading import Reader

ROWS, CAPACITY, WAITING = 4, 1024, 8


@contextlib.contextmanager
def listen(app, limits: Limits | None = None) -> Iterator[str]:
    """The address at which `app` answers, until it has shut down."""
    with serve_command.bind("127.0.0.1", 0) as listener:
        listener.listen(serve_command.BACKLOG)
        server = uvicorn.Server(configure(app, limits or Limits()))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def make_server(model, tokenizer, limits=None, draft: int = 0, waiting: int = WAITING) -> Server:
    """A server with an engine of its own."""
    engine = ds.engine(model, rows=ROWS, capacity=CAPACITY, pages=24, draft=draft)
    reader = Reader("demo", engine, tokenizer, {"temperature": 0.0})
    return Server(reader, Driver(engine, ROWS + waiting), limits or Limits(seconds=60, keep_alive=0.02))


class ScriptedDriver:
    """Gives rows the tokens of `scripts`, text or ids, the i-th row the i-th, in groups of `sizes`; needs no device."""

    def __init__(self, engine, tokenizer, scripts: Sequence[str | list[int]], sizes: Sequence[int]):
        self.engine, self.tokenizer, self.scripts, self.sizes = engine, tokenizer, scripts, sizes
        self.jobs: list[Job] = []

    def submit(self, request) -> Job:
        rows = [Row(request, index) for index in range(len(request.limits))]
        job = Job(rows)
        self.jobs.append(job)
        tokens = [self.say(script) for script in self.scripts]
        at, turn = 0, 0
        while job.is_going:
            size = self.sizes[turn % len(self.sizes)]
            for row, said in zip(rows, tokens, strict=True):
                for token in said[at : at + size]:
                    if row.finish_reason is None:
                        row.pending.append(row.add(token, -1.0))
            job.put(job.collect())
            at, turn = at + size, turn + 1
        return job

    def say(self, script: str | list[int]) -> list[int]:
        """The tokens of a completion, tags and all, and the end."""
        ids = self.tokenizer.encode(script, allow_special=True) if isinstance(script, str) else script
        return [*ids, self.engine.model.cfg.eos_token_id[0]]

    def leave(self, job: Job) -> None:
        pass
