"""A conversation that keeps its cache, so that each turn prefills only what is new."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError, argument
from ..model import validation
from ..model.cache import dtype_of
from ..model.model import Model
from ..model.summary import Summarized
from ..parallel.multihost import fetch, make_agreed
from ..system.files import expand_file_path
from ..system.interrupts import defer_interrupt
from ..system.progress import format_size
from . import memory, session_file
from .engine import Engine
from .generate import Stream
from .options import Options, Sampling, accepts_options, check_option, specs
from .prefill_decode import Caches, empty_caches, fit_caches
from .request import capacity_for, validate_for
from .result import Generation, Token

OWN = tuple(name for name, spec in specs(Options).items() if spec.group == "cache")
"""Options that a session has for all its turns."""

BUSY = "this session is in the middle of a turn; wait for it, or close its stream"


class Session(Summarized):
    """One row's cache over many turns. Made by `session`.

    A turn is given the whole conversation so far as token ids, as a chat template makes it. What it has in common with
    `tokens`, those that the cache holds, is not prefilled again. Turns, `fork` and `save` may be called from any
    thread: one turn runs at a time.
    """

    def __init__(self, model: Model, capacity: int | None, cache_dtype: np.dtype, draft: int):
        self.model, self.capacity, self.cache_dtype, self.draft = model, capacity, cache_dtype, draft
        self.tokens: list[int] = []
        self._caches: Caches | None = None
        self._drafted = 0
        self._turn, self._access = threading.Lock(), threading.Lock()

    @accepts_options(without=("n", *OWN))
    def generate(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Generation:
        """Continue the conversation, as `generate` continues a prompt. The session then holds prompt and answer."""
        engine = self._engine(tokens, sampling, options)
        with defer_interrupt() as is_interrupted:
            for _ in self._run(engine, None, make_agreed(self.model.mesh, is_interrupted)):
                pass
        return engine.result()

    @accepts_options(without=("n", *OWN))
    def stream(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """Continue the conversation token by token. After a stream that is closed early the session holds what was
        processed until then."""
        engine = self._engine(tokens, sampling, options)
        return Stream(engine, self._run(engine, 1, lambda: False))

    def fork(self) -> Self:
        """Return another session that holds the same tokens and goes its own way. Raises UsageError during a turn."""
        with self._between_turns():
            other = type(self)(self.model, self.capacity, self.cache_dtype, self.draft)
            other.tokens, other._drafted = list(self.tokens), self._drafted
            other._caches = jax.tree.map(jnp.copy, self._caches)
            return other

    def save(self, file: str | Path) -> None:
        """Write the session to one safetensors file, from which `load_session` continues with the same model.

        Raises UsageError during a turn or if `file` is a folder, StorageError if it cannot be written.
        """
        with self._between_turns():
            file = expand_file_path(file)
            own = {"capacity": self.capacity, "cache_dtype": self.cache_dtype.name, "draft": self.draft}
            count = len(self.tokens)
            caches = self._caches and fit_caches(self._caches, count, count)
            settings = {**own, "drafted": self._drafted, "tokens": self.tokens}
            session_file.write(file, self.model, settings, caches)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return how much the session holds and may hold."""
        size = sum(array.nbytes for array in jax.tree.leaves(self._caches))
        longest = self.capacity or self.model.cfg.max_position_embeddings
        cache = f"{self.cache_dtype.name}, {format_size(size)}"
        return "Session", {
            "tokens": f"{len(self.tokens)} of at most {longest}",
            "cache": cache,
            "draft": f"{self.draft}",
        }

    @contextlib.contextmanager
    def _between_turns(self) -> Iterator[None]:
        """Hold off turns during the `with` block. Raises UsageError if one is running."""
        with self._access:
            if self._turn.locked():
                raise UsageError(BUSY)
            yield

    def _engine(self, tokens: Sequence[int], sampling: Any, options: dict[str, Any]) -> Engine:
        if given := [name for name in OWN if name in options]:
            raise UsageError(f"{argument(given[0])} belongs to the session: give it to ds.session(...)")
        if options.get("n", 1) != 1:
            raise UsageError(f"a session has one row, not {argument('n', options['n'])}; fork it")
        own = {name: getattr(self, name) for name in OWN}
        return Engine(self.model, validate_for(self.model, [tokens], sampling, **options, **own))

    def _run(self, engine: Engine, steps: int | None, should_stop: Callable[[], bool]) -> Generator[Token, None, None]:
        """Run a turn. Its programs donate the caches, so that the session holds nothing meanwhile."""
        with self._access:
            if not self._turn.acquire(blocking=False):
                raise UsageError(BUSY)
        try:
            for batch in engine.batches:
                (prompt,) = engine.request.prompts
                known, caches = self._count_known(prompt), self._caches
                if caches is not None:
                    capacity = max(engine.request.capacity, caches[0].capacity)
                    engine.request = dataclasses.replace(engine.request, capacity=capacity)
                    caches = fit_caches(caches, capacity, known)
                self.tokens, self._caches, self._drafted = [], None, 0
                with contextlib.closing(engine.run(batch, steps, should_stop, caches, known)) as tokens:
                    try:
                        yield from (token for _, token in tokens)
                    finally:
                        self._keep(engine)
        finally:
            self._turn.release()

    def _count_known(self, prompt: list[int]) -> int:
        """Return how many tokens of the prompt need no prefill. The last one always does, for its logits. A slot of the
        MTP head's cache depends on the token after it too, so with drafts one more token has to be common."""
        common = 0
        while common < min(len(self.tokens), len(prompt)) and self.tokens[common] == prompt[common]:
            common += 1
        known = min(common, len(prompt) - 1)
        return known if not self.draft else max(0, min(known, common - 1, self._drafted))

    def _keep(self, engine: Engine) -> None:
        """Hold what a turn has processed; nothing if a program was interrupted, or met a value that is not finite and
        would spoil later turns."""
        state = engine.state
        if state is None or not fetch(state.finite_B).all():
            return
        (prompt,), (row,) = engine.request.prompts, engine.rows
        length = int(fetch(state.cache.length_B)[0])
        self.tokens = (prompt + row.tokens)[:length]
        self._caches = state.cache, state.draft_cache
        self._drafted = length - max(1, int(fetch(state.unread_B)[0])) if self.draft else 0


def session(model: Model, *, capacity: int | None = None, cache_dtype: Any = None, draft: int = 0) -> Session:
    """Return a session of at most `capacity` tokens. Without one its cache grows as turns need it, by powers of two.

    Raises UsageError, and CapacityError if the cache does not fit in memory.
    """
    cfg, draft = validation.config_of(model), check_option("draft", draft)
    capacity = check_option("capacity", capacity, 1, cfg.max_position_embeddings)
    stored = dtype_of(cache_dtype, model.dtype)
    if capacity is not None:
        memory.plan_batch(cfg, 1, 1, capacity, stored, draft, model.mesh)
    return Session(model, capacity, stored, draft)


def load_session(model: Model, file: str | Path) -> Session:
    """Return the session in `file`, for the model it was saved with.

    Raises UsageError if that was another model, CheckpointError if the file is damaged.
    """
    cfg = validation.config_of(model)
    file = expand_file_path(file)
    saved = session_file.read_settings(file, model)
    loaded = session(model, **{name: saved[name] for name in OWN})
    if saved["tokens"]:
        (tokens,) = validation.check_prompts([saved["tokens"]], cfg.vocab_size)
        slots = loaded.capacity or capacity_for(cfg, len(tokens))
        if len(tokens) > slots:
            raise UsageError(f"{file} holds {len(tokens)} tokens, but its session has room for {slots}")
        empty = empty_caches(cfg, 1, len(tokens), loaded.cache_dtype, loaded.draft)
        caches = session_file.read_into(file, empty)
        loaded.tokens, loaded._drafted = tokens, saved["drafted"]
        loaded._caches = fit_caches(caches, slots, len(tokens))
    return loaded
