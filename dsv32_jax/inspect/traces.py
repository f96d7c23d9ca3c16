"""Traces: the values that the layers of a model compute for rows of tokens, as arrays, tables and one file."""

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..config import Config
from ..errors import CapacityError, UsageError, listing
from ..system import host
from ..system.array_file import write_arrays
from ..system.files import expand_file_path
from ..system.progress import format_size
from ..system.summary import Summarized
from .trace_format import ARRAYS, KIND, KINDS, read

COLUMNS = {"l": "layer", "m": "layer", "s": "layer", "r": "row", "t": "position", "p": "position", "D": "dimension"}
"""The column of a table for each axis. The others count a token's choices from 0."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trace(Summarized, Mapping[str, np.ndarray]):
    """The values that every layer computes for the tokens of each row; `inspect.trace` makes one. `trace[name]` is:

    tokens         [rows, tokens]                  token ids
    length         [rows]                          the number of tokens in each row
    expert         [MoE layers, rows, tokens, X]   routing, experts: the experts of each token, in no particular order
    gate           as expert                       routing: their gates, which sum to routed_scaling_factor
    norm           as expert                       experts: the norm of each one's output, before its gate
    selected       [layers, rows, tokens, k]       indexer, attention: the positions attended to, -1 for none
    index_score    as selected                     indexer: their index scores, -inf for none
    weight         as selected                     attention: their attention weights, mean over heads; they sum to 1
    spread         [layers, rows, tokens]          attention: entropy of the weights in nats, mean over heads
    mass_selected  as spread                       mass: the share of dense attention's weight on selected positions,
    mass_best      as spread                           on the best choice of as many positions,
    mass_recent    as spread                           and on as many of the most recent positions; means over heads
    top_id         [rows, tokens, n]               logits: the most likely next tokens
    top_logprob    as top_id                       logits: their log-probabilities
    entropy        [rows, tokens]                  logits: entropy of the prediction in nats
    lens_id        [layers, rows, tokens, o]       lens: the most likely next tokens if this layer were the last,
    lens_logprob   as lens_id                          their log-probabilities,
    lens_entropy   as spread                           and the entropy of that prediction in nats
    residual       [s, rows, p, D]                 residual: the residual stream after the layers of
    layer          [s]                                 `layer`
    position       [rows, p]                           at the positions of `position`

    Entry i along tokens belongs to the token at position i. Beyond the end of a row ids are -1, index scores -inf and
    all else is NaN. `about` holds the model's config and the digest of its checkpoint.
    """

    kinds: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name]
        kinds = [kind for kind, names in KINDS.items() if name in names]
        if not kinds:
            raise UsageError(f"a trace has no array {name!r}; this one has {listing(self.arrays, 20)}")
        raise UsageError(f"{name!r} was not traced: keep={{{' or '.join(map(repr, kinds))}}} keeps it")

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return kinds and size, and the shape of every array."""
        rows, tokens = self.arrays["tokens"].shape
        title = f"Trace of {', '.join(self.kinds) or 'nothing'}: {rows} x {tokens} tokens, {format_size(self.nbytes)}"
        return title, {name: str(list(array.shape)) for name, array in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def config(self) -> Config:
        """The model's config."""
        return Config.from_dict(dict(self.about["config"]), "the config in the trace")

    def table(self, name: str) -> np.ndarray:
        """Return the arrays of a kind, or one array, as a structured array: a record for each value that is not
        padding, with its layer, row, position and token. Raises UsageError, and CapacityError if it does not fit in
        memory."""
        return _build_table(self, name)

    def frame(self, name: str) -> Any:
        """Return `table` as a pandas DataFrame. Raises UsageError if pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise UsageError("DataFrames need pandas: pip install pandas; table() needs nothing") from None
        return pandas.DataFrame(self.table(name))

    def count_experts(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Count the uses of each expert [MoE layers, experts] by all tokens, or those of `mask` [rows, tokens]."""
        expert = self["expert"]
        used = [layer[np.ones(expert.shape[1:3], bool) if mask is None else mask] for layer in expert]
        return np.stack([np.bincount(one[one >= 0], minlength=self.config.n_routed_experts) for one in used])

    def save(self, file: str | Path) -> None:
        """Write the trace to one safetensors file, atomically. Raises CapacityError, StorageError."""
        facts = {"kinds": self.kinds, "about": dict(self.about)}
        write_arrays(expand_file_path(file), KIND, facts, self.arrays)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read the file that `save` wrote; needs neither the model nor JAX. Raises CheckpointError, and CapacityError
        if it does not fit in memory."""
        return cls(*read(expand_file_path(file)))


def _build_table(trace: Trace, name: str) -> np.ndarray:
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


def _find_real(trace: Trace, axes: str, shape: tuple[int, ...]) -> np.ndarray:
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
