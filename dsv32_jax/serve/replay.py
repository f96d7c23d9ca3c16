"""Tool calls that were sampled here are written as they were sampled when a client sends them back.

Other tokens can say the same text, and JSON has many spellings; then nothing behind them would be found in the cache.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..chat import Tokenizer, template
from ..chat.messages import Message
from ..chat.streaming_parser import CONTENT, REASONING
from ..chat.template import Sampled
from .choice import Call, Choice

MOST_TURNS = 1000


class Turn(NamedTuple):
    """A message with calls: what the client was told, and what was sampled."""

    content: str
    reasoning: str
    calls: list[Call]
    sampled_content: Sampled
    sampled_reasoning: Sampled


class SampledTurns:
    """The last messages with tool calls, by the ids of their first calls."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._turns, self._lock = tokenizer, OrderedDict[str, Turn](), threading.Lock()

    def remember(self, choice: Choice, end_ids: Sequence[int]) -> None:
        """Remember a choice whose calls are whole."""
        if choice.finish_reason != "tool_calls":
            return
        ids = [token.token for token in choice.tokens]
        ids = ids[:-1] if ids[-1] in end_ids else ids
        reasoning, think_end = list[int](), self._tokenizer.specials[template.THINK_END]
        if choice.thinking:
            at = ids.index(think_end) if think_end in ids else 0
            reasoning, ids = ids[:at], ids[at + 1 :]
        content, thoughts = (Sampled(self._tokenizer.decode(some), some) for some in (ids, reasoning))
        if thoughts != choice.text[REASONING] or not content.startswith(choice.text[CONTENT]):
            return
        with self._lock:
            turn = Turn(choice.text[CONTENT], choice.text[REASONING], choice.calls, content, thoughts)
            self._turns[choice.calls[0].id] = turn
            if len(self._turns) > MOST_TURNS:
                self._turns.popitem(last=False)

    def restore(self, message: Message) -> Message:
        """Return the message as it was sampled, if it was sampled here and says what it said then; reasoning that the
        client did not send back too. Any other message is returned as it is."""
        calls = message.get("tool_calls")
        first = calls[0] if isinstance(calls, list) and calls else None
        key = first.get("id") if isinstance(first, dict) else None
        with self._lock:
            turn = self._turns.get(key) if isinstance(key, str) else None
        if turn is None or (message.get("content") or "") != turn.content or not _are_same(calls, turn.calls):
            return message
        if (message.get("reasoning_content") or turn.reasoning) != turn.reasoning:
            return message
        reasoning = {"reasoning_content": turn.sampled_reasoning} if turn.reasoning else {}
        return {**message, **reasoning, "content": turn.sampled_content}


def _are_same(given: Any, calls: Sequence[Call]) -> bool:
    """Return whether calls of a client are those, however their JSON is spelled."""
    try:
        told = [(call["id"], call["function"]["name"], _spell(call["function"]["arguments"])) for call in given]
    except (KeyError, TypeError, ValueError):
        return False
    return told == [(call.id, call.name, _spell(call.arguments)) for call in calls]


def _spell(arguments: str) -> str:
    return json.dumps(json.loads(arguments), sort_keys=True)
