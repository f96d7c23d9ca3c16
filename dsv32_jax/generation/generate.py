"""The ways to generate: all at once, a layer at a time, token by token, and many requests side by side."""

import contextlib
from collections.abc import Sequence
from typing import Any

from ..errors import require_integer
from ..model import validation
from ..model.cache import dtype_of
from ..model.model import Model
from ..parallel.multihost import make_agreed
from ..system.interrupts import defer_interrupt
from . import memory
from .engine import Engine
from .options import Sampling, accepts_options, check_option
from .request import Request, require_drafts, require_one_row, validate_for
from .result import Generation
from .row import summarize
from .stream import Stream

MAX_ROWS, MAX_PAGES = 1 << 16, 1 << 26


@accepts_options()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt (lists of token ids, of any lengths) until an end token or `max_new_tokens`.

    `sampling` and `max_new_tokens` are one for all prompts or a list with one each. A row that ends makes room for the
    next prompt; results are in the order of prompts. The first Ctrl-C returns what was generated so far. The model is
    compiled as one program, or layer by layer where that would take long: `generate.whole` and `generate.layerwise`
    choose otherwise. `inspect.trace` shows afterwards what the layers computed. Raises UsageError for a request that
    makes no sense and CapacityError if its cache does not fit in memory, both before anything is compiled, and
    FloatingPointError if logits are not finite.
    """
    return _generate(None, model, prompts, sampling, options)


@accepts_options()
def _layerwise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Generate with one program for each kind of layer, called from Python: compiles in seconds, runs slower."""
    return _generate(True, model, prompts, sampling, options)


@accepts_options()
def _whole(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Generate with programs of the whole model, however long they take to compile."""
    return _generate(False, model, prompts, sampling, options)


generate.layerwise, generate.whole = _layerwise, _whole


def _generate(layerwise: bool | None, model: Model, prompts: Any, sampling: Any, options: dict[str, Any]) -> Generation:
    request = validate_for(model, prompts, sampling, **options)
    return run_request(Engine.for_request(model, request, layerwise), request)


def run_request(engine: Engine, request: Request) -> Generation:
    """Generate in an engine until all rows of the request have ended, or Ctrl-C was pressed once."""
    rows = engine.add(request)
    with defer_interrupt() as is_interrupted:
        should_stop = make_agreed(engine.model.mesh, is_interrupted)
        with contextlib.closing(engine.follow(rows, should_stop=should_stop)) as tokens:
            for _ in tokens:
                pass
    return summarize(rows, engine.loop.totals)


@accepts_options(without=("n",))
def stream(model: Model, prompt: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
    """Generate from one prompt and return an iterator over its tokens as they are sampled.

    The request is validated at once. Under `async for` each step runs in a thread. The stream's `result()` is what
    `generate` returns.
    """
    request = validate_for(model, [prompt], sampling, **options)
    require_one_row(request)
    return Engine.for_request(model, request).open(request, steps=1)


astream = stream
"""`stream`, by the name it has in event loops: `async for token in astream(...)`."""


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
    a beginning that another prompt or conversation had is not read again while its pages are not needed otherwise.
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
    return Engine(
        model,
        rows=rows,
        capacity=capacity,
        pages=memory.plan_pages(cfg, rows, capacity, wanted, stored, draft, model.mesh),
        cache_dtype=stored,
        draft=draft,
        layerwise=layerwise,
    )
