"""Errors of a quantized checkpoint against its source, part by part: of weights and of outputs, ||e|| / ||w||.

Both checkpoints compute from the activations of the first, so a layer's error is its own and not what earlier layers
pass on. One layer of each is in memory at a time, and all arithmetic is float32.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.load import Checkpoint
from ..config import Config
from ..errors import UsageError, listing, pluralize, require_integer
from ..model import validation
from ..model.block import Block
from ..model.cache import LayerCache, empty_layer
from ..model.experts import apply_each_expert
from ..model.model import Model, build
from ..model.moe import MoE, Routing
from ..model.mtp import MTP
from ..model.ops import einsum32, rms_norm
from ..quantization.formats import NVFP4, Fp8Block, Weight, dequantize
from ..system.compilation import initialize
from .corpus import CONTEXT, Texts, build_corpus
from .variant import Variant

DTYPE = np.dtype(np.float32)
HEAD = ("norm_D", "head_VD")
BANKS = ("ffn.w_gate_EMD", "ffn.w_up_EMD", "ffn.w_down_EDM")
"""The matrices of routed experts."""

Squares = tuple[jax.Array, jax.Array]
"""The sums of squares of an error and of what it is relative to."""


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Relative errors of one part of the model: `weights` by parameter, `outputs` by name.

    `expert_weights` and `expert_outputs` have an entry for each expert: the error of its three matrices together, and
    of its outputs for the tokens that the first checkpoint routes to it (None: no token). Both are empty without
    experts. Elsewhere None means relative to zeros.
    """

    part: str
    weights: dict[str, float | None]
    outputs: dict[str, float | None]
    expert_weights: list[float | None] = dataclasses.field(default_factory=list)
    expert_outputs: list[float | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PartLoader:
    """Loads a checkpoint part by part."""

    checkpoint: Checkpoint

    @cached_property
    def paths(self) -> Model:
        """The model's pytree with the path of each parameter in its place."""
        return build(self.checkpoint.cfg, DTYPE, lambda path: path)

    def load(self, part: Any) -> Any:
        """Return a part of `paths` with its weights."""
        homes = {self.checkpoint.home(path) for path in jax.tree.leaves(part)}
        weights = self.checkpoint.weights(homes, DTYPE)
        return jax.tree.map(lambda path: weights[self.checkpoint.home(path)], part)


def layers(
    a: str | Path,
    b: str | Path,
    texts: Texts | str | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
) -> Iterator[LayerError]:
    """Yield the errors of checkpoint B against A as they are computed: embedding, layers, head, MTP head.

    Outputs are for the first `tokens` tokens of the first text (1024, if the model's longest context allows). Arguments
    are checked at once. Raises UsageError if the checkpoints are not of the same model.
    """
    initialize()
    first, second = (PartLoader(Checkpoint.open(_check_folder(given))) for given in (a, b))
    cfg = first.checkpoint.cfg
    _require_one_model(cfg, second.checkpoint.cfg)
    if tokens is not None:
        require_integer("tokens", tokens, 2, cfg.max_position_embeddings)
    tokenizer = tokenizer or Variant.of(first.checkpoint.folder).tokenizer()
    context = min(CONTEXT, cfg.max_position_embeddings) if tokens is None else tokens
    (window,) = build_corpus(cfg, tokenizer, texts, context=context, limit=1).windows
    return _compare_parts(first, second, jnp.asarray(validation.check_token_matrix([window.tokens], cfg.vocab_size)))


def _compare_parts(a: PartLoader, b: PartLoader, tokens_BT: jax.Array) -> Iterator[LayerError]:
    cfg = a.checkpoint.cfg
    cache = empty_layer(cfg, 1, tokens_BT.shape[1], DTYPE)
    position_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]

    mine, theirs = (loader.load({"embed_VD": loader.paths.embed_VD}) for loader in (a, b))
    x_BTD, other_BTD = (one["embed_VD"][tokens_BT].astype(DTYPE) for one in (mine, theirs))
    yield _layer_error("embedding", mine, theirs, {"embedding": _squares(x_BTD, other_BTD)})

    for i in range(cfg.num_hidden_layers):
        mine, theirs = (loader.load(loader.paths.layers[i]) for loader in (a, b))
        x_BTD, *squares = compare_blocks(mine, theirs, x_BTD, cache, position_BT)
        yield _layer_error(f"layer {i}", mine, theirs, *squares)

    mine, theirs = (loader.load({name: getattr(loader.paths, name) for name in HEAD}) for loader in (a, b))
    h_BTD, logits = _compare_heads(mine, theirs, x_BTD, cfg.rms_norm_eps)
    yield _layer_error("head", mine, theirs, {"logits": logits})

    if a.paths.mtp is not None:
        mine, theirs = (loader.load(loader.paths.mtp) for loader in (a, b))
        next_BT = jnp.concatenate([tokens_BT[:, 1:], tokens_BT[:, -1:]], axis=1)
        u_BTD = mtp_block_input(mine, h_BTD, next_BT, cache, position_BT)
        _, *squares = compare_blocks(mine.block, theirs.block, u_BTD, cache, position_BT)
        yield _layer_error("mtp", mine, theirs, *squares)


def _layer_error(
    name: str, a: Any, b: Any, outputs: dict[str, Squares], experts: Squares | tuple[()] = ()
) -> LayerError:
    """Turn sums of squares into relative errors, and compare the weights of the part."""
    named, _ = jax.tree_util.tree_flatten_with_path(a, is_leaf=_is_weight)
    pairs = [*zip((leaf for _, leaf in named), jax.tree.leaves(b, is_leaf=_is_weight), strict=True)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    weights = {name: np.stack(squares) for name, squares in zip(names, _compare_weights(pairs), strict=True)}
    banks = [squares for name, squares in weights.items() if name.endswith(BANKS)]
    return LayerError(
        name,
        {name: _relative(squares.sum(axis=1)) for name, squares in weights.items()},
        {name: _relative(squares) for name, squares in outputs.items()},
        [_relative(pair) for pair in np.sum(banks, axis=0).T] if banks else [],
        [_relative(pair) if pair[1] else None for pair in np.stack(experts).T] if experts else [],
    )


def _relative(squares: Iterable) -> float | None:
    """Return ||error|| / ||size||: 0 if both are zero, None if only the size is."""
    error, size = map(float, squares)
    return (error / size) ** 0.5 if size else None if error else 0.0


@jax.jit
def compare_blocks(
    a: Block, b: Block, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, dict[str, Squares], Squares | tuple[()]]:
    """Return the residual stream after `a`, and the squares of what attention, feed-forward and each expert [E] add."""
    (_, _, seen), (_, _, other) = (block.observe(x_BTD, cache, position_BT) for block in (a, b))
    mid_BTD = x_BTD + seen.attention_BTD
    inputs = [rms_norm(mid_BTD, block.ffn_norm_D, a.cfg.rms_norm_eps) for block in (a, b)]
    (f_BTD, routing), (g_BTD, _) = (block.ffn(h_BTD) for block, h_BTD in zip((a, b), inputs, strict=True))
    outputs = {"attention": _squares(seen.attention_BTD, other.attention_BTD), "feed-forward": _squares(f_BTD, g_BTD)}
    experts = ()
    if routing is not None and isinstance(a.ffn, MoE) and isinstance(b.ffn, MoE):
        y_tXD, z_tXD = (_expert_outputs(moe, h_BTD, routing) for moe, h_BTD in zip((a.ffn, b.ffn), inputs, strict=True))
        experts = _sum_by_expert(z_tXD - y_tXD, routing, a.cfg), _sum_by_expert(y_tXD, routing, a.cfg)
    return mid_BTD + f_BTD, outputs, experts


def _expert_outputs(moe: MoE, h_BTD: jax.Array, routing: Routing) -> jax.Array:
    h_tD = h_BTD.reshape(-1, h_BTD.shape[-1])
    expert_tX = routing.expert_BTX.reshape(len(h_tD), -1)
    return apply_each_expert(h_tD, expert_tX, moe.w_gate_EMD, moe.w_up_EMD, moe.w_down_EDM)


def _sum_by_expert(y_tXD: jax.Array, routing: Routing, cfg: Config) -> jax.Array:
    square_tX = jnp.square(y_tXD).sum(axis=-1)
    return jax.ops.segment_sum(square_tX.reshape(-1), routing.expert_BTX.reshape(-1), cfg.n_routed_experts)


@jax.jit
def mtp_block_input(
    mtp: MTP, h_BTD: jax.Array, next_BT: jax.Array, cache: LayerCache, position_BT: jax.Array
) -> jax.Array:
    """Return the stream that enters the block of the MTP head."""
    _, _, seen = mtp.observe(h_BTD, next_BT, cache, position_BT)
    return seen.x_BTD


@jax.jit
def _compare_heads(a: dict[str, Any], b: dict[str, Any], x_BTD: jax.Array, eps: float) -> tuple[jax.Array, Squares]:
    h_BTD, other_BTD = (rms_norm(x_BTD, one["norm_D"], eps) for one in (a, b))
    mine_BTV = einsum32("BTD,VD->BTV", h_BTD, a["head_VD"])
    other_BTV = einsum32("BTD,VD->BTV", other_BTD, b["head_VD"])
    return h_BTD, _squares(mine_BTV, other_BTV)


@jax.jit
def _compare_weights(pairs: list[tuple[Weight, Weight]]) -> list[Squares]:
    """Return squares [n] for the n entries of the first axis of each weight, dequantized only while it is summed."""

    def sum_entries(x: jax.Array) -> jax.Array:
        rows = jnp.square(x).sum(axis=-1, keepdims=x.ndim == 1)
        return rows.sum(axis=tuple(range(1, rows.ndim)))

    dense = [(dequantize(a, jnp.float32), dequantize(b, jnp.float32)) for a, b in pairs]
    return [(sum_entries(b - a), sum_entries(a)) for a, b in dense]


def _squares(a: jax.Array, b: jax.Array) -> Squares:
    """Sum by rows first, which is more exact."""
    error, size = (jnp.square(x).sum(axis=-1).sum() for x in (b - a, a))
    return error, size


def _is_weight(node: Any) -> bool:
    return isinstance(node, NVFP4 | Fp8Block | jax.Array)


def _check_folder(given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise UsageError(f"layers are streamed from the folder of a checkpoint, not from {type(given).__name__}")
    return Path(given)


def _require_one_model(a: Config, b: Config) -> None:
    ours, theirs = (dataclasses.asdict(cfg) for cfg in (a, b))
    if differing := [f"{key}: {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        raise UsageError(
            f"the checkpoints are not of one model: their configs differ in {pluralize(len(differing), 'value')}, "
            f"nothing was read: {listing(differing)}"
        )
