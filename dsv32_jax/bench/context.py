"""`dsv32 bench context`: the cost of a long context, part by part of a decode step and over the length of a prompt.

Each part of a step is a program of its own on the arrays of the step: queries made by the model's matrices, and a cache
of synthetic values.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import uniform
from ..config import Config
from ..errors import UsageError, require_integer
from ..generation.prefill_decode import empty_caches, new_state
from ..generation.programs import WHOLE
from ..generation.request import chunk_size
from ..model import indexer, mla
from ..model.cache import Cache, dtype_of
from ..model.model import Model
from ..model.ops import rotation
from .decode_step import DTYPE, DecodeStep, fill_cache, make_model, require_memory
from .measure import Row, format_table, measure_median

SECTIONS = ("decode", "prefill")
CONTEXTS = (2048, 8192, 32768, 131072)
CACHES = ("bfloat16", "fp8")
LAYERS = 4

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 16,
}
"""Sizes that differ from DeepSeek-V3.2; heads and indexer, which long contexts are about, are the true ones."""

DECODE = """\
Decode: ms a token, batch 1, {layers} layers with the true heads and indexer (hidden size {hidden}, {experts} experts)
at the end of a context of synthetic values. scoring: index scores of all cached keys. top-k: the {topk} largest.
attention: over those. rest: the whole step less these three (projections, experts, head, sampling, cache writes). A
context of {topk} is attended to as a whole."""

PREFILL = """
Prefill: chunks of {chunk}, {layers} of these layers, bfloat16 cache. temp: the program's memory beside weights, cache
and results. time: from the first token on, without compilation."""

PARTS = ("scoring", "topk", "attention")


def _format_ms(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else f"{row[name] * 1e3:.2f}"


DECODE_COLUMNS = (
    ("cache", 8, lambda row: row["cache"]),
    ("context", 7, lambda row: str(row["context"])),
    *((name.replace("topk", "top-k"), 9, _format_ms(name)) for name in (*PARTS, "rest", "whole")),
)
PREFILL_COLUMNS = (
    ("tokens", 8, lambda row: str(row["tokens"])),
    ("time s", 9, lambda row: f"{row['seconds']:.2f}"),
    ("tokens/s", 9, lambda row: f"{row['tokens'] / row['seconds']:.0f}"),
    ("temp MB", 9, lambda row: f"{row['temporary_bytes'] / 1e6:.1f}"),
)


def run(arguments: argparse.Namespace) -> None:
    """Print the tables of the sections that are asked for. Raises UsageError, CapacityError."""
    tokens, layers = arguments.prefill, arguments.layers
    if tokens < 4 * chunk_size() or tokens % (4 * chunk_size()):
        raise UsageError(f"--prefill must be a multiple of {4 * chunk_size()}, not {tokens}")
    require_integer("layers", layers, 1, 1000)
    for section in arguments.section or SECTIONS:
        cfg = make_config(WIDE, LAYERS if section == "decode" else layers)
        sizes = {"layers": cfg.num_hidden_layers, "hidden": cfg.hidden_size, "experts": cfg.n_routed_experts}
        longest = max(CONTEXTS) if section == "decode" else tokens
        require_memory(cfg, None, [1], longest, DTYPE)
        if section == "decode":
            print(DECODE.format(topk=cfg.index_topk, **sizes))
            lines = format_table(DECODE_COLUMNS, decode_rows(cfg, CONTEXTS, CACHES))
        else:
            print(PREFILL.format(chunk=chunk_size(), **sizes))
            lines = format_table(PREFILL_COLUMNS, prefill_rows(cfg, tokens, chunk_size()))
        for line in lines:
            print(line, flush=True)


def make_config(sizes: dict[str, int], layers: int) -> Config:
    """Return DeepSeek-V3.2's config with other `sizes` and `layers` layers, the first of several dense."""
    from .. import configs

    cfg = Config.from_json(configs.path("deepseek_v32"))
    return dataclasses.replace(cfg, **sizes, num_hidden_layers=layers, first_k_dense_replace=int(layers > 1))


def decode_rows(cfg: Config, contexts: Sequence[int], caches: Sequence[str], seconds: float = 1.0) -> Iterator[Row]:
    """Yield a row for each cache and context: seconds a token of all layers, None for a part that does not run.

    Each time is the median of about `seconds` of repeats, at least three.
    """
    model = make_model(cfg)
    repeats = 1 if jax.default_backend() == "cpu" else 16

    def measure(run: Callable[[], Any]) -> float:
        return measure_median(lambda: jax.block_until_ready([run() for _ in range(repeats)]), seconds).wall / repeats

    for stored in caches:
        for context in contexts:
            cache = fill_cache(cfg, context, dtype_of(stored, DTYPE))
            parts = {name: measure(run) for name, run in make_parts(model, cache).items()}
            whole = measure(DecodeStep(model, cache).run)
            row = {"cache": stored, "context": context, **dict.fromkeys(PARTS), **parts}
            yield {**row, "rest": whole - sum(parts.values()), "whole": whole}


def prefill_rows(cfg: Config, tokens: int, chunk: int) -> Iterator[Row]:
    """Yield a row for a quarter, half and all of a prompt of `tokens` tokens: seconds from the first token on."""
    model = make_model(cfg)
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, tokens), np.int32)
    count, row = np.full(1, chunk, np.int32), np.zeros(1, np.int32)
    state = new_state(model, empty_caches(cfg, 1, tokens, model.dtype, 0), 0)
    program = WHOLE.prefill.lower(model, state, prompt[:, :chunk], prompt[:, :chunk], count, row).compile()
    seconds = []
    for start in range(0, tokens, chunk):
        part = prompt[:, start : start + chunk]
        begin = time.perf_counter()
        state = jax.block_until_ready(program(model, state, part, part, count, row))
        seconds.append(time.perf_counter() - begin)
    temporary = program.memory_analysis().temp_size_in_bytes
    for share in (4, 2, 1):
        total = sum(seconds[: len(seconds) // share])
        yield {"tokens": tokens // share, "seconds": total, "temporary_bytes": temporary}


class Queries(NamedTuple):
    """One layer's queries: attention's content and rotated parts, the indexer's, and the weights of its heads."""

    content: jax.Array
    rotated: jax.Array
    index: jax.Array
    weight: jax.Array


def make_parts(model: Model, cache: Cache) -> dict[str, Callable[[], Any]]:
    """Return functions that run the parts of a decode step over `cache` in all layers.

    If the indexer selects the whole cache, it is neither scored nor searched.
    """
    hidden = uniform((1, 1, model.cfg.hidden_size), model.dtype.name, jnp.uint32(9), 0.0, 1.0)
    queries = make_queries(model, hidden, cache.length_B[:, None])
    if cache.capacity <= model.cfg.index_topk:
        return {"attention": lambda: attend_to_all(model, queries, cache)}
    scores = score_cache(queries, cache)
    selected = select_topk(scores, model.cfg.index_topk)
    return {
        "scoring": lambda: score_cache(queries, cache),
        "topk": lambda: select_topk(scores, model.cfg.index_topk),
        "attention": lambda: attend_to_selected(model, queries, cache, selected),
    }


@jax.jit
def make_queries(model: Model, hidden: jax.Array, position: jax.Array) -> list[Queries]:
    """Return the queries of every layer."""
    turns = rotation(position, model.cfg)

    def of_layer(layer: Any) -> Queries:
        latent = layer.mla.latent_query(hidden)
        index = layer.indexer.queries(latent, *turns)
        content, rotated = layer.mla.queries(latent, *turns)
        return Queries(content, rotated, index, layer.indexer.head_weights(hidden))

    return [of_layer(layer) for layer in model.layers]


@jax.jit
def score_cache(queries: list[Queries], cache: Cache) -> list[jax.Array]:
    """Return the index scores of every layer."""
    position = cache.length_B[:, None]
    pairs = zip(queries, cache.layers, strict=True)
    return [indexer.score_slots(query.index, query.weight, layer, position) for query, layer in pairs]


@partial(jax.jit, static_argnums=1)
def select_topk(scores: list[jax.Array], count: int) -> list[jax.Array]:
    """Return the positions of the largest scores in every layer."""
    return [indexer.select_topk(score, count) for score in scores]


@jax.jit
def attend_to_selected(
    model: Model, queries: list[Queries], cache: Cache, selected: list[jax.Array]
) -> list[jax.Array]:
    """Return every layer's attention over the selected positions."""
    return [
        mla.attend_sparse(layer.mla, query.content, query.rotated, layer_cache, positions, cache.length_B[:, None])
        for layer, query, layer_cache, positions in zip(model.layers, queries, cache.layers, selected, strict=True)
    ]


@jax.jit
def attend_to_all(model: Model, queries: list[Queries], cache: Cache) -> list[jax.Array]:
    """Return every layer's attention over a cache no longer than what the indexer selects."""
    visible = jnp.arange(cache.capacity) <= cache.length_B[:, None, None]
    attend = mla.choose_dense(model.cfg, 1, cache.capacity)
    return [
        attend(layer.mla, query.content, query.rotated, layer_cache, visible)
        for layer, query, layer_cache in zip(model.layers, queries, cache.layers, strict=True)
    ]
