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
from jax.sharding import Mesh

from ..checkpoint.random_weights import leaf_maker, uniform
from ..config import Config
from ..generation.batch import WHOLE, Programs
from ..generation.options import Sampling
from ..generation.prefill_decode import Context, State, Task
from ..generation.sampling_params import knobs
from ..model import mla
from ..model.cache import Cache, LayerCache, dtype_of, empty_layer
from ..model.indexer import scores_of_cache, select
from ..model.model import Model, build
from ..model.ops import rotation
from ..parallel.sharding import by_rows
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


def random_model(cfg: Config, mesh: Mesh | None = None) -> Model:
    """A model of `cfg` with random weights, NVFP4 as published checkpoints are, made where they belong."""
    return jax.block_until_ready(build(cfg, DTYPE, leaf_maker(cfg, DTYPE, mesh=mesh), mesh=mesh))


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


def filled(
    cfg: Config, capacity: int, dtype: np.dtype, batch: int = 1, length: int | None = None, mesh: Mesh | None = None
) -> Cache:
    """A cache of rows that have `length` tokens, synthetic ones of standard deviation 1; by default there is room for
    one more."""
    layers = tuple(_filled_layer(cfg, batch, capacity, dtype, mesh, np.uint32(i)) for i in range(cfg.num_hidden_layers))
    lengths = jnp.full(batch, capacity - 1 if length is None else length, jnp.int32)
    return jax.block_until_ready(Cache(layers, by_rows(mesh, lengths)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _filled_layer(
    cfg: Config, batch: int, capacity: int, dtype: np.dtype, mesh: Mesh | None, number: jax.Array
) -> LayerCache:
    sizes = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim)
    new = [uniform((batch, capacity, size), DTYPE.name, number * 3 + i, 0.0, 1.0) for i, size in enumerate(sizes)]
    slots = jnp.broadcast_to(jnp.arange(capacity), (batch, capacity))
    return by_rows(mesh, empty_layer(cfg, batch, capacity, dtype).write(slots, *new))


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
    """Decodes `steps` tokens a row as `generate` does, again and again in the same slots of `cache`, which it takes
    over."""

    def __init__(self, model: Model, cache: Cache, programs: Programs = WHOLE, steps: int = 1, program: Any = None):
        """`programs` are those of `generate`; `program`: that of another Step of these shapes."""
        self.model, self._steps = model, np.int32(steps)
        self._length = np.asarray(cache.length_B)
        batch, vocabulary = len(self._length), model.cfg.vocab_size
        unlimited = jnp.full(batch, np.iinfo(np.int32).max, jnp.int32)
        nothing = jnp.zeros((batch, vocabulary), bool)
        choice = knobs([Sampling()] * batch, vocabulary, vocabulary)
        self._task = by_rows(model.mesh, Task(choice, nothing, jnp.zeros(batch, jnp.int32), unlimited))
        hidden = by_rows(model.mesh, uniform((batch, model.cfg.hidden_size), model.dtype.name, jnp.uint32(7), 0.0, 1.0))
        self.held = programs.begin(
            model, self._task, Context(cache, hidden, None), by_rows(model.mesh, nothing), slots=1, width=0, drafts=0
        )
        self._decode = programs.decode
        self.program: Any = self._compiled({}) if program is None else program

    @property
    def _state(self) -> State:
        """At the same place again."""
        cache = dataclasses.replace(self.held.cache, length_B=by_rows(self.model.mesh, self._length))
        return dataclasses.replace(self.held, cache=cache)

    def in_pieces(self) -> Any:
        """The program in the pieces that a profile tells apart: inside a CUDA graph it sees nothing."""
        if jax.default_backend() != "gpu":
            return self.program
        return self._compiled({"xla_gpu_graph_min_graph_size": 1 << 20})

    def _compiled(self, options: dict[str, Any]) -> Any:
        return self._decode.lower(self.model, self._task, self._state, self._steps).compile(options or None)

    def run(self) -> jax.Array:
        """Choose the tokens; the cache is donated and comes back."""
        self.held = self.program(self.model, self._task, self._state, self._steps)
        return self.held.made_B
