"""From messages, or from raw text, to the token ids that generation starts with, saying which of the two it was."""

import dataclasses
from collections.abc import Mapping, Sequence

from ..errors import UsageError
from . import template
from .encoding import pieces
from .messages import Message
from .tokenizer import Tokenizer, require_tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is given: `path` says how it came about, `text` is all of it, `ids` are its tokens."""

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
    """The prompt of messages, in the chat format (see `encode`), or of raw text, which the model goes on with.

    No content can forge special tokens: in what comes with a message, and in raw text, their text is plain text.
    `allow_special` lifts this: then the ids are those of the whole text, as the reference tokenizes it.
    Raw text begins with the beginning-of-sentence token, unless not `bos`, or it is there already and may count.
    """
    require_tokenizer(tokenizer)
    if isinstance(given, str):
        if thinking or tools or context:
            raise UsageError(
                "thinking, tools and context belong to messages, but raw text was given; "
                "use [{'role': 'user', 'content': ...}] to chat"
            )
        begun = allow_special and given.startswith(template.BOS)
        written = [template.BOS, given] if bos and not begun else [given]
        path = "raw text"
    else:
        written = pieces(given, thinking=thinking, tools=tools, context=context, drop_thinking=drop_thinking, bos=bos)
        path = "messages, thinking" if thinking else "messages, chat"
    return Prompt(path, "".join(written), tokenizer.encode(written, allow_special=allow_special))
