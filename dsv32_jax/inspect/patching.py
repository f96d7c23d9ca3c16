"""Activation patching: what decides an answer, found by putting the residual stream of one run into another."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError, argument, listing, require_integer, to_integer
from ..generation import memory
from ..generation.programs import capacity_for
from ..generation.score import score
from ..model import validation
from ..model.cache import dtype_of
from ..model.model import Model
from ..system.reporter import show_slow
from ..system.summary import Summarized
from .edited_modules import Patch
from .interventions import change_stream, get_changes, place_whole
from .tracing import trace

BATCH = 16
"""The most rows that are patched at once."""


@dataclasses.dataclass(frozen=True, repr=False)
class Patching(Summarized):
    """The log-probability of an answer in two runs, and in the second with parts of the first.

    clean, corrupted  log-probability of `answer` after each prompt
    patched           [layers, positions] after the corrupted prompt, if the residual stream after a layer is the clean
                      run's at a position, or at a group of positions
    layers            the layer of each row of `patched`
    positions         the positions of each column, a tuple each
    """

    answer: int
    clean: float
    corrupted: float
    patched: np.ndarray
    layers: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]

    @property
    def change(self) -> np.ndarray:
        """The change that each patch makes to the log-probability after the corrupted prompt [layers, positions]."""
        return self.patched - self.corrupted

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the log-probabilities of the two runs, and the largest change."""
        layer, column = np.unravel_index(np.argmax(np.abs(self.change)), self.change.shape)
        at = ", ".join(map(str, self.positions[column]))
        return f"Patching of {len(self.layers)} layers and {len(self.positions)} positions", {
            "answer": f"token {self.answer}",
            "clean": f"log-probability {self.clean:.3f}",
            "corrupted": f"log-probability {self.corrupted:.3f}",
            "largest": f"{self.change[layer, column]:+.3f} after layer {self.layers[layer]} at position {at}",
        }


def patch(
    model: Model,
    clean: Sequence[int],
    corrupted: Sequence[int],
    answer: int,
    *,
    layers: Iterable[int] | None = None,
    positions: Iterable[int | Iterable[int]] | None = None,
    cache_dtype: Any = None,
) -> Patching:
    """Return how the log-probability of the token `answer` after the prompt `corrupted` changes if the residual stream
    after a layer, at a position, is that of the prompt `clean`, which has as many tokens.

    Every one of `layers` (default: all) is patched at every one of `positions`, which may be groups of positions that
    are patched together; by default at each position from the first on where the prompts differ. A patch is a prefill
    of the prompt; up to 16 are one batch. Raises UsageError, and CapacityError before anything runs.
    """
    cfg = validation.config_of(model)
    prompts = validation.check_prompts([clean, corrupted], cfg.vocab_size)
    answer = require_integer("answer", answer, 0, cfg.vocab_size - 1)
    if len(prompts[0]) != len(prompts[1]) or prompts[0] == prompts[1]:
        raise UsageError(
            f"{argument('clean')} and {argument('corrupted')} must be different prompts of equal length; they have "
            f"{len(prompts[0])} and {len(prompts[1])} tokens"
        )
    groups = _check_groups(positions, *prompts)
    found = trace(model, prompts[:1], {"residual"}, layers=layers, cache_dtype=cache_dtype)
    rows = [[*prompt, answer] for prompt in prompts]
    scores = [one[-1] for one in score(model, rows, cache_dtype=cache_dtype).logprobs]
    capacity, dtype = capacity_for(cfg, len(rows[0])), dtype_of(cache_dtype, model.dtype)
    batch = memory.plan_batch(cfg, min(BATCH, memory.round_up_rows(len(groups))), 1, capacity, dtype, 0, model.mesh)
    chosen = tuple(found["layer"].tolist())
    patched = np.zeros((len(chosen), len(groups)))
    with show_slow(patched.size, unit="patches") as count:
        for i, first in itertools.product(range(len(chosen)), range(0, len(groups), batch)):
            part = groups[first : first + batch]
            other = _patch_rows(model, chosen, chosen[i], found["residual"][i, 0], part, batch)
            again = score(other, [rows[1]] * batch, cache_dtype=cache_dtype, batch_size=batch).logprobs
            patched[i, first : first + len(part)] = [one[-1] for one in again[: len(part)]]
            count(len(part))
    return Patching(answer, scores[0], scores[1], patched, chosen, groups)


def _check_groups(positions: Any, clean: list[int], corrupted: list[int]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of positions that are patched together. Raises UsageError."""
    length = len(clean)
    if positions is None:
        first = next(i for i in range(length) if clean[i] != corrupted[i])
        return tuple((i,) for i in range(first, length))
    given = [list(group) if isinstance(group, Iterable) else [group] for group in positions]
    groups = [tuple(to_integer(i) for i in group) for group in given]
    wrong = [group for group in groups if not group or not all(i is not None and 0 <= i < length for i in group)]
    if wrong or not groups:
        raise UsageError(
            f"{argument('positions')} takes positions 0 to {length - 1}, or groups of them, not "
            f"{listing(map(repr, wrong)) or 'nothing'}"
        )
    return tuple(tuple(i for i in group if i is not None) for group in groups)


def _patch_rows(
    model: Model, layers: tuple[int, ...], layer: int, stream: np.ndarray, groups: Any, batch: int
) -> Model:
    """Return the model that patches the stream after `layer`, in each row of a batch at one group of positions. All of
    `layers` have a patch, so that each runs the same program; those of the others are nowhere."""
    nowhere = np.zeros((batch, len(stream)), bool)
    here = nowhere.copy()
    for row, group in enumerate(groups):
        here[row, list(group)] = True
    places, other = {True: place_whole(model, here), False: place_whole(model, nowhere)}, place_whole(model, stream)
    for i in layers:
        model = change_stream(model, i, (*get_changes(model, i), Patch(other, places[i == layer])))
    return model
