"""Each token's own experts, and no others (DeepSeekMoE, arXiv 2401.06066).

The (token, expert) assignments are sorted by expert and laid out in blocks of one expert each; a loop over the blocks
picks its expert's matrices by index. Shapes are static, work is proportional to the assignments, the bytes of experts
that nobody chose are never touched, and all of it can be differentiated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .formats import Weight
from .ops import swiglu
from .storage.pieces import axes_of

LARGEST_BLOCK = 256


class Blocks(NamedTuple):
    """Assignments in blocks of one expert: n blocks of b slots for t tokens of X assignments."""

    expert_n: jax.Array
    token_nb: jax.Array
    slot_tX: jax.Array


def apply_experts(
    h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, w_gate_EMD: Weight, w_up_EMD: Weight, w_down_EDM: Weight
) -> jax.Array:
    """sum over k of gate[t, k] * expert[t, k](h[t]), in float32 [t, D]; the id E stands for no expert."""
    return jnp.sum(gate_tX[..., None] * each_expert(h_tD, expert_tX, w_gate_EMD, w_up_EMD, w_down_EDM), axis=1)


@jax.named_scope("experts")
def each_expert(
    h_tD: jax.Array, expert_tX: jax.Array, w_gate_EMD: Weight, w_up_EMD: Weight, w_down_EDM: Weight
) -> jax.Array:
    """expert[t, k](h[t]), in float32 [t, X, D]: what each of a token's experts makes of it."""
    experts = w_gate_EMD.shape[0]
    blocks = in_blocks(expert_tX, experts)

    def run(expert, token_b):
        w_gate, w_up, w_down = (_pick(bank, expert) for bank in (w_gate_EMD, w_up_EMD, w_down_EDM))
        return swiglu(h_tD[token_b], w_gate, w_up, w_down)

    def nothing(_, token_b):
        return jnp.zeros((len(token_b), h_tD.shape[-1]), jnp.float32)

    def visit(_, block):
        expert, token_b = block
        return None, jax.lax.cond(expert < experts, run, nothing, expert, token_b)

    _, y_nbD = jax.lax.scan(visit, None, (blocks.expert_n, blocks.token_nb))
    return y_nbD.reshape(-1, y_nbD.shape[-1]).at[blocks.slot_tX].get(mode="fill", fill_value=0)


@jax.named_scope("experts")
def over_mesh(
    mesh: Mesh,
    h_tD: jax.Array,
    expert_tX: jax.Array,
    gate_tX: jax.Array,
    w_gate_EMD: Weight,
    w_up_EMD: Weight,
    w_down_EDM: Weight,
) -> jax.Array:
    """`apply_experts` where E is split over the mesh axis "expert", M over "model" and tokens over "data".

    A device visits its own experts with the tokens that chose them, each with its part of M; what they make is added
    up over the devices.
    """
    banks = (w_gate_EMD, w_up_EMD, w_down_EDM)
    tokens = "data" if len(h_tD) % mesh.shape.get("data", len(h_tD) + 1) == 0 else None
    added = tuple(axis for axis in ("expert", "model") if axis in mesh.shape)
    own = w_gate_EMD.shape[0] // mesh.shape.get("expert", 1)

    def local(h_tD, expert_tX, gate_tX, w_gate_emD, w_up_emD, w_down_eDm):
        first = jax.lax.axis_index("expert") * own if "expert" in mesh.shape else 0
        here_tX = (expert_tX >= first) & (expert_tX < first + own)
        expert_tX = jnp.where(here_tX, expert_tX - first, own)
        return jax.lax.psum(apply_experts(h_tD, expert_tX, gate_tX, w_gate_emD, w_up_emD, w_down_eDm), added)

    specs = [
        jax.tree.map(lambda part, letters=letters: PartitionSpec(*axes_of(mesh.shape, letters, part.shape)), bank)
        for bank, letters in zip(banks, ("EMD", "EMD", "EDM"), strict=True)
    ]
    by_token = PartitionSpec(tokens)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(by_token, by_token, by_token, *specs), out_specs=by_token, check_vma=False
    )
    return run(h_tD, expert_tX, gate_tX, *banks)


def in_blocks(expert_tX: jax.Array, experts: int) -> Blocks:
    """Lay the assignments out: as many blocks as any routing can need, unused ones of the expert E, which is none.

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
    expert_o = expert_a[order_a]
    rank_o = jnp.arange(total) - (jnp.cumsum(chosen_E) - chosen_E)[expert_o]
    slot_o = jnp.where(expert_o < experts, ((end_E - blocks_E) * size)[expert_o] + rank_o, count * size)
    slot_a = jnp.zeros(total, jnp.int32).at[order_a].set(slot_o)
    token_a = jnp.arange(total, dtype=jnp.int32) // each
    token_s = jnp.zeros(count * size, jnp.int32).at[slot_a].set(token_a, mode="drop")
    expert_n = jnp.searchsorted(end_E, jnp.arange(count), side="right")
    return Blocks(expert_n, token_s.reshape(count, size), slot_a.reshape(tokens, each))


def _pick(bank: Weight, expert: jax.Array) -> Weight:
    """One expert's matrix, in its own format.

    The barrier keeps XLA from converting the scales of all experts before it picks one.
    """
    bank, expert = jax.lax.optimization_barrier((bank, expert))
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), bank)
