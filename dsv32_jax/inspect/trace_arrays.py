"""The arrays of a trace: their names, axes, dtypes and sizes."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from ..config import Config
from ..errors import UsageError, listing

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
