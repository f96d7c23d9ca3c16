"""The tokens of one row, as they come."""

import asyncio
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from ..system.summary import Summarized
from .result import Generation, Token
from .row import Row, summarize

if TYPE_CHECKING:
    from .engine_core import EngineCore
    from .session import Session


class Stream(Summarized, Iterator[Token]):
    """The tokens of one row as they are sampled. Under `async for` the engine is advanced in a thread, and the event
    loop is free meanwhile. Any thread may close the stream, which waits for the step that is running.

    A turn of a `session` begins when the first token is asked for, and ends with the row or when the stream is closed.
    """

    def __init__(self, core: "EngineCore", row: Row, steps: int | None = None, session: "Session | None" = None):
        self._core, self._row, self._steps, self._session = core, row, steps, session
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, core.abandon if session is None else session._abandon, row)
        self._finalizer.atexit = False
        self._has_begun, self._is_closing = session is None, False

    def __next__(self) -> Token:
        with self._lock:
            row = self._row
            if not self._has_begun and self._session is not None:
                self._session._begin(row)
                self._has_begun = True
            try:
                while not (self._is_ready() or self._is_closing):
                    self._core.wait(self._is_ready, self._steps)
            except BaseException:
                self.close()
                raise
            row.news.clear()
            if row.pending:
                return row.pending.popleft()
            if row.finish_reason:
                self._end()
            if row.error is not None:
                error, row.error = row.error, None
                raise error
            raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if (token := await asyncio.to_thread(next, self, None)) is None:
            raise StopAsyncIteration
        return token

    def close(self) -> None:
        """Generate no more tokens."""
        self._is_closing = True
        with self._lock:
            if self._finalizer.alive:
                self._core.interrupt([self._row])
            self._end()

    def _is_ready(self) -> bool:
        return bool(self._row.pending or self._row.finish_reason)

    def _end(self) -> None:
        if self._finalizer.detach() and self._has_begun and self._session is not None:
            self._session._end(self._row)

    def result(self) -> Generation:
        """Return what `generate` returns, with all tokens, as soon as the row has ended. After `close` it has the
        tokens that were taken until then, and its row is "interrupted"."""
        for _ in self:
            pass
        return summarize([self._row], self._core.loop.totals)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return how far the stream is."""
        row = self._row
        tokens = f"{len(row.tokens) - len(row.pending)} of at most {row.limit}"
        capacity = str(row.request.capacity)
        return "Stream", {"tokens": tokens, "finished": row.finish_reason or "no", "capacity": capacity}
