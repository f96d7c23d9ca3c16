"""Habits that Orbax is kept from while it saves: telling every step, choosing chunks by size, copying whole arrays.

There are no options for them. What is replaced is put back at the end of each `with`.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from orbax.checkpoint._src.arrays import subchunking
from orbax.checkpoint._src.serialization.type_handlers import NumpyHandler

from . import bands


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
    write = bands.writer()

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
