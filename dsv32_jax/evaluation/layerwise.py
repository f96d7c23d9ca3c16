"""Where a quantized checkpoint differs from its source: part by part, weights and outputs.

Both are given the activations of the first, so that a layer's error is its own and not what earlier ones pass on. One
layer of each is in memory at a time. Everything is computed in float32.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.load import Checkpoint
from ..errors import UsageError, listing, require_integer
from ..model import validation
from ..model.cache import LayerCache, empty_layer
from ..model.model import Model, build
from ..model.mtp import MTP
from ..model.ops import einsum32, rms_norm
from ..system.compilation import initialize
from . import layer_errors
from .layer_errors import Squares, squares
from .passages import CONTEXT, Texts, passages
from .variant import Variant

DTYPE = np.dtype(np.float32)
HEAD = ("norm_D", "head_VD")


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Relative errors ||e|| / ||w|| of one part of the model: `weights` of each leaf, `outputs` of what it computes.

    `expert_weights` and `expert_outputs` have one entry an expert: of its three matrices together, and of what it makes
    of the tokens that the first checkpoint's gate sends there (None: no token). Empty without experts.
    None elsewhere: relative to zeros.
    """

    part: str
    weights: dict[str, float | None]
    outputs: dict[str, float | None]
    expert_weights: list[float | None] = dataclasses.field(default_factory=list)
    expert_outputs: list[float | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose parts are loaded one by one."""

    checkpoint: Checkpoint

    @cached_property
    def model(self) -> Model:
        """The model's tree, each leaf its own path."""
        return build(self.checkpoint.cfg, DTYPE, lambda path: path)

    def filled(self, part: Any) -> Any:
        """`part` of `model` with its weights."""
        homes = {self.checkpoint.home(path) for path in jax.tree.leaves(part)}
        found = self.checkpoint.weights(homes, DTYPE)
        return jax.tree.map(lambda path: found[self.checkpoint.home(path)], part)


def layers(
    a: str | Path,
    b: str | Path,
    texts: Texts | str | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
) -> Iterator[LayerError]:
    """The errors of B's parts against A's, as they are computed: embedding, layers, head, drafting layer.

    Outputs are for the first `tokens` tokens (1024, where the model's longest context allows) of the first text.
    What is asked for is checked at once. Raises UsageError where the two are not the same model.
    """
    initialize()
    first, second = (Source(Checkpoint.open(_folder(given))) for given in (a, b))
    cfg = first.checkpoint.cfg
    _require_one_model(first.checkpoint, second.checkpoint)
    if tokens is not None:
        require_integer("tokens", tokens, 2, cfg.max_position_embeddings)
    tokenizer = tokenizer or Variant.of(first.checkpoint.folder).tokenizer()
    context = min(CONTEXT, cfg.max_position_embeddings) if tokens is None else tokens
    (window,) = passages(cfg, tokenizer, texts, context=context, limit=1).windows
    return _parts(first, second, jnp.asarray(validation.check_token_matrix([window.tokens], cfg.vocab_size)))


def _parts(a: Source, b: Source, tokens_BT: jax.Array) -> Iterator[LayerError]:
    cfg = a.checkpoint.cfg
    cache = empty_layer(cfg, 1, tokens_BT.shape[1], DTYPE)
    position_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]

    mine, theirs = (source.filled({"embed_VD": source.model.embed_VD}) for source in (a, b))
    x_BTD, other_BTD = (one["embed_VD"][tokens_BT].astype(DTYPE) for one in (mine, theirs))
    vectors = {"embedding": squares(x_BTD, other_BTD)}
    yield _part("embedding", mine, theirs, vectors)

    for i in range(cfg.num_hidden_layers):
        mine, theirs = (source.filled(source.model.layers[i]) for source in (a, b))
        x_BTD, *found = layer_errors.outputs(mine, theirs, x_BTD, cache, position_BT)
        yield _part(f"layer {i}", mine, theirs, *found)

    mine, theirs = (source.filled({name: getattr(source.model, name) for name in HEAD}) for source in (a, b))
    h_BTD, logits = _head(mine, theirs, x_BTD, cfg.rms_norm_eps)
    yield _part("head", mine, theirs, {"logits": logits})

    if a.model.mtp is not None:
        mine, theirs = (source.filled(source.model.mtp) for source in (a, b))
        next_BT = jnp.concatenate([tokens_BT[:, 1:], tokens_BT[:, -1:]], axis=1)
        u_BTD = _drafting(mine, h_BTD, next_BT, cache, position_BT)
        _, *found = layer_errors.outputs(mine.block, theirs.block, u_BTD, cache, position_BT)
        yield _part("mtp", mine, theirs, *found)


def _part(name: str, a: Any, b: Any, outputs: dict[str, Squares], experts: Squares | tuple[()] = ()) -> LayerError:
    weights = layer_errors.weights(a, b)
    return LayerError(
        name,
        layer_errors.of_leaves(weights),
        layer_errors.of_outputs(outputs),
        layer_errors.of_experts(weights),
        layer_errors.of_expert_outputs(experts) if experts else [],
    )


@jax.jit
def _drafting(mtp: MTP, h_BTD: jax.Array, next_BT: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
    """The stream that enters the drafting layer's block."""
    _, _, seen = mtp.observe(h_BTD, next_BT, cache, position_BT)
    return seen.x_BTD


@jax.jit
def _head(a: dict[str, Any], b: dict[str, Any], x_BTD: jax.Array, eps: float) -> tuple[jax.Array, Squares]:
    """A's hidden vectors, and the squares of the logits that norms and heads make of the stream."""
    h_BTD, other_BTD = (rms_norm(x_BTD, one["norm_D"], eps) for one in (a, b))
    mine_BTV = einsum32("BTD,VD->BTV", h_BTD, a["head_VD"])
    other_BTV = einsum32("BTD,VD->BTV", other_BTD, b["head_VD"])
    return h_BTD, squares(mine_BTV, other_BTV)


def _folder(given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise UsageError(f"layers are streamed from the folder of a checkpoint, not from {type(given).__name__}")
    return Path(given)


def _require_one_model(a: Checkpoint, b: Checkpoint) -> None:
    ours, theirs = (dataclasses.asdict(one.cfg) for one in (a, b))
    if differing := [f"{key}: {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        raise UsageError(
            f"the checkpoints are not of one model; their configs differ in {len(differing)} values, nothing was "
            f"read: {listing(differing)}"
        )
