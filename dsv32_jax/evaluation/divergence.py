"""How far the predictions of model B are from those of model A: KL(A || B) of the next token, token by token.

A runs first; its head and, on the host, one hidden state a token are kept. So one model is in memory at a time, and the
logits of a few tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pluralize
from ..generation.score import Chunk, prefill_chunks
from ..model.attention import MAX_TEMPORARY
from ..model.cache import Cache
from ..model.model import Model
from ..model.ops import einsum32, map_tokens
from ..parallel.multihost import fetch
from ..quantization.formats import Weight
from ..system.summary import Summarized
from .corpus import BATCH, Corpus, Progress, Texts, build_corpus, map_batches
from .perplexities import Estimate, estimate_mean, exponentiate, require_finite
from .variant import Variant, require_one_vocabulary

PERCENTILES = (50, 90, 99, 99.9, 100)
WORST = 8
BEFORE = 16


@dataclasses.dataclass(frozen=True)
class Worst:
    """A token that the models predict very differently: its place, the divergence in nats, the 16 tokens before it, the
    token with its probabilities, and the most likely token of each model. Token ids if there is no tokenizer."""

    document: int
    position: int
    kl: float
    before: str
    token: str
    probability_a: float
    probability_b: float
    top_a: str
    top_b: str


@dataclasses.dataclass(frozen=True, repr=False)
class Divergence(Summarized):
    """The divergence of B from A over `tokens` tokens of the same text.

    kl           mean of KL(A || B) in nats
    percentiles  of KL over tokens; "100" is the maximum
    same_top     how often both models have the same most likely token
    loss         mean of log p_A - log p_B of the actual tokens, in nats, positive if B is worse; the error is that of
                 paired differences, smaller than that of either perplexity
    worst        the tokens of largest divergence, largest first
    """

    kl: Estimate
    percentiles: dict[str, float]
    same_top: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    loss: Estimate
    tokens: int
    windows: int
    context: int
    stride: int
    worst: list[Worst]

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the means, the percentiles and the token of largest divergence."""
        worst = self.worst[0]
        return f"Divergence of B from A over {pluralize(self.tokens, 'token')}", {
            "KL(A || B)": f"{self.kl} nats per token",
            "percentiles": ", ".join(f"{name} %: {value:.2g}" for name, value in self.percentiles.items()),
            "same_top": f"{100 * self.same_top.mean:.2f} %",
            "perplexity": f"A {self.perplexity_a}, B {self.perplexity_b}",
            "loss": f"B - A {self.loss:+} nats per token (paired)",
            "windows": f"{self.windows} of {self.context} tokens, {self.stride} apart; +- is the error over them",
            "worst": f"KL {worst.kl:.3f} at {worst.token!r}, token {worst.position} of text {worst.document}",
        }


class TokenDivergence(NamedTuple):
    """Two predictions of each token: their divergence, the log-probability each gives the actual token, and the most
    likely token of each. Arrays [B, T], or [n] for the scored tokens of one window."""

    kl: Any
    logprob_a: Any
    logprob_b: Any
    top_a: Any
    top_b: Any


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """The normed hidden states of every window, [n, D] on the host, and the head that turns them into logits."""

    corpus: Corpus
    windows: list[np.ndarray]
    head: Weight

    def chunk(self, batch: range, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the states of a batch of windows from position `start` on, padded with zeros to `shape` [B, T, D]."""
        h_BTD = np.zeros(shape, self.windows[0].dtype)
        for b, i in enumerate(batch):
            states = self.windows[i][start : start + shape[1]]
            h_BTD[b, : len(states)] = states
        return h_BTD


def kl(
    a: Variant | Model | str | Path,
    b: Variant | Model | str | Path,
    texts: Texts | str | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Divergence:
    """Return the divergence of B's predictions from A's: two checkpoints, or one computed in two ways (`Variant.of`).

    Texts and windows are those of `perplexity`. Raises UsageError if the models have different vocabularies.
    """
    a, b = Variant.of(a), Variant.of(b)
    sizes = {"context": context, "stride": stride, "limit": limit, "batch_size": batch_size}
    corpus = build_corpus(a.cfg, tokenizer or a.tokenizer(), texts, **sizes)
    require_one_vocabulary(a, b, corpus.tokenizer)
    first = progress and (lambda done, count: progress(done, 2 * count))
    second = progress and (lambda done, count: progress(count + done, 2 * count))
    return summarize(corpus, compare(compute_hidden_states(a, corpus, first), b, second))


def compute_hidden_states(variant: Variant, corpus: Corpus, progress: Progress | None = None) -> HiddenStates:
    """Return the hidden states that the model of `variant` computes; the model itself is released."""
    model = variant.load()

    def compute(batch: range) -> list[np.ndarray]:
        parts = [fetch(chunk.values[0]) for chunk in prefill_hidden(model, variant, corpus, batch)]
        rows_BTD = np.concatenate(parts, axis=1)
        return [row[: len(corpus.windows[i].tokens)] for row, i in zip(rows_BTD, batch, strict=False)]

    return HiddenStates(corpus, map_batches(compute, model, corpus, progress), model.head_VD)


def prefill_hidden(model: Model, variant: Variant, corpus: Corpus, batch: range) -> Iterator[Chunk]:
    """Prefill a batch of windows and yield, for each chunk, the hidden states [B, T, D] and the next tokens [B, T]."""
    rows = corpus.rows(batch)
    yield from prefill_chunks(model, rows, _hidden_jit, cache_dtype=variant.cache_dtype, batch_size=len(rows))


@partial(jax.jit, donate_argnames="cache")
def _hidden_jit(
    model: Model, cache: Cache, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array
) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
    h_BTD, cache = model(tokens_BT, cache, count_B)
    return cache, (h_BTD, next_BT)


def compare(a: HiddenStates, b: Variant, progress: Progress | None = None) -> list[TokenDivergence]:
    """Compare the predictions of B with those made from the hidden states of A, window by window."""
    model, corpus, windows = b.load(), a.corpus, a.corpus.windows

    def compare_batch(batch: range) -> list[TokenDivergence]:
        parts = []
        for chunk in prefill_hidden(model, b, corpus, batch):
            h_BTD, next_BT = chunk.values
            other_BTD = a.chunk(batch, chunk.start, h_BTD.shape)
            parts.append(jax.tree.map(fetch, _compare_jit(a.head, model.head_VD, other_BTD, h_BTD, next_BT)))
        whole_BT = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
        return [TokenDivergence(*(part[b, windows[i].predicting] for part in whole_BT)) for b, i in enumerate(batch)]

    found = map_batches(compare_batch, model, corpus, progress)
    require_finite(windows, [one.kl + one.logprob_a + one.logprob_b for one in found])
    return found


def compare_predictions(
    head_a_VD: Weight, head_b_VD: Weight, h_a_BTD: jax.Array, h_b_BTD: jax.Array, next_BT: jax.Array
) -> TokenDivergence:
    """Compare the predictions that two heads make from hidden states, in float32, a few tokens at a time."""

    def of(h_a_BTD, h_b_BTD, next_BT):
        a_BTV = jax.nn.log_softmax(einsum32("BTD,VD->BTV", h_a_BTD, head_a_VD))
        b_BTV = jax.nn.log_softmax(einsum32("BTD,VD->BTV", h_b_BTD, head_b_VD))
        logprob_a_BT, logprob_b_BT = (
            jnp.take_along_axis(x_BTV, next_BT[..., None], axis=-1)[..., 0] for x_BTV in (a_BTV, b_BTV)
        )
        kl_BT = jnp.sum(jnp.exp(a_BTV) * (a_BTV - b_BTV), axis=-1)
        return TokenDivergence(kl_BT, logprob_a_BT, logprob_b_BT, a_BTV.argmax(axis=-1), b_BTV.argmax(axis=-1))

    at_once = max(1, MAX_TEMPORARY // (2 * len(next_BT) * head_a_VD.shape[0]))
    return map_tokens(of, (h_a_BTD, h_b_BTD, next_BT), at_once)


_compare_jit = jax.jit(compare_predictions)


def summarize(corpus: Corpus, found: list[TokenDivergence]) -> Divergence:
    """Return the means over all windows, and the worst tokens."""
    kl = np.concatenate([one.kl for one in found]).astype(np.float64)
    return Divergence(
        estimate_mean([one.kl for one in found]),
        {f"{p:g}": float(value) for p, value in zip(PERCENTILES, np.percentile(kl, PERCENTILES), strict=True)},
        estimate_mean([one.top_a == one.top_b for one in found]),
        exponentiate(estimate_mean([-one.logprob_a for one in found])),
        exponentiate(estimate_mean([-one.logprob_b for one in found])),
        estimate_mean([one.logprob_a - one.logprob_b for one in found]),
        len(kl),
        len(corpus.windows),
        corpus.context,
        corpus.stride,
        _find_worst(corpus, found),
    )


def _find_worst(corpus: Corpus, found: list[TokenDivergence]) -> list[Worst]:
    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if corpus.tokenizer is None else corpus.tokenizer.decode(ids)

    places = [(i, t) for i, one in enumerate(found) for t in np.argsort(-one.kl, kind="stable")[:WORST]]
    worst = []
    for i, t in sorted(places, key=lambda place: -found[place[0]].kl[place[1]])[:WORST]:
        window, one = corpus.windows[i], TokenDivergence(*(part[t].item() for part in found[i]))
        tokens, position = corpus.documents[window.document], window.start + window.first + int(t)
        worst.append(
            Worst(
                window.document,
                position,
                one.kl,
                decode(tokens[max(0, position - BEFORE) : position]),
                decode([tokens[position]]),
                float(np.exp(one.logprob_a)),
                float(np.exp(one.logprob_b)),
                decode([one.top_a]),
                decode([one.top_b]),
            )
        )
    return worst
