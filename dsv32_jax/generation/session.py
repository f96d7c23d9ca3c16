"""A conversation that keeps its cache: what the model has read is not read again.

Latents and index keys lie in one cache and move together; the drafting layer's cache goes with them.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError, require_integer
from ..model import cache as caches
from ..model import validation
from ..model.model import Model
from ..parallel.multihost import fetch
from ..system.files import expand_file_path
from ..system.interrupts import defer_interrupt
from . import memory, session_file
from .batch import WHOLE, Batch
from .options import Sampling, accepts_options
from .prefill_decode import Context, blank, resized, resumed, rewound
from .request import MOST_DRAFTS, bucket
from .result import Generation
from .run import Run, Stream
from .transcript import Token

OWN = ("capacity", "cache_dtype", "draft")
"""Options that a session has for all its turns."""


BUSY = "this session is in the middle of a turn; wait for it, or close its stream"


class Session:
    """One row's cache over many turns.

    A turn gives the whole conversation so far as token ids, as a chat template makes it; what it has in common with
    `tokens`, those that the cache holds, is not read again. Made by `session`.
    """

    def __init__(self, model: Model, capacity: int | None, cache_dtype: np.dtype, draft: int):
        self.model, self.capacity, self.cache_dtype = model, capacity, cache_dtype
        self.draft = draft
        self.tokens: list[int] = []
        self._context: Context | None = None
        self._drafted = 0
        self._turns = threading.Lock()

    @accepts_options(without=("n", *OWN))
    def generate(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Generation:
        """Continue the conversation, like `generate` of one prompt; the session then holds what was read and made."""
        run = self._run(tokens, sampling, options)
        with defer_interrupt() as asked_to_stop:
            for _ in self._turn(run, None, asked_to_stop):
                pass
        return run.result()

    @accepts_options(without=("n", *OWN))
    def stream(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """The same, token by token. A stream that is left early keeps what was read and made until then."""
        run = self._run(tokens, sampling, options)
        return Stream(run, self._turn(run, 1, lambda: False))

    def fork(self) -> Self:
        """Another session that holds the same tokens and goes its own way. Raises UsageError during a turn."""
        self._require_rest()
        other = type(self)(self.model, self.capacity, self.cache_dtype, self.draft)
        other.tokens, other._drafted = list(self.tokens), self._drafted
        other._context = jax.tree.map(jnp.copy, self._context)
        return other

    def save(self, file: str | Path) -> None:
        """Write the session to one file (safetensors); `load_session` continues it with the same model. Raises
        UsageError in the middle of a turn or where `file` is a folder, StorageError where it cannot be written."""
        self._require_rest()
        file = expand_file_path(file)
        settings = {
            "capacity": self.capacity,
            "cache_dtype": self.cache_dtype.name,
            "draft": self.draft,
            "drafted": self._drafted,
            "tokens": self.tokens,
        }
        used = None if self._context is None else resized(self._context, len(self.tokens))
        session_file.write(file, self.model, settings, used)

    def _require_rest(self) -> None:
        if self._turns.locked():
            raise UsageError(BUSY)

    def _run(self, tokens: Sequence[int], sampling: Any, options: dict[str, Any]) -> Run:
        if given := [name for name in OWN if name in options]:
            raise UsageError(f"{given[0]} belongs to the session: give it to ds.session(...)")
        if options.get("n", 1) != 1:
            raise UsageError(f"a session has one row, not n={options.get('n')}; fork it")
        own = {"capacity": self.capacity, "cache_dtype": self.cache_dtype, "draft": self.draft}
        run = Run(WHOLE, self.model, [tokens], sampling, **options, **own)
        if self._context is not None:
            run.request = dataclasses.replace(
                run.request, capacity=max(run.request.capacity, self._context.cache.capacity)
            )
        return run

    def _turn(self, run: Run, steps: int | None, asked_to_stop) -> Generator[Token, None, None]:
        """Run the turn's only batch. While it runs its buffers are in use, and the session holds nothing."""
        if not self._turns.acquire(blocking=False):
            raise UsageError(BUSY)
        try:
            yield from self._continued(run, steps, asked_to_stop)
        finally:
            self._turns.release()

    def _continued(self, run: Run, steps: int | None, asked_to_stop) -> Generator[Token, None, None]:
        for batch in run.batches():
            (prompt,) = run.request.prompts
            known, context = self._known(prompt), self._context
            if context is not None:
                context = rewound(resized(context, run.request.capacity), known)
            self.tokens, self._context, self._drafted = [], None, 0
            with contextlib.closing(run.tokens(batch, steps, asked_to_stop, context, known)) as tokens:
                try:
                    for _, token in tokens:
                        yield token
                finally:
                    self._keep(prompt, batch)

    def _known(self, prompt: list[int]) -> int:
        """How many tokens need not be read: the last one always is, for its logits. A slot of the drafting layer knows
        the token after it, so where there are drafts one more token has to be common."""
        common = 0
        while common < min(len(self.tokens), len(prompt)) and self.tokens[common] == prompt[common]:
            common += 1
        known = min(common, len(prompt) - 1)
        return known if not self.draft else max(0, min(known, common - 1, self._drafted))

    def _keep(self, prompt: list[int], batch: Batch) -> None:
        """Hold what `batch` has read and made; nothing where it did not get that far, or met a value that is not
        finite: it would spoil what is read later."""
        state = batch.held
        if state is None or not fetch(state.finite_B).all():
            return
        length = int(fetch(state.cache.length_B)[0])
        made = fetch(state.tokens_Bm)[0, : int(fetch(state.made_B)[0])].tolist()
        self.tokens = (prompt + made)[:length]
        self._context = resumed(self.model, state)
        self._drafted = 0 if state.fresh is None else length - int(fetch(state.fresh.count_B)[0])


def session(
    model: Model,
    *,
    capacity: int | None = None,
    cache_dtype: Any = None,
    draft: int = 0,
) -> Session:
    """A session of at most `capacity` tokens; without one its cache grows as turns need it, by powers of two."""
    longest = validation.config_of(model).max_position_embeddings
    draft = require_integer("draft", draft, 0, MOST_DRAFTS)
    stored = caches.dtype_of(cache_dtype, model.dtype)
    if capacity is not None:
        capacity = require_integer("capacity", capacity, 1, longest)
        memory.plan_batch(model.cfg, 1, 1, capacity, stored, draft, model.mesh)
    return Session(model, capacity, stored, draft)


def load_session(model: Model, file: str | Path) -> Session:
    """The session in `file`, for the model it was saved with. Raises UsageError where that is another one,
    CheckpointError where the file is damaged."""
    validation.config_of(model)
    file = expand_file_path(file)
    saved = session_file.read_settings(file, model)
    options = {name: saved[name] for name in OWN}
    loaded, tokens = session(model, **options), saved["tokens"]
    if tokens:
        (tokens,) = validation.check_prompts([tokens], model.cfg.vocab_size)
        slots = loaded.capacity or bucket(len(tokens))
        validation.check_length(len(tokens), min(slots, model.cfg.max_position_embeddings))
        context = blank(model.cfg, model.dtype, 1, len(tokens), loaded.cache_dtype, loaded.draft)
        loaded._context = resized(session_file.read_into(file, context), slots)
    loaded.tokens, loaded._drafted = tokens, saved["drafted"]
    return loaded
