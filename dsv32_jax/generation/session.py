"""A conversation that keeps its cache, so that each turn prefills only what is new."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import UsageError, argument
from ..model import validation
from ..model.cache import dtype_of
from ..model.model import Model
from ..parallel.multihost import make_agreed
from ..system.files import expand_file_path
from ..system.interrupts import defer_interrupt
from ..system.progress import format_size
from ..system.summary import Summarized
from . import memory, session_file
from .engine_core import EngineCore
from .options import Sampling, check_option
from .pages import count_pages
from .prefill_decode import Caches, empty_caches
from .request import CACHE_OPTIONS, accepts_options, validate_for_owner
from .result import Generation
from .row import Row
from .stream import Stream

SPARE_PAGES = 8
"""Pages of a session beside those of its longest turn, for what turns that were taken back have left."""

BUSY = "this session is in the middle of a turn; wait for it, or close its stream"


class Session(Summarized):
    """A conversation over many turns. Made by `session`.

    A turn is given the whole conversation so far as token ids, as a chat template makes it. What it has in common with
    earlier turns of this session and of its forks is not read again while its pages are there; `tokens` are those that
    the last turn left in them. Turns, `fork` and `save` may be called from any thread: one turn runs at a time.
    """

    def __init__(
        self, model: Model, capacity: int | None, cache_dtype: np.dtype, draft: int, core: EngineCore | None = None
    ):
        self.model, self.capacity, self.cache_dtype, self.draft = model, capacity, cache_dtype, draft
        self.tokens: list[int] = []
        self._core = core or EngineCore(model, rows=1, pages=SPARE_PAGES, cache_dtype=cache_dtype, draft=draft)
        self._turn, self._access = threading.Lock(), threading.Lock()

    @accepts_options(without=("n", *CACHE_OPTIONS))
    def generate(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Generation:
        """Continue the conversation, as `generate` continues a prompt. The session then holds prompt and answer."""
        stream = self._open(tokens, sampling, options, None)
        with defer_interrupt() as is_interrupted, contextlib.closing(stream):
            should_stop = make_agreed(self.model.mesh, is_interrupted)
            while not should_stop() and next(stream, None) is not None:
                pass
        return stream.result()

    @accepts_options(without=("n", *CACHE_OPTIONS))
    def stream(self, tokens: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """Continue the conversation token by token. After a stream that is closed early the session holds what was
        processed until then."""
        return self._open(tokens, sampling, options, 1)

    def fork(self) -> Self:
        """Return another session that holds the same tokens, in the same pages, and goes its own way.

        Raises UsageError during a turn.
        """
        with self._between_turns(), self._core.pause():
            self._core.grow(2 * self._core.loop.scheduler.pages - SPARE_PAGES)
            other = type(self)(self.model, self.capacity, self.cache_dtype, self.draft, self._core)
            other.tokens = list(self.tokens)
            return other

    def save(self, file: str | Path) -> None:
        """Write the session to one safetensors file, from which `load_session` continues with the same model.

        Raises UsageError during a turn or if `file` is a folder, StorageError if it cannot be written.
        """
        with self._between_turns():
            file = expand_file_path(file)
            with self._core.pause():
                caches = self._core.loop.copy_out(self.tokens)
            own = {"capacity": self.capacity, "cache_dtype": self.cache_dtype.name, "draft": self.draft}
            held = int(caches[0].length_B[0]) if caches else 0
            session_file.write(file, self.model, {**own, "tokens": self.tokens, "held": held}, caches)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return how much the session holds and may hold."""
        longest = self.capacity or self.model.cfg.max_position_embeddings
        size = count_pages(len(self.tokens)) * memory.compute_page_bytes(self.model.cfg, self.cache_dtype, self.draft)
        return "Session", {
            "tokens": f"{len(self.tokens)} of at most {longest}",
            "cache": f"{self.cache_dtype.name}, {format_size(size)}",
            "draft": f"{self.draft}",
        }

    @contextlib.contextmanager
    def _between_turns(self) -> Iterator[None]:
        """Hold off turns during the `with` block. Raises UsageError if one is running."""
        with self._access:
            if self._turn.locked():
                raise UsageError(BUSY)
            yield

    def _open(self, tokens: Sequence[int], sampling: Any, options: dict[str, Any], steps: int | None) -> Stream:
        if options.get("n", 1) != 1:
            raise UsageError(f"a session has one row, not {argument('n', options['n'])}; fork it")
        request = validate_for_owner(self, tokens, sampling, options)
        if request.limits[0]:
            memory.plan_batch(self.model.cfg, 1, 1, request.capacity, self.cache_dtype, self.draft, self.model.mesh)
        return Stream(self._core, Row(request), steps, self)

    def _restore(self, tokens: list[int], caches: Caches) -> None:
        """Hold these tokens, which are in a contiguous cache of one row."""
        with self._core.pause():
            self._core.grow(SPARE_PAGES + memory.round_up_rows(count_pages(len(tokens))))
            self._core.loop.copy_in(tokens, caches)

    def _begin(self, row: Row) -> None:
        """Begin a turn. Raises UsageError if one is running."""
        with self._access:
            if not self._turn.acquire(blocking=False):
                raise UsageError(BUSY)
        try:
            with self._core.pause():
                self._core.grow(SPARE_PAGES + memory.round_up_rows(count_pages(row.request.capacity)))
            self.tokens = []
            self._core.enter([row])
        except BaseException:
            self._turn.release()
            raise

    def _end(self, row: Row) -> None:
        """End a turn, and hold what it has processed."""
        try:
            with self._core.pause():
                self.tokens = list(row.known[: row.cached])
        finally:
            self._turn.release()

    def _abandon(self, row: Row) -> None:
        """End the turn of a stream that was not closed. What it has processed is found again all the same."""
        self._core.abandon(row)
        if row.before:
            self._turn.release()


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
    """Return the session in `file`, with the capacity, cache dtype and drafts it was made with.

    Raises UsageError if it was saved with another model or compute dtype, CheckpointError if the file is damaged.
    """
    cfg = validation.config_of(model)
    file = expand_file_path(file)
    saved, arrays = session_file.read(file, model)
    loaded = session(model, **{name: saved[name] for name in CACHE_OPTIONS})
    if saved["tokens"]:
        (tokens,) = validation.check_prompts([saved["tokens"]], cfg.vocab_size)
        slots, held = loaded.capacity or cfg.max_position_embeddings, saved["held"]
        if len(tokens) > slots or not 0 <= held <= len(tokens):
            raise UsageError(f"{file} holds {len(tokens)} tokens, but its session has room for {slots}")
        if held:
            empty = empty_caches(cfg, 1, held, loaded.cache_dtype, loaded.draft)
            loaded._restore(tokens[:held], session_file.restore(file, arrays, empty))
        loaded.tokens = tokens
    return loaded
