"""Records of downloads: the revision and the SHA-256 that `hf download` and the hub's cache keep of each file."""

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv32_jax.errors import CheckpointError, UsageError, argument, listing, pluralize
from dsv32_jax.system.files import hash_chunks, read_regular
from dsv32_jax.system.progress import Progress

from .safetensors import FileId, read_bytes

DOWNLOADS = ".cache/huggingface/download"
"""Where `hf download` keeps, in FILE.metadata, the revision and the SHA-256 of each file: a line each."""

CHUNK_BYTES = 16 << 20


def verify_downloads(files: Mapping[Path, FileId], workers: int, report: Callable[[Progress], None]) -> None:
    """Raise CheckpointError listing every shard whose bytes do not have the SHA-256 that `hf download` recorded.

    Raises UsageError, before anything is read, if it is not recorded for all of them.
    """
    expected = {file: _find_download(file)[1] for file in files}
    if unknown := [file.name for file, sha256 in expected.items() if not sha256]:
        raise UsageError(
            f"{argument('verify_source')} needs the SHA-256 that `hf download` records beside the files; it is missing "
            f"for {pluralize(len(unknown), 'shard')}: {listing(unknown, 4)}. Nothing was read"
        )
    done, total, damaged = 0, sum(file_id.size for file_id in files.values()), []
    report(Progress(done, total))

    def hash_file(file: Path) -> str:
        starts = range(0, files[file].size, CHUNK_BYTES)
        sizes = (min(CHUNK_BYTES, files[file].size - start) for start in starts)
        return hash_chunks(read_bytes(file, files[file], *at, "any") for at in zip(starts, sizes, strict=True))

    with ThreadPoolExecutor(workers) as pool:
        for file, sha256 in zip(files, pool.map(hash_file, files), strict=True):
            damaged += [file.name] if sha256 != expected[file] else []
            done += files[file].size
            report(Progress(done, total, file.name))
    if damaged:
        raise CheckpointError(
            f"{pluralize(len(damaged), 'shard')} with another SHA-256 than `hf download` recorded: "
            f"{listing(damaged, 20)}. Nothing was written; download again"
        )


def _find_download(file: Path) -> tuple[str, str]:
    """Return the hub's revision and SHA-256 of a downloaded file, "" where unknown.

    In the hub's cache a file is a link from snapshots/REVISION/ to a blob that is named by its SHA-256.
    """
    if file.is_symlink():
        revision, sha256 = file.parent.name if file.parent.parent.name == "snapshots" else "", file.readlink().name
    elif (metadata := file.parent / DOWNLOADS / f"{file.name}.metadata").is_file():
        revision, sha256, *_ = (*read_regular(metadata, 1000).decode(errors="replace").split("\n"), "", "")
        revision = revision if re.fullmatch("[0-9a-f]{40}", revision) else ""
    else:
        return "", ""
    return revision, sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else ""


def compare_revisions(files: Iterable[Path]) -> list[str]:
    """Return a note if the shards come from several revisions of a repository."""
    revisions: dict[str, list[str]] = {}
    for file in files:
        revisions.setdefault(_find_download(file)[0], []).append(file.name)
    if len(revisions) < 2:
        return []
    texts = (f"{revision[:12] or 'unknown'} ({listing(names, 2)})" for revision, names in revisions.items())
    return [f"the shards come from {len(revisions)} revisions of the repository: {listing(texts)}"]
