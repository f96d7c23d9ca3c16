"""The arrays of a trace: their names, axes, dtypes and sizes, and the file that holds them.

Nothing in a file is trusted: shapes are checked before an array is read, and ids before they count or index anything.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import Config
from ..errors import CheckpointError, ConfigError, UsageError, listing, pluralize
from ..system.array_file import Header, read_arrays

KIND, FORM = "dsv32_jax trace 3", {"kinds": [str], "about": {"config": dict}}
"""The kind of file that a trace is, and the form of its facts."""

DTYPES = {np.int32: "I32", np.float32: "F32"}
"""The names of dtypes in a safetensors header."""

TOP, LENS = 20, 5
"""How many of the most likely next tokens are kept, by the head itself and after every layer."""

KINDS = {
    "attention": ("selected", "weight", "spread"),
    "experts": ("expert", "norm"),
    "indexer": ("selected", "index_score"),
    "lens": ("lens_id", "lens_logprob", "lens_entropy"),
    "logits": ("top_id", "top_logprob", "entropy"),
    "mass": ("mass_selected", "mass_best", "mass_recent"),
    "residual": ("layer", "position", "residual"),
    "routing": ("expert", "gate"),
}
"""The arrays of each kind."""


class Array(NamedTuple):
    """Axes, dtype and padding of an array, and for ids what each is below."""

    axes: str
    dtype: type
    padding: float
    below: str = ""


ARRAYS = {
    "tokens": Array("rt", np.int32, -1, "vocab_size"),
    "length": Array("r", np.int32, 0),
    "expert": Array("mrtX", np.int32, -1, "n_routed_experts"),
    "gate": Array("mrtX", np.float32, np.nan),
    "norm": Array("mrtX", np.float32, np.nan),
    "selected": Array("lrtk", np.int32, -1, "max_position_embeddings"),
    "index_score": Array("lrtk", np.float32, -np.inf),
    "weight": Array("lrtk", np.float32, np.nan),
    "spread": Array("lrt", np.float32, np.nan),
    "mass_selected": Array("lrt", np.float32, np.nan),
    "mass_best": Array("lrt", np.float32, np.nan),
    "mass_recent": Array("lrt", np.float32, np.nan),
    "top_id": Array("rtn", np.int32, -1, "vocab_size"),
    "top_logprob": Array("rtn", np.float32, np.nan),
    "entropy": Array("rt", np.float32, np.nan),
    "lens_id": Array("lrto", np.int32, -1, "vocab_size"),
    "lens_logprob": Array("lrto", np.float32, np.nan),
    "lens_entropy": Array("lrt", np.float32, np.nan),
    "layer": Array("s", np.int32, -1, "num_hidden_layers"),
    "position": Array("rp", np.int32, -1, "max_position_embeddings"),
    "residual": Array("srpD", np.float32, np.nan),
}
"""Axes: rows, tokens, layers, MoE layers, X experts of a token, k selected positions, n and o next tokens; s layers and
p positions whose residual stream is kept, D its elements."""


def check_kinds(keep: Any) -> tuple[str, ...]:
    """Return the kinds that `keep` names, sorted. Raises UsageError."""
    names = list(keep) if isinstance(keep, Collection) and not isinstance(keep, str) else [keep]
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"keep takes a set of {listing(KINDS)}, not {listing(map(repr, unknown))}")
    return tuple(kind for kind in KINDS if kind in names)


def names_of(kinds: Collection[str]) -> list[str]:
    """Return the names of all arrays of a trace of these kinds."""
    return ["tokens", "length", *(name for name in ARRAYS if any(name in KINDS[kind] for kind in kinds))]


def shapes(
    cfg: Config, kinds: Collection[str], rows: int, tokens: int, layers: int, positions: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a trace of `rows` rows of at most `tokens` tokens, with the residual stream
    after so many layers at so many positions of each."""
    sizes = {
        "r": rows,
        "t": tokens,
        "l": cfg.num_hidden_layers,
        "m": max(0, cfg.num_hidden_layers - cfg.first_k_dense_replace),
        "X": cfg.num_experts_per_tok,
        "k": min(cfg.index_topk, tokens),
        "n": min(TOP, cfg.vocab_size),
        "o": min(LENS, cfg.vocab_size),
        "s": layers,
        "p": positions,
        "D": cfg.hidden_size,
    }
    return {name: tuple(sizes[axis] for axis in ARRAYS[name].axes) for name in names_of(kinds)}


def read(file: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray], dict[str, Any]]:
    """Return the kinds, arrays and facts of a trace. Raises CheckpointError, and CapacityError if it does not fit in
    memory."""
    facts, arrays = read_arrays(file, KIND, FORM, _find_header_problems)
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
