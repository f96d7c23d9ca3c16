"""Hidden vectors of a text, window by window: all that a model's predictions are made of, beside its head."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from ..generation.memory import rows_bucket
from ..generation.prefill_decode import Context, blank, placed
from ..generation.request import bucket, chunks
from ..model.model import Model
from ..parallel.multihost import fetch
from ..quantization.formats import Weight
from ..system.compilation import initialize
from .passages import Passages
from .variant import Variant

Found = TypeVar("Found")

SIDE_BY_SIDE = 2

Progress = Callable[[int, int], None]
"""Called with how many windows were read, of all."""


def silent(done: int, count: int) -> None:
    """Progress that nobody watches."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model made of the windows: the hidden vectors of each, [n, D] on the host, and its head."""

    passages: Passages
    hidden: list[np.ndarray]
    head: Weight

    def chunk(self, windows: range, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """The vectors of `windows` from their position `start` on as an array of `shape` [B, T, D], zero beyond."""
        h_BTD = np.zeros(shape, self.hidden[0].dtype)
        for b, i in enumerate(windows):
            hidden = self.hidden[i][start : start + shape[1]]
            h_BTD[b, : len(hidden)] = hidden
        return h_BTD


def reading(variant: Variant, read: Passages, progress: Progress = silent) -> Reading:
    """What the model of `variant` makes of the windows; the model itself is not kept."""
    model = variant.load()

    def hidden(group: range) -> list[np.ndarray]:
        rows_BTD = np.concatenate([fetch(part) for part, _, _ in vectors(model, variant, read, group)], axis=1)
        return [row[: len(read.windows[i].tokens)] for row, i in zip(rows_BTD, group, strict=False)]

    return Reading(read, over_groups(hidden, model, read, progress), model.head_VD)


def over_groups(work: Callable[[range], list[Found]], model: Model, read: Passages, progress: Progress) -> list[Found]:
    """What `work` finds of each window, called with one group of them after the other, each in a thread.

    XLA's CPU backend runs much of a program on one core, so there SIDE_BY_SIDE groups are read at the same time; but
    not over a mesh, whose devices wait for each other and must all take the same turns.
    """
    threads = SIDE_BY_SIDE if jax.default_backend() == "cpu" and model.mesh is None else 1
    found: list[Found] = []
    with ThreadPoolExecutor(threads) as pool:
        contexts = [copy_context() for _ in read.groups]
        for some in pool.map(lambda context, group: context.run(work, group), contexts, read.groups):
            found += some
            progress(len(found), len(read.windows))
    return found


def vectors(
    model: Model, variant: Variant, read: Passages, group: range
) -> Iterator[tuple[jax.Array, int, np.ndarray]]:
    """Hidden vectors [B, T, D] of the windows in `group`, a chunk of tokens at a time, with the position of the first
    and the token after each. B is filled up to a power of two."""
    initialize()
    rows = read.filled(group)
    batch, start = rows_bucket(len(rows)), 0
    stored: Any = variant.stored(model)
    context = placed(model, blank(model.cfg, model.dtype, batch, bucket(max(map(len, rows))), stored, 0))
    for tokens_BT, next_BT, count_B in chunks(rows, batch):
        h_BTD, context = _read_jit(model, context, tokens_BT, count_B)
        yield h_BTD, start, next_BT
        start += tokens_BT.shape[1]


@partial(jax.jit, donate_argnames="context")
def _read_jit(model: Model, context: Context, tokens_BT: jax.Array, count_B: jax.Array) -> tuple[jax.Array, Context]:
    h_BTD, cache = model(tokens_BT, context.cache, count_B)
    return h_BTD, dataclasses.replace(context, cache=cache)
