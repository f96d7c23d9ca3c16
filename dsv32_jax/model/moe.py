"""The mixture of experts and its gate (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..config import Config
from ..parallel.sharding import map_rows
from ..quantization.formats import Weight
from ..system.summary import Summarized
from .experts import Matrices, mix_experts, mix_experts_on_mesh
from .ops import einsum32
from .summary import Module


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Routing(Summarized):
    """The experts of each token, and the gates that weigh their outputs and sum to routed_scaling_factor."""

    expert_BTX: jax.Array
    gate_BTX: jax.Array


@dataclasses.dataclass(eq=False, repr=False)
class MoE(Module):
    """A shared expert that every token uses, and E routed ones of which a token uses X."""

    cfg: Config
    router_ED: Weight = nnx.data()
    bias_E: jax.Array = nnx.data()
    w_gate_EMD: Weight = nnx.data()
    w_up_EMD: Weight = nnx.data()
    w_down_EDM: Weight = nnx.data()
    shared_gate_MD: Weight = nnx.data()
    shared_up_MD: Weight = nnx.data()
    shared_down_DM: Weight = nnx.data()
    mesh: Mesh | None = None

    def __call__(self, h_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        """Return the sum of routed and shared experts, float32 [B, T, D], and the routing."""
        routing = self.route(h_BTD)
        h_tD = h_BTD.reshape(-1, h_BTD.shape[-1])
        expert_tX, gate_tX = (part.reshape(-1, part.shape[-1]) for part in (routing.expert_BTX, routing.gate_BTX))
        return self.mix(h_tD, expert_tX, gate_tX).reshape(h_BTD.shape), routing

    def mix(self, h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array) -> jax.Array:
        """Return the sum of the given experts and the shared one, float32 [t, D]. The id E is no expert."""
        experts = mix_experts if self.mesh is None else partial(mix_experts_on_mesh, self.mesh)
        return experts(h_tD, expert_tX, gate_tX, self.routed, self.shared)

    @property
    def routed(self) -> Matrices:
        """The matrices of the routed experts."""
        return self.w_gate_EMD, self.w_up_EMD, self.w_down_EDM

    @property
    def shared(self) -> Matrices:
        """The matrices of the shared expert."""
        return self.shared_gate_MD, self.shared_up_MD, self.shared_down_DM

    @jax.named_scope("gate")
    def route(self, h_BTD: jax.Array) -> Routing:
        """Choose experts by their affinities, which are float32 whatever the activations are."""
        logit_BTE = einsum32("BTD,ED->BTE", h_BTD.astype(jnp.float32), self.router_ED)
        return map_rows(partial(gate, bias_E=self.bias_E, cfg=self.cfg))(logit_BTE)


def gate(logit_BTE: jax.Array, bias_E: jax.Array, cfg: Config) -> Routing:
    """Choose experts as `noaux_tc` does: the bias counts in the choice of groups and experts, but not in the gates.

    A group's score is the sum of its two best biased affinities; only the best `topk_group` groups are eligible.
    """
    affinity_BTE = jax.nn.sigmoid(logit_BTE)
    biased_BTE = affinity_BTE + bias_E.astype(jnp.float32)
    biased_BTGe = biased_BTE.reshape(*biased_BTE.shape[:-1], cfg.n_group, -1)
    group_BTG = jax.lax.top_k(biased_BTGe, 2)[0].sum(axis=-1)
    chosen_BTW = jax.lax.top_k(group_BTG, cfg.topk_group)[1]
    eligible_BTG = jnp.any(chosen_BTW[..., None] == jnp.arange(cfg.n_group), axis=-2)
    eligible_BTE = jnp.repeat(eligible_BTG, cfg.n_routed_experts // cfg.n_group, axis=-1)
    expert_BTX = jax.lax.top_k(jnp.where(eligible_BTE, biased_BTE, -jnp.inf), cfg.num_experts_per_tok)[1]
    chosen_BTX = jnp.take_along_axis(affinity_BTE, expert_BTX, axis=-1)
    gate_BTX = chosen_BTX / (jnp.sum(chosen_BTX, axis=-1, keepdims=True) + 1e-20) * cfg.routed_scaling_factor
    return Routing(expert_BTX, gate_BTX)
