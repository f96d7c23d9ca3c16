"""The prompts of `dsv32 generate`: from the command line, stdin or files, validated and as token ids."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..chat import prepare
from ..chat.messages import require_content
from ..errors import COMMAND_LINE, DsvError, UsageError, argument, listing, pluralize, unknown
from ..generation.options import Options, Sampling, specs
from ..model import validation
from ..system.files import expand_path, parse_json
from .open_checkpoint import OpenedCheckpoint
from .parsers import OWN, collect_options, collect_sampling, parse_token_ids
from .terminal import Screen

MAX_BYTES = 1 << 30

MOST_LINES = 40
"""Invalid requests that are listed."""

KINDS = ("prompt", "messages", "ids")
KEYS = (*KINDS, "id", "thinking", "tools", *specs(Sampling), *OWN)
"""The keys that a line of a .jsonl file may have."""


@dataclasses.dataclass(frozen=True)
class PromptInput:
    """One prompt with its `options` of `generate`. Its results repeat `labels`; without messages `thinking` is None."""

    ids: list[int]
    path: str
    labels: dict[str, Any]
    thinking: bool | None
    sampling: Sampling
    options: dict[str, Any]

    @property
    def n(self) -> int:
        """The number of its continuations."""
        return self.options["n"]


class PromptReader:
    """Read the prompts that the command line asks for, for the checkpoint `opened`."""

    def __init__(self, arguments: argparse.Namespace, opened: OpenedCheckpoint, screen: Screen):
        self._arguments, self._opened = arguments, opened
        self._file: Path | None = arguments.file
        self._options = {name: getattr(Options(), name) for name in OWN} | collect_options(arguments, OWN)
        given = collect_sampling(arguments)
        self._sampling = opened.choose_sampling(given, screen)
        self.is_batch = self._file is not None and self._file.suffix == ".jsonl"
        idle = [argument(name) for name in ("top_k", "top_p", "min_p", "seed") if name in given]
        if idle and not self._sampling.get("temperature") and not self.is_batch:
            screen.note(f"{listing(idle)}: no effect without --temperature, as the most likely token is chosen")
        self._is_chat = arguments.chat or arguments.system is not None
        if arguments.ids and (self._is_chat or arguments.think or arguments.allow_special):
            raise UsageError(
                "--ids takes and prints token ids; --chat, --system, --think and --allow-special apply to text"
            )

    def read(self) -> list[PromptInput]:
        """Return all prompts. Raises UsageError that lists every invalid one."""
        arguments, file = self._arguments, self._file
        if file is not None and arguments.prompt is not None:
            raise UsageError("PROMPT and --file exclude each other")
        if file is not None and self.is_batch:
            if arguments.system is not None:
                raise UsageError('--system applies to one prompt: in a .jsonl file, give it as the first of "messages"')
            return self._read_lines(read_text(file))
        if arguments.think and not self._is_chat:
            raise UsageError("--think applies to messages: add --chat, or use a .jsonl file")
        text = _read_prompt(arguments)
        if not arguments.ids:
            return [self._prepare({"prompt": text}, {})]
        try:
            return [self._prepare({"ids": parse_token_ids(text)}, {})]
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--ids: {error}") from None

    def _read_lines(self, text: str) -> list[PromptInput]:
        """Read the requests of a .jsonl file, whose options are spelled as its keys, not as on the command line."""
        found: list[PromptInput] = []
        problems: list[str] = []
        spelling = COMMAND_LINE.set(False)
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                request = _parse_line(line)
                labels = {"line": number, **({"id": request["id"]} if "id" in request else {})}
                found.append(one := self._prepare(request, labels))
                self._opened.validate(
                    self._arguments.dtype, [one.ids], one.sampling, **one.options, tokenizer=self._opened.tokenizer
                )
            except DsvError as error:
                problems.append(f"\n  line {number}: {error}")
        COMMAND_LINE.reset(spelling)
        if problems:
            more = f"\n  ... and {len(problems) - MOST_LINES} more" if len(problems) > MOST_LINES else ""
            count = pluralize(len(problems), "invalid request")
            raise UsageError(f"{count} in {self._file}; nothing was run:{''.join(problems[:MOST_LINES])}{more}")
        if not found:
            raise UsageError(f"{self._file} holds no requests")
        return found

    def _prepare(self, request: Mapping[str, Any], labels: dict[str, Any]) -> PromptInput:
        """Return the prompt of a request, which has the keys of a line of a .jsonl file."""
        kinds = [kind for kind in KINDS if kind in request]
        if len(kinds) != 1:
            raise UsageError(f"a request needs one of {', '.join(KINDS)}, not {' and '.join(kinds) or 'none'}")
        sampling = Sampling(**{**self._sampling, **parse_sampling(request)})
        own = {**self._options, **{name: request[name] for name in OWN if name in request}}
        is_chat = "messages" in request or (self._is_chat and "prompt" in request)
        if not is_chat and (wrong := [name for name in ("thinking", "tools") if name in request]):
            raise UsageError(f"{' and '.join(wrong)} can only be given with messages")
        if "ids" in request:
            if not isinstance(request["ids"], list):
                raise UsageError(f"ids must be a list of token ids, not {request['ids']!r:.60}")
            (ids,) = validation.check_prompts([request["ids"]], self._opened.cfg.vocab_size)
            return PromptInput(ids, "token ids", labels, None, sampling, own)
        if self._opened.tokenizer is None:
            raise UsageError("with --ids every request must have ids, not text")
        prompt: Any = request.get("prompt")
        if "prompt" in request and (not isinstance(prompt, str) or not prompt):
            raise UsageError(f"prompt must be a non-empty string, not {prompt!r:.60}")
        options: dict[str, Any] = {"allow_special": self._arguments.allow_special}
        if is_chat:
            system = self._arguments.system
            before = [] if system is None else [{"role": "system", "content": system}]
            prompt = request.get("messages", [*before, {"role": "user", "content": prompt}])
            options |= {"thinking": request.get("thinking", self._arguments.think), "tools": request.get("tools")}
            if not isinstance(prompt, list):
                raise UsageError(f"messages must be a list of messages, not {prompt!r:.60}")
            require_content(prompt)
            if type(options["thinking"]) is not bool:
                raise UsageError(f"thinking must be true or false, not {options['thinking']!r:.60}")
        prepared = prepare(prompt, self._opened.tokenizer, **options)
        return PromptInput(prepared.ids, prepared.path, labels, options.get("thinking"), sampling, own)


def _parse_line(line: str) -> dict[str, Any]:
    request = parse_json(line.encode())
    if not isinstance(request, dict):
        raise UsageError("not an object")
    if wrong := unknown(sorted(request), KEYS):
        raise UsageError(f"unknown: {listing(wrong)}; a request may have {', '.join(KEYS)}")
    return request


def parse_sampling(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters in an object from JSON, where keys cannot be numbers."""
    found = {name: request[name] for name in specs(Sampling) if name in request}
    if isinstance(bias := found.get("logit_bias"), dict):
        if wrong := [key for key in bias if not key.isdecimal() or str(int(key)) != key]:
            raise UsageError(f"logit_bias: {wrong[0]!r} is not a token id")
        found["logit_bias"] = {int(key): value for key, value in bias.items()}
    return found


def _read_prompt(arguments: argparse.Namespace) -> str:
    """Return the one prompt that does not come from a .jsonl file."""
    if arguments.file is not None:
        return read_text(arguments.file)
    if arguments.prompt not in (None, "-"):
        return arguments.prompt
    if arguments.prompt is None and sys.stdin.isatty():
        raise UsageError('no prompt: give one ("..."), a --file, or pipe it in (- reads what you type)')
    if not (raw := sys.stdin.buffer.read(MAX_BYTES + 1)):
        raise UsageError('no prompt: stdin is empty. Pipe it in, or give one ("...") or a --file')
    return _decode(raw, "stdin")


def read_text(file: Path) -> str:
    """Return the text of a file, which may be a pipe. Raises UsageError unless it is UTF-8 and not too long."""
    with open(expand_path(file), "rb") as opened:
        return _decode(opened.read(MAX_BYTES + 1), str(file))


def _decode(raw: bytes, name: str) -> str:
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{name} has more than {MAX_BYTES} bytes; split it into several files")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
