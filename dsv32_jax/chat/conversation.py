"""A conversation as a value: each turn gives the next conversation, and the old one stays as it was."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..errors import UsageError
from .encoding import encode
from .lenient import parse_lenient
from .prompts import Prompt, prepare
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """What was said so far, and how: with which system text, which tools, and whether the model thinks first.

    talk = Conversation(system="Be brief.", thinking=True).user("1+1=?")
    talk, forgiven = talk.completed(text)       # what the model wrote after `talk.prompt(tokenizer)`
    talk = talk.results(["4"])                  # where it called tools: a result for each call, in order

    Old reasoning stays in `messages` and is left out of the prompt when the next user turn begins.
    Raises EncodingError where messages or tools have no encoding.
    """

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        if self.system is not None:
            _require_text(self.system, "the system text")
        object.__setattr__(self, "tools", tuple(self.tools))
        object.__setattr__(self, "messages", tuple(self.messages))
        encode([self._head], thinking=False)
        encode(self.messages, thinking=False, context=[self._head])

    def user(self, text: str) -> Self:
        """With a user's turn. Raises UsageError while calls wait for their results."""
        _require_text(text, "a user's turn")
        if waiting := self.waiting:
            raise UsageError(
                f"{len(waiting)} tool calls wait for their results ({', '.join(waiting)}); give them first"
            )
        return self._with({"role": "user", "content": text})

    def assistant(self, message: Mapping[str, Any]) -> Self:
        """With the model's turn, as `parse` gives it. Raises UsageError where it is not the model's turn."""
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            raise UsageError(f"the model's turn must be an assistant message, not {message!r:.200}")
        self._require_turn()
        return self._with(message)

    def completed(self, text: str) -> tuple[Self, list[str]]:
        """With the model's turn read from its text, special tokens and all; and what was forgiven to read it."""
        message, forgiven = parse_lenient(text, thinking=self.thinking)
        return self.assistant(message), forgiven

    def results(self, texts: Sequence[str]) -> Self:
        """With the results of all calls that wait for one, in the order of the calls."""
        waiting = self.waiting
        if isinstance(texts, str) or len(texts) != len(waiting):
            count = "one string" if isinstance(texts, str) else len(texts)
            raise UsageError(f"{len(waiting)} tool calls wait for results ({', '.join(waiting)}), but {count} came")
        for text in texts:
            _require_text(text, "a tool's result")
        return self._with(*({"role": "tool", "content": text} for text in texts))

    def reset(self) -> Self:
        """The same system text, tools and mode, with nothing said yet."""
        return dataclasses.replace(self, messages=())

    @property
    def waiting(self) -> list[str]:
        """The names of the functions whose results come next."""
        given = len(list(itertools.takewhile(lambda message: message["role"] == "tool", reversed(self.messages))))
        caller = self.messages[-1 - given] if given < len(self.messages) else {}
        calls = caller.get("tool_calls") if caller.get("role") == "assistant" else None
        return [call["function"]["name"] for call in calls or ()][given:]

    @property
    def _head(self) -> Mapping[str, Any]:
        return {"role": "system", "content": self.system, "tools": self.tools}

    def all_messages(self) -> list[Mapping[str, Any]]:
        """The system message and what was said, as `encode` takes it."""
        return [self._head, *self.messages]

    def text(self) -> str:
        """The prompt that the model's next turn follows. Raises UsageError where it is not the model's turn."""
        self._require_turn()
        return encode(self.all_messages(), thinking=self.thinking)

    def prompt(self, tokenizer: Tokenizer) -> Prompt:
        """The same as token ids, in which no message's content makes special tokens."""
        self._require_turn()
        return prepare(self.all_messages(), tokenizer, thinking=self.thinking)

    def _with(self, *messages: Mapping[str, Any]) -> Self:
        return dataclasses.replace(self, messages=(*self.messages, *messages))

    def _require_turn(self) -> None:
        if waiting := self.waiting:
            raise UsageError(f"{len(waiting)} tool calls wait for their results: {', '.join(waiting)}")
        if not self.messages or self.messages[-1].get("role") not in ("user", "developer", "tool"):
            raise UsageError("it is not the model's turn: add a user's turn first")


def _require_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{what} must be a string, not {text!r}")
