"""A conversation as an immutable value, and prompts as token ids."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..errors import UsageError, pluralize, require
from ..generation.detokenizer import require_tokenizer
from . import template
from .encoding import encode, encode_pieces
from .lenient_parser import parse_lenient
from .messages import Message
from .tokenizer import Tokenizer
from .tool_calls import find_pending, require_results, require_turn


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: `path` names how it was made (raw text or messages), `text` is all of it, `ids` are its tokens."""

    path: str
    text: str
    ids: list[int]


def prepare(
    given: str | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    thinking: bool = False,
    tools: Sequence[Mapping] | None = None,
    context: Sequence[Message] = (),
    drop_thinking: bool = True,
    bos: bool = True,
    allow_special: bool = False,
) -> Prompt:
    """Return the prompt of messages in the chat format (see `encode`), or of raw text for the model to continue.

    Special tokens in raw text or in the content of messages are plain text, so content cannot forge them, unless
    `allow_special`; then the ids are those of the whole text, as the reference tokenizes it. Raw text is preceded by
    the beginning-of-sentence token, unless `bos` is False or `allow_special` text begins with it already. Raises
    UsageError where it is not the model's turn, or text or messages have no encoding.
    """
    require_tokenizer(tokenizer)
    if isinstance(given, str):
        if thinking or tools or context:
            raise UsageError(
                "thinking, tools and context apply to messages, but raw text was given; "
                "use [{'role': 'user', 'content': ...}] to chat"
            )
        begun = allow_special and given.startswith(template.BOS)
        pieces = [template.BOS, given] if bos and not begun else [given]
        path = "raw text"
    else:
        options = {"tools": tools, "context": context, "drop_thinking": drop_thinking, "bos": bos}
        pieces = encode_pieces(given, thinking=thinking, **options)
        require_turn([*context, *given])
        path = "messages, thinking" if thinking else "messages, chat"
    return Prompt(path, "".join(pieces), tokenizer.encode_pieces(pieces, allow_special=allow_special))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """System text, tools, whether the model thinks first, and the messages so far. Each turn makes a new value.

    talk = Conversation(system="Be brief.", thinking=True).user("1+1=?")
    talk, warnings = talk.complete(text)        # the model's text after `talk.prompt(tokenizer)`
    talk = talk.results(["4"])                  # after tool calls: the result of each call, in order

    Old reasoning stays in `messages`; the prompt omits it once the next user turn begins. Raises EncodingError where
    messages or tools have no encoding.
    """

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        require(self.system, (str, type(None)), "the system text must be a string")
        object.__setattr__(self, "tools", tuple(self.tools))
        object.__setattr__(self, "messages", tuple(self.messages))
        encode([self._head], thinking=False)
        encode(self.messages, thinking=False, context=[self._head])

    def user(self, text: str) -> Self:
        """Add a user's turn. Raises UsageError while tool calls are pending."""
        require(text, str, "a user's turn must be a string")
        require_results(self.messages)
        return self._add({"role": "user", "content": text})

    def assistant(self, message: Mapping[str, Any]) -> Self:
        """Add the model's turn, as `parse` returns it. Raises UsageError where it is not the model's turn."""
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            raise UsageError(f"the model's turn must be an assistant message, not {message!r:.200}")
        require_turn(self.messages)
        return self._add(message)

    def complete(self, text: str) -> tuple[Self, list[str]]:
        """Add the model's turn, parsed from its text with special tokens; return also the warnings of the parser."""
        message, warnings = parse_lenient(text, thinking=self.thinking)
        return self.assistant(message), warnings

    def results(self, texts: Sequence[str]) -> Self:
        """Add the results of all pending tool calls, in the order of the calls."""
        pending = self.pending
        if isinstance(texts, str) or len(texts) != len(pending):
            count = "one string" if isinstance(texts, str) else pluralize(len(texts), "result")
            raise UsageError(f"{pluralize(len(pending), 'pending tool call')} ({', '.join(pending)}), but {count}")
        for text in texts:
            require(text, str, "a tool's result must be a string")
        return self._add(*({"role": "tool", "content": text} for text in texts))

    def reset(self) -> Self:
        """Return the same system text, tools and mode without messages."""
        return dataclasses.replace(self, messages=())

    @property
    def pending(self) -> list[str]:
        """The names of the functions that were called and have no result yet."""
        return find_pending(self.messages)

    @property
    def _head(self) -> Mapping[str, Any]:
        return {"role": "system", "content": self.system, "tools": self.tools}

    def all_messages(self) -> list[Mapping[str, Any]]:
        """Return the system message and all others, as `encode` takes them."""
        return [self._head, *self.messages]

    def text(self) -> str:
        """Return the prompt for the model's next turn. Raises UsageError where it is not the model's turn."""
        require_turn(self.messages)
        return encode(self.all_messages(), thinking=self.thinking)

    def prompt(self, tokenizer: Tokenizer) -> Prompt:
        """Return the same as token ids, in which no message's content makes special tokens."""
        require_turn(self.messages)
        return prepare(self.all_messages(), tokenizer, thinking=self.thinking)

    def _add(self, *messages: Mapping[str, Any]) -> Self:
        return dataclasses.replace(self, messages=(*self.messages, *messages))
