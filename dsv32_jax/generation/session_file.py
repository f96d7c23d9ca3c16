"""A session as one safetensors file: the used slots of every cache as bytes, and whose they are as text beside them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import CheckpointError, StorageError, UsageError, listing
from ..model.model import Model
from .prefill_decode import Context

KIND = "dsv32_jax session 4"


def identity(model: Model) -> str:
    """The digest of the checkpoint's manifest; where a model has none, that of its config."""
    facts = json.dumps(model.cfg.to_dict(), sort_keys=True)
    return model.origin.digest or "config " + hashlib.sha256(facts.encode()).hexdigest()


def write(file: Path, model: Model, settings: dict[str, Any], context: Context | None) -> None:
    """Write `context`, whose slots are all used: the whole file or, with StorageError, none."""
    arrays = {name: _bytes(slots) for name, slots in _slots(context).items()}
    about = {"kind": KIND, "model": identity(model), "settings": json.dumps(settings)}
    about["sha256"] = _digest(about["settings"], arrays)
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        save_file(arrays or {"empty": np.zeros(0, np.uint8)}, unfinished, about)
        os.replace(unfinished, file)
    except (SafetensorError, OSError) as error:
        unfinished.unlink(missing_ok=True)
        raise StorageError(f"{file} cannot be written: {error}") from error


def read_settings(file: Path, model: Model) -> dict[str, Any]:
    """What `write` was told. Raises CheckpointError where the file is no session, UsageError where it is another
    model's."""
    try:
        with safe_open(file, "numpy") as opened:
            about = opened.metadata() or {}
        settings = json.loads(about["settings"]) if about.get("kind") == KIND else None
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {file}; nothing was read") from error
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


def read_into(file: Path, context: Context) -> Context:
    """`context`, which is empty, with as many tokens from the file as it has slots."""
    wanted = _slots(context)
    with safe_open(file, "numpy") as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        about, expected = opened.metadata(), {name: [slots.nbytes] for name, slots in wanted.items()}
        if sizes != expected:
            wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
            raise CheckpointError(f"{file} is damaged: {len(wrong)} arrays are not of their size: {listing(wrong)}")
        arrays = {name: opened.get_tensor(name) for name in wanted}
    if _digest(about["settings"], arrays) != about.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its bytes are not those that were written")

    def filled(path, slots):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(arrays[name].view(slots.dtype).reshape(slots.shape)) if name in wanted else slots

    return jax.tree_util.tree_map_with_path(filled, context)


def _digest(settings: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of everything that a session is."""
    found = hashlib.sha256(settings.encode())
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(arrays[name].data)
    return found.hexdigest()


def _slots(context: Context | None) -> dict[str, Any]:
    """The arrays with slots [1, S, ...] by path."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(context)}
    return {name: leaf for name, leaf in found.items() if name not in (".cache.length_B", ".h_BD")}


def _bytes(slots: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(slots)).view(np.uint8).reshape(-1)
