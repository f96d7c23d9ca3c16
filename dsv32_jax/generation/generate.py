"""The ways to generate: all at once, a layer at a time, and token by token."""

import asyncio
import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Self

from ..errors import UsageError, argument
from ..model.model import Model
from ..model.summary import Summarized
from ..parallel.multihost import make_agreed
from ..system.interrupts import defer_interrupt
from .engine import LAYERWISE, WHOLE, Engine, Programs
from .options import Sampling, accepts_options
from .request import validate_for
from .result import Generation, Token


@accepts_options()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt (lists of token ids, of any lengths) until an end token or `max_new_tokens`.

    `sampling` is one for all prompts or a list with one each. The first Ctrl-C returns what was generated so far.
    `generate.layerwise` does the same without compiling the whole model; `inspect.trace` shows afterwards what the
    layers computed. Raises UsageError for a request that makes no sense and CapacityError if its cache does not fit in
    memory, both before anything is compiled, and FloatingPointError if logits are not finite.
    """
    return _generate(WHOLE, model, prompts, sampling, options)


@accepts_options()
def _layerwise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Generate with one program for each kind of layer, called from Python: compiles in seconds, runs slower."""
    return _generate(LAYERWISE, model, prompts, sampling, options)


generate.layerwise = _layerwise


def _generate(programs: Programs, model: Model, prompts: Any, sampling: Any, options: dict[str, Any]) -> Generation:
    engine = Engine(model, validate_for(model, prompts, sampling, **options), programs)
    with defer_interrupt() as is_interrupted:
        should_stop = make_agreed(model.mesh, is_interrupted)
        for batch in engine.batches:
            for _ in engine.run(batch, should_stop=should_stop):
                pass
            if should_stop():
                break
    return engine.result()


@accepts_options(without=("n",))
def stream(model: Model, prompt: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> "Stream":
    """Generate from one prompt and return an iterator over its tokens as they are sampled.

    The request is validated at once. Under `async for` each step runs in a thread. The stream's `result()` is what
    `generate` returns.
    """
    request = validate_for(model, [prompt], sampling, **options)
    if request.options.n != 1:
        raise UsageError(f"a stream has one row, not {argument('n', request.options.n)}; use generate")
    engine = Engine(model, request)
    return Stream(engine, _iterate(engine))


def _iterate(engine: Engine) -> Generator[Token, None, None]:
    for batch in engine.batches:
        with contextlib.closing(engine.run(batch, steps=1)) as tokens:
            yield from (token for _, token in tokens)


astream = stream
"""`stream`, by the name it has in event loops: `async for token in astream(...)`."""


class Stream(Summarized, Iterator[Token]):
    """The tokens of one row as they are sampled. Under `async for` each step runs in a thread, and the event loop is
    free meanwhile. Any thread may close the stream, which waits for the step that is running."""

    def __init__(self, engine: Engine, tokens: Generator[Token, None, None]):
        self._engine, self._tokens = engine, tokens
        self._lock = threading.RLock()

    def __next__(self) -> Token:
        with self._lock:
            return next(self._tokens)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if (token := await asyncio.to_thread(next, self, None)) is None:
            raise StopAsyncIteration
        return token

    def close(self) -> None:
        """Generate no more tokens."""
        with self._lock:
            self._tokens.close()

    def result(self) -> Generation:
        """Return what `generate` returns. A stream that has not ended is closed, and its row is "interrupted"."""
        with self._lock:
            self.close()
            return self._engine.result()

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return how far the stream is."""
        (row,), request = self._engine.rows, self._engine.request
        tokens = f"{len(row.tokens)} of at most {request.max_new_tokens}"
        return "Stream", {"tokens": tokens, "finished": row.finish_reason or "no", "capacity": str(request.capacity)}
