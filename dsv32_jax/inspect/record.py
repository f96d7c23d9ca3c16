"""What a recorded generation saw, as one file that a machine without the model reads."""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..config import Config
from ..errors import CheckpointError, UsageError, listing, writing_failed

KIND = "dsv32_jax record 1"

NAMES = {
    "routing": ("expert", "gate"),
    "indexer": ("selected", "index_score"),
    "attention": ("selected", "weight", "spread"),
    "logits": ("top_id", "top_logprob", "entropy"),
}
"""The arrays of each kind."""

ALWAYS = {"tokens": 2, "prompt": 1, "length": 1}
RANKS = {"spread": 3, "entropy": 2, "top_id": 3, "top_logprob": 3}
"""The axes of an array where they are not four."""

IDS = ("tokens", "prompt", "length", "expert", "selected", "top_id")


@dataclasses.dataclass(frozen=True)
class Record:
    """What every layer saw of the tokens of each row; `record[name]` is one of these arrays:

    tokens       [rows, tokens + 1]          prompt and new tokens, -1 beyond the end
    prompt       [rows]                      how many of them are the prompt
    length       [rows]                      how many were processed: all but the last, which nothing follows
    expert       [moe layers, rows, tokens, X]   routing: the experts of each token, in no order
    gate         the same                    the weights of their outputs; the sum is routed_scaling_factor
    selected     [layers, rows, tokens, k]   indexer, attention: positions attended to, -1 for none
    index_score  the same                    indexer: their scores, -inf for none
    weight       the same                    attention: their weight in attention, mean over heads; the sum is 1
    spread       [layers, rows, tokens]      attention: entropy of the weights in nats, mean over heads
    top_id       [rows, tokens, n]           logits: the likeliest next tokens
    top_logprob  the same                    their log-probabilities
    entropy      [rows, tokens]              entropy of the prediction in nats

    Entry i along tokens is about the token at position i, prompt or new; beyond a row's length ids are -1, index
    scores -inf, and the rest is NaN. Weights are those among the selected positions: what a dense attention would give
    to the others is not computed when generating, `inspect.kept_mass` does. `about` holds the model's config and the
    digest of its checkpoint.
    """

    kinds: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name]
        kinds = [kind for kind, names in NAMES.items() if name in names]
        if not kinds:
            raise UsageError(f"a record has no {name!r}; it has {listing(self.arrays, 20)}")
        raise UsageError(f"{name!r} was not recorded: record={{{' or '.join(map(repr, kinds))}}} keeps it")

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {list(array.shape)}" for name, array in self.arrays.items())
        return f"Record of {', '.join(self.kinds)}, {self.nbytes / 1e6:.1f} MB: {arrays}"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def config(self) -> Config:
        """The model's config."""
        return Config.from_dict(dict(self.about["config"]), "the config in the record")

    def save(self, file: str | Path) -> None:
        """Write it to one safetensors file, which is there whole or not at all. Raises CapacityError, StorageError."""
        file = Path(file)
        unfinished = file.with_name(file.name + ".unfinished")
        about = {"kind": KIND, "kinds": json.dumps(self.kinds), "about": json.dumps(dict(self.about))}
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        try:
            save_file(arrays, unfinished, about)
            os.replace(unfinished, file)
        except (OSError, SafetensorError) as error:
            raise writing_failed(file, error) from error

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """The record that `save` wrote; needs neither model nor JAX. Raises CheckpointError."""
        try:
            with safe_open(file, "numpy") as opened:
                about = opened.metadata() or {}
                if about.get("kind") != KIND:
                    raise CheckpointError(f"{file} is not a record of this version ({KIND}): {about.get('kind')!r}")
                kinds, facts = json.loads(about["kinds"]), json.loads(about["about"])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} is not a record: {error}") from error
        if problems := _problems(kinds, facts, arrays):
            raise CheckpointError(f"{file} is damaged ({len(problems)} problems): {listing(problems)}")
        return cls(tuple(kinds), arrays, facts)


def _problems(kinds: Any, about: Any, arrays: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with a record that was read: kinds, names, dtypes, and sizes that do not fit together."""
    if not isinstance(kinds, list) or not all(kind in NAMES for kind in kinds if isinstance(kind, str)):
        return [f"it names the kinds {kinds!r}"]
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        return ["it does not hold a config"]
    wanted = {*ALWAYS, *(name for kind in kinds for name in NAMES[kind])}
    problems = [f"{name} is missing" for name in sorted(wanted - set(arrays))]
    problems += [f"{name} is unknown" for name in sorted(set(arrays) - wanted)]
    if problems:
        return problems
    rows, tokens = len(arrays["prompt"]), int(arrays["length"].max(initial=0))
    for name, array in arrays.items():
        rank = ALWAYS.get(name, RANKS.get(name, 4))
        if array.dtype != (np.int32 if name in IDS else np.float32) or array.ndim != rank:
            problems.append(f"{name} is {array.dtype} {list(array.shape)}")
        elif name not in ALWAYS and (rows, tokens) not in (array.shape[:2], array.shape[1:3]):
            problems.append(f"{name} is {list(array.shape)} for {rows} rows of {tokens} tokens")
    return problems
