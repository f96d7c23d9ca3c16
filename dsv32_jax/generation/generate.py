"""Generation: prompts in, tokens out, all at once or one by one."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from ..errors import UsageError
from ..model.model import Model
from ..parallel.multihost import asking
from ..system.interrupts import defer_interrupt
from .batch import LAYERWISE, WHOLE
from .options import Sampling, accepts_options
from .result import Generation
from .run import Run, Stream
from .transcript import Token


@accepts_options()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt (lists of token ids, of any lengths) until an end token or `max_new_tokens` (64).

    `sampling` is one for all prompts or a list with one each.
    The first Ctrl-C returns what was made so far. Raises UsageError before anything is compiled where the request makes
    no sense, CapacityError where its cache does not fit in memory, FloatingPointError where the model's logits are not
    numbers. `generate.layerwise` does the same without compiling the whole model. `inspect.trace` shows afterwards what
    the layers computed.
    """
    return _generate(Run(WHOLE, model, prompts, sampling, **options))


@accepts_options()
def _layerwise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    **options: Any,
) -> Generation:
    """`generate` with one program for each kind of layer, called from Python: compiles in seconds, runs slower."""
    return _generate(Run(LAYERWISE, model, prompts, sampling, **options))


generate.layerwise = _layerwise


def _generate(run: Run) -> Generation:
    with defer_interrupt() as asked:
        asked_to_stop = asking(run.mesh, asked)
        for batch in run.batches():
            for _ in run.tokens(batch, asked_to_stop=asked_to_stop):
                pass
            if asked_to_stop():
                break
    return run.result()


@accepts_options(without=("n",))
def stream(
    model: Model,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    **options: Any,
) -> Stream:
    """What `generate` makes of one prompt, token by token as they are chosen; `result()` of the stream is what
    `generate` gives. The request is checked at once. Under `async for` each step runs in a thread."""
    run = Run(WHOLE, model, [prompt], sampling, **options)
    if run.request.n != 1:
        raise UsageError(f"a stream has one row, not n={run.request.n}; use generate")
    return Stream(run, _one_by_one(run))


def _one_by_one(run: Run) -> Generator[Token, None, None]:
    for batch in run.batches():
        with contextlib.closing(run.tokens(batch, steps=1)) as tokens:
            yield from (token for _, token in tokens)


astream = stream
"""`stream`, by the name that event loops have had for it: `async for token in astream(...)`."""
