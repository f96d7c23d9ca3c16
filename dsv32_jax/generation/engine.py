"""An engine for requests that come at any time, from any thread."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..errors import pluralize, require_integer
from ..model import validation
from ..model.cache import dtype_of
from ..model.model import Model
from ..system.summary import Summarized
from . import memory
from .engine_core import EngineCore
from .options import Sampling, check_option
from .pages import PAGE
from .request import CACHE_OPTIONS, accepts_options, require_drafts, require_one_row, validate_for_owner
from .stream import Stream

MAX_ROWS, MAX_PAGES = 1 << 16, 1 << 26


class Engine(Summarized):
    """A model with a batch of rows, and pages for their tokens, for any number of requests. Made by `engine`.

    capacity  the most tokens of a row;  core: the rows, and what advances them
    """

    def __init__(self, model: Model, capacity: int, cache_dtype: np.dtype, draft: int, core: EngineCore):
        self.model, self.capacity, self.cache_dtype, self.draft, self.core = model, capacity, cache_dtype, draft, core

    @accepts_options(without=("n", *CACHE_OPTIONS))
    def submit(self, prompt: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """Let a prompt wait for its place, and return the stream of its tokens. Any thread may submit.

        Raises UsageError, and CapacityError if the row could never have the pages it may need.
        """
        request = validate_for_owner(self, prompt, sampling, options)
        require_one_row(request)
        return Stream(self.core, self.core.add(request)[0])

    def close(self) -> None:
        """Interrupt all rows and free the device's memory. Nothing can be submitted after that."""
        self.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, float]:
        """Return what the engine has done and at which rates, rows that run, read and wait, and pages in use."""
        totals, scheduler = dict(self.core.loop.totals), self.core.loop.scheduler
        decoding, answered = totals["decode_seconds"], totals["answered"]
        return {
            **totals,
            "tokens_per_second": totals["generated"] / decoding if decoding else 0.0,
            "seconds_to_first_token": totals["first_token_seconds"] / answered if answered else 0.0,
            "running": len(scheduler.running),
            "reading": len(scheduler.reading),
            "waiting": self.core.waiting,
            "pages": scheduler.pages,
            "pages_of_rows": scheduler.row_pages,
            "pages_used": scheduler.used_pages,
        }

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return its size and what it is doing."""
        stats = self.stats()
        rows = ", ".join(f"{stats[name]} {name}" for name in ("running", "reading", "waiting"))
        return f"Engine of {pluralize(len(self.core.loop.scheduler.places), 'row')}", {
            "rows": rows,
            "pages": f"{stats['pages_used']} of {stats['pages']} used, {PAGE} tokens each",
            "decode": f"{stats['generated']} tokens at {stats['tokens_per_second']:.0f} tokens/s",
        }


def engine(
    model: Model,
    *,
    rows: int = 16,
    capacity: int | None = None,
    pages: int | None = None,
    cache_dtype: Any = None,
    draft: int = 0,
    layerwise: bool | None = None,
) -> Engine:
    """Return an engine for requests that come at any time, from any thread.

    It computes `rows` rows at once, each of at most `capacity` tokens (default: the longest context), prompt included,
    in `pages` pages of 64 tokens (default: as many as fit in memory). `submit` returns the stream of a prompt's tokens;
    a prefix that another prompt or conversation had is not read again while its pages are not needed otherwise.
    Programs are compiled for the whole model or `layerwise`, by default as in `generate`.

        with ds.engine(model, rows=8) as engine:
            streams = [engine.submit(prompt, max_new_tokens=100) for prompt in prompts]
            for token in streams[0]: ...

    Raises UsageError, and CapacityError if the pages do not fit in memory.
    """
    cfg, draft = validation.config_of(model), check_option("draft", draft)
    longest = cfg.max_position_embeddings
    capacity = longest if capacity is None else check_option("capacity", capacity, 1, longest)
    assert capacity is not None
    rows, stored = require_integer("rows", rows, 1, MAX_ROWS), dtype_of(cache_dtype, model.dtype)
    require_drafts(cfg, draft)
    wanted = None if pages is None else require_integer("pages", pages, 1, MAX_PAGES)
    pages = memory.plan_pages(cfg, rows, capacity, wanted, stored, draft, model.mesh)
    core = EngineCore(model, rows=rows, pages=pages, cache_dtype=stored, draft=draft, layerwise=layerwise)
    return Engine(model, capacity, stored, draft, core)
