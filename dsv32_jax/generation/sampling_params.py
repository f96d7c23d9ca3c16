"""How tokens are to be chosen: what the user says, checked, and brought into the form that `choice` works on."""

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from ..errors import UsageError, argument, listing, pluralize
from .options import Sampling
from .sampler import Knobs


def of_rows(sampling: Any, rows: int, n: int) -> list[Sampling]:
    """One Sampling for each of `n` continuations of `rows` prompts: `sampling` is None, one for all, or a list of them.

    The i-th continuation of a prompt has its seed + i.
    """
    each = (
        list(sampling) if isinstance(sampling, list | tuple) else [Sampling() if sampling is None else sampling] * rows
    )
    for one in each:
        if not isinstance(one, Sampling):
            raise UsageError(f"sampling must be a Sampling(temperature=..., seed=...), or one a prompt, not {one!r}")
    if len(each) != rows:
        raise UsageError(f"there are {len(each)} samplings for {rows} prompts; give one for all or one each")
    seeds = [_seed(one, row, rows) for row, one in enumerate(each)]
    return [
        dataclasses.replace(one, seed=(seed + i) % 2**63)
        for one, seed in zip(each, seeds, strict=True)
        for i in range(n)
    ]


def _seed(one: Sampling, row: int, rows: int) -> int:
    if isinstance(one.seed, int):
        return one.seed
    if len(one.seed) != rows:
        raise UsageError(f"there are {len(one.seed)} seeds for {rows} prompts; give one for all or one each")
    return one.seed[row]


def knobs(samplings: Sequence[Sampling], vocab_size: int, used: int) -> Knobs:
    """The form that is traced, of one Sampling a row; nothing is compiled for it. Ids from `used` on are never chosen:
    they stand for no token."""
    bias_BV = np.stack([bias(one, vocab_size, used) for one in samplings])

    def column(name: str) -> jax.Array:
        return jax.device_put(np.asarray([getattr(one, name) for one in samplings], np.float32))

    return Knobs(
        column("temperature"),
        jax.device_put(np.asarray([one.top_k or vocab_size for one in samplings], np.int32)),
        column("top_p"),
        column("min_p"),
        column("repetition_penalty"),
        column("presence_penalty"),
        column("frequency_penalty"),
        jax.device_put(bias_BV),
        _keys([one.seed for one in samplings]),
    )


def bias(one: Sampling, vocab_size: int, used: int) -> np.ndarray:
    """What `one` adds to each logit, [V]. Raises UsageError where its ids are not in the vocabulary."""
    if one.top_k > vocab_size:
        raise UsageError(f"top_k is {one.top_k}, but the vocabulary has {vocab_size} tokens")
    bias_V = np.zeros(vocab_size, np.float32)
    for token, added in zip(token_ids("logit_bias", one.logit_bias, vocab_size), one.logit_bias.values(), strict=True):
        bias_V[token] = added
    forbidden_V = np.arange(vocab_size) >= used
    if one.allowed_ids is not None:
        allowed_V = np.zeros(vocab_size, bool)
        allowed_V[token_ids("allowed_ids", one.allowed_ids, vocab_size)] = True
        forbidden_V |= ~allowed_V
    forbidden_V[token_ids("forbidden_ids", one.forbidden_ids, vocab_size)] = True
    if forbidden_V.all():
        raise UsageError("allowed_ids and forbidden_ids leave no token to choose")
    bias_V[forbidden_V] = -np.inf
    return bias_V


def token_ids(name: str, ids: Collection[int], vocab_size: int) -> list[int]:
    """`ids` as whole numbers in the vocabulary."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Collection):
        raise UsageError(f"{argument(name)} must be a list of token ids, not {ids!r}")
    wrong = [token for token in ids if isinstance(token, bool) or not _is_id(token, vocab_size)]
    if wrong:
        raise UsageError(
            f"{argument(name)} holds {pluralize(len(wrong), 'id')} outside the vocabulary of 0..{vocab_size - 1}: "
            f"{listing(wrong, 5)}"
        )
    return [operator.index(token) for token in ids]


def _is_id(token: Any, vocab_size: int) -> bool:
    try:
        return 0 <= operator.index(token) < vocab_size
    except TypeError:
        return False


def _keys(seeds: list[Any]) -> jax.Array:
    """Threefry keys of 64-bit seeds, which JAX itself would truncate to 32 bits."""
    return jax.device_put(np.asarray([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32))
