"""From logits to the next token: logit processors, then the argmax or a draw from the truncated distribution.

Every parameter is a traced value a row, so changing one compiles nothing. Truncation needs no sort of the vocabulary:
the smallest logit to keep is found by bisection over the 2^32 ordered float32 values, exactly.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError, argument, listing, pluralize, to_integer
from ..system.summary import Summarized
from .options import Sampling

SMALLEST = np.finfo(np.float32).tiny
"""Smaller numbers are zero to XLA: a temperature of less is greedy, and a top-p of less keeps the likeliest token."""

PRNG = "threefry2x32"
"""The generator of all noise, whatever the user's default is: seeds mean the same everywhere."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SamplerParams(Summarized):
    """How each row is sampled and when it ends: the fields of `Sampling`, and

    bias_BV      added to the logits, -inf where a token is forbidden
    seed_high_B  the upper 32 bits of the row's seed;  seed_low_B: the lower ones
    end_BV       the tokens that end a row
    max_new_B    the row ends after so many new tokens
    min_answer_B    no end token before so many tokens of the answer, which begins after the token thoughts_end_B, or
                    where that is -1 with the first token
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    bias_BV: jax.Array
    seed_high_B: jax.Array
    seed_low_B: jax.Array
    end_BV: jax.Array
    max_new_B: jax.Array
    min_answer_B: jax.Array
    thoughts_end_B: jax.Array


def make_params(
    samplings: Sequence[Sampling],
    vocab_size: int,
    tokens: int,
    end_ids: Sequence[int] = (),
    min_answer: int = 0,
    max_new: Sequence[int] | int = 0,
    thoughts_end: int = -1,
) -> SamplerParams:
    """Return the parameters of rows with these samplings; nothing is compiled. Ids from `tokens` on, which stand for no
    token, are never sampled."""
    rows, seeds = len(samplings), [one.seed for one in samplings]

    def column(values: Any, dtype: Any = np.float32) -> Any:
        return np.array(list(values), dtype)

    return SamplerParams(
        temperature_B=column(one.temperature if one.temperature >= SMALLEST else 0 for one in samplings),
        top_k_B=column((one.top_k or vocab_size for one in samplings), np.int32),
        top_p_B=column(max(one.top_p, SMALLEST) for one in samplings),
        min_p_B=column(one.min_p for one in samplings),
        repetition_B=column(one.repetition_penalty for one in samplings),
        presence_B=column(one.presence_penalty for one in samplings),
        frequency_B=column(one.frequency_penalty for one in samplings),
        bias_BV=column(bias_row(one, vocab_size, tokens) for one in samplings),
        seed_high_B=column((seed >> 32 for seed in seeds), np.uint32),  # pyright: ignore[reportOperatorIssue]
        seed_low_B=column((seed & 0xFFFFFFFF for seed in seeds), np.uint32),  # pyright: ignore[reportOperatorIssue]
        end_BV=column([np.isin(np.arange(vocab_size), end_ids)] * rows, bool),
        max_new_B=column([max_new] * rows if isinstance(max_new, int) else max_new, np.int32),
        min_answer_B=column([min_answer] * rows, np.int32),
        thoughts_end_B=column([thoughts_end] * rows, np.int32),
    )


def bias_row(sampling: Sampling, vocab_size: int, tokens: int) -> np.ndarray:
    """Return what `sampling` adds to the logits, [V]. Raises UsageError if its ids are not in the vocabulary, or if it
    leaves no token to sample."""
    if sampling.top_k > vocab_size:
        raise UsageError(f"{argument('top_k', sampling.top_k)}, but the vocabulary has {vocab_size} tokens")
    bias_V = np.zeros(vocab_size, np.float32)
    bias_V[check_ids("logit_bias", sampling.logit_bias, vocab_size)] = list(sampling.logit_bias.values())
    forbidden_V = np.arange(vocab_size) >= tokens
    if sampling.allowed_ids is not None:
        allowed_V = np.zeros(vocab_size, bool)
        allowed_V[check_ids("allowed_ids", sampling.allowed_ids, vocab_size)] = True
        forbidden_V |= ~allowed_V
    forbidden_V[check_ids("forbidden_ids", sampling.forbidden_ids, vocab_size)] = True
    if forbidden_V.all():
        raise UsageError(f"{argument('allowed_ids')} and {argument('forbidden_ids')} leave no token to sample")
    bias_V[forbidden_V] = -np.inf
    return bias_V


def check_ids(name: str, ids: Collection[int], vocab_size: int) -> list[int]:
    """Return `ids` as ints. Raises UsageError that lists those outside the vocabulary."""
    if wrong := [token for token in ids if to_integer(token) not in range(vocab_size)]:
        raise UsageError(
            f"{argument(name)} holds {pluralize(len(wrong), 'id')} outside the vocabulary of 0..{vocab_size - 1}: "
            f"{listing(wrong, 5)}"
        )
    return list(map(int, ids))


def process_logits(
    params: SamplerParams, logit_BV: jax.Array, in_prompt_BV: jax.Array, generated_BV: jax.Array
) -> jax.Array:
    """Return the logits after penalties and bias. `generated_BV` counts the tokens generated so far.

    Repetition (CTRL, arXiv 1909.05858) divides positive logits of tokens seen, in the prompt too, and multiplies
    negative ones; presence and frequency count generated tokens alone.
    """
    seen_BV = in_prompt_BV | (generated_BV > 0)
    repetition_B1 = params.repetition_B[:, None]
    scaled_BV = jnp.where(logit_BV > 0, logit_BV / repetition_B1, logit_BV * repetition_B1)
    logit_BV = jnp.where(seen_BV, scaled_BV, logit_BV)
    logit_BV -= params.presence_B[:, None] * (generated_BV > 0).astype(jnp.float32)
    logit_BV -= params.frequency_B[:, None] * generated_BV.astype(jnp.float32)
    return logit_BV + params.bias_BV


def sample(params: SamplerParams, logit_BV: jax.Array, position_B: jax.Array) -> jax.Array:
    """Return each row's token at `position_B`, from processed logits. The noise depends on the row's seed and the
    position alone."""

    def take_argmax(logit_BV, _):
        return jnp.argmax(logit_BV, axis=-1)

    def draw(logit_BV, position_B):
        return jnp.where(params.temperature_B > 0, _draw(params, logit_BV, position_B), take_argmax(logit_BV, None))

    token_B = jax.lax.cond(jnp.any(params.temperature_B > 0), draw, take_argmax, logit_BV, position_B)
    return token_B.astype(jnp.int32)


def _draw(params: SamplerParams, logit_BV: jax.Array, position_B: jax.Array) -> jax.Array:
    temperature_B1 = jnp.where(params.temperature_B > 0, params.temperature_B, 1)[:, None]
    logit_BV -= jnp.max(logit_BV, axis=-1, keepdims=True)  # or the quotient may be infinite
    logit_BV = truncate(logit_BV / temperature_B1, params.top_k_B, params.top_p_B, params.min_p_B)

    def draw_row(high, low, position, logits):
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl=PRNG)
        return jax.random.categorical(jax.random.fold_in(key, position), logits)

    return jax.vmap(draw_row)(params.seed_high_B, params.seed_low_B, position_B, logit_BV)


def truncate(logit_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Return the logits with -inf for all outside the top k, then for those outside the top p of what is left, then for
    those less likely than min_p times the most likely one."""
    one_BV = jnp.ones_like(logit_BV)
    keep_BV = logit_BV >= _smallest_to_keep(logit_BV, one_BV, top_k_B.astype(jnp.float32)[:, None])
    logit_BV = jnp.where(keep_BV, logit_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(logit_BV, axis=-1)
    top_p_B1 = top_p_B[:, None]
    keep_BV = (logit_BV >= _smallest_to_keep(logit_BV, probability_BV, top_p_B1)) | (top_p_B1 >= 1)
    keep_BV &= logit_BV >= jnp.max(logit_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(keep_BV, logit_BV, -jnp.inf)


def _smallest_to_keep(logit_BV: jax.Array, weight_BV: jax.Array, target_B1: jax.Array) -> jax.Array:
    """Return the largest logit [B, 1] such that the weights of all not below it sum to at least `target`."""
    rank_BV = _rank(logit_BV)
    low_B1 = jnp.zeros((len(logit_BV), 1), jnp.uint32)

    def halve(bit, low_B1):
        middle_B1 = low_B1 | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(rank_BV >= middle_B1, weight_BV, 0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= target_B1, middle_B1, low_B1)

    low_B1 = jax.lax.fori_loop(0, 32, halve, low_B1)
    return jnp.min(jnp.where(rank_BV >= low_B1, logit_BV, jnp.inf), axis=-1, keepdims=True)


def _rank(x: jax.Array) -> jax.Array:
    """Return uint32 in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
