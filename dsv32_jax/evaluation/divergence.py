"""How far the predictions of one model are from those of another: KL(A || B) of the next token, token by token.

A is read first. Of it are kept its head and, on the host, one hidden vector a token. So one model is in memory at a
time, and no more logits than those of a few tokens.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError
from ..model.attention import LARGEST_TEMPORARY
from ..model.model import Model
from ..model.ops import einsum32, over_tokens
from ..parallel.multihost import fetch
from ..quantization.formats import Weight
from .estimate import Estimate, exponential, over_windows
from .loss import require_finite
from .passages import BATCH, Passages, Texts, passages
from .reading import Progress, Reading, over_groups, reading, silent, vectors
from .variant import Variant

PERCENTILES = (50, 90, 99, 99.9, 100)
WORST = 8
BEFORE = 16


@dataclasses.dataclass(frozen=True)
class Worst:
    """One of the tokens that the two predict most differently: where it is, its divergence in nats, the 16 tokens
    before it, itself and its probabilities, and the likeliest token of each model. Ids where there is no tokenizer."""

    document: int
    position: int
    kl: float
    before: str
    token: str
    probability_a: float
    probability_b: float
    top_a: str
    top_b: str


@dataclasses.dataclass(frozen=True)
class Divergence:
    """B seen from A, over `tokens` tokens of the same text.

    `kl` is the mean of KL(A || B) in nats, `percentiles` of it over tokens (100: the largest). `same_top`: how often
    both hold the same token for the likeliest. `loss`: the mean of log p_A - log p_B of the tokens that came, in nats,
    positive where B is worse; its error is that of paired differences, smaller than that of either perplexity.
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


class Compared(NamedTuple):
    """Two predictions of each token: their divergence, the log-probability each gives to the token that came, and the
    token each holds for the likeliest. Arrays [B, T], or [n] of one window's scored tokens."""

    kl: Any
    logprob_a: Any
    logprob_b: Any
    top_a: Any
    top_b: Any


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
    progress: Progress = silent,
) -> Divergence:
    """How far B's predictions are from A's: two checkpoints, or one computed in two ways (see `Variant.of`).

    Texts and windows are those of `perplexity`. Raises UsageError where the two have different vocabularies.
    """
    a, b = Variant.of(a), Variant.of(b)
    tokenizer = tokenizer or a.tokenizer()
    read = passages(a.cfg, tokenizer, texts, context=context, stride=stride, limit=limit, batch_size=batch_size)
    require_one_vocabulary(a, b, read)
    first = reading(a, read, lambda done, count: progress(done, 2 * count))
    return summary(read, compare(first, b, lambda done, count: progress(count + done, 2 * count)))


def compare(a: Reading, b: Variant, progress: Progress = silent) -> list[Compared]:
    """The predictions of `b` against those of the model that made the reading `a`, window by window."""
    model, read, windows = b.load(), a.passages, a.passages.windows

    def of(group: range) -> list[Compared]:
        parts = []
        for h_BTD, start, next_BT in vectors(model, b, read, group):
            before_BTD = a.chunk(group, start, h_BTD.shape)
            parts.append(jax.tree.map(fetch, _compared_jit(a.head, model.head_VD, before_BTD, h_BTD, next_BT)))
        whole_BT = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
        return [Compared(*(part[row, windows[i].predicting] for part in whole_BT)) for row, i in enumerate(group)]

    found = over_groups(of, model, read, progress)
    require_finite(windows, [one.kl + one.logprob_a + one.logprob_b for one in found])
    return found


def compared(
    head_a_VD: Weight, head_b_VD: Weight, h_a_BTD: jax.Array, h_b_BTD: jax.Array, next_BT: jax.Array
) -> Compared:
    """Compare predictions made of hidden vectors by the heads, in float32, a few tokens at a time."""

    def of(h_a_BTD, h_b_BTD, next_BT):
        a_BTV = jax.nn.log_softmax(einsum32("BTD,VD->BTV", h_a_BTD, head_a_VD))
        b_BTV = jax.nn.log_softmax(einsum32("BTD,VD->BTV", h_b_BTD, head_b_VD))
        logprob_a_BT, logprob_b_BT = (
            jnp.take_along_axis(x_BTV, next_BT[..., None], axis=-1)[..., 0] for x_BTV in (a_BTV, b_BTV)
        )
        kl_BT = jnp.sum(jnp.exp(a_BTV) * (a_BTV - b_BTV), axis=-1)
        return Compared(kl_BT, logprob_a_BT, logprob_b_BT, a_BTV.argmax(axis=-1), b_BTV.argmax(axis=-1))

    at_once = max(1, LARGEST_TEMPORARY // (2 * len(next_BT) * head_a_VD.shape[0]))
    return over_tokens(of, (h_a_BTD, h_b_BTD, next_BT), at_once)


_compared_jit = jax.jit(compared)


def summary(read: Passages, found: list[Compared]) -> Divergence:
    """What the comparison of each window comes to."""
    every = np.concatenate([one.kl for one in found]).astype(np.float64)
    return Divergence(
        over_windows([one.kl for one in found]),
        {f"{p:g}": float(value) for p, value in zip(PERCENTILES, np.percentile(every, PERCENTILES), strict=True)},
        over_windows([one.top_a == one.top_b for one in found]),
        exponential(over_windows([-one.logprob_a for one in found])),
        exponential(over_windows([-one.logprob_b for one in found])),
        over_windows([one.logprob_a - one.logprob_b for one in found]),
        len(every),
        len(read.windows),
        read.context,
        read.stride,
        _worst(read, found),
    )


def _worst(read: Passages, found: list[Compared]) -> list[Worst]:
    """The tokens with the largest divergence, the largest first."""

    def said(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if read.tokenizer is None else read.tokenizer.decode(ids)

    places = [(i, t) for i, one in enumerate(found) for t in np.argsort(-one.kl, kind="stable")[:WORST]]
    worst = []
    for i, t in sorted(places, key=lambda place: -found[place[0]].kl[place[1]])[:WORST]:
        window, one = read.windows[i], Compared(*(part[t].item() for part in found[i]))
        tokens, position = read.documents[window.document], window.start + window.first + int(t)
        worst.append(
            Worst(
                window.document,
                position,
                one.kl,
                said(tokens[max(0, position - BEFORE) : position]),
                said([tokens[position]]),
                float(np.exp(one.logprob_a)),
                float(np.exp(one.logprob_b)),
                said([one.top_a]),
                said([one.top_b]),
            )
        )
    return worst


def require_one_vocabulary(a: Variant, b: Variant, read: Passages) -> None:
    """Both models know the same tokens. Where there are not two tokenizers, only sizes are compared."""
    size, other = a.cfg.vocab_size, b.cfg.vocab_size
    if size != other:
        raise UsageError(f"the models have vocabularies of {size} and {other} tokens; nothing was run")
    ours, theirs = read.tokenizer, b.tokenizer()
    if ours is None or theirs is None:
        return
    if differing := sum(ours.decode([i]) != theirs.decode([i]) for i in range(size)):
        raise UsageError(
            f"the tokenizers of the two differ in {differing} of {size} tokens: their predictions cannot be compared; "
            "nothing was run"
        )
