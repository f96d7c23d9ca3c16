"""`dsv32 generate`: prompts in, continuations out."""

import argparse
import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from ..chat import parse_lenient, template
from ..errors import CheckpointError, UsageError, pluralize
from ..generation.engine import LAYERWISE, WHOLE, Engine
from ..generation.result import Stats, Token
from ..parallel.multihost import asking
from ..system.interrupts import EXIT_CODE, defer_interrupt
from .answer_view import describe_stats
from .open_checkpoint import OpenedCheckpoint
from .parsers import BATCH, CACHE, LENGTH, collect_options
from .prompt_input import PromptInput, PromptReader
from .screen import Screen, json_line

STATUS_SECONDS = 0.2
"""Time between two updates of the status line."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = OpenedCheckpoint.of(arguments.checkpoint, ids=arguments.ids)
    reader = PromptReader(arguments, opened)
    inputs = reader.read()
    options = collect_options(arguments, [*LENGTH, *BATCH, *CACHE])
    samples, as_json = options.get("n", 1), arguments.json or reader.is_batch
    if len(inputs) * samples != 1 and not as_json:
        raise UsageError(f"--n {samples} makes {samples} texts: add --json, which writes one result per line")
    results = _Results(screen, opened, inputs, samples, as_json, arguments.stream)
    prompts, samplings = [one.ids for one in inputs], [one.sampling for one in inputs]
    options |= {"tokenizer": opened.tokenizer, "progress": results.show_prefill}
    request = opened.validate(arguments.dtype, prompts, samplings, **options)
    with screen.show_log():
        model = opened.load(arguments, screen)
        screen.note(_describe_inputs(inputs))
        if samples > 1 and not any(sampling.temperature for sampling in samplings):
            screen.note(f"--n {samples} without --temperature makes identical texts")
        try:
            return results.write(Engine(model, request, LAYERWISE if arguments.layerwise else WHOLE))
        except FloatingPointError as error:
            raise CheckpointError(str(error)) from error


def _describe_inputs(inputs: Sequence[PromptInput]) -> str:
    tokens = pluralize(sum(len(one.ids) for one in inputs), "token")
    paths = collections.Counter(one.path for one in inputs)
    if len(inputs) == 1:
        hint = " (--chat sends it as a message)" if "raw text" in paths else ""
        return f"prompt: {inputs[0].path}, {tokens}{hint}"
    return f"{len(inputs)} prompts: {', '.join(f'{count} x {path}' for path, count in paths.items())}; {tokens}"


class _Results:
    """Write each row's continuation, as text or JSON, at its end or token by token."""

    def __init__(
        self,
        screen: Screen,
        opened: OpenedCheckpoint,
        inputs: Sequence[PromptInput],
        samples: int,
        as_json: bool,
        stream: bool,
    ):
        self._screen, self._opened, self._inputs, self._samples = screen, opened, inputs, samples
        self._as_json, self._stream = as_json, stream
        self._written: set[int] = set()
        self._tokens = self._streamed = 0
        self._last_status = 0.0

    def show_prefill(self, read: int, tokens: int) -> None:
        """Show how much of the prompts was read."""
        self._screen.status(f"reading: {read} of {tokens} tokens")

    def write(self, engine: Engine) -> int:
        """Generate, write all results and return the exit code."""
        with defer_interrupt() as is_interrupted:
            must_stop = asking(engine.model.mesh, is_interrupted)
            for batch in engine.batches:
                for row, token in engine.run(batch, 1 if self._stream else None, must_stop):
                    self._write_token(row, token)
                for row in sorted(batch):
                    one = engine.rows[row]
                    one.interrupt()
                    self._write_row(row, one.tokens, one.logprobs, one.finish_reason, one.text, one.top)
                if must_stop():
                    break
        made = engine.result()
        for row, reason in enumerate(made.finish_reason):
            if row not in self._written and reason != "interrupted":
                self._write_row(row, made.tokens[row], made.logprobs[row], reason, made.text and made.text[row], [])
        self._summarize(made.stats)
        if "interrupted" not in made.finish_reason:
            return 0
        rows = len(made.finish_reason)
        unstarted = rows - len(self._written)
        self._screen.note("interrupted" + (f"; {unstarted} of {rows} rows were not started" if unstarted else ""))
        return EXIT_CODE

    def _write_token(self, row: int, token: Token) -> None:
        self._tokens += 1
        if self._stream and self._as_json:
            event = {"token": token.token, "text": token.text, "logprob": token.logprob, "top_logprobs": token.top}
            self._write_json({**self._label(row), **event, "finish_reason": token.finish_reason})
        elif self._stream:
            self._write_text(f"{' ' if self._streamed else ''}{token.token}" if token.text is None else token.text)
        elif time.monotonic() - self._last_status > STATUS_SECONDS:
            self._last_status = time.monotonic()
            self._screen.status(f"generated {pluralize(self._tokens, 'token')}")

    def _write_row(self, row: int, tokens: list[int], logprobs: list[float], reason: Any, text: Any, top: list) -> None:
        """Write a complete row, or what was not streamed of it."""
        self._written.add(row)
        if not self._as_json:
            whole = " ".join(map(str, tokens)) if text is None else text
            self._write_text(whole[self._streamed :] + "\n")
        elif not self._stream:
            texts = {} if text is None else {"text": text, **self._parse_message(row, tokens, text)}
            likeliest = {"top_logprobs": top} if any(top) else {}
            result = {"tokens": tokens, "logprobs": logprobs, **likeliest, "finish_reason": reason}
            self._write_json({**self._label(row), **texts, **result})

    def _write_text(self, text: str) -> None:
        self._streamed += len(text)
        self._screen.result(text)

    def _write_json(self, value: dict[str, Any]) -> None:
        self._screen.result(json_line(value) + "\n")

    def _label(self, row: int) -> dict[str, Any]:
        one = self._inputs[row // self._samples]
        sample = {"sample": row % self._samples} if self._samples > 1 else {}
        return {**one.labels, **sample, "read_as": one.path, "prompt_tokens": len(one.ids)}

    def _parse_message(self, row: int, tokens: list[int], text: str) -> dict[str, Any]:
        """Return the assistant message in the text, where the prompt was made of messages."""
        thinking = self._inputs[row // self._samples].thinking
        if thinking is None:
            return {}
        ended = bool(tokens) and tokens[-1] in self._opened.cfg.eos_token_id
        message, warnings = parse_lenient(text + template.EOS if ended else text, thinking=thinking)
        return {"message": message, "parse_warnings": warnings}

    def _summarize(self, stats: Stats) -> None:
        rates = {name: getattr(stats, name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
        as_json = json_line({"stats": {**dataclasses.asdict(stats), **rates}})
        self._screen.note(as_json if self._as_json else describe_stats(stats))
