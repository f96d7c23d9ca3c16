"""Programs that record, and the Record that is made of their tapes."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any

import jax
import numpy as np

from ..inspect.record import Record
from ..model.model import Model
from ..parallel.multihost import fetch
from . import prefill_decode, speculative, tape
from .batch import LAYERWISE, OPTIONS, WHOLE, Batch, Programs, layer_by_layer
from .session_file import identity


@cache
def whole(kinds: tuple[str, ...]) -> Programs:
    """`batch.WHOLE`, recording; itself where nothing is recorded."""
    if not kinds:
        return WHOLE
    read, step, drafting = (_recorded(kinds, f) for f in (prefill_decode.read, prefill_decode.step, speculative.step))
    return Programs(
        partial(tape.recorded_blank, kinds),
        jax.jit(read, donate_argnames="context", compiler_options=OPTIONS),
        WHOLE.spread,
        WHOLE.begin,
        jax.jit(partial(prefill_decode.decode, step), donate_argnames="state", compiler_options=OPTIONS),
        jax.jit(partial(prefill_decode.decode, drafting), donate_argnames="state", compiler_options=OPTIONS),
    )


def layerwise(kinds: tuple[str, ...]) -> Programs:
    """`batch.LAYERWISE`, recording; itself where nothing is recorded."""
    if not kinds:
        return LAYERWISE
    read, step, drafting = (_recorded(kinds, f) for f in (prefill_decode.read, prefill_decode.step, speculative.step))
    return Programs(
        partial(tape.recorded_blank, kinds),
        read,
        LAYERWISE.spread,
        LAYERWISE.begin,
        partial(layer_by_layer, step),
        partial(layer_by_layer, drafting),
    )


def _recorded(kinds: tuple[str, ...], function: Callable) -> Callable:
    """`function`, whose first argument is a model, with a recording one."""

    @wraps(function)
    def recorded(model: Model, *arguments, **options):
        return function(tape.recording(model, kinds), *arguments, **options)

    return recorded


class Rows:
    """What the rows of a request saw, taken from each batch when it is done."""

    def __init__(self, kinds: tuple[str, ...], model: Model, prompts: Sequence[Sequence[int]], rows: int):
        self._kinds, self._model = kinds, model
        self._prompts = [prompts[row * len(prompts) // rows] for row in range(rows)]
        self._seen: list[dict[str, np.ndarray]] = [{} for _ in range(rows)]
        self._lengths = [0] * rows

    def take(self, batch: Batch) -> None:
        """Copy the batch's rows to the host: of each, the tokens that were processed."""
        if batch.held is None or not isinstance(batch.held.cache, tape.RecordedCache):
            return
        taken: Any = jax.tree.map(fetch, batch.held.cache.tape)
        for b, (row, transcript) in enumerate(zip(batch.rows, batch.transcripts, strict=True)):
            length = self._lengths[row] = len(self._prompts[row]) + max(len(transcript.tokens) - 1, 0)
            names = dict.fromkeys(name for layer in taken.layers for name in layer)
            self._seen[row] = {name: part[b, :length].copy() for name, part in taken.head.items()}
            for name in names:
                parts = [layer[name][b, :length] for layer in taken.layers if name in layer]
                self._seen[row][name] = np.stack(parts)

    def record(self, new: Sequence[Sequence[int]]) -> Record | None:
        """The record of all rows, `new` being the tokens that were made; None where nothing is recorded."""
        if not self._kinds:
            return None
        tokens = [[*prompt, *made] for prompt, made in zip(self._prompts, new, strict=True)]
        longest = max(map(len, tokens))
        arrays = {
            "tokens": np.array([row + [-1] * (longest - len(row)) for row in tokens], np.int32),
            "prompt": np.array(list(map(len, self._prompts)), np.int32),
            "length": np.array(self._lengths, np.int32),
            **self._padding(max(self._lengths)),
        }
        for row, seen in enumerate(self._seen):
            for name, part in seen.items():
                if name in tape.OF_HEAD:
                    arrays[name][row, : len(part)] = part
                else:
                    arrays[name][:, row, : part.shape[1]] = (
                        part[..., : arrays[name].shape[-1]] if part.ndim > 2 else part
                    )
        about: dict[str, Any] = {"config": self._model.cfg.to_dict(), "model": identity(self._model)}
        return Record(self._kinds, arrays, about)

    def _padding(self, longest: int) -> dict[str, np.ndarray]:
        """What stands where nothing was recorded, NaN for values, [layers, rows, tokens, ...] by name; of what was
        selected, no more columns than tokens."""
        cfg = self._model.cfg
        routing = dataclasses.replace(cfg, first_k_dense_replace=0)
        whole, every = (
            jax.eval_shape(partial(tape.empty, cfg, len(self._seen), max(longest, 1), self._kinds))
            for cfg in (cfg, routing)
        )
        found = {name: part.update(shape=(len(part), longest, *part.shape[2:])) for name, part in whole.head.items()}
        for name, part in every.layers[0].items():
            layers = sum(name in layer for layer in whole.layers)
            found[name] = part.update(shape=(layers, len(part), longest, *part.shape[2:]))
        return {name: np.full(part.shape, tape.PAD.get(name, np.nan), part.dtype) for name, part in found.items()}
