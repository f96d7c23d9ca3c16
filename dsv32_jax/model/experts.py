"""Each token's own experts, and no others, and the shared one (DeepSeekMoE, arXiv 2401.06066).

The (token, expert) assignments are sorted by expert and laid out in blocks of one expert each; a product picks each
block's matrix by index. Shapes are static, work is proportional to the assignments, the bytes of experts
that nobody chose are never touched, and all of it can be differentiated.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..kernels import dispatch
from ..parallel.partition import find_axes
from ..quantization.formats import Weight
from .ops import einsum32, swiglu

LARGEST_BLOCK = 256


Matrices = tuple[Weight, Weight, Weight]
"""Gate, up and down."""


class Blocks(NamedTuple):
    """Assignments in blocks of one expert: n blocks of b slots for t tokens of X assignments."""

    expert_n: jax.Array
    token_nb: jax.Array
    slot_tX: jax.Array


def mixture(h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, routed: Matrices, shared: Matrices) -> jax.Array:
    """What routed and shared experts make of each token: summed in float32 [t, D], before anything is rounded."""
    return apply_experts(h_tD, expert_tX, gate_tX, *routed) + shared_expert(h_tD, *shared)


def shared_expert(h_tD: jax.Array, shared_gate_MD: Weight, shared_up_MD: Weight, shared_down_DM: Weight) -> jax.Array:
    """What the shared expert makes of every token, float32 [t, D]."""
    up, down = partial(einsum32, "tD,MD->tM"), partial(einsum32, "tM,DM->tD")
    return swiglu(h_tD, shared_gate_MD, shared_up_MD, shared_down_DM, up, down)


def apply_experts(
    h_tD: jax.Array,
    expert_tX: jax.Array,
    gate_tX: jax.Array,
    w_gate_EMD: Weight,
    w_up_EMD: Weight,
    w_down_EDM: Weight,
    devices: int = 1,
) -> jax.Array:
    """sum over k of gate[t, k] * expert[t, k](h[t]), in float32 [t, D]; the id E stands for no expert.

    Of the experts these are what one of `devices` has. Summed term by term: for a sum over the middle axis XLA's CPU
    backend takes ten times as long.
    """
    y_tXD = each_expert(h_tD, expert_tX, w_gate_EMD, w_up_EMD, w_down_EDM, devices)
    return reduce(jnp.add, (gate_tX[:, k, None] * y_tXD[:, k] for k in range(gate_tX.shape[1])))


@jax.named_scope("experts")
def each_expert(
    h_tD: jax.Array,
    expert_tX: jax.Array,
    w_gate_EMD: Weight,
    w_up_EMD: Weight,
    w_down_EDM: Weight,
    devices: int = 1,
) -> jax.Array:
    """expert[t, k](h[t]), in float32 [t, X, D]: what each of a token's experts makes of it."""
    blocks = in_blocks(expert_tX, w_gate_EMD.shape[0], dispatch.min_block())

    def product(x_nbz, bank):
        return dispatch.multiply_blocks(x_nbz, blocks.expert_n, bank, devices)

    y_nbD = swiglu(h_tD[blocks.token_nb], w_gate_EMD, w_up_EMD, w_down_EDM, product, product)
    return y_nbD.reshape(-1, y_nbD.shape[-1]).at[blocks.slot_tX].get(mode="fill", fill_value=0)


def over_mesh(
    mesh: Mesh, h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, routed: Matrices, shared: Matrices
) -> jax.Array:
    """`mixture` where E is split over the mesh axis "expert", M over "model" and tokens over "data".

    A device visits its own experts with the tokens that chose them, each with its part of M, as it has a part of the
    shared expert; what they make is added up over the devices, all at once.
    """
    devices = mesh.shape.get("expert", 1)
    own = routed[0].shape[0] // devices
    tokens = "data" if len(h_tD) % mesh.shape.get("data", len(h_tD) + 1) == 0 else None
    added = tuple(axis for axis in ("expert", "model") if mesh.shape.get(axis, 1) > 1)

    def local(h_tD, expert_tX, gate_tX, routed: Matrices, shared: Matrices):
        first = jax.lax.axis_index("expert") * own if devices > 1 else 0
        here_tX = (expert_tX >= first) & (expert_tX < first + own)
        y_tD = apply_experts(h_tD, jnp.where(here_tX, expert_tX - first, own), gate_tX, *routed, devices)
        return jax.lax.psum(y_tD + jnp.where(first == 0, shared_expert(h_tD, *shared), 0), added)

    def specs(matrices: Matrices, *letters: str) -> tuple:
        return tuple(
            jax.tree.map(lambda part, of=of: PartitionSpec(*find_axes(mesh.shape, of, part.shape)), matrix)
            for matrix, of in zip(matrices, letters, strict=True)
        )

    by_token = PartitionSpec(tokens)
    weights = specs(routed, "EMD", "EMD", "EDM"), specs(shared, "MD", "MD", "DM")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(by_token, by_token, by_token, *weights), out_specs=by_token, check_vma=False
    )
    return run(h_tD, expert_tX, gate_tX, routed, shared)


def in_blocks(expert_tX: jax.Array, experts: int, smallest: int = 1) -> Blocks:
    """Lay the assignments out: as many blocks as any routing can need, unused ones of the expert E, which is none.

    Blocks have room for the assignments that an expert gets on average, and for `smallest`. Where there are fewer
    assignments than experts, as in decoding, each is its own block and nothing is sorted.
    """
    tokens, each = expert_tX.shape
    total, most = tokens * each, min(experts, tokens * each)
    size = min(LARGEST_BLOCK, max(smallest, 1 << ((total // most).bit_length() - 1)))
    expert_a = expert_tX.reshape(-1)
    if total <= experts or size == 1:
        a = jnp.arange(total, dtype=jnp.int32)
        return Blocks(expert_a, (a // each)[:, None], a.reshape(tokens, each))

    count = (total + most * (size - 1)) // size
    order_a = jnp.argsort(expert_a, stable=True)
    chosen_E = jnp.bincount(expert_a, length=experts)
    blocks_E = -(-chosen_E // size)
    end_E = jnp.cumsum(blocks_E)
    sorted_a = expert_a[order_a]
    rank_a = jnp.arange(total) - (jnp.cumsum(chosen_E) - chosen_E)[sorted_a]
    sorted_slot_a = jnp.where(sorted_a < experts, ((end_E - blocks_E) * size)[sorted_a] + rank_a, count * size)
    slot_a = jnp.zeros(total, jnp.int32).at[order_a].set(sorted_slot_a)
    token_a = jnp.arange(total, dtype=jnp.int32) // each
    token_nb = jnp.zeros(count * size, jnp.int32).at[slot_a].set(token_a, mode="drop").reshape(count, size)
    expert_n = jnp.searchsorted(end_E, jnp.arange(count), side="right")
    return Blocks(expert_n, token_nb, slot_a.reshape(tokens, each))
