"""A decode step at the end of a long context, whole and in parts: scoring, top-k, attention, and the dense alternative.

Each part is a program of its own on the arrays that the step uses: queries that the model's own matrices make, and the
cache. The caches hold synthetic values.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import mla
from ..batch import WHOLE, Programs
from ..cache import Cache, LayerCache, dtype_of, empty_layer
from ..config import Config
from ..decoding import Context, Task
from ..indexer import scores_of_cache, select
from ..model import Model, build
from ..ops import rotation
from ..random_weights import leaf_maker, uniform
from ..sampling import Sampling, knobs
from .measure import Row, medians

DTYPE = np.dtype(jnp.bfloat16)
"""The compute dtype."""

PARTS = ("scoring", "topk", "attention")


class Queries(NamedTuple):
    """What one layer asks its cache: content and rotated part of attention's query; the indexer's, and its weights."""

    content: jax.Array
    rotated: jax.Array
    index: jax.Array
    weight: jax.Array


def rows(cfg: Config, contexts: Sequence[int], caches: Sequence[str], seconds: float = 1.0) -> Iterator[Row]:
    """A row for each cache and context: seconds a token of all layers together, None for a part that is not run.

    Each time is the median of about `seconds` of repeats, at least three.
    """
    model = random_model(cfg)
    for stored in caches:
        for context in contexts:
            yield {"cache": stored, "context": context, **_times(model, context, dtype_of(stored, DTYPE), seconds)}


def random_model(cfg: Config) -> Model:
    """A model of `cfg` with random weights, NVFP4 as published checkpoints are."""
    return jax.block_until_ready(build(cfg, DTYPE, leaf_maker(cfg, DTYPE)))


def _times(model: Model, context: int, dtype: np.dtype, seconds: float) -> Row:
    """Seconds of the parts of a step, of the dense alternative, of the whole step, and of what is left of it."""
    repeats = 1 if jax.default_backend() == "cpu" else 16

    def measured(run: Callable[[], Any]) -> float:
        return medians(lambda: jax.block_until_ready([run() for _ in range(repeats)]), seconds).wall / repeats

    cache = filled(model.cfg, context, dtype)
    found = {name: measured(run) for name, run in parts(model, cache).items()}
    whole = measured(Step(model, cache).run)
    spent = sum(found.get(name, 0.0) for name in PARTS)
    return {**dict.fromkeys((*PARTS, "dense")), **found, "rest": whole - spent, "whole": whole}


def filled(cfg: Config, capacity: int, dtype: np.dtype) -> Cache:
    """A cache of one row with room for one more token, the others synthetic, of standard deviation 1."""
    layers = tuple(_filled_layer(cfg, capacity, dtype, jnp.uint32(i)) for i in range(cfg.num_hidden_layers))
    return jax.block_until_ready(Cache(layers, jnp.full(1, capacity - 1, jnp.int32)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _filled_layer(cfg: Config, capacity: int, dtype: np.dtype, number: jax.Array) -> LayerCache:
    sizes = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim)
    new = [uniform((1, capacity, size), DTYPE.name, number * 3 + i, 0.0, 1.0) for i, size in enumerate(sizes)]
    return empty_layer(cfg, 1, capacity, dtype).write(jnp.arange(capacity)[None], *new)


def parts(model: Model, cache: Cache) -> dict[str, Callable[[], Any]]:
    """By name, what runs a part for all layers, its inputs made: those that a decode step over `cache` has, and dense.

    A cache that the indexer selects from whole is neither scored nor searched.
    """
    hidden = uniform((1, 1, model.cfg.hidden_size), model.dtype.name, jnp.uint32(9), 0.0, 1.0)
    asked = queries(model, hidden, cache.length_B[:, None])
    if cache.capacity <= model.cfg.index_topk:
        return {"attention": lambda: whole_attention(model, asked, cache)}
    scores = scoring(asked, cache)
    selected = topk(scores, model.cfg.index_topk)
    return {
        "scoring": lambda: scoring(asked, cache),
        "topk": lambda: topk(scores, model.cfg.index_topk),
        "attention": lambda: sparse_attention(model, asked, cache, selected),
        "dense": lambda: masked_attention(model, asked, cache, selected),
    }


@jax.jit
def queries(model: Model, hidden: jax.Array, position: jax.Array) -> list[Queries]:
    """What every layer asks for the tokens `hidden` [B, T, D] at `position` [B, T]."""
    turns = rotation(position, model.cfg)

    def asked(layer) -> Queries:
        latent = layer.mla.latent_query(hidden)
        content, rotated = layer.mla.queries(latent, *turns)
        return Queries(content, rotated, layer.indexer.queries(latent, *turns), layer.indexer.head_weights(hidden))

    return [asked(layer) for layer in model.layers]


@jax.jit
def scoring(asked: list[Queries], cache: Cache) -> list[jax.Array]:
    """The index scores of every layer."""
    position = cache.length_B[:, None]
    return [
        scores_of_cache(one.index, one.weight, layer, position) for one, layer in zip(asked, cache.layers, strict=True)
    ]


@partial(jax.jit, static_argnums=1)
def topk(scores: list[jax.Array], count: int) -> list[jax.Array]:
    """The positions with the largest scores, in every layer."""
    return [select(score, count) for score in scores]


@jax.jit
def sparse_attention(model: Model, asked: list[Queries], cache: Cache, selected: list[jax.Array]) -> list[jax.Array]:
    """Every layer's attention over the selected positions."""
    return [
        mla.sparse(layer.mla, one.content, one.rotated, layer_cache, positions)
        for layer, one, layer_cache, positions in zip(model.layers, asked, cache.layers, selected, strict=True)
    ]


@jax.jit
def masked_attention(model: Model, asked: list[Queries], cache: Cache, selected: list[jax.Array]) -> list[jax.Array]:
    """The same result over all positions, those that were not selected being masked."""
    return [
        mla.absorbed(layer.mla, one.content, one.rotated, layer_cache, _mask(positions, cache.capacity))
        for layer, one, layer_cache, positions in zip(model.layers, asked, cache.layers, selected, strict=True)
    ]


@jax.jit
def whole_attention(model: Model, asked: list[Queries], cache: Cache) -> list[jax.Array]:
    """Every layer's attention over a cache that is not longer than what the indexer selects."""
    visible = jnp.arange(cache.capacity) <= cache.length_B[:, None, None]
    form = mla.dense(model.cfg, 1, cache.capacity)
    return [
        form(layer.mla, one.content, one.rotated, layer_cache, visible)
        for layer, one, layer_cache in zip(model.layers, asked, cache.layers, strict=True)
    ]


def _mask(positions: jax.Array, capacity: int) -> jax.Array:
    """[B, T, capacity]: whether a slot is among `positions` [B, T, k], where -1 is none."""
    row, token = jnp.arange(positions.shape[0])[:, None, None], jnp.arange(positions.shape[1])[:, None]
    slot = jnp.where(positions < 0, capacity, positions)
    return jnp.zeros((*positions.shape[:2], capacity), bool).at[row, token, slot].set(True, mode="drop")


class Step:
    """Decodes a token as `generate` does, again and again in the last slot of `cache`, which it takes over."""

    def __init__(self, model: Model, cache: Cache, programs: Programs = WHOLE):
        self.model, self._length, self._programs = model, cache.length_B, programs
        vocabulary = model.cfg.vocab_size
        unlimited = jnp.full(1, np.iinfo(np.int32).max, jnp.int32)
        nothing = jnp.zeros((1, vocabulary), bool)
        self._task = Task(knobs([Sampling()], vocabulary, vocabulary), nothing, jnp.zeros(1, jnp.int32), unlimited)
        context = Context(cache, jnp.zeros((1, model.cfg.hidden_size), model.dtype), None)
        self.held = programs.begin(model, self._task, context, nothing, slots=1, width=0, drafts=0)

    def run(self) -> jax.Array:
        """Choose a token; the cache is donated and comes back."""
        cache = dataclasses.replace(self.held.cache, length_B=jnp.copy(self._length))
        self.held = self._programs.decode(self.model, self._task, dataclasses.replace(self.held, cache=cache), 1)
        return self.held.made_B
