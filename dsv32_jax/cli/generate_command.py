"""`dsv32 generate`: prompts in, continuations out."""

import argparse
import collections
import dataclasses
import sys
from collections.abc import Collection, Sequence
from typing import Any

from ..chat import parse_lenient, template
from ..errors import CheckpointError, UsageError, pluralize
from ..generation.engine import Engine
from ..generation.request import Request
from ..generation.result import Stats, Token
from ..generation.row import Row, summarize
from ..parallel.multihost import make_agreed
from ..system.interrupts import EXIT_CODE, defer_interrupt
from .answer_view import describe_stats
from .open_checkpoint import OpenedCheckpoint
from .parsers import BATCH, CACHE, LENGTH, collect_options
from .prompt_input import PromptInput, PromptReader
from .terminal import Screen, json_line


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = OpenedCheckpoint.of(arguments.checkpoint, ids=arguments.ids)
    reader = PromptReader(arguments, opened, screen)
    inputs = reader.read()
    options = collect_options(arguments, [*LENGTH, *BATCH, *CACHE])
    samples, as_json = options.get("n", 1), arguments.json or reader.is_batch
    if len(inputs) * samples != 1 and not as_json:
        raise UsageError(f"--n {samples} makes {samples} texts: add --json, which writes one result per line")
    prompts, samplings = [one.ids for one in inputs], [one.sampling for one in inputs]
    options["tokenizer"] = opened.tokenizer
    options["progress"] = lambda read, tokens: screen.status(f"read {read} of {tokens} tokens")
    request = opened.validate(arguments.dtype, prompts, samplings, **options)
    alone = arguments.coordinator is None  # several processes must run the same programs, whoever prints
    stream = alone and not as_json and sys.stdout.isatty() if arguments.stream is None else arguments.stream
    results = _Results(screen, opened.cfg.eos_token_id, inputs, samples, as_json, stream)
    with screen.show_log():
        model = opened.load(arguments, screen)
        screen.note(_describe_inputs(inputs))
        if samples > 1 and not any(sampling.temperature for sampling in samplings):
            screen.note(f"--n {samples} without --temperature makes identical texts")
        try:
            engine = Engine.for_request(model, request, arguments.layerwise)
            return results.write(engine, request)
        except FloatingPointError as error:
            raise CheckpointError(str(error)) from error


def _describe_inputs(inputs: Sequence[PromptInput]) -> str:
    tokens = pluralize(sum(len(one.ids) for one in inputs), "token")
    paths = collections.Counter(one.path for one in inputs)
    if len(inputs) == 1:
        hint = " (--chat sends it as a message)" if "raw text" in paths else ""
        return f"prompt: {inputs[0].path}, {tokens}{hint}"
    return f"{len(inputs)} prompts: {', '.join(f'{count} x {path}' for path, count in paths.items())}; {tokens}"


@dataclasses.dataclass
class _Results:
    """Writes each row's continuation, as text or JSON, at its end or token by token."""

    screen: Screen
    end_ids: Collection[int]
    inputs: Sequence[PromptInput]
    samples: int
    as_json: bool
    stream: bool
    tokens: int = 0
    streamed: int = 0
    """Characters of the text that were written."""

    def write(self, engine: Engine, request: Request) -> int:
        """Generate, write all results in the order of prompts, and return the exit code."""
        rows, ended, written = engine.add(request), set[int](), 0
        with defer_interrupt() as is_interrupted:
            must_stop = make_agreed(engine.model.mesh, is_interrupted)
            for row, token in engine.follow(rows, 1 if self.stream else None, must_stop):
                if token is not None:
                    self._write_token(row.index, token)
                    continue
                ended.add(row.index)
                while written in ended:
                    if rows[written].has_begun:
                        self._write_row(written, rows[written])
                    written += 1
        gen, unstarted = summarize(rows, engine.loop.totals), sum(not row.has_begun for row in rows)
        self.screen.note(self._describe_stats(gen.stats))
        if "interrupted" not in gen.finish_reason:
            return 0
        unstarted = f"; {unstarted} of {len(rows)} rows were not started" if unstarted else ""
        self.screen.note("interrupted" + unstarted)
        return EXIT_CODE

    def _write_token(self, row: int, token: Token) -> None:
        self.tokens += 1
        if self.stream and self.as_json:
            event = {"token": token.token, "text": token.text, "logprob": token.logprob, "top_logprobs": token.top}
            self._write_json({**self._label(row), **event, "finish_reason": token.finish_reason})
        elif self.stream:
            self._write_text(f"{' ' if self.streamed else ''}{token.token}" if token.text is None else token.text)
        else:
            self.screen.status(f"generated {pluralize(self.tokens, 'token')}")

    def _write_row(self, row: int, one: Row) -> None:
        """Write a complete row, or what was not streamed of it."""
        if not self.as_json:
            whole = " ".join(map(str, one.tokens)) if one.text is None else one.text
            self._write_text(whole[self.streamed :] + "\n")
        elif not self.stream:
            text = {} if one.text is None else {"text": one.text, **self._parse_message(row, one)}
            top = {"top_logprobs": one.top} if any(one.top) else {}
            result = {"tokens": one.tokens, "logprobs": one.logprobs, **top, "finish_reason": one.finish_reason}
            self._write_json({**self._label(row), **text, **result})

    def _write_text(self, text: str) -> None:
        self.streamed += len(text)
        self.screen.result(text)

    def _write_json(self, value: dict[str, Any]) -> None:
        self.screen.result(json_line(value) + "\n")

    def _label(self, row: int) -> dict[str, Any]:
        one = self.inputs[row // self.samples]
        sample = {"sample": row % self.samples} if self.samples > 1 else {}
        return {**one.labels, **sample, "read_as": one.path, "prompt_tokens": len(one.ids)}

    def _parse_message(self, row: int, one: Row) -> dict[str, Any]:
        """Return the assistant message in the text, where the prompt was made of messages."""
        thinking = self.inputs[row // self.samples].thinking
        if thinking is None:
            return {}
        ended = bool(one.tokens) and one.tokens[-1] in self.end_ids
        message, warnings = parse_lenient(f"{one.text}{template.EOS if ended else ''}", thinking=thinking)
        return {"message": message, "parse_warnings": warnings}

    def _describe_stats(self, stats: Stats) -> str:
        if not self.as_json:
            return describe_stats(stats)
        rates = {name: getattr(stats, name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
        return json_line({"stats": {**dataclasses.asdict(stats), **rates}})
