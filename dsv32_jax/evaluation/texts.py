"""Texts to evaluate on: from files, or the held-out text that is shipped. A text is a document of its own."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import StorageError, UsageError, listing

HELDOUT = Path(__file__).parents[1] / "demo_checkpoint" / "heldout.txt"
"""Files of Python's standard library, each under a line with its path; the demo model has not seen them."""

LARGEST_FILE = 256 << 20
JSON_LINES = (".jsonl", ".ndjson")


def heldout() -> list[str]:
    """The shipped text, file by file."""
    parts = re.split("^##### .*\n", HELDOUT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text.removesuffix("\n") for text in parts[1:]]


def read(files: Sequence[str | Path]) -> list[str]:
    """The documents in `files`: each line's "text" of a .jsonl, any other file whole.

    Raises UsageError that lists everything that is no text, StorageError where a file cannot be read.
    """
    problems: list[str] = []
    found = [text for file in files for text in _documents(Path(file), problems)]
    if problems:
        raise UsageError(
            f"{len(problems)} texts to evaluate on cannot be used; nothing was run: {listing(problems)}. "
            f'A {JSON_LINES[0]} file has one JSON object with a string "text" a line, any other file is UTF-8 text'
        )
    return found


def _documents(file: Path, problems: list[str]) -> Iterator[str]:
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            problems.append(f"{file} has {size} bytes, {LARGEST_FILE} at most are read")
            return
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        problems.append(f"{file} is not UTF-8 at byte {error.start}")
        return
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}; nothing was run") from error
    if file.suffix not in JSON_LINES:
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _text_of(json.loads(line))
        except (ValueError, RecursionError):
            problems.append(f'{file}:{number} is not a JSON object with a string "text"')


def _text_of(entry: object) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError
    return entry["text"]
