"""Modules that behave differently in one thing, as subclasses of the model's own; what differs is data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..model.block import Block, Seen
from ..model.cache import LayerCache
from ..model.indexer import Indexer
from ..model.mla import MLA


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skip:
    """The residual stream passes the layer unchanged. The rest of the layer is observed, and its cache written."""

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, position_BT: jax.Array) -> jax.Array:
        """Return the stream before the layer."""
        return x_BTD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift:
    """A vector is added to the residual stream at the positions from `start` on."""

    direction_D: jax.Array
    start: jax.Array

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, position_BT: jax.Array) -> jax.Array:
        """Return the stream after the layer with the vector added, float32."""
        return y_BTD + jnp.where((position_BT >= self.start)[..., None], self.direction_D, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patch:
    """The residual stream of another run replaces that of row B at the positions of `at_Bs`."""

    stream_sD: jax.Array
    at_Bs: jax.Array

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, position_BT: jax.Array) -> jax.Array:
        """Return the stream after the layer, with the other run's at some positions."""
        at_BT = jnp.take_along_axis(self.at_Bs, position_BT, axis=1, mode="fill", fill_value=False)
        other_BTD = self.stream_sD.at[position_BT].get(mode="fill", fill_value=0)
        return jnp.where(at_BT[..., None], other_BTD, y_BTD)


@dataclasses.dataclass(eq=False, repr=False)
class EditedBlock(Block):
    """A layer after which `changes` are made to the residual stream, one after the other."""

    changes: tuple[Callable, ...] = nnx.data()

    def observe(
        self, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache, Seen]:
        """Return what `Block.observe` does, with the residual stream changed."""
        y_BTD, cache, seen = super().observe(x_BTD, cache, position_BT)
        for change in self.changes:
            y_BTD = change(x_BTD, y_BTD, position_BT)
        return y_BTD, cache, seen


@dataclasses.dataclass(eq=False, repr=False)
class MutedMLA(MLA):
    """Attention in which only the heads of `kept_H` have an output: the others' columns of W^O count as zero."""

    kept_H: jax.Array = nnx.data()

    def output(self, o_BTHP: jax.Array) -> jax.Array:
        """Project the outputs of the heads that are kept to [B, T, D]."""
        return super().output(jnp.where(self.kept_H[:, None], o_BTHP, 0).astype(o_BTHP.dtype))


@dataclasses.dataclass(eq=False, repr=False)
class RestrictedIndexer(Indexer):
    """An indexer that selects among the last `window` positions, a query's own included, and those of `always`, a
    mask of max_position_embeddings positions."""

    window: jax.Array = nnx.data()
    always: jax.Array = nnx.data()

    def restrict(self, value_BTS: jax.Array, position_BT: jax.Array, hidden: Any) -> jax.Array:
        """Return the values with `hidden` at every position that may not be selected."""
        slot_S = jnp.arange(value_BTS.shape[-1])
        recent_BTS = slot_S > position_BT[..., None] - self.window
        return jnp.where(recent_BTS | self.always.at[slot_S].get(mode="fill", fill_value=False), value_BTS, hidden)
