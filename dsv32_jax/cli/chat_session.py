"""A conversation with a model: each turn is sent, and its answer shown while it streams."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat import Conversation, Tokenizer, template
from ..chat.encoding import encode_pieces
from ..chat.lenient_parser import UNENDED
from ..chat.messages import to_json
from ..errors import UsageError, pluralize
from ..generation.options import Sampling
from ..generation.result import Generation
from ..generation.session import Session
from ..generation.stream import Stream
from ..system.compilation import is_cache_enabled
from ..system.interrupts import defer_interrupt
from .answer_view import AnswerView, describe_stats
from .terminal import Screen, shorten


class ChatSession:
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
        hide_reasoning: bool,
    ):
        self.screen, self.session, self.conversation = screen, session, conversation
        self.sampling, self.hide_reasoning = sampling, hide_reasoning
        self._tokenizer, self.options = tokenizer, {"max_new_tokens": None, "stop": (), **options}
        self._results: list[str] = []

    @property
    def prompt(self) -> str:
        """The prompt for the user's next line."""
        pending = self.conversation.pending[len(self._results) :]
        return f"result of {shorten(pending[0], 40)}> " if pending else "> "

    @property
    def capacity(self) -> int:
        """Tokens that the whole conversation may have."""
        return self.session.capacity or self.session.model.cfg.max_position_embeddings

    def update(self, **changes: Any) -> None:
        """Replace fields of the conversation."""
        self.conversation, self._results = dataclasses.replace(self.conversation, **changes), []

    def warm_up(self) -> None:
        """Read the system text and tools, and compile what the first answer needs; a loaded session is warm already."""
        if self.session.tokens:
            return
        ids = self._tokenizer.encode_pieces(encode_pieces(self.conversation.all_messages()[:1], thinking=False))
        if (room := self.capacity - len(ids)) < 2:
            raise UsageError(f"the system text and tools have {len(ids)} tokens; the context holds {self.capacity}")
        self.screen.status("compiling" + ("; compiled programs are cached for next time" if is_cache_enabled() else ""))
        limit = min(self.options["max_new_tokens"] or room, room)
        with contextlib.closing(self._stream(ids, max_new_tokens=limit, min_new_tokens=min(2, limit))) as tokens:
            for _ in itertools.islice(tokens, 2):
                pass

    def show_calls(self) -> None:
        """Show the tool calls of the last message."""
        for message in self.conversation.messages[-1:]:
            for call in message.get("tool_calls") or ():
                self.screen.note(f"calls {format_call(call['function'])}", important=True)

    def send(self, text: str) -> bool:
        """Add a user's turn or the next pending tool result, and answer where it is then the model's turn.

        Returns False where Ctrl-C stopped the answer.
        """
        pending = self.conversation.pending
        if not pending:
            return self._answer(self.conversation.user(text))
        self._results.append(text)
        if len(self._results) < len(pending):
            return True
        results, self._results = self._results, []
        return self._answer(self.conversation.results(results))

    def find_last_turn(self) -> int:
        """Return the index of the user's last message. Raises UsageError if there is none."""
        turns = [i for i, message in enumerate(self.conversation.messages) if message["role"] == "user"]
        if not turns:
            raise UsageError("the conversation has no turn of yours yet; nothing was done")
        return turns[-1]

    def retry(self) -> bool:
        """Answer the user's last turn again, with the next seed, in place of what follows it; return as `send`."""
        messages, seed = self.conversation.messages[: self.find_last_turn() + 1], self.sampling.seed
        if not self.sampling.temperature or not isinstance(seed, int):
            raise UsageError("/retry needs a temperature above 0 and one seed, or the answer is the same: see /set")
        self.sampling, self._results = dataclasses.replace(self.sampling, seed=seed + 1), []
        return self._answer(dataclasses.replace(self.conversation, messages=messages))

    def _answer(self, conversation: Conversation) -> bool:
        ids = conversation.prompt(self._tokenizer).ids
        gen = self._generate(ids, conversation.thinking)
        (tokens,), (text,), (reason,) = gen.tokens, gen.text or [""], gen.finish_reason
        if not tokens:
            self.screen.note("stopped before the first token; your turn was taken back")
            return False
        ended = tokens[-1] in self.session.model.cfg.eos_token_id
        self.conversation, warnings = conversation.complete(text + template.EOS if ended else text)
        self.show_calls()
        notes, used = [text for text in warnings if text != UNENDED], len(ids) + len(tokens)
        if reason == "interrupted":
            notes.append("stopped; the answer so far stays in the conversation, /undo takes it back")
        elif used >= self.capacity:
            notes.append(f"the context of {self.capacity} tokens is full: /undo, /clear or /save")
        elif reason == "length":
            notes.append(f"cut after {pluralize(len(tokens), 'token')} by max_new_tokens: see /set")
        for note in notes:
            self.screen.note(f"({shorten(note)})")
        self.screen.note(f"[{describe_stats(gen.stats)}; context {used}/{self.capacity}]")
        return reason != "interrupted"

    def _generate(self, ids: Sequence[int], thinking: bool) -> Generation:
        """Continue the prompt `ids`, and show the answer while it streams.

        Ctrl-C stops after the current token or chunk of the prompt; the second at once, and the session is read again.
        """
        room = self.capacity - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, but the context holds {self.capacity}: /undo or /clear, or "
                "/save it and start again with --load and a larger --capacity. Your turn was not taken"
            )
        with defer_interrupt() as is_interrupted:

            def show_prefill(read: int, _: int) -> None:
                self.screen.status(f"reading: {pluralize(read, 'token')}")
                if is_interrupted():
                    raise KeyboardInterrupt

            view = AnswerView(self.screen, thinking=thinking, hide_reasoning=self.hide_reasoning)
            limit = min(self.options["max_new_tokens"] or room, room)
            stream = self._stream(ids, **{**self.options, "max_new_tokens": limit, "progress": show_prefill})
            with contextlib.suppress(KeyboardInterrupt), contextlib.closing(stream):
                for token in stream:
                    view.add(token.text or "")
                    if is_interrupted():
                        break
            view.end()
        return stream.result()

    def _stream(self, ids: Sequence[int], **options: Any) -> Stream:
        return self.session.stream(ids, sampling=self.sampling, tokenizer=self._tokenizer, **options)


def format_call(function: Mapping[str, Any]) -> str:
    """Return a tool call as Python writes calls, on one line."""
    arguments = json.loads(function["arguments"])
    values = (f"{shorten(name, 60)}={shorten(to_json(value), 400)}" for name, value in arguments.items())
    return f"{shorten(function['name'], 60)}({', '.join(values)})"
