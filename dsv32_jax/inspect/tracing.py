"""Prefill rows of tokens once more and keep what the layers compute: routing, index scores, attention, predictions."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from ..config import Config
from ..errors import CapacityError, UsageError, argument, listing, to_integer
from ..generation import memory
from ..generation.programs import capacity_for, chunk_size
from ..generation.score import Chunk, prefill_chunks
from ..generation.session_file import identity
from ..model import validation
from ..model.model import Model
from ..parallel.multihost import fetch
from ..system import host
from ..system.reporter import show_slow
from .observations import Keep, observe_jit
from .trace_format import ARRAYS, check_kinds, shapes
from .traces import Trace

DEFAULT_KINDS = ("attention", "indexer", "logits", "routing")
"""The kinds that cost little beside a prefill. "mass" computes dense attention weights as well, "experts" applies each
expert once more, "lens" applies the head after every layer, "residual" takes much memory."""


def trace(
    model: Model,
    tokens: Sequence[Sequence[int]],
    keep: Collection[str] = DEFAULT_KINDS,
    *,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    cache_dtype: Any = None,
    batch_size: int | None = None,
) -> Trace:
    """Run rows of token ids (prompts with their answers, of any lengths) and return what every layer computed.

    `keep` names the kinds of arrays: "routing", "experts", "indexer", "attention", "mass", "logits", "lens" and
    "residual"; `Trace` lists their arrays. Residual streams are kept after `layers` and at `positions` of each row, -1
    the last (default: all). Rows are prefilled in chunks, as `score` does. In float32 the values are those that
    generated the answer. `estimate_bytes` says before what a trace takes; the work of "mass" grows with the square of
    the longest row. Raises UsageError for bad arguments and CapacityError, before anything runs, if the arrays do not
    fit in memory.
    """
    kinds = check_kinds(keep)
    cfg = validation.config_of(model)
    rows = validation.check_prompts(tokens, cfg.vocab_size)
    longest = validation.check_length(max(map(len, rows)), cfg.max_position_embeddings)
    if "residual" not in kinds and not (layers is None and positions is None):
        raise UsageError(f"layers and positions choose residual streams: add 'residual' to {argument('keep')}")
    chosen = _check_layers(layers, cfg.num_hidden_layers) if "residual" in kinds else ()
    places = _check_positions(positions, [len(row) for row in rows])
    sizes = shapes(cfg, kinds, len(rows), longest, len(chosen), places.shape[1])
    require_room(sizes, longest)
    arrays = {name: np.full(shape, ARRAYS[name].padding, ARRAYS[name].dtype) for name, shape in sizes.items()}
    for b, row in enumerate(rows):
        arrays["tokens"][b, : len(row)], arrays["length"][b] = row, len(row)
    if "residual" in kinds:
        arrays["layer"][:], arrays["position"][:] = chosen, places
    capacity = capacity_for(cfg, longest)
    on_device = count_bytes(shapes(cfg, kinds, 1, capacity, len(chosen), capacity))
    extra = on_device * min(chunk_size(), capacity) // capacity
    step = partial(observe_jit, Keep(kinds, chosen))
    with show_slow(sum(map(len, rows)), unit="tokens") as count:
        for chunk in prefill_chunks(model, rows, step, cache_dtype=cache_dtype, batch_size=batch_size, extra=extra):
            _copy(chunk, arrays)
            count(sum(chunk.counts))
    return Trace(kinds, arrays, {"config": cfg.to_dict(), "model": identity(model)})


def estimate_bytes(
    cfg: Config,
    keep: Collection[str] = DEFAULT_KINDS,
    *,
    rows: int = 1,
    tokens: int,
    layers: int | None = None,
    positions: int | None = None,
) -> int:
    """Return the size of a trace of `rows` rows of `tokens` tokens in bytes; of residual streams after so many layers
    at so many positions (default: all)."""
    layers = cfg.num_hidden_layers if layers is None else layers
    return count_bytes(shapes(cfg, check_kinds(keep), rows, tokens, layers, tokens if positions is None else positions))


def count_bytes(sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of arrays of these shapes, all of 4-byte numbers."""
    return 4 * sum(map(math.prod, sizes.values()))


def require_room(sizes: Mapping[str, tuple[int, ...]], tokens: int) -> None:
    """Raise CapacityError if a trace of these arrays does not fit in the host's memory."""
    needed, free, rows = count_bytes(sizes), host.get_free_memory(), sizes["length"][0]
    if needed > free * memory.CACHE_SHARE:
        each = ", ".join(
            f"{name} {4 * math.prod(shape) / (rows * tokens) / 1e3:.1f} kB" for name, shape in sizes.items()
        )
        raise CapacityError(
            f"a trace of {rows} rows of up to {tokens} tokens takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            f"free; nothing was run. A token takes: {each}. Keep fewer kinds, layers or positions, or trace fewer rows "
            "or shorter ones"
        )


def _check_layers(layers: Any, count: int) -> tuple[int, ...]:
    """Return the layers whose residual stream is kept, in order. Raises UsageError."""
    chosen = list(range(count) if layers is None else layers)
    if wrong := [i for i in chosen if to_integer(i) not in range(count)]:
        raise UsageError(f"{argument('layers')} takes layers 0 to {count - 1}, not {listing(map(repr, wrong))}")
    return tuple(sorted(set(map(int, chosen))))


def _check_positions(positions: Any, lengths: Sequence[int]) -> np.ndarray:
    """Return the positions of each row [rows, p], -1 beyond its end. Raises UsageError."""
    if positions is None:
        every = np.arange(max(lengths), dtype=np.int32)
        return np.where(every < np.array(lengths)[:, None], every, -1)
    chosen, shortest = list(positions), min(lengths)
    if wrong := [i for i in chosen if to_integer(i) not in range(-shortest, shortest)]:
        raise UsageError(
            f"{argument('positions')} takes positions that every row has; the shortest has {shortest} tokens, "
            f"which leaves out {listing(map(repr, wrong))}"
        )
    return np.array([[i % length for i in chosen] for length in lengths], np.int32).reshape(len(lengths), -1)


def _copy(chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the values of a chunk to their places in the arrays of the whole trace."""
    layers, head = jax.tree.map(fetch, chunk.values)
    for name, array in arrays.items():
        targets, sources = [array], [head[name]] if name in head else []
        if parts := [values[name] for values in layers if name in values]:
            targets, sources = array, parts
        for target, source in zip(targets, sources, strict=False):
            for b, (row, count) in enumerate(zip(chunk.rows, chunk.counts, strict=True)):
                if name == "residual":
                    place = arrays["position"][row] - chunk.start
                    here = (0 <= place) & (place < count)
                    target[row, here] = source[b, place[here]]
                else:
                    target[row, chunk.start : chunk.start + count] = source[b, :count][..., : target.shape[-1]]
