"""Habits that Orbax is kept from: telling every step, choosing chunks by size, copying whole arrays, last words.

There are no options for them. What is replaced is put back at the end of each `with`.
"""

import contextlib
import gc
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from orbax.checkpoint._src.arrays import subchunking
from orbax.checkpoint._src.serialization.type_handlers import NumpyHandler

from . import chunked_writer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax tells every step through absl's logger, and an error that it raises once for each thread it ends."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def hide_leftovers() -> None:
    """Of a read that fails Orbax leaves others under way, whose results nobody waits for. What they raise when they end
    or are collected goes nowhere; from now on it is not shown either."""
    shown = sys.unraisablehook
    if shown is not _show_no_leftovers:
        _show_no_leftovers.others = shown
        sys.unraisablehook = _show_no_leftovers


def collect_leftovers() -> None:
    """Collect them now: Python warns of those that have not begun."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


class _OtherHook:
    """Shows what is raised where nothing can catch it, but for leftovers of Orbax."""

    def __init__(self):
        self.others: Any = sys.__unraisablehook__

    def __call__(self, raised: Any) -> None:
        coroutine = inspect.iscoroutine(raised.object) and "orbax" in raised.object.cr_code.co_filename
        late = raised.object is None and str(raised.exc_value) == "Event loop is closed"
        if not (coroutine or late):
            self.others(raised)


_show_no_leftovers = _OtherHook()


@contextlib.contextmanager
def chunk_shapes_as_given() -> Iterator[None]:
    """Orbax derives the shape of chunks from a size in bytes and axes to cut; here the "axes" are the shape itself."""
    derived = subchunking.choose_chunk_shape
    subchunking.choose_chunk_shape = lambda *_, shard_axes, **__: shard_axes
    try:
        yield
    finally:
        subchunking.choose_chunk_shape = derived


@contextlib.contextmanager
def written_in_bands() -> Iterator[None]:
    """Orbax hands whole arrays to TensorStore, which copies each before it writes the first byte of it."""
    whole_arrays = NumpyHandler._open_and_write
    write = chunked_writer.writer()

    async def in_bands(self: NumpyHandler, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
        await write(value, _values_apart(tspec), ts_context)

    NumpyHandler._open_and_write = in_bands
    try:
        yield
    finally:
        NumpyHandler._open_and_write = whole_arrays


def _values_apart(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` with the nodes of OCDBT's tree in files of their own, named as Orbax names them.

    Otherwise outdated nodes lie among the values, where no SHA-256 of an array and none of a small file covers them.
    """
    nodes = ("btree_node_data_prefix", "version_tree_node_data_prefix")
    prefixes = {"value_data_prefix": "ocdbt_data/", **dict.fromkeys(nodes, "ocdbt_meta/")}
    return {**spec, "kvstore": {**spec["kvstore"], **prefixes}}
