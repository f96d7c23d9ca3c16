"""The multi-token prediction (MTP) head, which predicts the token after next (DeepSeek-V3, arXiv 2412.19437, 2.2)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..config import Config
from ..parallel import sharding
from ..quantization.formats import Weight
from . import block
from .block import Block, Seen
from .cache import LayerCache
from .ops import einsum32, look_up, rms_norm
from .summary import Module


@dataclasses.dataclass(eq=False, repr=False)
class MTP(Module):
    """The MTP head. Slot i combines the model's hidden vector of token i with token i + 1, and predicts token i + 2.

    embed_VD and head_VD are the model's own arrays unless the checkpoint stores others.
    """

    cfg: Config
    dtype: np.dtype
    embed_VD: jax.Array = nnx.data()
    e_norm_D: jax.Array = nnx.data()
    h_norm_D: jax.Array = nnx.data()
    w_e_AD: Weight = nnx.data()
    w_h_AD: Weight = nnx.data()
    block: Block = nnx.data()
    norm_D: jax.Array = nnx.data()
    head_VD: Weight = nnx.data()
    mesh: Mesh | None = None

    def __call__(
        self, h_BTD: jax.Array, next_BT: jax.Array, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Return the normed hidden vectors [B, T, D] of slots `position_BT`, and the cache with these slots.

        `h_BTD` are the model's hidden vectors after its final norm, `next_BT` the tokens that follow them. The result
        predicts the token after `next_BT` through `logits`, and can stand for h in another step.
        """
        z_BTD, cache, _ = self._apply(block.run, h_BTD, next_BT, cache, position_BT)
        return z_BTD, cache

    def observe(
        self, h_BTD: jax.Array, next_BT: jax.Array, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache, Seen]:
        """Return what `__call__` does, and the intermediate values of the block."""
        z_BTD, cache, (seen,) = self._apply(block.observe, h_BTD, next_BT, cache, position_BT)
        return z_BTD, cache, seen

    def _apply(
        self, run_block: Callable, h_BTD: jax.Array, next_BT: jax.Array, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache, list[Seen]]:
        """The checkpoint's eh_proj multiplies [embedding; hidden], the reverse of the paper; w_e and w_h are its
        halves."""
        eps = self.cfg.rms_norm_eps
        normed_BTD = rms_norm(h_BTD.astype(jnp.float32), self.h_norm_D, eps).astype(self.dtype)
        with sharding.use_mesh(self.mesh):
            e_BTD = rms_norm(look_up(next_BT, self.embed_VD), self.e_norm_D, eps).astype(self.dtype)
            u_BTA = einsum32("BTD,AD->BTA", e_BTD, self.w_e_AD) + einsum32("BTD,AD->BTA", normed_BTD, self.w_h_AD)
            z_BTD, cache, *seen = run_block(self.block, u_BTA, cache, position_BT)
        return rms_norm(z_BTD, self.norm_D, eps).astype(self.dtype), cache, seen

    @jax.named_scope("head")
    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Return the logits, float32 [B, T, V], of normed hidden vectors."""
        with sharding.use_mesh(self.mesh):
            return einsum32("BTD,VD->BTV", h_BTD, self.head_VD)
