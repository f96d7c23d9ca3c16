"""Generate from prompts at once, or from one prompt token by token."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..model.model import Model
from ..parallel.multihost import make_agreed
from ..system.interrupts import defer_interrupt
from .engine_core import EngineCore
from .options import Sampling
from .request import accepts_options, require_one_row, validate_for
from .result import Generation
from .row import summarize
from .stream import Stream


@accepts_options()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    layerwise: bool | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt (lists of token ids, of any lengths) until an end token or `max_new_tokens`.

    `sampling` and `max_new_tokens` are one for all prompts or a list with one each. A row that ends makes room for the
    next prompt; results are in the order of prompts. The first Ctrl-C returns what was generated so far. Programs are
    compiled for the whole model or, `layerwise`, for each kind of layer and called from Python: these compile in
    seconds and run slower. By default they are if the model is deep and on a CPU. `inspect.trace` shows afterwards what
    the layers computed. Raises UsageError for a request that makes no sense and CapacityError if its cache does not fit
    in memory, both before anything is compiled, and FloatingPointError if logits are not finite.
    """
    request = validate_for(model, prompts, sampling, **options)
    core = EngineCore.for_request(model, request, layerwise)
    rows = core.add(request)
    with defer_interrupt() as is_interrupted:
        should_stop = make_agreed(model.mesh, is_interrupted)
        with contextlib.closing(core.follow(rows, should_stop=should_stop)) as tokens:
            for _ in tokens:
                pass
    return summarize(rows, core.loop.totals)


generate.layerwise, generate.whole = (partial(generate, layerwise=choice) for choice in (True, False))


@accepts_options(without=("n",))
def stream(model: Model, prompt: Sequence[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
    """Generate from one prompt and return an iterator over its tokens as they are sampled.

    The request is validated at once. Under `async for` each step runs in a thread. The stream's `result()` is what
    `generate` returns.
    """
    request = validate_for(model, [prompt], sampling, **options)
    require_one_row(request)
    core = EngineCore.for_request(model, request)
    return Stream(core, core.add(request)[0], steps=1)


astream = stream
"""`stream`, by the name it has in event loops: `async for token in astream(...)`."""
