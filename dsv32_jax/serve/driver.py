"""One thread advances the engine for all requests, and hands each its tokens in the event loop that asked."""

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError, pluralize
from ..generation.engine import Engine
from ..generation.request import Request
from ..generation.result import Token
from ..generation.row import Row

SEGMENT_SECONDS = 0.1
"""Tokens are handed out about this often."""

log = logging.getLogger(__name__)


class Busy(Exception):
    """As many rows run and wait as may."""


class Arrival(NamedTuple):
    """Tokens of one row of a request that came together, and how the row ended, None while it goes on."""

    row: int
    tokens: list[Token]
    finish_reason: str | None


class Job:
    """The rows of one request. A job belongs to the event loop that submitted it."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.submitted = rows, time.monotonic()
        self.loop = asyncio.get_running_loop()
        self._going, self._queue = {row.index for row in rows}, asyncio.Queue[list[Arrival] | Exception]()

    @property
    def is_going(self) -> bool:
        """Whether rows have not ended."""
        return bool(self._going)

    def collect(self) -> list[Arrival]:
        """Return what is new. The thread that advances the engine calls this."""
        self.rows[0].news.clear()
        found: list[Arrival] = []
        for row in self.rows:
            if row.index not in self._going:
                continue
            tokens = [row.pending.popleft() for _ in range(len(row.pending))]
            if row.error is not None:
                raise row.error
            if tokens or row.finish_reason:
                found.append(Arrival(row.index, tokens, row.finish_reason))
            if row.finish_reason:
                self._going.remove(row.index)
        return found

    def put(self, news: list[Arrival] | Exception) -> None:
        """Hand out what `collect` returned, or the error that ends the job."""
        self._queue.put_nowait(news)

    async def take(self, seconds: float) -> list[Arrival]:
        """Return what came next, nothing if nothing came in so many seconds. Raises the error that ended the job."""
        try:
            async with asyncio.timeout(seconds):
                news = await self._queue.get()
        except TimeoutError:
            return []
        if isinstance(news, Exception):
            raise news
        return news


def warm_up(engine: Engine, room: int) -> None:
    """Compile what short prompts need: one whose answer may fill the context, of `room` tokens, one with a short
    answer, whose first token is found in the cache, and one whose answer must have a form."""
    allowed_V = np.ones(engine.model.cfg.vocab_size, bool)
    anything = SimpleNamespace(allowed=lambda: allowed_V, add=lambda token: None)
    for token, (limit, constraint) in enumerate([(room - 3, None), (1, None), (room - 3, lambda: anything)]):
        options: dict[str, Any] = {"max_new_tokens": max(0, limit), "constraint": constraint}
        with contextlib.closing(engine.submit([0, token, token][:room], **options)) as stream:
            next(stream, None)


class Driver:
    """Advances an engine while there are jobs.

    most  the rows that may run or wait at the same time
    """

    def __init__(self, engine: Engine, most: int):
        self.engine, self.most = engine, most
        self._jobs: list[Job] = []
        self._left: list[Job] = []
        self._changed, self._is_closed = threading.Condition(), False
        engine.core.loop.segment_seconds = SEGMENT_SECONDS
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows that run or wait."""
        return sum(len(job.rows) for job in self._jobs)

    def submit(self, request: Request) -> Job:
        """Let the rows of a request wait for their places. Raises Busy, and what `EngineCore.add` raises."""
        if (rows := len(request.limits)) > self.most:
            raise UsageError(f"the request asks for {rows} rows; at most {self.most} may run and wait")
        with self._changed:
            if self.rows + rows > self.most:
                raise Busy(f"{pluralize(self.rows, 'row')} run or wait, and at most {self.most} may; try again")
            job = Job(self.engine.core.add(request))
            self._jobs.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """Give up what is left of a job: its rows and pages are free after the step that is running."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._left += [job] if job.is_going else []
                self._changed.notify()

    def close(self) -> None:
        """End the thread, and all rows with it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._left or self._is_closed)
                if self._is_closed:
                    return
                jobs, left, self._left = list(self._jobs), self._left, []
            if left:
                self.engine.core.interrupt([row for job in left for row in job.rows])
            if jobs:
                self._hand_out(jobs, self._advance())

    def _advance(self) -> Exception | None:
        """Take some steps; return the error if that failed."""
        compiles = self.engine.core.loop.totals["compiles"]
        try:
            self.engine.core.wait(lambda: False)
        except Exception as error:
            log.exception("the engine failed; the requests it was working on are ended")
            return error
        if self.engine.core.loop.totals["compiles"] > compiles:
            gc.freeze()  # the collector would look through all that JAX has traced, for 0.2 to 1 s at a time
        return None

    def _hand_out(self, jobs: list[Job], failure: Exception | None) -> None:
        """Give each job what is new. One that has ended, or failed, is let go."""
        for job in jobs:
            try:
                found = failure or job.collect()
            except Exception as error:
                found = error
            is_over = isinstance(found, Exception) or not job.is_going
            try:
                if found:
                    job.loop.call_soon_threadsafe(job.put, found)
            except RuntimeError:  # a loop that was closed meanwhile
                is_over = True
            if is_over:
                self.leave(job)
