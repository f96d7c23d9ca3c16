"""A session as one file: its caches, cut to the slots in use, as bytes, and its settings."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, UsageError, argument, listing, pluralize
from ..model.model import Model
from ..system.array_file import read_arrays, write_arrays
from .prefill_decode import Caches

KIND = "dsv32_jax session 7"

FORM = {
    "model": str,
    "dtype": str,
    "capacity": (int, type(None)),
    "cache_dtype": str,
    "draft": int,
    "tokens": [int],
    "held": int,
}
"""The form of a session's settings: `held` of its `tokens` are in the caches."""


def identity(model: Model) -> str:
    """Return the digest of the checkpoint's manifest, for a model without one that of its config; and of its edits."""
    facts = json.dumps(model.cfg.to_dict(), sort_keys=True)
    digest = model.origin.digest or "config " + hashlib.sha256(facts.encode()).hexdigest()
    return f"{digest}, edit {model.origin.edit}" if model.origin.edit else digest


def write(file: Path, model: Model, settings: dict[str, Any], caches: Caches | None) -> None:
    """Write a session, whole or not at all. Raises CapacityError, StorageError."""
    arrays = {
        name: np.ascontiguousarray(np.asarray(array)).view(np.uint8).reshape(-1)
        for name, array in _name_arrays(caches).items()
    }
    write_arrays(file, KIND, {"model": identity(model), "dtype": model.dtype.name, **settings}, arrays)


def read(file: Path, model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and the bytes of the caches. Raises CheckpointError if the file is no intact session,
    UsageError if it is that of another model or compute dtype."""
    settings, arrays = read_arrays(file, KIND, FORM)
    if settings["model"] != identity(model):
        raise UsageError(
            f"{file} belongs to another model (its checkpoint's digest is {settings['model']}, this one's is "
            f"{identity(model)}); load that checkpoint, or begin a new session"
        )
    if settings["dtype"] != model.dtype.name:
        raise UsageError(
            f"{file} was computed in {settings['dtype']}, {argument('cache_dtype', settings['cache_dtype'])}, and this "
            f"model computes in {model.dtype.name}; load the model with {argument('dtype', settings['dtype'])}, or "
            "begin a new session"
        )
    return settings, arrays


def restore(file: Path, arrays: dict[str, np.ndarray], caches: Caches) -> Caches:
    """Return caches of the shapes of `caches` from the bytes that `read` returned. Raises CheckpointError."""
    wanted = _name_arrays(caches)
    sizes, expected = ({name: a.nbytes for name, a in some.items()} for some in (arrays, wanted))
    if wrong := sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{file} is damaged: {pluralize(len(wrong), 'array')} of the wrong size: {listing(wrong)}"
        )
    found = [jnp.asarray(arrays[name].view(array.dtype).reshape(array.shape)) for name, array in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(caches), found)


def _name_arrays(caches: Caches | None) -> dict[str, jax.Array]:
    """Return the arrays of the caches by their paths."""
    found = jax.tree_util.tree_leaves_with_path(caches)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in found}
