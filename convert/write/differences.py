"""How a job differs from the one that an output belongs to.

The `basis` of a job is everything in its plan that a user can change. The journal of an unfinished output has it, and
it follows from the manifest of a finished one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.checkpoint.checksums import find_changed_files
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.errors import OutputExistsError, VerificationError, kind_of, listing

RECIPE = ("--policy", "format of everything else (--to)", "--scales", "--tensor-scales")
"""Names of the parts of a plan's recipe, for messages."""


def read_finished(folder: Path, plan: str, basis: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a finished output.

    Raises OutputExistsError if another plan (by its digest) made it, VerificationError if its files have changed; of
    the arrays' only the sizes are looked at.
    """
    manifest = Manifest.read(folder)
    if manifest.source["plan"] != plan:
        changed = describe_differences(manifest_basis(manifest), basis)
        raise OutputExistsError(
            f"{folder} holds a converted checkpoint (of {manifest.source['folder']!r}) that was made from other "
            f"files or with other options; nothing was touched. Write to another folder, or delete this one "
            f"yourself. The differences: {listing(changed)}"
        )
    if damaged := find_changed_files(folder, manifest):
        raise kind_of(damaged, VerificationError)(
            f"{folder} holds this conversion and is damaged: {listing(damaged)}. Nothing was touched; delete the "
            "folder and convert again, or convert to another one"
        )
    return manifest


def manifest_basis(manifest: Manifest) -> dict[str, Any]:
    """The basis of a finished conversion."""
    return {
        "format_version": manifest.format_version,
        "config": manifest.config,
        "files": manifest.source["files"],
        "recipe": manifest.source["recipe"],
        "mesh": manifest.storage["mesh"],
    }


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two bases differ, in the user's words; never empty."""
    found = []
    if before["format_version"] != now["format_version"]:
        found.append(f"the checkpoint format was {before['format_version']}, now {now['format_version']}")
    found += _describe_changes("config.json: {} was {}, now {}", before["config"], now["config"])
    found += _describe_changes("file {} was {}, now {}", _describe_files(before), _describe_files(now))
    found += _describe_changes("{}: was {}, now {}", _describe_recipe(before), _describe_recipe(now))
    found += _describe_changes("--mesh: {} was {}, now {}", before["mesh"], now["mesh"])
    return found or ["the weights that the options select"]


def _describe_changes(text: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    return [text.format(key, before.get(key, "absent"), now.get(key, "absent")) for key in keys]


def _describe_recipe(basis: Mapping[str, Any]) -> dict[str, Any]:
    rules, *others = basis["recipe"]
    return dict(zip(RECIPE, (listing(map(": ".join, rules)) or "none", *others), strict=False))


def _describe_files(basis: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{file['size']} bytes (header {file['header_sha256'][:8]})" for name, file in basis["files"].items()}
