"""Writing an array with TensorStore chunk by chunk, where a single write would copy all of it first.

Measured for 0.94 GB of NVFP4 codes: one write takes 0.95 GB more memory and 130 MB/s, bands of 64 MB that TensorStore
does not flush one by one 0.07 GB more and 1000 MB/s.
"""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from . import chunks

BYTES = chunks.LARGEST
"""Bytes of an array that are on their way together: one chunk of the largest size."""

Write = Callable[[np.ndarray, dict[str, Any], ts.Context], Awaitable[None]]


def writer() -> Write:
    """A function that writes arrays: (array, TensorStore spec, context). All that it writes share one band.

    What it wrote may not be on disk before the caller has flushed the files.
    """
    turn = asyncio.Lock()
    contexts: dict[int, ts.Context] = {}

    async def write(array: np.ndarray, spec: dict[str, Any], context: ts.Context) -> None:
        lazy = contexts.setdefault(id(context), ts.Context({"file_io_sync": False}, parent=context))
        store = await ts.open(ts.Spec(spec), create=True, open=True, context=lazy)
        for band in _bands(array.shape, store.chunk_layout.write_chunk.shape, array.itemsize):
            async with turn:
                writes = (store[at].write(array[at], can_reference_source_data_indefinitely=True) for at in band)
                await asyncio.gather(*writes)

    return write


def _bands(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Iterator[list[tuple[slice, ...]]]:
    """The chunks of an array, about BYTES of them at a time."""
    count = max(1, BYTES // max(1, math.prod(chunk) * itemsize))
    starts = itertools.product(*(range(0, size, step) for size, step in zip(shape, chunk, strict=True)))
    places = (tuple(slice(at, at + step) for at, step in zip(start, chunk, strict=True)) for start in starts)
    while band := list(itertools.islice(places, count)):
        yield [tuple(slice(s.start, min(s.stop, size)) for s, size in zip(at, shape, strict=True)) for at in band]
