"""Whether a folder holds (the beginning of) the same conversion, and in what it differs where it does not."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest
from dsv32_jax.errors import OutputExistsError, listing

from ..read.safetensors import Tensor
from ..read.source import Source

PROBE_BYTES = 16 << 20
"""A tensor of at most so many bytes is read again in each file before a conversion is continued."""

RECIPE: tuple[str, ...] = ("rules of the policy", "format of everything else (--to)", "--scales", "--tensor-scales")


def basis_of(manifest: Manifest) -> dict[str, Any]:
    """The basis of a finished conversion."""
    return {
        "format_version": manifest.format_version,
        "config": manifest.config,
        "files": manifest.source.get("files", {}),
        "recipe": manifest.source.get("recipe", []),
        "mesh": manifest.storage.get("mesh", {}),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two bases differ, in the user's words."""
    found = []
    if before.get("format_version") != now["format_version"]:
        found.append(
            f"the format of converted checkpoints was {before.get('format_version')}, {now['format_version']} now"
        )
    found += _changed("config.json: {} was {}, {} now", before.get("config", {}), now["config"])
    found += _changed("file {} was {}, {} now", _files(before.get("files", {})), _files(now["files"]))
    recipes = (dict(zip(RECIPE, basis.get("recipe", []), strict=False)) for basis in (before, now))
    found += _changed("{}: was {}, {} now", *recipes)
    return found + _changed("--mesh: {} was {}, {} now", before.get("mesh", {}), now["mesh"])


def require_same_bytes(source: Source, leaves: Iterable[LeafEntry], touched: Collection[str] = ()) -> None:
    """Raise OutputExistsError where tensors that were converted before have other bytes now.

    Headers do not show that a checkpoint was replaced by another training of the same model, or that a damaged file was
    downloaded again: so of each file, one tensor that was converted is read again, and all of those files that were
    `touched` since.
    """
    digests = {t.name: t.sha256 for leaf in leaves if leaf.passport for t in leaf.passport.sources}
    probes: dict[str, Tensor] = {}
    read = [source.tensors[name] for name in digests if name in source.tensors]
    for tensor in read:
        best = probes.get(tensor.file.name)
        if tensor.nbytes <= PROBE_BYTES and (best is None or tensor.nbytes > best.nbytes):
            probes[tensor.file.name] = tensor
    again = [probes[name] for name in sorted(probes) if name not in touched]
    again += [tensor for tensor in read if tensor.file.name in touched]
    changed = [
        f"{tensor.name} in {tensor.file.name}" for tensor in again if _sha256(source, tensor) != digests[tensor.name]
    ]
    if changed:
        raise OutputExistsError(
            f"the source has changed since this conversion began: {len(changed)} of {len(again)} tensors that were "
            f"read again have other bytes ({listing(changed)}). Nothing was touched; "
            "convert to another folder, or delete this one yourself"
        )


def _sha256(source: Source, tensor: Tensor) -> str:
    found = hashlib.sha256()
    for piece in source.read_chunks(tensor):
        found.update(piece.data)
    return found.hexdigest()


def _changed(text: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in (*before, *(key for key in now if key not in before)) if before.get(key) != now.get(key)]
    return [text.format(key, before.get(key, "absent"), now.get(key, "absent")) for key in keys]


def _files(files: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{file['size']} bytes (header {file['header_sha256'][:8]})" for name, file in files.items()}
