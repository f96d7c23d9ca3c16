"""A session as one safetensors file: the used slots of every cache as bytes, and whose they are as text beside them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .decoding import Context
from .errors import CheckpointError, StorageError, UsageError, listing
from .model import Model

KIND = "dsv32_jax session 1"


def identity(model: Model) -> str:
    """The digest of the checkpoint's manifest; where a model has none, that of its config."""
    facts = json.dumps(model.cfg.to_dict(), sort_keys=True)
    return model.origin.digest or "config " + hashlib.sha256(facts.encode()).hexdigest()


def write(file: Path, model: Model, settings: dict[str, Any], context: Context | None) -> None:
    """Write `context`, of which `settings["tokens"]` says how many slots are used: all of it or, with StorageError,
    nothing."""
    arrays = {name: _bytes(slots) for name, slots in _used(context, len(settings["tokens"])).items()}
    about = {"kind": KIND, "model": identity(model), "settings": json.dumps(settings)}
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        save_file(arrays or {"empty": np.zeros(0, np.uint8)}, unfinished, about)
    except SafetensorError as error:
        raise StorageError(f"{file} cannot be written: {error}") from error
    os.replace(unfinished, file)


def read_settings(file: Path, model: Model) -> dict[str, Any]:
    """What `write` was told. Raises CheckpointError where the file is no session, UsageError where it is another
    model's."""
    try:
        with safe_open(file, "numpy") as opened:
            about = opened.metadata() or {}
        settings = json.loads(about["settings"]) if about.get("kind") == KIND else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is not a session: {error}") from error
    if settings is None:
        raise CheckpointError(f"{file} is not a session of this version ({KIND}), but {about.get('kind')!r}")
    if about["model"] != identity(model):
        raise UsageError(
            f"{file} belongs to another model (its checkpoint's digest is {about['model']}, this one's "
            f"{identity(model)}); load that checkpoint, or begin a new session"
        )
    return settings


def read_into(file: Path, context: Context, length: int) -> Context:
    """`context`, which is empty, with `length` tokens from the file."""
    wanted = _used(context, length)
    with safe_open(file, "numpy") as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        expected = {name: [slots.nbytes] for name, slots in wanted.items()}
        if sizes != expected:
            wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
            raise CheckpointError(f"{file} is damaged: {len(wrong)} arrays are not of their size: {listing(wrong)}")

        def filled(path, slots):
            name = jax.tree_util.keystr(path)
            if name not in wanted:
                return slots
            stored = opened.get_tensor(name).view(slots.dtype).reshape(1, length, *slots.shape[2:])
            return slots.at[:, :length].set(jnp.asarray(stored))

        context = jax.tree_util.tree_map_with_path(filled, context)
    return context


def _used(context: Context | None, length: int) -> dict[str, Any]:
    """The first `length` slots [1, length, ...] of every cache, by its path; lengths and h have fewer axes."""
    if context is None:
        return {}
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(context)}
    return {name: leaf[:, :length] for name, leaf in found.items() if leaf.ndim == 3}


def _bytes(slots: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(slots)).view(np.uint8).reshape(-1)
