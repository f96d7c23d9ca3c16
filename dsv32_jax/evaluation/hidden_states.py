"""Hidden states of a corpus, window by window: with the model's head, all that its predictions are made of."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from ..generation.prefill_decode import Context
from ..generation.score import Chunk, prefill_chunks
from ..model.model import Model
from ..parallel.multihost import fetch
from ..quantization.formats import Weight
from .corpus import Corpus
from .variant import Variant

Value = TypeVar("Value")

THREADS = 2

Progress = Callable[[int, int], None]
"""Called with the number of windows done and their total."""


def ignore_progress(done: int, count: int) -> None:
    """The default `Progress`."""


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """The normed hidden states of every window, [n, D] on the host, and the head that turns them into logits."""

    corpus: Corpus
    windows: list[np.ndarray]
    head: Weight

    def chunk(self, batch: range, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the states of a batch of windows from position `start` on, padded with zeros to `shape` [B, T, D]."""
        h_BTD = np.zeros(shape, self.windows[0].dtype)
        for b, i in enumerate(batch):
            states = self.windows[i][start : start + shape[1]]
            h_BTD[b, : len(states)] = states
        return h_BTD


def compute_hidden_states(variant: Variant, corpus: Corpus, progress: Progress = ignore_progress) -> HiddenStates:
    """Return the hidden states that the model of `variant` computes; the model itself is released."""
    model = variant.load()

    def compute(batch: range) -> list[np.ndarray]:
        parts = [fetch(chunk.values[0]) for chunk in prefill_hidden(model, variant, corpus, batch)]
        rows_BTD = np.concatenate(parts, axis=1)
        return [row[: len(corpus.windows[i].tokens)] for row, i in zip(rows_BTD, batch, strict=False)]

    return HiddenStates(corpus, map_batches(compute, model, corpus, progress), model.head_VD)


def map_batches(
    function: Callable[[range], list[Value]], model: Model, corpus: Corpus, progress: Progress
) -> list[Value]:
    """Call `function` with each batch of windows, each call in a thread, and return its values for all windows.

    XLA's CPU backend runs much of a program on one core, so on CPUs several batches run at a time; not over a mesh,
    whose devices wait for each other and must all run programs in one order.
    """
    threads = THREADS if jax.default_backend() == "cpu" and model.mesh is None else 1
    values: list[Value] = []
    with ThreadPoolExecutor(threads) as pool:
        contexts = [copy_context() for _ in corpus.batches]
        for some in pool.map(lambda context, batch: context.run(function, batch), contexts, corpus.batches):
            values += some
            progress(len(values), len(corpus.windows))
    return values


def prefill_hidden(model: Model, variant: Variant, corpus: Corpus, batch: range) -> Iterator[Chunk]:
    """Prefill a batch of windows and yield, for each chunk, the hidden states [B, T, D] and the next tokens [B, T]."""
    rows = corpus.rows(batch)
    yield from prefill_chunks(model, rows, _hidden_jit, cache_dtype=variant.cache_dtype, batch_size=len(rows))


@partial(jax.jit, donate_argnames="context")
def _hidden_jit(
    model: Model, context: Context, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array
) -> tuple[Context, tuple[jax.Array, jax.Array]]:
    h_BTD, cache = model(tokens_BT, context.cache, count_B)
    return dataclasses.replace(context, cache=cache), (h_BTD, next_BT)
