"""What `dsv32 generate` is asked: prompts from the command line, from stdin or from files, checked and as token ids."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..chat import prepare
from ..errors import DsvError, UsageError
from ..generation.options import Sampling
from ..model import validation
from ..system.files import expand_path, parse_json
from .arguments import SAMPLING, given, token_ids
from .open_checkpoint import Opened

LARGEST = 1 << 30
"""Bytes of a file of prompts that are read."""

KINDS = ("prompt", "messages", "ids")
KEYS = (*KINDS, "id", "thinking", "tools", *SAMPLING)
"""What a line of a .jsonl file may hold."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt. `about` is what its results repeat; `thinking` is None where it is no message."""

    ids: list[int]
    path: str
    about: dict[str, Any]
    thinking: bool | None
    sampling: Sampling


class Reader:
    """Makes requests of what the command line `arguments` says, for the checkpoint `opened`."""

    def __init__(self, arguments: argparse.Namespace, opened: Opened):
        self._arguments, self._opened = arguments, opened
        self._file: Path | None = arguments.file
        self._sampling = given(arguments, SAMPLING)
        if arguments.ids and (arguments.chat or arguments.thinking or arguments.allow_special):
            raise UsageError("--ids takes and gives token ids: --chat, --thinking and --allow-special are for text")

    @property
    def many(self) -> bool:
        """Whether there is a file of requests, one a line."""
        return self._file is not None and self._file.suffix == ".jsonl"

    def requests(self) -> list[Asked]:
        """All of them. Raises UsageError that lists every bad one."""
        arguments = self._arguments
        if self._file is not None and arguments.prompt is not None:
            raise UsageError("there is both a PROMPT and a --file; give one of them")
        if self._file is not None and self.many:
            return self._lines(text_of(self._file))
        if arguments.thinking and not arguments.chat:
            raise UsageError("--thinking is for messages: add --chat, or use a .jsonl file")
        return [self._asked(self._raw(_prompt(arguments)), {})]

    def _raw(self, text: str) -> dict[str, Any]:
        """A text as a line of a .jsonl file would have it."""
        if not self._arguments.ids:
            return {"prompt": text}
        try:
            return {"ids": token_ids(text)}
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--ids: {error}") from None

    def _lines(self, text: str) -> list[Asked]:
        found: list[Asked] = []
        problems: list[str] = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                given = _object(line)
                about = {"line": number, **({"id": given["id"]} if "id" in given else {})}
                found.append(self._asked(given, about))
            except DsvError as error:
                problems.append(f"line {number}: {error}")
        if problems:
            more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UsageError(
                f"{len(problems)} lines of {self._file} are no requests; nothing was run:\n  "
                + "\n  ".join(problems[:20])
                + more
            )
        if not found:
            raise UsageError(f"{self._file} holds no request")
        return found

    def _asked(self, given: Mapping[str, Any], about: dict[str, Any]) -> Asked:
        kinds = [kind for kind in KINDS if kind in given]
        if len(kinds) != 1:
            raise UsageError(f"it needs one of {', '.join(KINDS)}, not {' and '.join(kinds) or 'none'}")
        sampling = Sampling(**{**self._sampling, **sampling_of(given)})
        (kind,) = kinds
        if kind == "prompt" and (not isinstance(given["prompt"], str) or not given["prompt"]):
            raise UsageError(f"prompt must be a text with at least one character, not {given['prompt']!r:.60}")
        asked = self._of_ids if kind == "ids" else self._of_messages if self._is_chat(kind) else self._of_text
        return asked(given, about, sampling)

    def _is_chat(self, kind: str) -> bool:
        return kind == "messages" or self._arguments.chat

    def _of_ids(self, given: Mapping[str, Any], about: dict[str, Any], sampling: Sampling) -> Asked:
        self._refuse(given, "thinking", "tools")
        if not isinstance(given["ids"], list):
            raise UsageError(f"ids must be a list of token ids, not {given['ids']!r:.60}")
        (ids,) = validation.check_prompts([given["ids"]], self._opened.cfg.vocab_size)
        return Asked(ids, "token ids", about, None, sampling)

    def _of_text(self, given: Mapping[str, Any], about: dict[str, Any], sampling: Sampling) -> Asked:
        self._refuse(given, "thinking", "tools")
        return self._prepared(given["prompt"], about, None, sampling)

    def _of_messages(self, given: Mapping[str, Any], about: dict[str, Any], sampling: Sampling) -> Asked:
        messages = given.get("messages", [{"role": "user", "content": given.get("prompt")}])
        if not isinstance(messages, list):
            raise UsageError(f"messages must be a list of messages, not {messages!r:.60}")
        thinking = given.get("thinking", self._arguments.thinking)
        if type(thinking) is not bool:
            raise UsageError(f"thinking must be true or false, not {thinking!r:.60}")
        return self._prepared(messages, about, thinking, sampling, tools=given.get("tools"))

    def _prepared(self, prompt: Any, about: dict[str, Any], thinking: bool | None, sampling: Sampling, **how) -> Asked:
        if self._opened.tokenizer is None:
            raise UsageError("--ids takes token ids; this is text")
        if thinking is not None:
            how["thinking"] = thinking
        allow = self._arguments.allow_special
        made = prepare(prompt, self._opened.tokenizer, allow_special=allow, **how)
        return Asked(made.ids, made.path, about, thinking, sampling)

    @staticmethod
    def _refuse(given: Mapping[str, Any], *names: str) -> None:
        if wrong := [name for name in names if name in given]:
            raise UsageError(f"{' and '.join(wrong)} belong to messages")


def _object(line: str) -> dict[str, Any]:
    """A line of a .jsonl file."""
    try:
        found = parse_json(line.encode())
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not isinstance(found, dict):
        raise UsageError("it is not an object")
    if unknown := sorted(set(found) - set(KEYS)):
        raise UsageError(f"unknown: {', '.join(map(repr, unknown))}; a line may hold {', '.join(KEYS)}")
    return found


def sampling_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options of an object from JSON, which has no numbers for keys."""
    found = {name: given[name] for name in SAMPLING if name in given}
    if isinstance(bias := found.get("logit_bias"), dict):
        if wrong := [key for key in bias if not key.isdecimal() or str(int(key)) != key]:
            raise UsageError(f"logit_bias has {wrong[0]!r} for a token id")
        found["logit_bias"] = {int(key): value for key, value in bias.items()}
    return found


def _prompt(arguments: argparse.Namespace) -> str:
    """The one prompt that is not in a .jsonl file."""
    if arguments.file is not None:
        return text_of(arguments.file)
    if arguments.prompt not in (None, "-"):
        return arguments.prompt
    if arguments.prompt is None and sys.stdin.isatty():
        raise UsageError('there is no prompt: give one ("..."), a --file, or pipe it in (- reads what you type)')
    if not (raw := sys.stdin.buffer.read(LARGEST + 1)):
        raise UsageError('there is no prompt: nothing came in on stdin. Pipe it in, or give one ("...") or a --file')
    return _decoded(raw, "stdin")


def text_of(file: Path) -> str:
    """The text in a file. Raises UsageError where it is not UTF-8, or far too long."""
    with open(expand_path(file), "rb") as opened:
        return _decoded(opened.read(LARGEST + 1), str(file))


def _decoded(raw: bytes, name: str) -> str:
    if len(raw) > LARGEST:
        raise UsageError(f"{name} has more than {LARGEST} bytes; cut it into several files")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
