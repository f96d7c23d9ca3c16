"""How tokens are to be chosen: what the user says, checked, and brought into the form that `choice` works on."""

import dataclasses
import operator
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..errors import UsageError, listing
from ..model import checks
from .sampler import Knobs

LARGEST_BIAS = 1e30
"""Far beyond any logit; what is larger could not be told from infinity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy. Raises UsageError on values that make no sense.

    temperature         0 is greedy; at most 5
    top_k               keep the k largest logits (all that tie with the k-th); 0 keeps all
    top_p               keep the fewest largest whose probability reaches p (all that tie with the last); 1 keeps all
    min_p               then drop what is less likely than min_p times the likeliest; 0 drops nothing
    repetition_penalty  above 1 makes tokens that occurred, in the prompt too, less likely; 1 is neutral
    presence_penalty    taken from the logit of every token that was made; frequency_penalty: once each time it was
    logit_bias          {token id: what is added to its logit}
    allowed_ids         only these may be chosen; forbidden_ids: these may not
    seed                one for all rows or one a row. A row's tokens depend on its seed, prompt and positions, never on
                        the batch around it; equal prompts with equal seeds give equal tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_ids: Collection[int] | None = None
    forbidden_ids: Collection[int] = ()
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        _require(self.temperature, 0, 5, "temperature must be from 0 (greedy) to 5")
        top_k = checks.as_whole(self.top_k)
        if top_k is None or not 0 <= top_k < 2**31:
            raise UsageError(f"top_k must be a whole number, 0 for no limit, not {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p must be above 0 and at most 1 (no limit), not {self.top_p!r}")
        _require(self.min_p, 0, 1, "min_p must be from 0 (no limit) to 1")
        _require(self.repetition_penalty, 0.01, 100, "repetition_penalty must be from 0.01 to 100")
        _require(self.presence_penalty, -100, 100, "presence_penalty must be from -100 to 100")
        _require(self.frequency_penalty, -100, 100, "frequency_penalty must be from -100 to 100")
        if not isinstance(self.logit_bias, Mapping) or not all(map(_is_bias, self.logit_bias.values())):
            raise UsageError(
                f"logit_bias must give a number from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g} for each token id, "
                f"not {self.logit_bias!r}"
            )
        _require_ids("forbidden_ids", self.forbidden_ids)
        if self.allowed_ids is not None:
            _require_ids("allowed_ids", self.allowed_ids)
        given: Any = self.seed
        many = isinstance(given, Iterable) and not isinstance(given, str)
        seeds = [checks.as_whole(seed) for seed in (given if many else [given])]
        if not seeds or any(seed is None or not 0 <= seed < 2**63 for seed in seeds):
            raise UsageError(f"seed must be a whole number below 2^63, or one a row, not {self.seed!r}")
        object.__setattr__(self, "seed", tuple(seeds) if many else seeds[0])


def _is_number(value: Any) -> bool:
    plain = value.item() if isinstance(value, np.number) else value
    return type(plain) in (int, float) and abs(plain) <= sys.float_info.max


def _is_bias(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST_BIAS


def _require(value: Any, least: float, most: float, rule: str) -> None:
    if not (_is_number(value) and least <= value <= most):
        raise UsageError(f"{rule}, not {value!r}")


def _require_ids(name: str, ids: Any) -> None:
    if isinstance(ids, str | bytes) or not isinstance(ids, Collection):
        raise UsageError(f"{name} must be a list of token ids, not {ids!r}")


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
    _require_ids(name, ids)
    wrong = [token for token in ids if isinstance(token, bool) or not _is_id(token, vocab_size)]
    if wrong:
        raise UsageError(
            f"{name} holds {len(wrong)} ids outside the vocabulary of 0..{vocab_size - 1}: {listing(wrong, 5)}"
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
