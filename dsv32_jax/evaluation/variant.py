"""A checkpoint to evaluate, and how it computes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..chat.tokenizer import Tokenizer
from ..checkpoint.load import Checkpoint, load
from ..config import Config
from ..errors import UsageError, listing, pluralize
from ..model.model import Model
from ..system.files import expand_path

COMPUTE = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
CACHES = {"bfloat16-cache": "bfloat16", "float32-cache": "float32", "fp8-cache": "fp8"}

SYNTAX = f"CHECKPOINT[:WORD,...] with one of {listing(COMPUTE)} and one of {listing(CACHES)}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A converted checkpoint or a model in memory, with the compute dtype and the dtype of the KV cache.

    `dtype` defaults to bfloat16, for a model in memory to its own; `cache_dtype` to the compute dtype.
    """

    checkpoint: Path | Model
    dtype: Any = None
    cache_dtype: Any = None

    def __post_init__(self):
        model, wanted = self.checkpoint, self.dtype
        if isinstance(model, Model) and wanted is not None and jnp.dtype(wanted) != model.dtype:
            raise UsageError(f"the model computes in {model.dtype}; load it again to compute in {jnp.dtype(wanted)}")

    @classmethod
    def of(cls, given: "Variant | Model | str | Path") -> "Variant":
        """Return the variant that `given` names. Text is CHECKPOINT[:WORD,...]: "ckpt:float32" computes in float32,
        "ckpt:fp8-cache" uses an FP8 cache. An existing folder of that name comes first. Raises UsageError."""
        if isinstance(given, Variant):
            return given
        if isinstance(given, Model):
            return cls(given)
        if not isinstance(given, str | Path):
            raise UsageError(f"a checkpoint is a folder, {SYNTAX}, or a Model, not {type(given).__name__}")
        folder, colon, words = str(given).rpartition(":")
        if not colon or expand_path(given).exists():
            return cls(Path(given))
        split = [word.strip() for word in words.split(",")]
        if unknown := [word for word in split if word not in COMPUTE and word not in CACHES]:
            raise UsageError(f"{str(given)!r}: {listing(map(repr, unknown))} cannot follow the colon; write {SYNTAX}")
        dtypes, caches = ([table[word] for word in split if word in table] for table in (COMPUTE, CACHES))
        if len(dtypes) > 1 or len(caches) > 1:
            raise UsageError(f"{str(given)!r} gives more than one compute dtype or cache dtype; write {SYNTAX}")
        return cls(Path(folder), *(one[0] if one else None for one in (dtypes, caches)))

    @property
    def cfg(self) -> Config:
        """The model's config; that of a checkpoint is read and checked."""
        return self.checkpoint.cfg if isinstance(self.checkpoint, Model) else Checkpoint.open(self.checkpoint).cfg

    def load(self) -> Model:
        """Return the model, loading it if necessary."""
        if isinstance(self.checkpoint, Model):
            return self.checkpoint
        return load(self.checkpoint, dtype=jnp.bfloat16 if self.dtype is None else self.dtype)

    def tokenizer(self) -> Tokenizer | None:
        """Return the checkpoint's tokenizer, None if it has none or for a model in memory."""
        if isinstance(self.checkpoint, Model) or not (expand_path(self.checkpoint) / "tokenizer.json").exists():
            return None
        return Tokenizer.load(self.checkpoint, self.cfg)


def require_one_vocabulary(a: Variant, b: Variant, ours: Any) -> None:
    """Raise UsageError if the models do not share tokens. Without A's tokenizer, `ours`, or B's, sizes decide."""
    size, other = a.cfg.vocab_size, b.cfg.vocab_size
    if size != other:
        raise UsageError(f"the models have vocabularies of {size} and {other} tokens; nothing was run")
    theirs = b.tokenizer()
    if ours is None or theirs is None:
        return
    if differing := sum(ours.decode([i]) != theirs.decode([i]) for i in range(size)):
        raise UsageError(
            f"the tokenizers differ in {differing} of {pluralize(size, 'token')}, so the predictions cannot be "
            "compared; nothing was run"
        )
