"""A trace as one file. Nothing in it is trusted: shapes are checked before an array is read, and ids before they count
or index anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import CheckpointError, ConfigError, listing, pluralize
from ..system.array_file import Header, read_arrays, write_arrays
from ..system.files import expand_file_path
from .trace_arrays import ARRAYS, KINDS, names_of, shapes

KIND, FORM = "dsv32_jax trace 3", {"kinds": [str], "about": {"config": dict}}
"""The kind of file that a trace is, and the form of its facts."""

DTYPES = {np.int32: "I32", np.float32: "F32"}
"""The names of dtypes in a safetensors header."""

Contents = tuple[tuple[str, ...], Mapping[str, np.ndarray], Mapping[str, Any]]
"""The kinds, arrays and facts of a trace."""


def write(file: str | Path, kinds: tuple[str, ...], arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a trace atomically. Raises CapacityError, StorageError."""
    write_arrays(expand_file_path(file), KIND, {"kinds": kinds, "about": dict(about)}, arrays)


def read(file: str | Path) -> Contents:
    """Return what `write` was given. Raises CheckpointError, and CapacityError if it does not fit in memory."""
    facts, arrays = read_arrays(expand_file_path(file), KIND, FORM, _find_header_problems)
    if problems := _find_value_problems(facts["about"], arrays):
        raise CheckpointError(f"{file} is damaged ({pluralize(len(problems), 'problem')}): {listing(problems)}")
    return tuple(facts["kinds"]), {name: arrays[name] for name in names_of(facts["kinds"])}, facts["about"]


def _find_header_problems(facts: Mapping[str, Any], headers: Mapping[str, Header]) -> list[str]:
    """Return the faults of a file before its arrays are read: kinds, config, names, dtypes and shapes."""
    kinds = facts["kinds"]
    if not KINDS.keys() >= set(kinds):
        return [f"its kinds are {kinds!r:.200}"]
    try:
        cfg = Config.from_dict(facts["about"]["config"], "its config")
    except ConfigError as error:
        return [str(error)]
    wanted = set(names_of(kinds))
    problems = [f"{name} is missing" for name in sorted(wanted - set(headers))]
    problems += [f"{name} is unknown" for name in sorted(set(headers) - wanted)]
    if problems:
        return problems
    sizes = {axis: size for name in wanted for axis, size in zip(ARRAYS[name].axes, headers[name].shape, strict=False)}
    expected = shapes(cfg, kinds, *(sizes.get(axis, 0) for axis in "rtsp"))
    for name, header in headers.items():
        if header != (DTYPES[ARRAYS[name].dtype], expected[name]):
            problems.append(f"{name} is {header.dtype} {list(header.shape)}, not {list(expected[name])}")
    return problems


def _find_value_problems(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the faults of ids and lengths."""
    cfg, problems = Config.from_dict(about["config"]), []
    for name, array in arrays.items():
        if limit := ARRAYS[name].below and getattr(cfg, ARRAYS[name].below):
            if array.size and not -1 <= array.min() <= array.max() < limit:
                problems.append(f"{name} has {array.min()} to {array.max()}; it ends at {limit - 1}")
    lengths, longest = arrays["length"], arrays["tokens"].shape[1]
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) != longest:
        problems.append(f"rows have {lengths.min(initial=0)} to {lengths.max(initial=0)} tokens, not up to {longest}")
    return problems
