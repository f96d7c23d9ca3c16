"""DeepSeek-V3.2 (arXiv 2512.02556): embedding, decoder layers, final norm and head; and `forward`, its entry point."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..config import Config
from ..errors import UsageError
from ..parallel import sharding
from ..parallel.partition import format_mesh
from ..quantization.formats import Weight
from ..system.summary import Summarized
from . import block, validation
from .block import MLP, Block, Seen
from .cache import Cache, LayerCache, empty
from .indexer import Indexer
from .mla import MLA
from .moe import MoE
from .mtp import MTP
from .ops import einsum32, look_up, rms_norm
from .summary import Module, tabulate


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint of a model: the digest of its manifest, "" if there is none, and the number of ids its tokenizer
    has, None if that is the vocabulary. `edit` is the digest of all edits since, "" if there are none; it does not
    count in comparisons, so that models that differ in an edit's values alone share their programs."""

    digest: str = ""
    tokens: int | None = None
    edit: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(eq=False, repr=False)
class Model(Module):
    """The model, a plain pytree of weights. `dtype` is the compute dtype, bfloat16 or float32."""

    cfg: Config
    dtype: np.dtype
    origin: Origin
    embed_VD: jax.Array = nnx.data()
    layers: tuple[Block, ...] = nnx.data()
    norm_D: jax.Array = nnx.data()
    head_VD: Weight = nnx.data()
    mtp: MTP | None = nnx.data()
    mesh: Mesh | None = None

    def __call__(self, tokens_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """Return the normed hidden vectors [B, T, D] of T new tokens a row, and the cache with these tokens.

        A row's tokens follow those in its cache; the first `count_B` are real, the rest is padding. A padding token
        writes to a slot beyond the row's length, which is overwritten before any token attends to it.
        """
        x_BTD, cache, _ = self._apply(block.run, tokens_BT, cache, count_B)
        return self.normalize(x_BTD), cache

    def observe(
        self, tokens_BT: jax.Array, cache: Cache, count_B: jax.Array
    ) -> tuple[jax.Array, Cache, tuple[Seen, ...]]:
        """Return the residual stream [B, T, D] after the last layer, which `normalize` makes what `__call__` returns,
        the cache, and the intermediate values of every layer."""
        return self._apply(block.observe, tokens_BT, cache, count_B)

    def normalize(self, x_BTD: jax.Array) -> jax.Array:
        """Return the residual stream as the head takes it: normed, in the compute dtype."""
        return rms_norm(x_BTD, self.norm_D, self.cfg.rms_norm_eps).astype(self.dtype)

    def _apply(
        self, run_block: Callable, tokens_BT: jax.Array, cache: Cache, count_B: jax.Array
    ) -> tuple[jax.Array, Cache, tuple[Seen, ...]]:
        position_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        with sharding.use_mesh(self.mesh):
            x_BTD = look_up(tokens_BT, self.embed_VD)
        caches: list[LayerCache] = []
        seen: list[Seen] = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            with sharding.use_mesh(self.mesh):
                layer_cache = layer_cache.with_table(cache.table_Bd)
                x_BTD, layer_cache, *layer_seen = run_block(layer, x_BTD, layer_cache, position_BT)
            caches.append(layer_cache.with_table(None))
            seen.extend(layer_seen)
        return x_BTD, Cache(tuple(caches), cache.length_B + count_B, cache.table_Bd), tuple(seen)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return whether it is edited, layers, dtype and mesh, and what is known of any module."""
        _, weights = super().summary()
        dense = sum(isinstance(layer.ffn, MLP) for layer in self.layers)
        drafting = "" if self.mtp is None else " and the MTP head"
        mesh = {} if self.mesh is None else {"mesh": format_mesh(self.mesh.shape)}
        layers = f"{len(self.layers)} ({dense} dense, {len(self.layers) - dense} MoE){drafting}"
        title = "DeepSeek-V3.2" + (", edited" if self.origin.edit else "")
        return title, {"layers": layers, **weights, "compute": self.dtype.name, **mesh}

    def _repr_html_(self) -> str:
        parts = {"embedding, norm, head": (self.embed_VD, self.norm_D, self.head_VD)}
        parts |= {f"layer {i}": layer for i, layer in enumerate(self.layers)}
        return super()._repr_html_() + tabulate(parts if self.mtp is None else parts | {"MTP head": self.mtp})

    @jax.named_scope("head")
    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Return the logits, float32 [B, T, V], of normed hidden vectors."""
        with sharding.use_mesh(self.mesh):
            return einsum32("BTD,VD->BTV", h_BTD, self.head_VD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Output(Summarized):
    """The result of `forward`.

    logits  [B, T, V] float32
    cache   with the new tokens
    hidden  [B, T, D] after the final norm
    seen    the intermediate values of every layer, if requested
    """

    logits: jax.Array
    cache: Cache
    hidden: jax.Array
    seen: tuple[Seen, ...] | None = None


def forward(
    model: Model,
    tokens_BT,
    *,
    cache: Cache | None = None,
    count_B=None,
    capacity: int | None = None,
    seen: bool = False,
) -> Output:
    """Run T new tokens a row (a whole prompt, a chunk of one, or a single token) on top of `cache`.

    Row b has `count_B[b]` new tokens (default T); the others are padding. If no cache is given, one with `capacity`
    slots (default T) is allocated. With `seen` the output includes the intermediate values of every layer, which for
    long prompts are much larger than everything else. Raises UsageError before anything is compiled if tokens are
    outside the vocabulary or do not fit in the cache.
    """
    cfg = validation.config_of(model)
    tokens_BT, longest = validation.check_token_matrix(tokens_BT, cfg.vocab_size), cfg.max_position_embeddings
    batch, new = tokens_BT.shape
    count_B = np.full(batch, new, np.int32) if count_B is None else validation.check_counts(count_B, batch, new)
    if cache is None:
        slots = (
            validation.check_length(new, longest)
            if capacity is None
            else validation.check_capacity(capacity, count_B, longest)
        )
        cache = empty(model.cfg, batch, slots, model.dtype)
    elif not isinstance(cache, Cache):
        raise UsageError(f"cache must be a Cache, as `forward` returns it, not {cache!r:.200}")
    elif capacity is not None:
        raise UsageError(f"the cache already has a capacity ({cache.capacity}); leave out capacity={capacity!r}")
    validation.check_room(cache, count_B)
    run = _observe if seen else _forward
    return run(model, tokens_BT, cache, count_B)


@jax.jit
def _forward(model: Model, tokens_BT: jax.Array, cache: Cache, count_B: jax.Array) -> Output:
    h_BTD, cache = model(tokens_BT, cache, count_B)
    return Output(model.logits(h_BTD), cache, h_BTD)


@jax.jit
def _observe(model: Model, tokens_BT: jax.Array, cache: Cache, count_B: jax.Array) -> Output:
    x_BTD, cache, seen = model.observe(tokens_BT, cache, count_B)
    h_BTD = model.normalize(x_BTD)
    return Output(model.logits(h_BTD), cache, h_BTD, seen)


def build(cfg: Config, dtype, leaf: Callable[[str], Any], origin: Origin = Origin(), mesh: Mesh | None = None) -> Model:
    """Return a Model whose weights are those that `leaf` returns for the paths of `layout.leaves`."""
    dtype = np.dtype(dtype)

    def weights(kind: type, prefix: str) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(kind)]
        return {name: leaf(prefix + name) for name in names if name.rpartition("_")[2].isupper()}

    def decoder_layer(prefix: str, i: int) -> Block:
        is_dense = i < cfg.first_k_dense_replace
        ffn = weights(MLP if is_dense else MoE, prefix + "ffn.")
        return Block(
            cfg,
            dtype,
            **weights(Block, prefix),
            mla=MLA(cfg, **weights(MLA, prefix + "mla.")),
            indexer=Indexer(cfg, **weights(Indexer, prefix + "indexer.")),
            ffn=MLP(cfg, **ffn) if is_dense else MoE(cfg, **ffn, mesh=mesh),
        )

    layers = tuple(decoder_layer(f"layers.{i}.", i) for i in range(cfg.num_hidden_layers))
    mtp = None
    if cfg.num_nextn_predict_layers:
        mtp_block = decoder_layer("mtp.block.", cfg.num_hidden_layers)
        mtp = MTP(cfg, dtype, **weights(MTP, "mtp."), block=mtp_block, mesh=mesh)
    return Model(cfg, dtype, origin, **weights(Model, ""), layers=layers, mtp=mtp, mesh=mesh)
