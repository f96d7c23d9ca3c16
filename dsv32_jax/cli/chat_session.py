"""A conversation on the screen: what is said goes to the model, what it answers is shown while it comes."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat import Conversation, Tokenizer, prepare, template
from ..chat.lenient_parsing import UNENDED
from ..chat.messages import to_json
from ..errors import UsageError
from ..generation.options import Sampling
from ..generation.run import Stream
from ..generation.session import Session
from ..system.compilation import count_compilations, is_cache_enabled
from ..system.interrupts import defer_interrupt
from .screen import Screen, one_line
from .stream_view import Answer

MOST_NEW = 4096
"""Tokens of an answer, unless it is said otherwise."""


class Talk:
    """The state of a chat. A turn that fails leaves the conversation as it was."""

    def __init__(
        self,
        screen: Screen,
        tokenizer: Tokenizer,
        session: Session,
        conversation: Conversation,
        sampling: Sampling,
        options: Mapping[str, Any],
        *,
        hides: bool,
    ):
        self.screen, self.session, self.conversation = screen, session, conversation
        self.sampling, self.hides = sampling, hides
        self._tokenizer, self._options = tokenizer, dict(options)
        self._limit = self._options.pop("max_new_tokens", MOST_NEW)
        self._results: list[str] = []

    @property
    def prompt(self) -> str:
        """What asks for the next turn."""
        waiting = self.conversation.pending[len(self._results) :]
        return f"result of {one_line(waiting[0], 40)}> " if waiting else "> "

    @property
    def capacity(self) -> int:
        """Tokens that the whole conversation may have."""
        return self.session.capacity or self.session.model.cfg.max_position_embeddings

    def change(self, **how: Any) -> None:
        """Go on with the conversation changed in this."""
        self.conversation, self._results = dataclasses.replace(self.conversation, **how), []

    def get_ready(self) -> None:
        """Read what comes before the first turn, and compile what the first answer needs; a loaded session is ready."""
        if self.session.tokens:
            return
        ids = prepare([self.conversation.all_messages()[0]], self._tokenizer).ids
        if (room := self.capacity - len(ids)) < 2:
            raise UsageError(f"the system text and tools have {len(ids)} tokens, the context holds {self.capacity}")
        cached = ": compiled programs are cached for next time" if is_cache_enabled() else ""
        self.screen.status("getting ready" + cached)
        limit = min(self._limit or room, room)
        with contextlib.closing(self._stream(ids, max_new_tokens=limit, min_new_tokens=min(2, limit))) as tokens:
            for _ in itertools.islice(tokens, 2):
                pass

    def show_calls(self) -> None:
        """Show the calls that were made last, where they wait for results."""
        for message in self.conversation.messages[-1:]:
            for call in message.get("tool_calls") or ():
                self.screen.strong(f"calls {call_text(call['function'])}")

    def say(self, text: str) -> bool:
        """Take a user's turn, or the next result that the model waits for, and answer where it is the model's turn.

        Returns False where Ctrl-C stopped the answer.
        """
        waiting = self.conversation.pending
        if not waiting:
            return self._answered(self.conversation.user(text))
        self._results.append(text)
        if len(self._results) < len(waiting):
            return True
        results, self._results = self._results, []
        return self._answered(self.conversation.results(results))

    def _answered(self, conversation: Conversation) -> bool:
        ids = conversation.prompt(self._tokenizer).ids
        answer = self._answer(ids, conversation.thinking)
        if not answer.tokens:
            self.screen.note("stopped before the first token; your turn was taken back")
            return False
        ended = answer.last_token in self.session.model.cfg.eos_token_id
        self.conversation, warnings = conversation.complete(answer.text + template.EOS if ended else answer.text)
        self._tell(answer, warnings, len(ids) + answer.tokens)
        return answer.finish_reason != "interrupted"

    def _answer(self, ids: Sequence[int], thinking: bool) -> Answer:
        """What the model makes of the prompt `ids`, shown while it comes.

        Ctrl-C stops it after the token, or the part of the prompt, that is being worked on; a second one at once, and
        then the session has to read everything again.
        """
        room = self.capacity - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, but the context holds {self.capacity}: /undo or /reset, "
                "or /save it and start again with --load and a larger --capacity. Your turn was not taken"
            )
        limit = min(self._limit or room, room)
        with defer_interrupt() as asked_to_stop, count_compilations() as meter:
            answer = Answer(self.screen, meter, thinking=thinking, hides=self.hides)

            def reading(read: int, _: int) -> None:
                answer.reading(read)
                if asked_to_stop():
                    raise KeyboardInterrupt

            tokens = self._stream(ids, **{**self._options, "max_new_tokens": limit, "progress": reading})
            with contextlib.suppress(KeyboardInterrupt), contextlib.closing(tokens):
                for token in tokens:
                    answer.add(token)
                    if asked_to_stop():
                        break
            answer.end()
        return answer

    def _stream(self, ids: Sequence[int], **options: Any) -> Stream:
        """What comes after `ids`, token by token; closed, it leaves the session with what was read and made."""
        return self.session.stream(ids, sampling=self.sampling, tokenizer=self._tokenizer, **options)

    def _tell(self, answer: Answer, warnings: Sequence[str], used: int) -> None:
        """The calls of an answer, and what else there is to know about it."""
        self.show_calls()
        notes = [text for text in warnings if text != UNENDED]
        if answer.finish_reason == "interrupted":
            notes.append("stopped; what was said so far is kept, /undo takes it back")
        elif used >= self.capacity:
            notes.append(f"the context of {self.capacity} tokens is full: /undo, /reset or /save")
        elif answer.finish_reason == "length":
            notes.append(f"cut after {answer.tokens} tokens by --max-new-tokens")
        for note in notes:
            self.screen.note(f"({one_line(note)})")
        self.screen.note(f"[{answer.facts(used, self.capacity)}]")


def call_text(function: Mapping[str, Any]) -> str:
    """A call as Python writes calls, on one line."""
    arguments = json.loads(function["arguments"])
    values = (f"{one_line(name, 60)}={one_line(to_json(value), 400)}" for name, value in arguments.items())
    return f"{one_line(function['name'], 60)}({', '.join(values)})"
