"""`dsv32 generate`: requests in, continuations out."""

import argparse
import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from ..chat import parse_lenient, template
from ..errors import CheckpointError, UsageError
from ..generation.batch import LAYERWISE, WHOLE
from ..generation.result import Stats
from ..generation.run import Run
from ..generation.transcript import Token
from ..parallel.multihost import asking
from ..system.interrupts import EXIT_CODE, defer_interrupt
from .arguments import BATCH, CACHE, TURN, given
from .open_checkpoint import Opened
from .prompt_input import Asked, Reader
from .screen import Screen, json_line

PAUSE = 0.2
"""Seconds between two changes of the status line."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = Opened.of(arguments.checkpoint, ids=arguments.ids)
    reader = Reader(arguments, opened)
    asked = reader.requests()
    options = given(arguments, TURN, BATCH, CACHE)
    samples, as_json = options.get("n", 1), arguments.json or reader.many
    if len(asked) * samples != 1 and not as_json:
        raise UsageError(f"--n {samples} makes {samples} texts: add --json, which writes one result a line")
    results = _Results(screen, opened, asked, samples, as_json, arguments.stream)
    programs = LAYERWISE if arguments.layerwise else WHOLE
    prompts, samplings = [one.ids for one in asked], [one.sampling for one in asked]
    how = {"tokenizer": opened.tokenizer, "progress": results.reading, **options}
    Run(programs, opened.outline(arguments.dtype), prompts, samplings, **how)
    with screen.listening():
        model = opened.load(arguments, screen)
        screen.note(_way(asked))
        if samples > 1 and not any(one.temperature for one in samplings):
            screen.note(f"--n {samples} without a --temperature makes texts that are all alike")
        try:
            return results.write(Run(programs, model, prompts, samplings, **how))
        except FloatingPointError as error:
            raise CheckpointError(str(error)) from error


def _way(asked: Sequence[Asked]) -> str:
    """How the prompts were taken."""
    tokens = sum(len(one.ids) for one in asked)
    ways = collections.Counter(one.path for one in asked)
    if len(asked) == 1:
        hint = " (--chat sends it as a message)" if "raw text" in ways else ""
        return f"prompt: {asked[0].path}, {tokens} tokens{hint}"
    counts = ", ".join(f"{count} x {way}" for way, count in ways.items())
    return f"{len(asked)} prompts: {counts}; {tokens} tokens"


class _Results:
    """Writes what becomes of each row: the text, or JSON; at its end, or token by token."""

    def __init__(
        self, screen: Screen, opened: Opened, asked: Sequence[Asked], samples: int, as_json: bool, stream: bool
    ):
        self._screen, self._opened, self._asked, self._samples = screen, opened, asked, samples
        self._as_json, self._stream = as_json, stream
        self._written: set[int] = set()
        self._made = self._said = 0
        self._told = 0.0

    def reading(self, read: int, tokens: int) -> None:
        """The progress of prefill."""
        self._screen.status(f"reading: {read} of {tokens} tokens")

    def write(self, run: Run) -> int:
        """Do the run; the exit code."""
        with defer_interrupt() as asked:
            asked_to_stop = asking(run.mesh, asked)
            for batch in run.batches():
                for row, token in run.tokens(batch, 1 if self._stream else None, asked_to_stop):
                    self._token(row, token)
                for row, one in sorted(zip(batch.rows, batch.transcripts, strict=True), key=lambda pair: pair[0]):
                    if one.finish_reason is None:
                        one.interrupt()
                    self._row(row, one.tokens, one.logprobs, one.finish_reason, one.text, one.top)
                if asked_to_stop():
                    break
        made = run.result()
        for row, reason in enumerate(made.finish_reason):
            if row not in self._written and reason != "interrupted":
                self._row(row, made.tokens[row], made.logprobs[row], reason, made.text and made.text[row], [])
        self._summarize(made.stats)
        if "interrupted" not in made.finish_reason:
            return 0
        none = len(made.finish_reason) - len(self._written)
        self._screen.note("interrupted" + (f"; {none} of {len(made.finish_reason)} were not begun" if none else ""))
        return EXIT_CODE

    def _token(self, row: int, token: Token) -> None:
        self._made += 1
        if self._stream and self._as_json:
            event = {"token": token.token, "text": token.text, "logprob": token.logprob, "top_logprobs": token.top}
            self._screen.result(json_line({**self._whose(row), **event, "finish_reason": token.finish_reason}) + "\n")
        elif self._stream:
            self._text(f"{' ' if self._said else ''}{token.token}" if token.text is None else token.text)
        elif time.monotonic() - self._told > PAUSE:
            self._told = time.monotonic()
            self._screen.status(f"made {self._made} tokens")

    def _text(self, text: str) -> None:
        self._said += len(text)
        self._screen.result(text)

    def _row(self, row: int, tokens: list[int], logprobs: list[float], reason: Any, text: Any, top: list) -> None:
        """Write a row that is complete, or what is left to write of it."""
        self._written.add(row)
        if not self._as_json:
            whole = " ".join(map(str, tokens)) if text is None else text
            self._text(whole[self._said :] + "\n")
        elif not self._stream:
            said = {} if text is None else {"text": text, **self._message(row, tokens, text)}
            likeliest = {"top_logprobs": top} if any(top) else {}
            made = {"tokens": tokens, "logprobs": logprobs, **likeliest, "finish_reason": reason}
            self._screen.result(json_line({**self._whose(row), **said, **made}) + "\n")

    def _whose(self, row: int) -> dict[str, Any]:
        asked = self._asked[row // self._samples]
        sample = {"sample": row % self._samples} if self._samples > 1 else {}
        return {**asked.about, **sample, "read_as": asked.path, "prompt_tokens": len(asked.ids)}

    def _message(self, row: int, tokens: list[int], text: str) -> dict[str, Any]:
        """The assistant message that the text is, where messages were asked."""
        thinking = self._asked[row // self._samples].thinking
        if thinking is None:
            return {}
        ended = bool(tokens) and tokens[-1] in self._opened.cfg.eos_token_id
        message, warnings = parse_lenient(text + template.EOS if ended else text, thinking=thinking)
        return {"message": message, "parse_warnings": warnings}

    def _summarize(self, stats: Stats) -> None:
        rates = {
            "prefill_tokens_per_second": stats.prefill_tokens_per_second,
            "decode_tokens_per_second": stats.decode_tokens_per_second,
        }
        if self._as_json:
            self._screen.note(json_line({"stats": {**dataclasses.asdict(stats), **rates}}))
            return
        compiled = f"; compiling took {stats.compile_seconds:.1f} s" if stats.compile_seconds > 0.05 else ""
        read, made = (f" at {rate:.0f}/s" if rate else "" for rate in rates.values())
        self._screen.note(f"read {stats.prompt_tokens} tokens{read}, made {stats.new_tokens}{made}{compiled}")
