"""Files: paths as users write them, regular files only, atomic writes, checksums, strict JSON."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, UsageError, listing

LONGEST_NAME = 255
"""The most bytes of the name of a file or folder on Linux."""


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` with ~ and ~user expanded. Raise UsageError for an unknown user and for what cannot be a path."""
    try:
        expanded = Path(path).expanduser()
    except TypeError:
        raise UsageError(f"a path must be a string or a Path, not {path!r:.200}") from None
    except RuntimeError as error:
        raise UsageError(f"invalid path {str(path)!r}: {error}") from None
    if not os.fspath(path):
        raise UsageError("empty path: name a folder, or . for the current one")
    if "\0" in str(expanded):
        raise UsageError(f"invalid path {str(path)!r}: it contains a null byte")
    try:
        longest = max(len(name.encode()) for name in ("", *expanded.parts))
    except UnicodeEncodeError:
        raise UsageError(f"invalid path {str(path)!r}: it is not UTF-8, which checkpoints require") from None
    if longest > LONGEST_NAME:
        most = f"at most {LONGEST_NAME} are possible"
        raise UsageError(f"invalid path {str(path)!r:.60}...: a name in it has {longest} bytes, {most}")
    return expanded


def expand_file_path(path: str | os.PathLike[str]) -> Path:
    """Return `expand_path` of a file that may or may not exist. Raise UsageError for a folder."""
    if (file := expand_path(path)).is_dir():
        raise UsageError(f"{file} is a folder; give the name of a file")
    return file


def find_home() -> Path | None:
    """Return the user's home folder; None where neither HOME nor the password database names one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def find_user_folder(variable: str, default: str) -> Path | None:
    """Return this package's folder below the one in the environment `variable` (XDG), by default HOME/`default`."""
    home = find_home()
    root = os.environ.get(variable) or (home / default if home else None)
    return Path(root, "dsv32_jax") if root else None


def require_apart(first: Path, second: Path) -> None:
    """Raise UsageError if the folders are the same, or one is inside the other."""
    a, b = first.resolve(), second.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{first} and {second} must be separate folders, none inside the other; nothing was written")


def open_regular(file: Path) -> int:
    """Return a descriptor open for reading. Raise CheckpointError unless `file` is a regular file."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # or a FIFO would block until it has a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file} is not a regular file")
    return descriptor


def require_regular(file: Path) -> Path:
    """Return `file`. Raise CheckpointError unless it is a regular file: libraries would wait for a pipe's writer."""
    os.close(open_regular(file))
    return file


def read_regular(file: Path, largest: int) -> bytes:
    """Return the content of a regular file. Raise CheckpointError if it has more than `largest` bytes."""
    with open(open_regular(file), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        content = opened.read(largest + 1) if size <= largest else b""
    if max(size, len(content)) > largest:
        raise CheckpointError(f"{file} has {max(size, len(content))} bytes; the limit is {largest}")
    return content


FOREIGN_CONTENT = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` or `hf download`"),
    (b"<", "an HTML or XML page: the download failed; download the file again"),
    (b"\x1f\x8b", "gzip-compressed: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: decompress it first"),
    (b"\xfd7zXZ", "xz-compressed: decompress it first"),
    (b"GGUF", "a GGUF file under another name: only safetensors files are supported"),
    (b"PK\x03\x04", "a zip file (PyTorch's pickle format): pickles are never opened; get the safetensors"),
    (b"\x80\x02", "a pickle: pickles are never opened; get the safetensors"),
    (b"age-encryption.org", "encrypted with age: decrypt it first"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
)


def recognize_content(start: bytes) -> str | None:
    """Describe well-known content that is found in place of a checkpoint's file, by its first bytes."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((description for magic, description in FOREIGN_CONTENT if text.startswith(magic)), None)


def hash_chunks(chunks: Iterable[Any]) -> str:
    """Return the SHA-256 of contiguous buffers one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file to write to, which then takes the place of `file`, synced to the disk.

    `file` stays as it was until then, and if the `with` raises. The new file lies beside it under a name of its own,
    created exclusively, so that no link is followed and two writers do not meet.
    """
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield new
        sync(new)
        os.replace(new, file)
        sync(file.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_file(file: Path, content: bytes) -> None:
    """Write `content` to `file`, whole or not at all."""
    with replace_file(file) as new:
        new.write_bytes(content)


def is_abandoned(name: str, file: str = "") -> bool:
    """Return whether `name` is that of a new file which a killed `replace_file` left, of `file` if one is given."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name)
    return match is not None and match[1] == (file or match[1])


def remove_abandoned(folder: Path) -> None:
    """Remove the new files that killed `replace_file`s left in `folder`, which nobody else is writing."""
    for entry in os.scandir(folder):
        if is_abandoned(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLimits(NamedTuple):
    """The most braces, brackets and commas a JSON text may contain, in strings too.

    For files from elsewhere: Python's objects take up to thirty times as much memory as the text. The defaults are
    enough for every file of a checkpoint but the header of a shard.
    """

    objects: int = 1_000
    lists: int = 10_000
    commas: int = 2_000_000


def limit_json(text: bytes, limits: JsonLimits | None) -> bytes:
    """Return `text`. Raise CheckpointError if it has more parts than `limits` allow."""
    for kind, mark, most in zip(JsonLimits._fields, (b"{", b"[", b","), limits or (), strict=False):
        if (count := text.count(mark)) > most:
            raise CheckpointError(f"too large a JSON text: {count} {kind}, at most {most} are allowed")
    return text


def parse_json(text: bytes, limits: JsonLimits | None = None) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or Infinity. Raise CheckpointError (a ValueError)."""
    limit_json(text, limits)
    hooks: dict[str, Any] = {"object_pairs_hook": reject_duplicates, "parse_constant": reject_constant}
    if b"-0" in text:
        hooks["parse_int"] = _parse_int
    try:
        return json.loads(text.decode("utf-8-sig"), **hooks)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}") from None


def read_json(file: Path, largest: int, limits: JsonLimits | None = None) -> Any:
    """Return the value in a JSON file of at most `largest` bytes. Raise CheckpointError that names the file."""
    content = read_regular(file, largest)
    try:
        return parse_json(content, limits)
    except CheckpointError as error:
        foreign = recognize_content(content[:64])
        raise CheckpointError(f"{file} is {foreign}" if foreign else f"{file}: {error}") from None


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict, as `object_pairs_hook` of a JSON parser. Raise ValueError for duplicate keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) <= 1000 else ["(a large object)"]
        raise ValueError(f"duplicate keys: {listing(map(ascii, twice))}")
    return found


def reject_constant(text: str) -> None:
    """Raise ValueError, as `parse_constant` of a JSON parser."""
    raise ValueError(f"{text} is not a JSON number")


def _parse_int(text: str) -> int | float:
    """Parse an integer; -0 is a float, as in the safetensors library."""
    return -0.0 if text == "-0" else int(text)


Schema = type | tuple[type, ...] | list[Any] | dict[Any, Any]
"""A type or several; [schema] of every item; {str: schema} of every value; or keys with their schemas."""


def find_mismatches(value: Any, schema: Schema, name: str) -> list[str]:
    """Return everything in which a parsed JSON value, called `name`, differs from `schema`.

    A bool is no integer, and keys that the schema does not name may be there.
    """
    kinds = schema if isinstance(schema, tuple) else (schema if isinstance(schema, type) else type(schema),)
    if type(value) not in kinds:
        return [f"{name} is {value!r:.200}"]
    found: list[str] = []
    if isinstance(schema, list):
        for number, item in enumerate(value):
            found += find_mismatches(item, schema[0], f"{name}[{number}]")
    elif isinstance(schema, dict):
        each: dict[str, Any] = dict.fromkeys(value, schema[str]) if str in schema else schema
        for key, kind in each.items():
            part = f"{name}.{key}"
            found += find_mismatches(value[key], kind, part) if key in value else [f"{part} is missing"]
    return found
