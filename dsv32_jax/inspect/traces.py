"""Traces: the values that the layers of a model compute for rows of tokens, as arrays and as one file."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..config import Config
from ..errors import CheckpointError, UsageError, listing, pluralize
from ..system.array_file import read_arrays, write_arrays
from ..system.files import expand_file_path

KIND, FORM = "dsv32_jax trace 2", {"kinds": [str], "about": {"config": dict}}
"""What the file of a trace is called, and the form of its facts."""

TOP = 20
"""How many of the most likely next tokens are kept."""

KINDS = {
    "attention": ("selected", "weight", "spread"),
    "indexer": ("selected", "index_score"),
    "logits": ("top_id", "top_logprob", "entropy"),
    "mass": ("mass_selected", "mass_best", "mass_recent"),
    "routing": ("expert", "gate"),
}
"""The arrays of each kind."""

ARRAYS: dict[str, tuple[str, type, float]] = {
    "tokens": ("rt", np.int32, -1),
    "length": ("r", np.int32, 0),
    "expert": ("mrtX", np.int32, -1),
    "gate": ("mrtX", np.float32, np.nan),
    "selected": ("lrtk", np.int32, -1),
    "index_score": ("lrtk", np.float32, -np.inf),
    "weight": ("lrtk", np.float32, np.nan),
    "spread": ("lrt", np.float32, np.nan),
    "mass_selected": ("lrt", np.float32, np.nan),
    "mass_best": ("lrt", np.float32, np.nan),
    "mass_recent": ("lrt", np.float32, np.nan),
    "top_id": ("rtn", np.int32, -1),
    "top_logprob": ("rtn", np.float32, np.nan),
    "entropy": ("rt", np.float32, np.nan),
}
"""Axes, dtype and padding of each array. Axes: rows, tokens, layers, MoE layers, X experts of a token, k selected
positions, n next tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(Mapping[str, np.ndarray]):
    """The values that every layer computes for the tokens of each row; `inspect.trace` makes one. `trace[name]` is:

    tokens         [rows, tokens]                  token ids
    length         [rows]                          the number of tokens in each row
    expert         [MoE layers, rows, tokens, X]   routing: the experts of each token, in no particular order
    gate           as expert                       routing: their gates, which sum to routed_scaling_factor
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

    def __repr__(self) -> str:
        rows, tokens = self.arrays["tokens"].shape
        head = f"Trace of {', '.join(self.kinds) or 'nothing'}: {rows} x {tokens} tokens, {self.nbytes / 1e6:.1f} MB"
        return "\n".join([head, *(f"  {name:<14} {list(array.shape)}" for name, array in self.arrays.items())])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def config(self) -> Config:
        """The model's config."""
        return Config.from_dict(dict(self.about["config"]), "the config in the trace")

    def save(self, file: str | Path) -> None:
        """Write the trace to one safetensors file, atomically. Raises CapacityError, StorageError."""
        facts = {"kinds": self.kinds, "about": dict(self.about)}
        write_arrays(expand_file_path(file), KIND, facts, self.arrays)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read the file that `save` wrote; needs neither the model nor JAX. Raises CheckpointError."""
        facts, arrays = read_arrays(expand_file_path(file), KIND, FORM)
        kinds = facts["kinds"]
        if problems := _find_problems(kinds, arrays):
            raise CheckpointError(f"{file} is damaged ({pluralize(len(problems), 'problem')}): {listing(problems)}")
        return cls(tuple(kinds), {name: arrays[name] for name in names_of(kinds)}, facts["about"])


def check_kinds(keep: Any) -> tuple[str, ...]:
    """Return the kinds that `keep` names, sorted. Raises UsageError."""
    names = list(keep) if isinstance(keep, Collection) and not isinstance(keep, str) else [keep]
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"keep takes a set of {listing(KINDS)}, not {listing(map(repr, unknown))}")
    return tuple(kind for kind in KINDS if kind in names)


def names_of(kinds: Collection[str]) -> list[str]:
    """Return the names of all arrays of a trace of these kinds."""
    return ["tokens", "length", *(name for name in ARRAYS if any(name in KINDS[kind] for kind in kinds))]


def shapes(cfg: Config, kinds: Collection[str], rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a trace of `rows` rows of at most `tokens` tokens."""
    sizes = {
        "r": rows,
        "t": tokens,
        "l": cfg.num_hidden_layers,
        "m": max(0, cfg.num_hidden_layers - cfg.first_k_dense_replace),
        "X": cfg.num_experts_per_tok,
        "k": min(cfg.index_topk, tokens),
        "n": min(TOP, cfg.vocab_size),
    }
    return {name: tuple(sizes[axis] for axis in ARRAYS[name][0]) for name in names_of(kinds)}


def _find_problems(kinds: list[str], arrays: dict[str, np.ndarray]) -> list[str]:
    """Return the faults of a trace that was read: kinds, names, dtypes, and sizes that contradict each other."""
    if not KINDS.keys() >= set(kinds):
        return [f"its kinds are {kinds!r}"]
    wanted = set(names_of(kinds))
    problems = [f"{name} is missing" for name in sorted(wanted - set(arrays))]
    problems += [f"{name} is unknown" for name in sorted(set(arrays) - wanted)]
    sizes: dict[str, int] = {}
    for name in sorted(wanted & set(arrays)):
        array, (axes, dtype, _) = arrays[name], ARRAYS[name]
        if array.dtype != dtype or array.ndim != len(axes):
            problems.append(f"{name} is {array.dtype} {list(array.shape)}")
        elif any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, array.shape, strict=True)):
            problems.append(f"{name} is {list(array.shape)}, which does not fit the other arrays")
    if not problems and arrays["length"].max(initial=0) != arrays["tokens"].shape[1]:
        problems.append(f"the longest row has {arrays['length'].max(initial=0)} tokens, not {sizes['t']}")
    return problems
