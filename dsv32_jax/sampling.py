"""From logits to the next token: greedy, or drawn at a temperature from the top-k and top-p of the distribution.

Every parameter is a traced value, so changing one compiles nothing. Truncation needs no sort of the vocabulary: the
smallest kept logit is found by bisection over the 2^32 ordered float32 values, exactly.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy. Raises UsageError on values that make no sense.

    temperature  0 is greedy; at most 5
    top_k        keep the k largest logits (all that tie with the k-th); 0 keeps all
    top_p        keep the fewest largest logits whose probability reaches p (all that tie with the last); 1 keeps all
    seed         one for all rows or one a row. A row's tokens depend on its seed, prompt and positions, never on the
                 batch around it; equal prompts with equal seeds give equal tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        if not (_is_number(self.temperature) and 0 <= self.temperature <= 5):
            raise UsageError(f"temperature must be from 0 (greedy) to 5, not {self.temperature!r}")
        if type(self.top_k) is not int or not 0 <= self.top_k < 2**31:
            raise UsageError(f"top_k must be a whole number, 0 for no limit, not {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p must be above 0 and at most 1 (no limit), not {self.top_p!r}")
        try:
            seeds = [self.seed] if isinstance(self.seed, int) else list(self.seed)
        except TypeError:
            seeds = []
        if not seeds or any(type(seed) is not int or not 0 <= seed < 2**63 for seed in seeds):
            raise UsageError(f"seed must be a whole number below 2^63, or one a row, not {self.seed!r}")


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """A Sampling as traced values, with a random key a row."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key_B: jax.Array


def knobs(sampling: Sampling, batch: int, vocab_size: int) -> Knobs:
    """The traced form of `sampling` for `batch` rows. Raises UsageError where it does not fit them."""
    if not isinstance(sampling, Sampling):
        raise UsageError(f"sampling must be a Sampling(temperature=..., seed=...), not {sampling!r}")
    seeds = [sampling.seed] * batch if isinstance(sampling.seed, int) else list(sampling.seed)
    if len(seeds) != batch:
        raise UsageError(f"there are {len(seeds)} seeds for {batch} prompts; give one for all or one each")
    if sampling.top_k > vocab_size:
        raise UsageError(f"top_k is {sampling.top_k}, but the vocabulary has {vocab_size} tokens")
    return Knobs(
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k or vocab_size),
        jnp.float32(sampling.top_p),
        jax.vmap(jax.random.wrap_key_data)(_key_data(seeds)),
    )


def _key_data(seeds: list[int]) -> jax.Array:
    """Threefry keys of 64-bit seeds, which JAX itself would truncate to 32 bits."""
    return jnp.asarray([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], jnp.uint32)


def choose(knobs: Knobs, logit_BV: jax.Array, position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, at `position_B`, and its log-probability under the untempered distribution."""
    token_B = jax.lax.cond(
        knobs.temperature > 0, _draw, lambda _, logit_BV, __: jnp.argmax(logit_BV, axis=-1), knobs, logit_BV, position_B
    ).astype(jnp.int32)
    logprob_BV = jax.nn.log_softmax(logit_BV, axis=-1)
    return token_B, jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]


def _draw(knobs: Knobs, logit_BV: jax.Array, position_B: jax.Array) -> jax.Array:
    logit_BV = truncate(logit_BV / knobs.temperature, knobs.top_k, knobs.top_p)
    key_B = jax.vmap(jax.random.fold_in)(knobs.key_B, position_B)
    return jax.vmap(jax.random.categorical)(key_B, logit_BV)


def truncate(logit_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for every logit outside the top k, then for those outside the top p of what is left."""
    one_BV = jnp.ones_like(logit_BV)
    kept_BV = logit_BV >= _smallest_kept(logit_BV, one_BV, top_k.astype(jnp.float32))
    logit_BV = jnp.where(kept_BV, logit_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(logit_BV, axis=-1)
    kept_BV = (logit_BV >= _smallest_kept(logit_BV, probability_BV, top_p)) | (top_p >= 1)
    return jnp.where(kept_BV, logit_BV, -jnp.inf)


def _smallest_kept(logit_BV: jax.Array, weight_BV: jax.Array, target: jax.Array) -> jax.Array:
    """[B, 1]: the largest logit such that those not below it weigh at least `target` in sum."""
    rank_BV = _ordered(logit_BV)
    low_B1 = jnp.full((*logit_BV.shape[:-1], 1), np.iinfo(np.uint32).min, jnp.uint32)

    def halve(bit, low_B1):
        middle_B1 = low_B1 | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(rank_BV >= middle_B1, weight_BV, 0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= target, middle_B1, low_B1)

    low_B1 = jax.lax.fori_loop(0, 32, halve, low_B1)
    return jnp.min(jnp.where(rank_BV >= low_B1, logit_BV, jnp.inf), axis=-1, keepdims=True)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
