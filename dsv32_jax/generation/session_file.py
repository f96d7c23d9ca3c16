"""A session as one safetensors file: its caches, cut to the slots in use, as bytes, and its settings as metadata."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import CheckpointError, StorageError, UsageError, listing, pluralize
from ..model.model import Model
from ..system.files import hash_chunks, replace_file, require_regular
from .prefill_decode import Caches

FORMAT = "dsv32_jax session 5"


def identity(model: Model) -> str:
    """Return the digest of the checkpoint's manifest, for a model without one that of its config; and of its edits."""
    facts = json.dumps(model.cfg.to_dict(), sort_keys=True)
    digest = model.origin.digest or "config " + hashlib.sha256(facts.encode()).hexdigest()
    return f"{digest}, edit {model.origin.edit}" if model.origin.edit else digest


def write(file: Path, model: Model, settings: dict[str, Any], caches: Caches | None) -> None:
    """Write the whole file or, raising StorageError, nothing."""
    arrays = {
        name: np.ascontiguousarray(np.asarray(array)).view(np.uint8).reshape(-1)
        for name, array in _name_arrays(caches).items()
    }
    about = {"kind": FORMAT, "model": identity(model), "settings": json.dumps(settings)}
    about["sha256"] = _hash(about["settings"], arrays)
    try:
        with replace_file(file) as unfinished:
            save_file(arrays or {"empty": np.zeros(0, np.uint8)}, unfinished, about)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{file} cannot be written: {error}") from error


def read_settings(file: Path, model: Model) -> dict[str, Any]:
    """Return the settings that `write` was given. Raises CheckpointError if the file is not a session, UsageError if it
    is that of another model."""
    try:
        with safe_open(require_regular(file), "numpy") as opened:
            about = opened.metadata() or {}
        is_session = about.get("kind") == FORMAT
        settings, of = (json.loads(about["settings"]), about["model"]) if is_session else (None, "")
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {file}; nothing was read") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a session: {error}") from error
    if settings is None:
        raise CheckpointError(f"{file} is not a session of this version ({FORMAT}), but {about.get('kind')!r}")
    if of != identity(model):
        raise UsageError(
            f"{file} belongs to another model (its checkpoint's digest is {of}, this one's is "
            f"{identity(model)}); load that checkpoint, or begin a new session"
        )
    return settings


def read_into(file: Path, caches: Caches) -> Caches:
    """Return the caches in the file, which have the shapes of `caches`. Raises CheckpointError."""
    wanted = _name_arrays(caches)
    with safe_open(file, "numpy") as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        about, expected = opened.metadata(), {name: [array.nbytes] for name, array in wanted.items()}
        if wrong := sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name)):
            raise CheckpointError(
                f"{file} is damaged: {pluralize(len(wrong), 'array')} of the wrong size: {listing(wrong)}"
            )
        arrays = {name: opened.get_tensor(name) for name in wanted}
    if _hash(about["settings"], arrays) != about.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its bytes are not those that were written")
    found = [jnp.asarray(arrays[name].view(array.dtype).reshape(array.shape)) for name, array in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(caches), found)


def _hash(settings: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of everything that a session is."""
    named = ((name.encode(), arrays[name].data) for name in sorted(arrays))
    return hash_chunks(itertools.chain([settings.encode()], *named))


def _name_arrays(caches: Caches | None) -> dict[str, jax.Array]:
    """Return the arrays of the caches by their paths."""
    found = jax.tree_util.tree_leaves_with_path(caches)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in found}
