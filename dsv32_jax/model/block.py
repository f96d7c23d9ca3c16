"""A decoder layer: attention and feed-forward, dense or MoE, each normed before and added to the residual stream."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config import Config
from ..quantization.formats import Weight
from ..system.summary import Summarized
from .attention import attention
from .cache import LayerCache
from .indexer import Indexer
from .mla import MLA
from .moe import MoE, Routing
from .ops import einsum32, rms_norm, swiglu
from .summary import Module


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Seen(Summarized):
    """Intermediate values of a layer.

    x_BTD            the residual stream before the layer, float32
    attention_BTD    the output of attention, which is added to it
    index_score_BTS  the indexer's scores, -inf where a position is not visible
    selected_BTk     the positions attended to, k = min(index_topk, S), -1 if fewer are visible
    routing          the experts of each token, None in a dense layer
    """

    x_BTD: jax.Array
    attention_BTD: jax.Array
    index_score_BTS: jax.Array
    selected_BTk: jax.Array
    routing: Routing | None


@dataclasses.dataclass(eq=False, repr=False)
class MLP(Module):
    """The dense feed-forward of the first layers."""

    cfg: Config
    w_gate_FD: Weight = nnx.data()
    w_up_FD: Weight = nnx.data()
    w_down_DF: Weight = nnx.data()

    def __call__(self, h_BTD: jax.Array) -> tuple[jax.Array, None]:
        """Return float32 [B, T, D], and no routing."""
        up, down = partial(einsum32, "BTD,FD->BTF"), partial(einsum32, "BTF,DF->BTD")
        return swiglu(h_BTD, self.w_gate_FD, self.w_up_FD, self.w_down_DF, up, down), None


@dataclasses.dataclass(eq=False, repr=False)
class Block(Module):
    """A layer. `dtype` is the compute dtype; the residual stream is float32, so that its sums are not rounded."""

    cfg: Config
    dtype: np.dtype
    attn_norm_D: jax.Array = nnx.data()
    mla: MLA = nnx.data()
    indexer: Indexer = nnx.data()
    ffn_norm_D: jax.Array = nnx.data()
    ffn: MLP | MoE = nnx.data()

    def __call__(self, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array) -> tuple[jax.Array, LayerCache]:
        """Return the residual stream after the layer and the cache with the new tokens."""
        x_BTD, cache, _ = self.observe(x_BTD, cache, position_BT)
        return x_BTD, cache

    def observe(
        self, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache, Seen]:
        """Return what `__call__` does, and the intermediate values."""
        eps = self.cfg.rms_norm_eps
        h_BTD = rms_norm(x_BTD, self.attn_norm_D, eps).astype(self.dtype)
        a_BTD, cache, (score_BTS, selected_BTk) = attention(self.mla, self.indexer, h_BTD, cache, position_BT)
        mid_BTD = x_BTD + a_BTD.astype(jnp.float32)
        f_BTD, routing = self.ffn(rms_norm(mid_BTD, self.ffn_norm_D, eps).astype(self.dtype))
        return mid_BTD + f_BTD, cache, Seen(x_BTD, a_BTD, score_BTS, selected_BTk, routing)


@jax.jit
def run(block: Block, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Apply a block: one program for each kind of layer, inlined if the caller is itself compiled."""
    return block(x_BTD, cache, position_BT)


@jax.jit
def observe(
    block: Block, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, LayerCache, Seen]:
    """Apply a block as `run` does, and return its intermediate values too."""
    return block.observe(x_BTD, cache, position_BT)
