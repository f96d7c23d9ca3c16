"""One continuation as it comes: its text in parts, its tool calls with their ids, and how it ended."""

import dataclasses
import secrets

from ..chat.streaming_parser import ARGUMENTS, CALL, CONTENT, REASONING, Piece, StreamingParser
from ..generation.result import Token
from .driver import Arrival


@dataclasses.dataclass
class Call:
    """A tool call: the id that the client answers to, the function's name, and JSON text as far as it came."""

    id: str
    name: str
    arguments: str = ""


class Choice:
    """A row of a request.

    thinking is whether its prompt lets the model think first; None where the prompt is no conversation, and all text
    is content.
    """

    def __init__(self, index: int, thinking: bool | None):
        self.index, self.thinking, self.tokens = index, thinking, list[Token]()
        self.text, self.calls = {REASONING: "", CONTENT: ""}, list[Call]()
        self.parts = None if thinking is None else StreamingParser(thinking=thinking)
        self.ended: str | None = None

    def add(self, arrival: Arrival) -> list[Piece]:
        """Take tokens, and return the pieces of text that can be handed out."""
        self.tokens += arrival.tokens
        text = "".join(token.text or "" for token in arrival.tokens)
        if self.parts is None:
            pieces = [Piece(CONTENT, text)] if text else []
        else:
            pieces = self.parts.add(text) + (self.parts.end() if arrival.finish_reason else [])
        for part, text in pieces:
            if part == CALL:
                self.calls.append(Call(f"call_{secrets.token_hex(12)}", text))
            elif part == ARGUMENTS:
                self.calls[-1].arguments += text
            else:
                self.text[part] += text
        self.ended = arrival.finish_reason
        return pieces

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for how it ended: "tool_calls" where there are calls, and all are whole."""
        is_calling = self.ended == "stop" and self.calls and self.parts and self.parts.is_whole
        return "tool_calls" if is_calling else self.ended

    @property
    def warnings(self) -> list[str]:
        """Deviations from the message format, in a sentence each."""
        return self.parts.warnings if self.parts else []
