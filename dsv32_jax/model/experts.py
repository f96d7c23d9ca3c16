"""The mixture of experts: each token's own routed experts, and the shared one (DeepSeekMoE, arXiv 2401.06066).

The (token, expert) assignments are sorted by expert and laid out in blocks with one expert each, and a product picks
the matrix of each block by index. Shapes are static, work is proportional to the assignments, experts that no token
chose are not read, and the whole is differentiable.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..kernels import dispatch, host_experts
from ..parallel.partition import find_axes
from ..quantization.formats import Weight
from ..quantization.host_weight import HostWeight
from .ops import einsum32, swiglu

Matrices = tuple[Weight, Weight, Weight]
"""Gate, up and down projection."""


class Blocks(NamedTuple):
    """Assignments in n blocks of b slots with one expert each, and the slot of each assignment."""

    expert_n: jax.Array
    token_nb: jax.Array
    slot_tX: jax.Array


def mix_experts(
    h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, routed: Matrices, shared: Matrices
) -> jax.Array:
    """Return the sum of routed and shared experts for each token in float32 [t, D]."""
    return apply_experts(h_tD, expert_tX, gate_tX, *routed) + apply_shared_expert(h_tD, *shared)


def apply_shared_expert(
    h_tD: jax.Array, shared_gate_MD: Weight, shared_up_MD: Weight, shared_down_DM: Weight
) -> jax.Array:
    """Return the output of the shared expert, float32 [t, D]."""
    up, down = partial(einsum32, "tD,MD->tM"), partial(einsum32, "tM,DM->tD")
    return swiglu(h_tD, shared_gate_MD, shared_up_MD, shared_down_DM, up, down)


def apply_experts(
    h_tD: jax.Array,
    expert_tX: jax.Array,
    gate_tX: jax.Array,
    w_gate_EMD: Any,
    w_up_EMD: Any,
    w_down_EDM: Any,
    devices: int = 1,
) -> jax.Array:
    """Return the sum over x of gate[t, x] * expert[t, x](h[t]), float32 [t, D]. The id E is no expert.

    The matrices are the local shard if the experts are spread over `devices`. Terms are added one by one, because XLA's
    CPU backend takes ten times as long for a sum over the middle axis.
    """
    if isinstance(w_gate_EMD, HostWeight):
        return apply_host_experts(h_tD, expert_tX, gate_tX, w_gate_EMD, w_up_EMD, w_down_EDM)
    y_tXD = apply_each_expert(h_tD, expert_tX, w_gate_EMD, w_up_EMD, w_down_EDM, devices)
    return reduce(jnp.add, (gate_tX[:, x, None] * y_tXD[:, x] for x in range(gate_tX.shape[1])))


@jax.named_scope("host experts")
def apply_host_experts(h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, *routed: HostWeight) -> jax.Array:
    """Return what `apply_experts` does, of matrices in host memory: few tokens go to them, many have them sent."""
    if not host_experts.pays_to_fetch(len(h_tD)):
        w_gate, w_up, w_down = routed
        return host_experts.mix(h_tD, expert_tX, gate_tX, w_gate, w_up, w_down)
    own_tX = host_experts.select_own(expert_tX, routed[0])
    w_gate_EMD, w_up_EMD, w_down_EDM = (host_experts.fetch(w, h_tD) for w in routed)
    return apply_experts(h_tD, own_tX, gate_tX, w_gate_EMD, w_up_EMD, w_down_EDM)


@jax.named_scope("experts")
def apply_each_expert(
    h_tD: jax.Array,
    expert_tX: jax.Array,
    w_gate_EMD: Weight,
    w_up_EMD: Weight,
    w_down_EDM: Weight,
    devices: int = 1,
) -> jax.Array:
    """Return expert[t, x](h[t]), float32 [t, X, D]: the output of each of a token's experts."""
    limits = dispatch.limit_block(w_gate_EMD, w_up_EMD, w_down_EDM)
    blocks = assign_blocks(expert_tX, w_gate_EMD.shape[0], *limits)

    def product(x_nbz, bank):
        return dispatch.multiply_blocks(x_nbz, blocks.expert_n, bank, devices)

    y_nbD = swiglu(h_tD[blocks.token_nb], w_gate_EMD, w_up_EMD, w_down_EDM, product, product)
    if blocks.token_nb.shape[1] == 1:
        return y_nbD.reshape(*expert_tX.shape, -1)
    return y_nbD.reshape(-1, y_nbD.shape[-1]).at[blocks.slot_tX].get(mode="fill", fill_value=0)


def mix_experts_on_mesh(
    mesh: Mesh, h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, routed: Matrices, shared: Matrices
) -> jax.Array:
    """Return `mix_experts` with E sharded over the mesh axis "expert", M over "model" and tokens over "data".

    Each device applies its own experts, and its part of the shared one, to its tokens. A single all-reduce adds up the
    outputs. Tokens that all devices of "data" have are the first one's, if the experts are in host memory: the host
    would apply them for each.
    """
    devices = mesh.shape.get("expert", 1)
    own = routed[0].shape[0] // devices
    tokens = "data" if len(h_tD) % mesh.shape.get("data", len(h_tD) + 1) == 0 else None
    repeated = tokens is None and mesh.shape.get("data", 1) > 1 and isinstance(routed[0], HostWeight)
    axes = ("expert", "model", "data") if repeated else ("expert", "model")
    added = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)

    def local(h_tD, expert_tX, gate_tX, routed: Matrices, shared: Matrices):
        first = jax.lax.axis_index("expert") * own if devices > 1 else 0
        is_mine = jax.lax.axis_index("data") == 0 if repeated else True
        here_tX = (expert_tX >= first) & (expert_tX < first + own) & is_mine
        y_tD = apply_experts(h_tD, jnp.where(here_tX, expert_tX - first, own), gate_tX, *routed, devices)
        return jax.lax.psum(y_tD + jnp.where((first == 0) & is_mine, apply_shared_expert(h_tD, *shared), 0), added)

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


def assign_blocks(expert_tX: jax.Array, experts: int, smallest: int, largest: int) -> Blocks:
    """Lay the assignments out in as many blocks as any routing can need; unused blocks have the id E, no expert.

    A block has slots for the assignments that an expert gets on average, but not fewer than `smallest` or more than
    `largest`. If there are fewer assignments than experts, as in decoding, each is its own block and nothing is sorted.
    """
    tokens, each = expert_tX.shape
    total, most = tokens * each, min(experts, tokens * each)
    size = min(largest, max(smallest, 1 << ((total // most).bit_length() - 1)))
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
