"""The flight recorder's device side: what layers saw, kept beside the cache in arrays of fixed shape.

Slot s of the tape holds what was seen of the token at position s, as slot s of the cache holds that token, so prompts,
new tokens and drafts are recorded alike, and what a rejected draft left is written again. A `Recording` is called as
the Model it is made of; what runs a model runs it, and where nothing is recorded there is no trace of it.
"""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..errors import CapacityError, UsageError, listing
from ..model import mla
from ..model.attention import LARGEST_TEMPORARY, queries_at_once
from ..model.block import Block, Seen
from ..model.cache import Cache, LayerCache
from ..model.model import Model
from ..model.ops import over_tokens, rms_norm, rotation
from ..system import host
from . import memory
from .prefill_decode import Context, blank

KINDS = ("attention", "indexer", "logits", "routing")
LIKELIEST = 20
"""Of the logits, so many are kept for each token."""

OF_SELECTED = ("selected", "index_score", "weight")
"""What has an entry for each selected position: min(index_topk, S) of them."""

PAD = {"expert": -1, "selected": -1, "top_id": -1, "index_score": -np.inf}
"""What stands for none."""

OF_HEAD = ("top_id", "top_logprob", "entropy")
"""What is kept of the head; the rest is of layers."""

Slots = dict[str, jax.Array]
"""By name, one value a token [B, S, ...]; `record.Record` explains the names."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tape:
    """What was seen of the token in each slot: by every layer, and by the head."""

    layers: tuple[Slots, ...]
    head: Slots

    def resized(self, cfg: Config, capacity: int) -> Self:
        """The first `capacity` slots, with empty ones where there are fewer. What the token at position p selected
        stands in its first p + 1 entries: nothing is lost where slots and entries are cut alike."""

        def resize(path, slots: jax.Array) -> jax.Array:
            name, sizes = path[-1].key, [len(slots), capacity, *slots.shape[2:]]
            if name in OF_SELECTED:
                sizes[2] = min(cfg.index_topk, capacity)
            more = [(0, new - old, 0) for new, old in zip(sizes, slots.shape, strict=True)]
            return jax.lax.pad(slots, jnp.asarray(PAD.get(name, 0), slots.dtype), more)

        return jax.tree_util.tree_map_with_path(resize, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordedCache(Cache):
    """A cache and the tape that runs along with it."""

    tape: Tape

    def resized(self, cfg: Config, capacity: int) -> Self:
        """The cache and its tape, resized together."""
        return dataclasses.replace(super().resized(cfg, capacity), tape=self.tape.resized(cfg, capacity))


@dataclasses.dataclass(eq=False)
class Recording(Model):
    """A Model that writes what it sees on the tape of its cache; `kinds` of KINDS."""

    kinds: tuple[str, ...] = ()

    def __call__(
        self, tokens_BT: jax.Array, cache: RecordedCache, count_B: jax.Array
    ) -> tuple[jax.Array, RecordedCache]:
        """What the model returns, the cache with its tape."""
        position_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        h_BTD, filled, seen = super().observe(tokens_BT, cache, count_B)
        layers = tuple(
            _written(slots, position_BT, _of_layer(self.kinds, layer, one, layer_cache, position_BT))
            for slots, layer, one, layer_cache in zip(cache.tape.layers, self.layers, seen, filled.layers, strict=True)
        )
        head = _written(cache.tape.head, position_BT, _logits(self, h_BTD) if "logits" in self.kinds else {})
        return h_BTD, RecordedCache(filled.layers, filled.length_B, Tape(layers, head))


def recording(model: Model, kinds: tuple[str, ...]) -> Recording:
    """`model`, recording."""
    return Recording(**{field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}, kinds=kinds)


def checked(record: Collection[str]) -> tuple[str, ...]:
    """The kinds that `record` names, in order. Raises UsageError."""
    names = list(record) if isinstance(record, Collection) and not isinstance(record, str) else [record]
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"record takes a set of {listing(KINDS)}, not {listing(map(repr, unknown))}")
    return tuple(kind for kind in KINDS if kind in names)


def recorded_blank(
    kinds: tuple[str, ...], cfg: Config, compute: np.dtype, batch: int, capacity: int, dtype: np.dtype, drafts: int
) -> Context:
    """`decoding.blank`, with a tape in which nothing is written."""
    context = blank(cfg, compute, batch, capacity, dtype, drafts)
    plain = context.cache
    return dataclasses.replace(
        context, cache=RecordedCache(plain.layers, plain.length_B, empty(cfg, batch, capacity, kinds))
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(cfg: Config, batch: int, capacity: int, kinds: tuple[str, ...]) -> Tape:
    """A tape for `batch` rows of `capacity` tokens."""
    likeliest, selected = min(LIKELIEST, cfg.vocab_size), min(cfg.index_topk, capacity)

    def slots(*sizes: int) -> jax.Array:
        return jnp.zeros((batch, capacity, *sizes), jnp.float32)

    def ids(size: int) -> jax.Array:
        return jnp.zeros((batch, capacity, size), jnp.int32)

    def layer(i: int) -> Slots:
        found: Slots = {}
        if "routing" in kinds and i >= cfg.first_k_dense_replace:
            found |= {"expert": ids(cfg.num_experts_per_tok), "gate": slots(cfg.num_experts_per_tok)}
        if "indexer" in kinds:
            found |= {"selected": ids(selected), "index_score": slots(selected)}
        if "attention" in kinds:
            found |= {"selected": ids(selected), "weight": slots(selected), "spread": slots()}
        return found

    head: Slots = dict(zip(OF_HEAD, (ids(likeliest), slots(likeliest), slots()), strict=True))
    layers = tuple(layer(i) for i in range(cfg.num_hidden_layers))
    return Tape(layers, head if "logits" in kinds else {})


def row_bytes(cfg: Config, capacity: int, kinds: tuple[str, ...]) -> int:
    """Bytes of one row of a tape."""
    return sum(
        a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(lambda: empty(cfg, 1, capacity, kinds)))
    )


def require_room(cfg: Config, rows: int, tokens: int, kinds: tuple[str, ...]) -> None:
    """Raise CapacityError where the record of `rows` rows of `tokens` tokens does not fit in the host's memory."""
    needed, free = rows * row_bytes(cfg, tokens, kinds), host.available()
    if needed > free * memory.SHARE:
        each = {kind: row_bytes(cfg, tokens, (kind,)) / tokens for kind in kinds}
        shares = ", ".join(f"{kind} {size / 1e3:.1f} kB" for kind, size in each.items())
        raise CapacityError(
            f"the record of {rows} rows of up to {tokens} tokens takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB "
            f"are free; nothing was run. A token takes: {shares}. Record less, fewer rows, or fewer tokens"
        )


@partial(jax.jit, static_argnums=0, inline=True)
def _of_layer(kinds: tuple[str, ...], layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array) -> Slots:
    """What is kept of a layer's new tokens, [B, T, ...] by name."""
    found: Slots = {}
    if "routing" in kinds and seen.routing is not None:
        found |= {"expert": seen.routing.expert_BTX, "gate": seen.routing.gate_BTX}
    if "indexer" in kinds:
        score_BTk = jnp.take_along_axis(seen.index_score_BTS, jnp.maximum(seen.selected_BTk, 0), axis=-1)
        score_BTk = jnp.where(seen.selected_BTk >= 0, score_BTk, -jnp.inf)
        found |= {"selected": seen.selected_BTk, "index_score": score_BTk}
    if "attention" in kinds:
        weight_BTk, spread_BT = attended(layer, seen, cache, position_BT)
        found |= {"selected": seen.selected_BTk, "weight": weight_BTk, "spread": spread_BT}
    return found


def attended(layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight of each selected position, the mean over heads [B, T, k], and the mean over heads of the entropy of
    their weights [B, T], in nats. Computed as attention computes it, from the stream that enters the layer: in one
    program it is computed once."""
    cfg = layer.cfg
    h_BTD = rms_norm(seen.x_BTD, layer.attn_norm_D, cfg.rms_norm_eps).astype(layer.dtype)
    queries = layer.mla.queries(layer.mla.latent_query(h_BTD), *rotation(position_BT, cfg))

    def of(q_c_BTHN, q_r_BTHR, selected_BTk, position_BT):
        if cache.capacity <= cfg.index_topk:
            weight_BTHk, _ = mla.absorbed_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, cache.visible(position_BT))
        else:
            weight_BTHk, _ = mla.sparse_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, selected_BTk)
        return weight_BTHk.mean(axis=2), _entropy(weight_BTHk).mean(axis=2)

    block = queries_at_once(cfg, len(position_BT), cache.capacity)
    return over_tokens(of, (*queries, seen.selected_BTk, position_BT), block)


def _entropy(weight: jax.Array) -> jax.Array:
    """Of weights along the last axis, in nats; what has none adds none."""
    return -jnp.sum(weight * jnp.log(jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)), axis=-1)


def _logits(model: Model, h_BTD: jax.Array) -> Slots:
    """The likeliest next tokens with their log-probabilities, and the entropy of all, in nats."""

    def of(h_BTD):
        logprob_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
        top_logprob_BTw, top_id_BTw = jax.lax.top_k(logprob_BTV, min(LIKELIEST, logprob_BTV.shape[-1]))
        return top_id_BTw, top_logprob_BTw, -jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1)

    at_once = max(1, LARGEST_TEMPORARY // (len(h_BTD) * model.cfg.vocab_size))
    return dict(zip(OF_HEAD, over_tokens(of, (h_BTD,), at_once), strict=True))


@partial(jax.jit, inline=True)
def _written(slots: Slots, position_BT: jax.Array, new: dict[str, Any]) -> Slots:
    """The slots with `new` at these positions; one beyond the capacity is dropped."""
    put = jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))
    return {name: put(slots[name], position_BT, new[name]) for name in slots}
