"""The rows of any number of requests in one device state, and who advances them.

Whoever waits for a token takes a step of the loop: rows are admitted, a chunk of prompts is read, and rows that
generate take some decode steps. No thread runs on its own.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Self

import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..errors import CapacityError, UsageError, argument, pluralize
from ..model.model import Model
from ..parallel import multihost
from ..system.compilation import initialize
from . import memory
from .batch import Batch
from .loop import Loop
from .pages import PAGE, count_pages
from .programs import choose_programs
from .request import Request
from .result import Token
from .row import Row
from .scheduler import Scheduler


def plan_rows(cfg: Config, request: Request, mesh: Mesh | None = None) -> int:
    """Return how many rows of the request are computed at once: as many as fit in memory; 0 if no new tokens are
    wanted. Raises CapacityError if not even one row fits."""
    options, rows = request.options, sum(limit > 0 for limit in request.limits)
    if not rows:
        return 0
    fitting = options.batch_size or memory.plan_batch(
        cfg, rows, 1, count_pages(request.capacity) * PAGE, request.cache_dtype, options.draft, mesh
    )
    return min(rows, fitting)


class Turns:
    """A lock that is fair: nobody who lets it go and asks again overtakes those who wait."""

    def __init__(self):
        self._lock, self._queue = threading.Lock(), deque[threading.Semaphore]()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, which lasts as long as the `with`."""
        mine = threading.Semaphore(0)
        with self._lock:
            self._queue.append(mine)
            is_first = len(self._queue) == 1
        try:
            if not is_first:
                mine.acquire()
            yield
        finally:
            with self._lock:
                is_first = self._queue[0] is mine
                self._queue.remove(mine)
                if is_first and self._queue:
                    self._queue[0].release()


class EngineCore:
    """A loop, and the rows that come to it and leave it. Any thread may use it; one at a time takes a step."""

    def __init__(
        self,
        model: Model,
        *,
        rows: int,
        pages: int,
        cache_dtype: np.dtype,
        draft: int,
        layerwise: bool | None = None,
        for_throughput: bool = False,
    ):
        initialize()
        shards = 1 if model.mesh is None else model.mesh.shape.get("data", 1)
        places = shards * memory.round_up_rows(-(-rows // shards))
        pages = shards * -(-pages // shards)
        batch = Batch(model, places, pages, cache_dtype, draft, choose_programs(model, layerwise))
        self.loop = Loop(model, Scheduler(places, pages, shards, draft), batch, for_throughput)
        self._turns, self._arrived, self._abandoned = Turns(), deque[Row](), deque[Row]()
        self._is_closed = False

    @classmethod
    def for_request(cls, model: Model, request: Request, layerwise: bool | None = None) -> Self:
        """Return one with the rows and pages that this request needs."""
        core = cls(
            model,
            rows=max(1, plan_rows(model.cfg, request, model.mesh)),
            pages=0,
            cache_dtype=request.cache_dtype,
            draft=request.options.draft,
            layerwise=layerwise,
            for_throughput=True,
        )
        core.grow(memory.round_up_rows(count_pages(request.capacity)) * len(core.loop.scheduler.places))
        return core

    @property
    def waiting(self) -> int:
        """Rows that have no place."""
        return len(self.loop.scheduler.waiting) + len(self._arrived)

    def close(self) -> None:
        """Interrupt all rows and free the device's memory. Nothing can be submitted after that."""
        with self._turns.take():
            self._is_closed = True
            self._let_in()
            scheduler = self.loop.scheduler
            scheduler.clear()
            for row in list(scheduler.waiting):
                row.interrupt()
                scheduler.release(row)
            self.loop.batch.state = None

    def grow(self, pages: int) -> None:
        """Have at least so many pages. Must be called during a `pause`."""
        scheduler, shards = self.loop.scheduler, len(self.loop.scheduler.pools)
        if (more := -(-(pages - scheduler.pages) // shards)) > 0:
            scheduler.grow(more)
            self.loop.batch.grow(more, shards)

    def add(self, request: Request) -> list[Row]:
        """Let the rows of a request wait for their places, and return them. Raises CapacityError if a row could never
        have the pages it may need."""
        rows = [Row(request, index) for index in range(len(request.limits))]
        self.enter(rows)
        return rows

    def enter(self, rows: list[Row]) -> None:
        """Let the rows of a request wait, as `add` does, the longest first: fewer places are empty at the end."""
        if self._is_closed:
            raise UsageError("the engine is closed; make another one with ds.engine(...)")
        multihost.require_same(self.loop.model.mesh, rows[0].request)
        most = len(self.loop.scheduler.pools[0].users)
        for row in rows:
            needed = count_pages(len(row.prompt) + row.limit)
            if needed > most:
                raise CapacityError(
                    f"a row of {len(row.prompt) + row.limit} tokens needs {pluralize(needed, 'page')} of {PAGE}, but "
                    f"the engine has {most}; use fewer new tokens, or {argument('pages', needed)} or more"
                )
        for row in rows:
            row.group, row.news = rows, rows[0].news
            row.submitted, row.before = time.perf_counter(), dict(self.loop.totals)
        self._arrived.extend(sorted((row for row in rows if row.limit), key=lambda row: -row.limit))

    def follow(
        self, rows: Sequence[Row], steps: int | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[Row, Token | None], None, None]:
        """Yield (row, token) for every token of the rows as they come, at least every `steps` steps, and (row, None)
        for each row at its end.

        Rows that have not ended are given up if `should_stop` returns True or the generator is closed. Raises
        CapacityError if the device runs out of memory, FloatingPointError if logits are not finite.
        """
        news, going = rows[0].news, {row.index for row in rows}
        news.extend(row for row in rows if row.finish_reason)
        try:
            while going:
                while news:
                    row = news.popleft()
                    while row.pending:
                        yield row, row.pending.popleft()
                    if row.error is not None:
                        raise row.error
                    if row.finish_reason and row.index in going:
                        going.remove(row.index)
                        yield row, None
                if should_stop():
                    break
                if going:
                    self.wait(lambda: bool(news), steps)
            for row in rows:
                if row.index in going:
                    row.interrupt()
                    yield row, None
        finally:
            self._abandoned.extend(row for row in rows if row.index in going)

    def wait(self, is_ready: Callable[[], bool], steps: int | None = None) -> None:
        """Return when `is_ready`, or after one step of the engine's loop; somebody else may take it."""
        if not is_ready():
            with self._turns.take():
                if not is_ready():
                    self._let_in()
                    self.loop.advance(steps)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let nobody advance the engine inside the `with`; rows that were given up have left it."""
        with self._turns.take(), self.loop.protect():
            self._let_in()
            yield

    def interrupt(self, rows: Sequence[Row]) -> None:
        """Stop these rows after the step that is running. Whoever has a stream closes it instead."""
        with self._turns.take():
            self._abandoned.extend(rows)
            self._let_in()

    def abandon(self, row: Row) -> None:
        """Stop a row before the next step, without waiting for it: the garbage collector may call this."""
        self._abandoned.append(row)

    def _let_in(self) -> None:
        """Submit rows that arrived, and release those that were given up."""
        while self._arrived:
            self.loop.submit(self._arrived.popleft())
        while self._abandoned:
            row = self._abandoned.popleft()
            row.interrupt()
            self.loop.scheduler.release(row)
