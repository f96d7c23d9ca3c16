"""The folder of a converted checkpoint: the names in it, the form of its manifest, what is said where there is none."""

import re
from pathlib import Path

from ..system.locks import find_writer

FILE = "manifest.json"
WEIGHTS = "weights"
"""The folder with the files of all arrays, beside the manifest."""

JOURNAL = "journal.jsonl"
"""The record of an unfinished conversion, which `convert` removes once the manifest is written."""

LARGEST = 256 << 20
"""The most bytes of a manifest."""

UNSEALED = b'"format_version": 1,'
"""A line of the manifests of the first format, which had no seal."""

RECOVER = "Copy the folder again, or convert the original checkpoint again"
RENEW = "An earlier version wrote it: convert the original checkpoint again with `dsv32 convert SRC NEW_FOLDER`"

SOURCE_FILES = {str: {"size": int, "header_sha256": str}}
SCHEMA = {
    "config": dict,
    "leaves": dict,
    "source": {"folder": str, "files": SOURCE_FILES, "recipe": list, "plan": str},
    "report": {
        "formats": {str: int},
        "notes": [str],
        "ignored": {str: int},
        "conversions": {str: int},
        "errors": {"kinds": {str: {"relative_rms": float}}, "worst": {str: float}},
        "nan_scale_bytes": int,
        "zero_blocks": int,
        "pairs_of_different_tensor_scales": int,
        "token_ids": (int, type(None)),
    },
    "versions": {str: str},
    "storage": {"files": {str: list}, "mesh": {str: int}},
}
"""The form of a manifest. Weights are checked by LeafEntry, the config by Config."""


STRAYS = re.compile(
    r"\._.*|\.DS_Store|\.localized|\.apdisk|\.Trash.*|\.Spotlight-V100|\.fseventsd|\.TemporaryItems|__MACOSX|lost\+found|"
    r"\.snapshots?|\.zfs|\.nfs[0-9a-f]+|\.directory|\.fuse_hidden.*|@eaDir|Thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|"
    r"System Volume Information",
    re.IGNORECASE,
)
"""Files and folders that systems and file managers leave anywhere. They are neither content nor damage."""


def is_stray(path: str) -> bool:
    """Return whether a relative path is, or lies in, one of STRAYS."""
    return any(STRAYS.fullmatch(name) for name in path.split("/"))


def explain_absence(folder: Path) -> str:
    """Return what is said of a folder without a manifest."""
    if not folder.is_dir():
        return f"{folder} is not a folder; nothing was read"
    if writer := find_writer(folder):
        return f"{folder} has no {FILE} yet: another process ({writer}) is writing it. Wait until it is done"
    if (folder / JOURNAL).exists():
        return (
            f"{folder} is an unfinished conversion: there is no {FILE}. "
            "Run the same `dsv32 convert` command again; it continues where it stopped"
        )
    if any(folder.glob("*.safetensors")):
        return f"{folder} holds safetensors, not a converted checkpoint: run `dsv32 convert {folder} DST` and load DST"
    return f"{folder} is not a converted checkpoint: there is no {FILE}"
