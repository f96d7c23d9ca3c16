"""Perplexity: how many tokens, equally likely, the model is as unsure among as it is about the next one."""

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, listing
from ..generation.score import score
from ..model.model import Model
from ..system.compilation import count_compilations
from .estimate import Estimate, exponential, over_windows
from .passages import BATCH, Passages, Texts, passages
from .reading import Progress, over_groups, silent
from .variant import Variant
from .windows import Window


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What the text costs the model: `nats` is the mean of -log p of a token, `perplexity` its exponential.

    `tokens` were scored, each once; `read` counts those that were read, context included, in `seconds` (without
    compilation). `bits_per_byte` is of the scored text in UTF-8, comparable between vocabularies; None where ids were
    given. Standard errors are over windows.
    """

    perplexity: Estimate
    nats: Estimate
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    documents: int
    windows: int
    context: int
    stride: int
    read: int
    seconds: float
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens read a second."""
        return self.read / self.seconds


def perplexity(
    checkpoint: Variant | Model | str | Path,
    texts: Texts | str | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> Perplexity:
    """The perplexity of `texts`: one or several, or token ids; by default the held-out text that is shipped.

    Texts are read apart from each other, in windows of `context` tokens (1024), `stride` (half of it) apart; with
    `limit` only the first windows. The tokenizer is the checkpoint's unless one is given. Raises UsageError where there
    is nothing to score or sizes make no sense, CheckpointError where the model's logits are not numbers.
    """
    variant = Variant.of(checkpoint)
    tokenizer = tokenizer or variant.tokenizer()
    read = passages(variant.cfg, tokenizer, texts, context=context, stride=stride, limit=limit, batch_size=batch_size)
    model = variant.load()
    start = time.perf_counter()

    def scored(group: range) -> list[np.ndarray]:
        rows = read.filled(group)
        found = score(model, rows, cache_dtype=variant.stored(model), batch_size=len(rows)).logprobs
        return [np.array(found[row][read.windows[i].first - 1 :]) for row, i in enumerate(group)]

    with count_compilations() as compiled:
        logprobs = over_groups(scored, model, read, progress)
    require_finite(read.windows, logprobs)
    seconds = max(time.perf_counter() - start - compiled.seconds, 1e-9)
    return _summary(read, logprobs, seconds, compiled.seconds)


def _summary(read: Passages, logprobs: list[np.ndarray], seconds: float, compile_seconds: float) -> Perplexity:
    nats = over_windows([-row for row in logprobs])
    tokens = sum(map(len, logprobs))
    size = None
    if read.tokenizer is not None:
        size = sum(len(read.tokenizer.bytes_of(read.scored(window))) for window in read.windows)
    return Perplexity(
        exponential(nats),
        nats,
        nats.mean * tokens / math.log(2) / size if size else None,
        tokens,
        size,
        len({window.document for window in read.windows}),
        len(read.windows),
        read.context,
        read.stride,
        sum(len(window.tokens) for window in read.windows),
        seconds,
        compile_seconds,
    )


def require_finite(windows: Iterable[Window], values: Iterable[np.ndarray]) -> None:
    """Raise CheckpointError that says where `values`, those of the tokens that `windows` score, are no numbers."""
    bad = [
        f"text {window.document} at token {window.start + window.first + i}"
        for window, row in zip(windows, values, strict=True)
        for i in np.flatnonzero(~np.isfinite(row))
    ]
    if bad:
        raise CheckpointError(
            f"the log-probabilities of {len(bad)} tokens are not numbers (counted from 0: {listing(bad, 5)}). "
            "Check the checkpoint's weights: `dsv32 verify`"
        )
