"""Interventions: a model that shares all other weights and behaves differently in what was asked for."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..errors import UsageError, argument, listing, to_integer
from ..generation.options import as_number
from ..model import validation
from ..model.block import Block
from ..model.model import Model
from ..model.moe import MoE
from ..model.summary import Module
from ..parallel.multihost import fetch
from .edited_modules import EditedBlock, MutedMLA, RestrictedIndexer, Shift, Skip

Pairs = Iterable[tuple[int, int]]


def edit(
    model: Model,
    *,
    experts_off: Pairs = (),
    favour: Mapping[tuple[int, int], float] = {},
    add: Mapping[int, Any] = {},
    scale: float = 1.0,
    start: int = 0,
    heads_off: Pairs = (),
    skip: Iterable[int] = (),
    window: int | None = None,
    positions: Iterable[int] = (),
    layers: Iterable[int] | None = None,
    index_topk: int | None = None,
) -> Model:
    """Return a model with these changes, which shares all other weights; it takes the place of `model` everywhere.

    experts_off  (layer, expert) pairs that are never selected: their selection bias is -inf
    favour       {(layer, expert): number} that is added to the selection bias; affinities are between 0 and 1
    add          {layer: direction [D]}, added `scale` times to the residual stream after the layer, at positions >=
                 `start` of each row: the length of a prompt is where its answer begins
    heads_off    (layer, head) pairs whose columns of W^O count as zero
    skip         layers that the residual stream passes unchanged
    window, positions  the indexer of `layers` (default: of all) selects among the last `window` positions (default 1:
                 the query's own) and these
    index_topk   the number of selected positions in every layer; max_position_embeddings makes attention dense

    Edits of an edited model add up. One of a kind that was run before compiles nothing: experts, directions, heads,
    windows and positions are data. The MTP head is not edited, so that drafts may be accepted less often.
    Raises UsageError for what the model does not have, and where too few experts are left to select.
    """
    validation.config_of(model)
    _require_mappings(favour=favour, add=add)
    if scale != 1 and not add:
        raise UsageError(f"{argument('scale')} multiplies the directions of {argument('add')}, and there are none")
    off, heads = _list_pairs("experts_off", experts_off), _list_pairs("heads_off", heads_off)
    skipped, always = sorted(set(skip)), sorted(set(positions))
    restricted = window is not None or bool(always)
    chosen = list(range(len(model.layers)) if layers is None else sorted(set(layers))) if restricted else []
    edited = _add_biases(model, [*((*pair, -np.inf) for pair in off), *((*pair, x) for pair, x in favour.items())])
    edited = _shift(edited, add, scale, start)
    edited = _mute(edited, heads)
    edited = _restrict(edited, chosen, 1 if window is None else window, always)
    edited = _set_topk(edited, index_topk)
    edited = _skip(edited, skipped)
    if edited is model:
        return model
    selected = sorted(off), sorted(favour.items()), window, always, chosen, index_topk
    facts = [*selected, scale, start, sorted(heads), skipped]
    digest = hashlib.sha256(f"{model.origin.edit} {facts}".encode())
    for i in sorted(add):
        digest.update(f"{i} ".encode() + np.asarray(add[i], np.float32).tobytes())
    return dataclasses.replace(edited, origin=dataclasses.replace(model.origin, edit=digest.hexdigest()))


def _list_pairs(name: str, pairs: Any) -> list[tuple[int, int]]:
    """Return the pairs of an argument as a list. Raises UsageError unless each has two members."""
    listed = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str | Mapping) else None
    if listed is None or any(isinstance(pair, str) or np.shape(pair) != (2,) for pair in listed):
        raise UsageError(f"{argument(name)} takes pairs, such as [(3, 5)], not {pairs!r:.200}")
    return [(first, second) for first, second in listed]


def _require_mappings(**arguments: Any) -> None:
    """Raise UsageError for the first argument that is not a mapping."""
    for name, value in arguments.items():
        if not isinstance(value, Mapping):
            key = "3: direction" if name == "add" else "(3, 5): 0.5"
            raise UsageError(f"{argument(name)} takes a mapping, such as {{{key}}}, not a {type(value).__name__}")


def _add_biases(model: Model, biases: list[tuple[int, int, float]]) -> Model:
    """Return the model with numbers added to the selection biases of (layer, expert)."""
    cfg = model.cfg
    _check_places("experts_off or favour", [pair[:2] for pair in biases], len(model.layers), cfg.n_routed_experts)
    dense = {i for i, _, _ in biases if not isinstance(model.layers[i].ffn, MoE)}
    if dense:
        raise UsageError(f"dense layers have no routed experts: {listing(sorted(dense))}")
    if wrong := [bias for *_, bias in biases if bias != -np.inf and as_number(bias) is None]:
        raise UsageError(f"{argument('favour')} takes finite numbers, not {listing(map(repr, wrong))}")
    for layer in sorted({i for i, _, _ in biases}):
        block = model.layers[layer]
        assert isinstance(block.ffn, MoE)
        bias_E = np.array(fetch(block.ffn.bias_E))
        for i, expert, bias in biases:
            if i == layer:
                bias_E[expert] += np.asarray(bias, bias_E.dtype)
        left = np.isfinite(bias_E.astype(np.float32)).reshape(cfg.n_group, -1).sum(axis=1)
        usable = np.sort(left[left >= 2])[: cfg.topk_group]
        if len(usable) < cfg.topk_group or usable.sum() < cfg.num_experts_per_tok:
            raise UsageError(
                f"layer {layer} has too few experts left: a token selects {cfg.num_experts_per_tok} from "
                f"{cfg.topk_group} groups with at least two each, but its groups have {left.tolist()}"
            )
        ffn = dataclasses.replace(block.ffn, bias_E=jax.device_put(bias_E, block.ffn.bias_E.sharding))
        model = _replace_layer(model, layer, dataclasses.replace(block, ffn=ffn))
    return model


def _shift(model: Model, add: Mapping[int, Any], scale: float, start: int) -> Model:
    """Return the model with directions added to the residual stream."""
    _check_places("add", [(i,) for i in add], len(model.layers))
    _check_places("start", [(start,)], model.cfg.max_position_embeddings)
    for i, vector in sorted(add.items()):
        direction = np.asarray(vector, np.float32) * np.float32(scale)
        if direction.shape != (model.cfg.hidden_size,) or not np.isfinite(direction).all():
            raise UsageError(
                f"{argument('add')} takes finite directions of shape [{model.cfg.hidden_size}] and a finite scale; "
                f"that of layer {i} is {list(direction.shape)}, scale={scale!r}"
            )
        shift = Shift(place_whole(model, direction), place_whole(model, np.int32(start)))
        model = change_stream(model, i, (*get_changes(model, i), shift))
    return model


def _mute(model: Model, heads: list[tuple[int, int]]) -> Model:
    """Return the model with heads that have no output."""
    _check_places("heads_off", heads, len(model.layers), model.cfg.num_attention_heads)
    for layer in sorted({i for i, _ in heads}):
        block = model.layers[layer]
        kept_H = np.ones(model.cfg.num_attention_heads, bool)
        if isinstance(block.mla, MutedMLA):
            kept_H = np.array(fetch(block.mla.kept_H))
        kept_H[[head for i, head in heads if i == layer]] = False
        mla = _extend(block.mla, MutedMLA, kept_H=place_whole(model, kept_H))
        model = _replace_layer(model, layer, dataclasses.replace(block, mla=mla))
    return model


def _restrict(model: Model, layers: list[int], window: int, positions: list[int]) -> Model:
    """Return the model whose indexers in `layers` select from a window and some positions; the latest edit holds."""
    longest = model.cfg.max_position_embeddings
    _check_places("layers", [(i,) for i in layers], len(model.layers))
    _check_places("positions", [(position,) for position in positions], longest)
    _check_places("window - 1 of window", [(window - 1,)], longest)
    if not layers:
        return model
    always = np.zeros(longest, bool)
    always[positions] = True
    data = {"window": place_whole(model, np.int32(window)), "always": place_whole(model, always)}
    for i in layers:
        indexer = _extend(model.layers[i].indexer, RestrictedIndexer, **data)
        model = _replace_layer(model, i, dataclasses.replace(model.layers[i], indexer=indexer))
    return model


def _set_topk(model: Model, topk: int | None) -> Model:
    """Return the model whose config has another index_topk."""
    if topk is None or topk == model.cfg.index_topk:
        return model
    _check_places("index_topk - 1 of index_topk", [(topk - 1,)], model.cfg.max_position_embeddings)
    cfg = dataclasses.replace(model.cfg, index_topk=topk)

    def change(node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(map(change, node))
        if not isinstance(node, Module):
            return node
        record: Any = node
        parts = {field.name: change(getattr(record, field.name)) for field in dataclasses.fields(record)}
        return dataclasses.replace(record, **(parts | {"cfg": cfg}))

    return change(model)


def _skip(model: Model, layers: list[int]) -> Model:
    """Return the model whose residual stream passes some layers unchanged; directions after them are still added."""
    _check_places("skip", [(i,) for i in layers], len(model.layers))
    for i in layers:
        others = [change for change in get_changes(model, i) if not isinstance(change, Skip)]
        model = change_stream(model, i, (Skip(), *others))
    return model


def get_changes(model: Model, i: int) -> tuple[Callable, ...]:
    """Return the changes made to the residual stream after layer i."""
    return getattr(model.layers[i], "changes", ())


def change_stream(model: Model, i: int, changes: tuple[Callable, ...]) -> Model:
    """Return the model in which these changes are made to the residual stream after layer i."""
    return _replace_layer(model, i, _extend(model.layers[i], EditedBlock, changes=changes))


def _check_places(name: str, places: list[Any], *sizes: int) -> None:
    """Raise UsageError that names every place that is not integers below these sizes."""

    def fits(place: Any) -> bool:
        pairs = zip(map(to_integer, place), sizes, strict=False)
        return len(place) == len(sizes) and all(at is not None and 0 <= at < size for at, size in pairs)

    if wrong := [place for place in places if not fits(place)]:
        below = " and ".join(map(str, sizes))
        raise UsageError(f"{name}: {listing(map(repr, wrong))} is not of this model; integers must be below {below}")


def _extend(module: Any, kind: type, **data: Any) -> Any:
    """Return the module as one of a subclass with more fields."""
    return kind(**{**{field.name: getattr(module, field.name) for field in dataclasses.fields(module)}, **data})


def _replace_layer(model: Model, i: int, layer: Block) -> Model:
    return dataclasses.replace(model, layers=(*model.layers[:i], layer, *model.layers[i + 1 :]))


def place_whole(model: Model, value: Any) -> jax.Array:
    """Put a whole value on every device of the model."""
    sharding = model.norm_D.sharding if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())
    return jax.device_put(value, sharding)
