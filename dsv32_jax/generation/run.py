"""A request under way: its batches one after the other, what became of its rows, and how long it took."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Self

import jax
from jax.sharding import Mesh

from ..model.model import Model
from ..parallel import multihost
from ..system.compilation import count_compilations, log_slow_compilation
from . import memory
from .batch import Batch, Programs
from .options import Options
from .prefill_decode import Context
from .request import plan
from .result import Generation, Stats
from .transcript import Token, Transcript


class Run:
    """Checks a request, then runs it. `stop`, `tokenizer` and `progress` are those of `options.Options`."""

    def __init__(
        self,
        programs: Programs,
        model: Model,
        prompts,
        sampling,
        *,
        tokenizer=None,
        stop=(),
        progress=None,
        **options,
    ):
        Options.of(options)
        self.request = plan(model, prompts, sampling, **options)
        multihost.require_same(model.mesh, (self.request, stop))
        self._programs, self._model, self._tokenizer = programs, model, tokenizer
        self._transcripts = [
            Transcript(self.request.ends, self.request.limit, tokenizer, stop) for _ in self.request.samplings
        ]
        self._progress = progress
        self._read = self._steps = self._accepted = self._compiles = 0
        self._seconds: dict[str, float] = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the model is spread over."""
        return self._model.mesh

    def batches(self) -> Iterator[Batch]:
        """The rows in the groups that are continued together; none where no token is asked for."""
        for group in self.request.groups if self.request.limit else ():
            yield Batch(self._programs, self._model, self.request, group, self._transcripts)

    def tokens(
        self,
        batch: Batch,
        steps: int | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        context: Context | None = None,
        known: int = 0,
    ) -> Generator[tuple[int, Token], None, None]:
        """Continue a batch to its end, telling (row, token) every `steps` steps, or every half second. Where it
        is closed before, the tokens made until then count."""
        with self._timed("prefill", batch):
            batch.read(self._told, asked_to_stop, context, known)
        if batch.held is None:
            return
        with contextlib.suppress(GeneratorExit):
            yield from batch.news()
            while not (batch.done or asked_to_stop()):
                with self._timed("decode", batch):
                    batch.advance(steps)
                yield from batch.news()
        self._steps += batch.steps
        self._accepted += batch.accepted

    def result(self) -> Generation:
        """What was generated; rows that have not ended were interrupted."""
        for one in self._transcripts:
            if one.finish_reason is None:
                one.interrupt()
        stats = Stats(
            rows=len(self._transcripts),
            compile_seconds=self._seconds["compile"],
            compiles=self._compiles,
            prefill_seconds=self._seconds["prefill"],
            decode_seconds=self._seconds["decode"],
            prompt_tokens=self._read,
            new_tokens=sum(len(one.tokens) for one in self._transcripts),
            capacity=self.request.capacity,
            steps=self._steps,
            drafts=self.request.draft,
            accepted=self._accepted,
        )
        return Generation(
            [one.tokens for one in self._transcripts],
            [one.logprobs for one in self._transcripts],
            [str(one.finish_reason) for one in self._transcripts],
            stats,
            None if self._tokenizer is None else [str(one.text) for one in self._transcripts],
            [one.top for one in self._transcripts] if self.request.top_logprobs else None,
        )

    def _told(self, count: int) -> None:
        self._read += count
        if self._progress is not None:
            self._progress(self._read, sum(map(len, self.request.prompts)))

    @contextlib.contextmanager
    def _timed(self, part: str, batch: Batch) -> Iterator[None]:
        """Add the seconds of the `with` to `part`, but those of compilation to their own account.

        Raises CapacityError where the device has no memory left.
        """
        start, what = time.perf_counter(), f"{part} of {len(batch.rows)} rows, {self.request.capacity} tokens each"
        with count_compilations() as compiled, log_slow_compilation(what, compiled):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                raise memory.explain_exhaustion(self._model, batch.bytes, error) from error
        self._compiles += compiled.count
        self._seconds["compile"] += compiled.seconds
        self._seconds[part] += max(0.0, time.perf_counter() - start - compiled.seconds)


class Stream(Iterator[Token]):
    """The tokens of a run of one row, as they are chosen; under `async for` each step runs in a thread, and the event
    loop is free meanwhile. `result()` is what came of it."""

    def __init__(self, run: Run, tokens: Generator[Token, None, None]):
        self._run, self._tokens = run, tokens

    def __next__(self) -> Token:
        return next(self._tokens)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if (token := await asyncio.to_thread(next, self, None)) is None:
            raise StopAsyncIteration
        return token

    def close(self) -> None:
        """Make no more tokens."""
        self._tokens.close()

    def result(self) -> Generation:
        """What `generate` gives: all tokens so far and times. A stream that has not ended is closed, its row
        "interrupted"."""
        self.close()
        return self._run.result()
