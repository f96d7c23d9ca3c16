"""Losses with their standard errors, and perplexity, the exponential of the mean loss of a token."""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, listing, pluralize
from ..generation.score import score
from ..inspect.contrasts import estimate_ratio
from ..kernels import host_experts
from ..model.model import Model
from ..system.compilation import count_compilations
from ..system.summary import Summarized
from .corpus import BATCH, Corpus, Progress, Texts, Window, build_corpus, map_batches
from .variant import Variant


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None if there is only one window."""

    mean: float
    standard_error: float | None

    def __format__(self, sign: str) -> str:
        """Return mean and error in few digits; `sign` is "" or "+"."""
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2g}"
        return f"{self.mean:{sign}.4g}{error}"


def estimate_mean(values: Sequence[np.ndarray]) -> Estimate:
    """Return the mean of all `values`, one array a window; windows are the sample."""
    sums, tokens = (np.array([measure(each) for each in values], np.float64) for measure in (np.sum, np.size))
    if len(values) < 2:
        return Estimate(float(sums.sum() / tokens.sum()), None)
    mean, variance = estimate_ratio(sums, tokens)
    return Estimate(float(mean), math.sqrt(variance))


def exponentiate(nats: Estimate) -> Estimate:
    """Return the perplexity of a mean loss, its error to first order."""
    mean = math.exp(nats.mean)
    return Estimate(mean, None if nats.standard_error is None else mean * nats.standard_error)


@dataclasses.dataclass(frozen=True, repr=False)
class Perplexity(Summarized):
    """The loss of a model on a text: `nats` is the mean of -log p of a token, `perplexity` its exponential.

    `tokens` counts scored tokens, each once; `read` counts tokens processed, context included, in `seconds` (without
    compilation). `bits_per_byte` of the scored text in UTF-8 is comparable between vocabularies; None if token ids were
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
        """Tokens processed per second."""
        return self.read / self.seconds

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the perplexity and what it was measured on."""
        bits = {} if self.bits_per_byte is None else {"bits per byte": f"{self.bits_per_byte:.4f}"}
        return f"Perplexity of {pluralize(self.tokens, 'token')}", {
            "perplexity": f"{self.perplexity}",
            "nats per token": f"{self.nats}",
            **bits,
            "windows": f"{self.windows} of {self.context} tokens of {pluralize(self.documents, 'text')}, {self.stride} "
            "apart; +- is the standard error over them",
            "time": f"{self.seconds:.1f} s for {pluralize(self.read, 'token')} read ({self.tokens_per_second:.0f} "
            f"tokens/s), compilation {self.compile_seconds:.1f} s",
        }


def perplexity(
    checkpoint: Variant | Model | str | Path,
    texts: Texts | str | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of `texts`: one or several, or token ids; by default the bundled held-out text.

    Each text is read on its own, in windows of `context` tokens (1024), `stride` (half of it) apart; `limit` keeps the
    first windows only. The tokenizer is the checkpoint's unless one is given. Without a `progress` stderr shows how far
    it is. Raises UsageError for sizes out of range or nothing to score, CheckpointError for logits that are not finite.
    """
    variant = Variant.of(checkpoint)
    sizes = {"context": context, "stride": stride, "limit": limit, "batch_size": batch_size}
    corpus = build_corpus(variant.cfg, tokenizer or variant.tokenizer(), texts, **sizes)
    model = variant.load()
    start = time.perf_counter()

    def score_batch(batch: range) -> list[np.ndarray]:
        rows = corpus.rows(batch)
        logprobs = score(model, rows, cache_dtype=variant.cache_dtype, batch_size=len(rows)).logprobs
        return [np.array(logprobs[b][corpus.windows[i].first - 1 :]) for b, i in enumerate(batch)]

    with count_compilations() as compiled:
        logprobs = map_batches(score_batch, model, corpus, progress)
    require_finite(corpus.windows, logprobs)
    seconds = max(time.perf_counter() - start - compiled.seconds, 1e-9)
    return _summarize(corpus, logprobs, seconds, compiled.seconds)


def _summarize(corpus: Corpus, logprobs: list[np.ndarray], seconds: float, compile_seconds: float) -> Perplexity:
    nats = estimate_mean([-row for row in logprobs])
    tokens = sum(map(len, logprobs))
    size = None
    if corpus.tokenizer is not None:
        size = sum(len(corpus.tokenizer.bytes_of(window.scored)) for window in corpus.windows)
    return Perplexity(
        exponentiate(nats),
        nats,
        nats.mean * tokens / math.log(2) / size if size else None,
        tokens,
        size,
        len({window.document for window in corpus.windows}),
        len(corpus.windows),
        corpus.context,
        corpus.stride,
        sum(len(window.tokens) for window in corpus.windows),
        seconds,
        compile_seconds,
    )


def require_finite(windows: Iterable[Window], values: Iterable[np.ndarray]) -> None:
    """Raise CheckpointError naming the scored tokens of `windows` whose `values` are not finite."""
    bad = [
        f"text {window.document} at token {window.start + window.first + i}"
        for window, row in zip(windows, values, strict=True)
        for i in np.flatnonzero(~np.isfinite(row))
    ]
    if bad:
        raise CheckpointError(
            f"the log-probabilities of {pluralize(len(bad), 'token')} are not finite (counted from 0: "
            f"{listing(bad, 5)}). "
            + (host_experts.take_error() or "Check the checkpoint's weights with `dsv32 verify`")
        )
