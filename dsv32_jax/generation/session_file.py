"""A session as one safetensors file: the used slots of every cache as bytes, and the settings as text beside them."""

import hashlib
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
from ..system.files import replace_file
from .prefill_decode import Caches

FORMAT = "dsv32_jax session 4"
LENGTH = "0/length_B"
"""The one array of the caches that has no slots."""


def identity(model: Model) -> str:
    """Return the digest of the checkpoint's manifest; for a model without one, that of its config."""
    facts = json.dumps(model.cfg.to_dict(), sort_keys=True)
    return model.origin.digest or "config " + hashlib.sha256(facts.encode()).hexdigest()


def write(file: Path, model: Model, settings: dict[str, Any], caches: Caches | None) -> None:
    """Write `caches`, whose slots are all used: the whole file or, with StorageError, none."""
    arrays = {name: _to_bytes(slots) for name, slots in _name_slots(caches).items()}
    about = {"kind": FORMAT, "model": identity(model), "settings": json.dumps(settings)}
    about["sha256"] = _hash(about["settings"], arrays)
    try:
        with replace_file(file) as unfinished:
            save_file(arrays or {"empty": np.zeros(0, np.uint8)}, unfinished, about)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{file} cannot be written: {error}") from error


def read_settings(file: Path, model: Model) -> dict[str, Any]:
    """Return the settings that `write` was given. Raises CheckpointError where the file is not a session, UsageError
    where it is that of another model."""
    try:
        with safe_open(file, "numpy") as opened:
            about = opened.metadata() or {}
        settings = json.loads(about["settings"]) if about.get("kind") == FORMAT else None
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {file}; nothing was read") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is not a session: {error}") from error
    if settings is None:
        raise CheckpointError(f"{file} is not a session of this version ({FORMAT}), but {about.get('kind')!r}")
    if about["model"] != identity(model):
        raise UsageError(
            f"{file} belongs to another model (its checkpoint's digest is {about['model']}, this one's is "
            f"{identity(model)}); load that checkpoint, or begin a new session"
        )
    return settings


def read_into(file: Path, caches: Caches) -> Caches:
    """Return empty `caches` with as many tokens from the file as they have slots. Raises CheckpointError."""
    wanted = _name_slots(caches)
    with safe_open(file, "numpy") as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        about, expected = opened.metadata(), {name: [slots.nbytes] for name, slots in wanted.items()}
        wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
        if wrong:
            raise CheckpointError(
                f"{file} is damaged: {pluralize(len(wrong), 'array')} of a wrong size: {listing(wrong)}"
            )
        arrays = {name: opened.get_tensor(name) for name in wanted}
    if _hash(about["settings"], arrays) != about.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its bytes are not those that were written")

    def fill(path, slots):
        name = _name(path)
        return jnp.asarray(arrays[name].view(slots.dtype).reshape(slots.shape)) if name in wanted else slots

    return jax.tree_util.tree_map_with_path(fill, caches)


def _hash(settings: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of everything that a session is."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def _name_slots(caches: Caches | None) -> dict[str, Any]:
    """Return the arrays of slots [1, S, ...] by their path in the caches."""
    found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(caches)}
    return {name: leaf for name, leaf in found.items() if name != LENGTH}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _to_bytes(slots: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(slots)).view(np.uint8).reshape(-1)
