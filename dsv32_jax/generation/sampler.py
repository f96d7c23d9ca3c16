"""From logits to the next token: greedy, or drawn at a temperature from what penalties, bias and truncation leave.

Every parameter is a traced value a row, so changing one compiles nothing. Truncation needs no sort of the vocabulary:
the smallest kept logit is found by bisection over the 2^32 ordered float32 values, exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """A Sampling for each row as traced values: bias_BV is -inf where a token is forbidden, key_data uint32 [B, 2]."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    bias_BV: jax.Array
    key_data: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
    """What penalties count: whether a token occurs in the prompt, and how often it was made since."""

    in_prompt_BV: jax.Array
    made_BV: jax.Array

    def add(self, token_B: jax.Array, really_B: jax.Array) -> "Tally":
        """With one more token in the rows where it is `really` so."""
        count = jax.vmap(lambda made, token, one: made.at[token].add(one))
        return dataclasses.replace(self, made_BV=count(self.made_BV, token_B, really_B.astype(jnp.int32)))


def choose(knobs: Knobs, logit_BV: jax.Array, position_B: jax.Array) -> jax.Array:
    """The token of each row at `position_B`, from logits that `weighed` has seen. The noise depends on the row's key
    and the position alone."""

    def greedy(logit_BV, _):
        return jnp.argmax(logit_BV, axis=-1)

    def drawn(logit_BV, position_B):
        return jnp.where(knobs.temperature_B > 0, _draw(knobs, logit_BV, position_B), greedy(logit_BV, position_B))

    token_B = jax.lax.cond(jnp.any(knobs.temperature_B > 0), drawn, greedy, logit_BV, position_B)
    return token_B.astype(jnp.int32)


def weighed(knobs: Knobs, tally: Tally, logit_BV: jax.Array) -> jax.Array:
    """Logits after the penalties (repetition: CTRL, arXiv 1909.05858; presence and frequency: of made tokens) and bias.

    Repetition divides positive logits of tokens that occurred, in the prompt too, and multiplies negative ones.
    """
    occurred_BV = tally.in_prompt_BV | (tally.made_BV > 0)
    repeated_B1 = knobs.repetition_B[:, None]
    scaled_BV = jnp.where(logit_BV > 0, logit_BV / repeated_B1, logit_BV * repeated_B1)
    logit_BV = jnp.where(occurred_BV, scaled_BV, logit_BV)
    logit_BV -= knobs.presence_B[:, None] * (tally.made_BV > 0).astype(jnp.float32)
    logit_BV -= knobs.frequency_B[:, None] * tally.made_BV.astype(jnp.float32)
    return logit_BV + knobs.bias_BV


def _draw(knobs: Knobs, logit_BV: jax.Array, position_B: jax.Array) -> jax.Array:
    temperature_B1 = jnp.where(knobs.temperature_B > 0, knobs.temperature_B, 1)[:, None]
    logit_BV = truncate(logit_BV / temperature_B1, knobs.top_k_B, knobs.top_p_B, knobs.min_p_B)
    key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.wrap_key_data)(knobs.key_data), position_B)
    return jax.vmap(jax.random.categorical)(key_B, logit_BV)


def truncate(logit_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """-inf for every logit outside the top k, then for those outside the top p of what is left, then for those less
    likely than min_p times the likeliest."""
    one_BV = jnp.ones_like(logit_BV)
    kept_BV = logit_BV >= _smallest_kept(logit_BV, one_BV, top_k_B.astype(jnp.float32)[:, None])
    logit_BV = jnp.where(kept_BV, logit_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(logit_BV, axis=-1)
    top_p_B1 = top_p_B[:, None]
    kept_BV = (logit_BV >= _smallest_kept(logit_BV, probability_BV, top_p_B1)) | (top_p_B1 >= 1)
    kept_BV &= logit_BV >= jnp.max(logit_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(kept_BV, logit_BV, -jnp.inf)


def _smallest_kept(logit_BV: jax.Array, weight_BV: jax.Array, target_B1: jax.Array) -> jax.Array:
    """[B, 1]: the largest logit such that those not below it weigh at least `target` in sum."""
    rank_BV = _ordered(logit_BV)
    low_B1 = jnp.full((*logit_BV.shape[:-1], 1), np.iinfo(np.uint32).min, jnp.uint32)

    def halve(bit, low_B1):
        middle_B1 = low_B1 | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(rank_BV >= middle_B1, weight_BV, 0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= target_B1, middle_B1, low_B1)

    low_B1 = jax.lax.fori_loop(0, 32, halve, low_B1)
    return jnp.min(jnp.where(rank_BV >= low_B1, logit_BV, jnp.inf), axis=-1, keepdims=True)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
