"""What a prompt's length costs while it is read in chunks, and what a batch saves: rows of `dsv32 bench context`."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import leaf_maker
from ..config import Config
from ..generation.batch import WHOLE
from ..generation.generate import generate
from ..generation.prefill_decode import blank, placed
from ..model.model import Model, build
from .measure import Row
from .parts import DTYPE, random_model

COUNTS = (4, 2, 1)
"""Of a prompt, a quarter, half and all are timed."""


def memory_rows(cfg: Config, capacity: int, chunk: int) -> Iterator[Row]:
    """A row for each of three programs that read a chunk: the half of `chunk`, `chunk`, and `chunk` with four times the
    capacity; bytes beside weights and results, and of the cache. Nothing is run."""
    model = jax.eval_shape(lambda: build(cfg, DTYPE, leaf_maker(cfg, DTYPE)))
    for slots, size in ((capacity, chunk // 2), (capacity, chunk), (4 * capacity, chunk)):
        context = jax.eval_shape(partial(blank, cfg, DTYPE, 1, slots, DTYPE, 0))
        tokens, count = jax.ShapeDtypeStruct((1, size), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        program = WHOLE.read.lower(model, context, tokens, tokens, count).compile()
        yield {
            "capacity": slots,
            "chunk": size,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(context.cache)),
        }


def time_rows(cfg: Config, tokens: int, chunk: int) -> Iterator[Row]:
    """A row for the seconds from the first token to a quarter, half and all of `tokens`, a multiple of four chunks."""
    model = random_model(cfg)
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, tokens), np.int32)
    _read(model, prompt[:, :chunk], tokens, chunk)
    seconds = _read(model, prompt, tokens, chunk)
    for part in COUNTS:
        yield {"tokens": tokens // part, "seconds": sum(seconds[: len(seconds) // part])}


def _read(model: Model, prompt: np.ndarray, capacity: int, chunk: int) -> list[float]:
    """Seconds of each chunk of `prompt`, from an empty cache on."""
    context: Any = placed(model, blank(model.cfg, model.dtype, 1, capacity, model.dtype, 0))
    seconds = []
    for start in range(0, prompt.shape[1], chunk):
        tokens = prompt[:, start : start + chunk]
        begin = time.perf_counter()
        context = jax.block_until_ready(WHOLE.read(model, context, tokens, tokens, np.full(1, chunk, np.int32)))
        seconds.append(time.perf_counter() - begin)
    return seconds


def ragged(count: int, shortest: int, longest: int, vocabulary: int) -> list[list[int]]:
    """`count` prompts of random tokens, their lengths spread evenly."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(shortest, longest, count).astype(int)
    return [rng.integers(2, vocabulary, length).tolist() for length in lengths]


def batch_rows(cfg: Config, prompts: Sequence[Sequence[int]], new: int) -> Iterator[Row]:
    """A row for all prompts in one batch and one for each alone, with the seconds of their `new` tokens each.

    A capacity for all and no end token: every run takes as many steps. What is compiled is compiled before.
    """
    model = random_model(cfg)
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "capacity": max(map(len, prompts)) + new,
        "batch_size": len(prompts),
    }

    def timed(how: str, runs: Sequence[Sequence[Sequence[int]]]) -> Row:
        for rows in runs:
            generate(model, rows, **options)
        start = time.perf_counter()
        made = [generate(model, rows, **options) for rows in runs]
        seconds = time.perf_counter() - start
        return {"how": how, "seconds": seconds, "tokens": sum(one.stats.new_tokens for one in made)}

    yield timed(f"{len(prompts)} rows together", [prompts])
    yield timed(f"{len(prompts)} rows one by one", [[prompt] for prompt in prompts])
