"""The arrays of a trace as a table: a record for each value that is not padding."""

import importlib
import math
from itertools import starmap
from typing import Any

import numpy as np

from ..errors import CapacityError, UsageError
from ..system import host
from ..system.progress import format_size
from .trace_arrays import ARRAYS, KINDS

COLUMNS = {"l": "layer", "m": "layer", "s": "layer", "r": "row", "t": "position", "p": "position", "D": "dimension"}
"""The column of each axis. The others count a token's choices from 0."""


def build(trace: Any, name: str) -> np.ndarray:
    """Return the table of a kind, or of one array. Values with fewer axes than others of their kind are repeated."""
    names = [each for each in KINDS.get(name, (name,)) if name != "residual" or each == name]
    arrays = {each: trace[each] for each in names}
    axes = max((ARRAYS[each].axes for each in names), key=len)
    shape = max((array.shape for array in arrays.values()), key=len)
    token = [("token", np.int32)] if set(axes) & {"t", "p"} else []
    index = [(COLUMNS.get(axis, "choice"), np.int32) for axis in axes]
    values = [each for each in names if each not in ("tokens", *dict(index))]
    dtype = np.dtype([*index, *token, *((each, arrays[each].dtype) for each in values)])
    needed, free = math.prod(shape) * (dtype.itemsize + 8 * len(axes)), host.get_free_memory()
    if needed > free:
        raise CapacityError(
            f"the table of {name!r} takes up to {format_size(needed)}, but {format_size(free)} are free; use the arrays"
        )
    whole = {each: np.broadcast_to(_align(array, ARRAYS[each].axes, axes), shape) for each, array in arrays.items()}
    at = np.nonzero(np.all([_find_real(trace, axes, shape), *starmap(_is_value, whole.items())], axis=0))
    table = np.empty(len(at[0]), dtype)
    for axis, place in zip(axes, at, strict=True):
        table[COLUMNS.get(axis, "choice")] = place
    if "s" in axes:
        table["layer"] = trace["layer"][table["layer"]]
    if "p" in axes:
        table["position"] = trace["position"][table["row"], table["position"]]
    if "m" in axes:
        table["layer"] += trace.config.first_k_dense_replace
    if token:
        table["token"] = trace["tokens"][table["row"], table["position"]]
    for each in values:
        table[each] = whole[each][at]
    return table


def to_frame(table: np.ndarray) -> Any:
    """Return a structured array as a pandas DataFrame. Raises UsageError."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise UsageError("DataFrames need pandas: pip install pandas; table() needs nothing") from None
    return pandas.DataFrame(table)


def _find_real(trace: Any, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return which values belong to a token of a row."""
    tokens = np.arange(trace["tokens"].shape[1]) < trace["length"][:, None]
    real, own = (trace["position"] >= 0, "rp") if "p" in axes else (tokens, "rt")
    return np.broadcast_to(_align(real, own, axes) if own[1] in axes else True, shape)


def _is_value(name: str, array: np.ndarray) -> np.ndarray:
    padding = ARRAYS[name].padding
    return ~np.isnan(array) if np.isnan(padding) else array != padding


def _align(array: np.ndarray, own: str, axes: str) -> np.ndarray:
    """Return the array with an axis of size 1 for each of `axes` that it does not have."""
    return array.reshape([array.shape[own.index(axis)] if axis in own else 1 for axis in axes])
