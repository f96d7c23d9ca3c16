"""Answers as OpenAI's interface writes them, whole or as the events of a stream."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..chat import Tokenizer
from ..chat.streaming_parser import ARGUMENTS, CALL, CONTENT, Piece
from ..generation.result import Token
from .api_error import ApiError
from .choice import Call, Choice
from .driver import Arrival, Job
from .reading import Ask

DONE = "data: [DONE]\n\n"


def count_usage(job: Job) -> dict[str, Any]:
    """Return the tokens of a request: those of each prompt once, those that were found in the cache among them."""
    rows = job.rows
    prompts = {id(row.prompt): row for row in reversed(rows)}.values()
    read, new = sum(len(row.prompt) for row in prompts), sum(len(row.tokens) for row in rows)
    cached = sum(max(0, len(row.prompt) - row.read) for row in prompts)
    details = {"cached_tokens": cached}
    total = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    return {**total, "prompt_tokens_details": details}


class _Writer:
    """Writes the answer to one request. `kind` is the name of the object, `prefix` begins its id."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, ask: Ask, tokenizer: Tokenizer):
        self.ask, self.tokenizer = ask, tokenizer
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": ask.model}

    def write_whole(self, choices: Sequence[Choice], job: Job) -> dict[str, Any]:
        """Return the whole answer."""
        written = [self._finish(self.write_choice(choice), choice) for choice in choices]
        return {**self.head, "object": self.kind, "choices": written, "usage": count_usage(job)}

    def open(self, choices: Sequence[Choice], job: Job) -> str:
        """Return the first events of a stream."""
        return ""

    def add(self, choice: Choice, arrival: Arrival, pieces: Sequence[Piece]) -> str:
        """Return the event for what came, "" where all of it is held back."""
        chunk = self.write_chunk(choice, arrival, pieces)
        return "" if chunk is None else self._event([self._finish(chunk, choice)])

    def close(self, choices: Sequence[Choice], job: Job) -> str:
        """Return the last events of a stream."""
        return (self._event([], usage=count_usage(job)) if self.ask.usage else "") + DONE

    def fail(self, error: ApiError) -> str:
        """Return the event of an error that ends the stream."""
        return f"data: {json.dumps(error.to_openai())}\n\n"

    def write_choice(self, choice: Choice) -> dict[str, Any]:
        """Return all of a choice but how it ended."""
        raise NotImplementedError

    def write_chunk(self, choice: Choice, arrival: Arrival, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Return what came of a choice; None if nothing can be said yet."""
        raise NotImplementedError

    def _finish(self, written: dict[str, Any], choice: Choice) -> dict[str, Any]:
        warnings = {"parse_warnings": choice.warnings} if choice.ended and choice.warnings else {}
        return {"index": choice.index, **written, "finish_reason": choice.finish_reason, **warnings}

    def _event(self, choices: list, usage: dict | None = None) -> str:
        chunk = {**self.head, "object": self.chunk_kind, "choices": choices}
        return f"data: {json.dumps({**chunk, 'usage': usage} if self.ask.usage else chunk)}\n\n"


class ChatWriter(_Writer):
    """Writes the messages of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def open(self, choices, job):
        return "".join(
            self._event([self._finish({"delta": {"role": "assistant", "content": ""}, "logprobs": None}, choice)])
            for choice in choices
        )

    def write_choice(self, choice):
        reasoning = {"reasoning_content": choice.text["reasoning"]} if choice.thinking else {}
        calls = [_write_call(call) for call in choice.calls]
        content = choice.text[CONTENT] or (None if calls else "")
        message = {"role": "assistant", "content": content, **reasoning, **({"tool_calls": calls} if calls else {})}
        return {"message": message, "logprobs": self._write_logprobs(choice.tokens)}

    def write_chunk(self, choice, arrival, pieces):
        if not pieces and not arrival.finish_reason and not self.ask.logprobs:
            return None
        return {"delta": _write_delta(choice, pieces), "logprobs": self._write_logprobs(arrival.tokens)}

    def _write_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.ask.logprobs:
            return None
        content = [
            {
                **self._write_token(token.token, token.logprob),
                "top_logprobs": [self._write_token(*likely) for likely in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _write_token(self, token: int, logprob: float) -> dict[str, Any]:
        said = self.tokenizer.bytes_of([token])
        return {"token": said.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(said)}


def _write_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _write_delta(choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return what a message gains by these pieces."""
    delta: dict[str, Any] = {}
    index = len(choice.calls) - sum(piece.part == CALL for piece in pieces) - 1
    for part, text in pieces:
        if part == CALL:
            index += 1
            call = _write_call(Call(choice.calls[index].id, text))
            delta.setdefault("tool_calls", []).append({"index": index, **call})
        elif part == ARGUMENTS:
            calls = delta.setdefault("tool_calls", [])
            if not calls:
                calls.append({"index": index, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += text
        else:
            name = "content" if part == CONTENT else "reasoning_content"
            delta[name] = delta.get(name, "") + text
    return delta


class CompletionWriter(_Writer):
    """Writes the texts of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, ask: Ask, tokenizer: Tokenizer):
        super().__init__(ask, tokenizer)
        self._written: dict[int, int] = {}

    def open(self, choices, job):
        return "".join(
            self._event([self._finish(self._write(choice.index, _join(told), told), choice)])
            for choice in choices
            if (told := self._repeat(choice))
        )

    def write_choice(self, choice):
        told = self._repeat(choice)
        return self._write(choice.index, _join(told) + choice.text[CONTENT], [*told, *choice.tokens])

    def write_chunk(self, choice, arrival, pieces):
        text = "".join(piece.text for piece in pieces)
        if not text and not arrival.finish_reason and not self.ask.logprobs:
            return None
        return self._write(choice.index, text, arrival.tokens)

    def _repeat(self, choice: Choice) -> Sequence[Token]:
        """Return the tokens of its prompt if they are wanted."""
        return self.ask.echo[choice.index // self.ask.request.options.n] if self.ask.echo else ()

    def _write(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return text and tokens; `_written` counts the characters of each choice, which places its next token."""
        offsets = []
        for token in tokens:
            offsets.append(self._written.setdefault(index, 0))
            self._written[index] += len(token.text or "")
        logprobs = None
        if self.ask.logprobs:
            top = [{self._say(i): logprob for i, logprob in token.top} for token in tokens]
            logprobs = {
                "tokens": [self._say(token.token) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": top,
                "text_offset": offsets,
            }
        return {"text": text, "logprobs": logprobs}

    def _say(self, token: int) -> str:
        """Return a token's text; one that is no whole character as its bytes, so that two are never the same."""
        said = self.tokenizer.bytes_of([token])
        try:
            return said.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


def _join(tokens: Sequence[Token]) -> str:
    return "".join(token.text or "" for token in tokens)
