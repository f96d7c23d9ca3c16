"""Each token's own experts, and no others (DeepSeekMoE, arXiv 2401.06066).

The (token, expert) assignments are sorted by expert and laid out in blocks of one expert each; a loop over the blocks
picks its expert's matrices by index. Shapes are static, work is proportional to the assignments, the bytes of experts
that nobody chose are never touched, and all of it can be differentiated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .formats import Weight
from .ops import swiglu

LARGEST_BLOCK = 256


class Blocks(NamedTuple):
    """Assignments in blocks of one expert: n blocks of b slots for t tokens of X assignments."""

    expert_n: jax.Array
    token_nb: jax.Array
    slot_tX: jax.Array


def apply_experts(
    h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, w_gate_EMD: Weight, w_up_EMD: Weight, w_down_EDM: Weight
) -> jax.Array:
    """sum over k of gate[t, k] * expert[t, k](h[t]), in float32 [t, D]."""
    blocks = in_blocks(expert_tX, w_gate_EMD.shape[0])

    def run(_, block):
        expert, token_b = block
        w_gate, w_up, w_down = (_pick(bank, expert) for bank in (w_gate_EMD, w_up_EMD, w_down_EDM))
        return None, swiglu(h_tD[token_b], w_gate, w_up, w_down)

    _, y_nbD = jax.lax.scan(run, None, (blocks.expert_n, blocks.token_nb))
    y_tXD = y_nbD.reshape(-1, y_nbD.shape[-1])[blocks.slot_tX]
    return jnp.sum(gate_tX[..., None] * y_tXD, axis=1)


def in_blocks(expert_tX: jax.Array, experts: int) -> Blocks:
    """Lay the assignments out: as many blocks as any routing can need, unused ones repeat the last expert.

    Where there are fewer assignments than experts, as in decoding, each is its own block and nothing is sorted.
    """
    tokens, each = expert_tX.shape
    total, most = tokens * each, min(experts, tokens * each)
    size = min(LARGEST_BLOCK, 1 << ((total // most).bit_length() - 1))
    expert_a = expert_tX.reshape(-1)
    if size == 1:
        a = jnp.arange(total, dtype=jnp.int32)
        return Blocks(expert_a, (a // each)[:, None], a.reshape(tokens, each))

    count = (total + most * (size - 1)) // size
    order_a = jnp.argsort(expert_a, stable=True)
    chosen_E = jnp.bincount(expert_a, length=experts)
    blocks_E = -(-chosen_E // size)
    end_E = jnp.cumsum(blocks_E)
    rank_a = jnp.arange(total) - (jnp.cumsum(chosen_E) - chosen_E)[expert_a[order_a]]
    slot_a = jnp.zeros(total, jnp.int32).at[order_a].set(((end_E - blocks_E) * size)[expert_a[order_a]] + rank_a)
    token_s = jnp.zeros(count * size, jnp.int32).at[slot_a].set(jnp.arange(total, dtype=jnp.int32) // each)
    block_n = jnp.minimum(jnp.arange(count), end_E[-1] - 1)
    expert_n = jnp.searchsorted(end_E, block_n, side="right")
    return Blocks(expert_n, token_s.reshape(count, size), slot_a.reshape(tokens, each))


def _pick(bank: Weight, expert: jax.Array) -> Weight:
    """One expert's matrix, in its own format.

    The barrier keeps XLA from converting the scales of all experts before it picks one.
    """
    bank, expert = jax.lax.optimization_barrier((bank, expert))
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), bank)
