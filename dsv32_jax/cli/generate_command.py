"""`dsv32 generate`: prompts in, continuations out."""

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from ..chat import Tokenizer, parse_lenient, template
from ..errors import CheckpointError, UsageError, pluralize
from ..generation.detokenizer import StopStrings
from ..generation.engine_core import EngineCore
from ..generation.request import Request
from ..generation.result import Stats, Token, TopLogprobs
from ..generation.row import Row, summarize
from ..parallel.multihost import make_agreed
from ..system.interrupts import EXIT_CODE, defer_interrupt
from ..system.progress import Progress
from .answer_view import describe_stats
from .open_checkpoint import OpenedCheckpoint
from .parsers import SHARED, collect_options
from .prompt_input import PromptInput, PromptReader
from .terminal import Screen, format_json


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = OpenedCheckpoint.of(arguments.checkpoint, ids=arguments.ids)
    reader = PromptReader(arguments, opened, screen)
    inputs = reader.read()
    shared: dict[str, Any] = {**collect_options(arguments, SHARED), "tokenizer": opened.tokenizer}
    shared["progress"] = lambda read, tokens: screen.progress(Progress(read, tokens, unit="tokens"))
    whole = _validate(opened, arguments.dtype, inputs, {"n": max(one.n for one in inputs), **shared})
    shared["capacity"] = whole.capacity
    groups = [
        (places, _validate(opened, arguments.dtype, [inputs[i] for i in places], shared)) for places in _group(inputs)
    ]
    if arguments.top_logprobs and not (arguments.json or reader.is_batch):
        raise UsageError("--top-logprobs is written as JSON alone: add --json, or omit it; nothing was run")
    as_json, slots = arguments.json or reader.is_batch, [(one, sample) for one in inputs for sample in range(one.n)]
    alone = arguments.coordinator is None  # several processes must run the same programs, whoever prints
    stream = alone and not as_json and sys.stdout.isatty() if arguments.stream is None else arguments.stream
    if stream and len(slots) > 1 and not as_json:
        if arguments.stream:
            raise UsageError(f"--stream shows one text, and --samples makes {len(slots)}: add --json, or omit --stream")
        stream = False
    results = _Results(screen, opened.cfg.eos_token_id, opened.tokenizer, slots, as_json, stream)
    with screen.show_log():
        model = opened.load(arguments, screen)
        screen.note(_describe_inputs(inputs))
        if equal := sum(one.n > 1 and not one.sampling.temperature for one in inputs):
            screen.note(f"without --temperature the samples of {pluralize(equal, 'prompt')} are identical")
        try:
            core = EngineCore.for_request(model, whole, arguments.layerwise)
            return results.write(core, groups)
        except FloatingPointError as error:
            raise CheckpointError(str(error)) from error


def _group(inputs: Sequence[PromptInput]) -> list[list[int]]:
    """Return the places of the inputs that have the same options but for their lengths, group by group."""
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(inputs):
        own = {name: value for name, value in one.options.items() if name != "max_new_tokens"}
        groups.setdefault(json.dumps(own, sort_keys=True), []).append(place)
    return list(groups.values())


def _validate(opened: OpenedCheckpoint, dtype: str, inputs: Sequence[PromptInput], options: dict[str, Any]) -> Request:
    """Return the request for inputs with the same options, with `options` beside or in place of their own."""
    lengths = [one.options["max_new_tokens"] for one in inputs]
    prompts, samplings = [one.ids for one in inputs], [one.sampling for one in inputs]
    return opened.validate(dtype, prompts, samplings, **{**inputs[0].options, **options, "max_new_tokens": lengths})


def _describe_inputs(inputs: Sequence[PromptInput]) -> str:
    tokens = pluralize(sum(len(one.ids) for one in inputs), "token")
    paths = collections.Counter(one.path for one in inputs)
    if len(inputs) == 1:
        hint = " (--chat sends it as a message)" if "raw text" in paths else ""
        return f"prompt: {inputs[0].path}, {tokens}{hint}"
    return f"{len(inputs)} prompts: {', '.join(f'{count} x {path}' for path, count in paths.items())}; {tokens}"


@dataclasses.dataclass
class _Results:
    """Writes continuations as text or JSON, whole or token by token. The reasoning of a text goes to stderr."""

    screen: Screen
    end_ids: Collection[int]
    tokenizer: Tokenizer | None
    slots: Sequence[tuple[PromptInput, int]]
    as_json: bool
    stream: bool
    tokens: int = 0
    streamed: int = 0
    """Characters of the row's text that were written."""
    reasoning: StopStrings | None = None
    """Finds the end of the row's reasoning; None outside it."""

    def write(self, core: EngineCore, groups: Sequence[tuple[list[int], Request]]) -> int:
        """Generate all groups of inputs side by side, write results in the order of inputs, return the exit code."""
        added = [(places, core.add(request)) for places, request in groups]
        firsts = [slot for slot, (_, sample) in enumerate(self.slots) if not sample]
        slots: dict[Row, int] = {}
        for places, row in ((places, row) for places, rows in added for row in rows):
            prompt, sample = divmod(row.index, row.request.options.n)
            slots[row] = firsts[places[prompt]] + sample
        rows, ended, written = sorted(slots, key=slots.__getitem__), set[int](), 0
        with defer_interrupt() as is_interrupted:
            must_stop = make_agreed(core.loop.model.mesh, is_interrupted)
            for _, group in added:
                for row, token in core.follow(group, 1 if self.stream else None, must_stop):
                    if token is not None:
                        self._write_token(slots[row], token)
                        continue
                    ended.add(slots[row])
                    while written in ended:
                        if rows[written].has_begun:
                            self._write_row(written, rows[written])
                        written += 1
        gen, unstarted = summarize(rows, core.loop.totals), sum(not row.has_begun for row in rows)
        self.screen.note(self._describe_stats(gen.stats))
        if "interrupted" not in gen.finish_reason:
            return 0
        unstarted = f"; {unstarted} of {len(rows)} rows were not started" if unstarted else ""
        self.screen.note("interrupted" + unstarted)
        return EXIT_CODE

    def _write_token(self, row: int, token: Token) -> None:
        self.tokens += 1
        if self.stream and self.as_json:
            event = {
                "token": token.token,
                "text": token.text,
                "logprob": token.logprob,
                "top_logprobs": self._name_tokens(token.top),
            }
            event = {**self._label(row), **event, "finish_reason": token.finish_reason}
            self.screen.result(format_json(event) + "\n")
        elif self.stream:
            text = f"{' ' if self.streamed else ''}{token.token}" if token.text is None else token.text
            self._write_text(row, text)
        else:
            self.screen.status(f"generated {pluralize(self.tokens, 'token')}")

    def _write_row(self, row: int, one: Row) -> None:
        """Write a complete row, or what was not streamed of it."""
        if not self.as_json:
            if len(self.slots) > 1:
                self.screen.result(f"==> {row + 1} of {len(self.slots)} <==\n")
            whole = " ".join(map(str, one.tokens)) if one.text is None else one.text
            self._write_text(row, whole[self.streamed :])
            if self.reasoning is not None:
                self.screen.aside(self.reasoning.end())
                self.screen.note("\nthe reasoning is not closed: there is no answer")
            self.screen.result("\n")
            self.streamed, self.reasoning = 0, None
        elif not self.stream:
            text = {} if one.text is None else {"text": one.text, **self._parse_message(row, one)}
            top = {"top_logprobs": list(map(self._name_tokens, one.top))} if any(one.top) else {}
            result = {"tokens": one.tokens, "logprobs": one.logprobs, **top, "finish_reason": one.finish_reason}
            self.screen.result(format_json({**self._label(row), **text, **result}) + "\n")

    def _write_text(self, row: int, text: str) -> None:
        """Write more of a row's text."""
        if not self.streamed and self.slots[row][0].thinking:
            self.reasoning = StopStrings(template.THINK_END)
        self.streamed += len(text)
        if self.reasoning is not None:
            self.screen.aside(self.reasoning.add(text))
            if self.reasoning.hit is None:
                return
            text, self.reasoning = self.reasoning.rest, None
            self.screen.aside("\n\n")
        self.screen.result(text)

    def _label(self, row: int) -> dict[str, Any]:
        one, number = self.slots[row]
        sample = {"sample": number} if one.n > 1 else {}
        return {**one.labels, **sample, "read_as": one.path, "prompt_tokens": len(one.ids)}

    def _parse_message(self, row: int, one: Row) -> dict[str, Any]:
        """Return the assistant message in the text, where the prompt was made of messages."""
        thinking = self.slots[row][0].thinking
        if thinking is None:
            return {}
        ended = bool(one.tokens) and one.tokens[-1] in self.end_ids
        message, warnings = parse_lenient(f"{one.text}{template.EOS if ended else ''}", thinking=thinking)
        return {"message": message, "parse_warnings": warnings}

    def _name_tokens(self, top: TopLogprobs) -> list[dict[str, Any]]:
        """Return the most likely tokens at a position, with their text where there is a tokenizer."""
        texts = [{} if self.tokenizer is None else {"text": self.tokenizer.decode([token])} for token, _ in top]
        return [{"token": token, **text, "logprob": value} for (token, value), text in zip(top, texts, strict=True)]

    def _describe_stats(self, stats: Stats) -> str:
        if not self.as_json:
            return describe_stats(stats)
        rates = {name: getattr(stats, name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
        return format_json({"stats": {**dataclasses.asdict(stats), **rates}})
