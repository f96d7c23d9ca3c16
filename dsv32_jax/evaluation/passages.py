"""Texts as token ids, cut into windows for one model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import Config
from ..errors import UsageError, listing, require_integer
from ..model import validation
from . import texts as files
from .windows import Window, windows

CONTEXT = 1024
"""Tokens of a window by default, where the model's longest context allows."""

BATCH = 4
"""Windows of a group, which are read together, by default; larger groups are no faster on a CPU."""

Texts = Sequence[str | Sequence[int]]
"""Documents, as text or as token ids."""


@dataclasses.dataclass(frozen=True)
class Passages:
    """What is read: documents as token ids, and the windows over them. `tokenizer` is None where ids were given."""

    documents: list[list[int]]
    windows: list[Window]
    context: int
    stride: int
    tokenizer: Any
    batch_size: int

    def scored(self, window: Window) -> list[int]:
        """The tokens that `window` scores."""
        return window.tokens[window.first :]

    @property
    def groups(self) -> list[range]:
        """The numbers of the windows, in the order of the text, as many together as are read at once."""
        count = len(self.windows)
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def filled(self, group: range) -> list[list[int]]:
        """The tokens of the windows in `group`; where it is the short last one, rows of one token besides, so that the
        program of the others does for it too."""
        rows = [self.windows[i].tokens for i in group]
        return rows + [rows[0][:1]] * (len(self.groups[0]) - len(rows))


def passages(
    cfg: Config,
    tokenizer: Any,
    texts: Texts | str | None,
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
) -> Passages:
    """The windows of `texts` (None: the held-out text that is shipped), the first `limit` of them.

    A text begins with the beginning-of-sentence token; its special tokens are plain text. Ids are taken as they are.
    Raises UsageError on sizes that make no sense, texts with nothing to score, and text without a tokenizer.
    """
    context = min(CONTEXT, cfg.max_position_embeddings) if context is None else context
    _within("context", context, 2, cfg.max_position_embeddings, "the model's longest context")
    stride = context // 2 if stride is None else stride
    _within("stride", stride, 1, context - 1, "context - 1, so that each token has one before it")
    require_integer("batch_size", batch_size, 1, 1 << 20)
    if limit is not None:
        _within("limit", limit, 1, None, "")
    given = files.heldout() if texts is None else [texts] if isinstance(texts, str) else texts
    if isinstance(given, bytes) or not hasattr(given, "__len__"):
        raise UsageError(f"texts must be a text, or a list of texts or of lists of token ids, not {given!r:.200}")
    documents = [_ids(text, tokenizer, cfg) if isinstance(text, str) else text for text in given]
    if odd := [repr(text) for text in documents if isinstance(text, bytes) or not hasattr(text, "__len__")]:
        raise UsageError(
            f"{len(odd)} texts are neither text nor lists of token ids: {listing(odd, 5)}; nothing was run"
        )
    if not documents:
        raise UsageError("there is no text to evaluate on; nothing was run")
    if short := [i for i, ids in enumerate(documents) if len(ids) < 2]:
        raise UsageError(
            f"{len(short)} of {len(documents)} texts have fewer than two tokens, so that there is nothing to score "
            f"(counted from 0: {listing(short)}); nothing was run. Leave them out"
        )
    documents = validation.check_prompts(documents, cfg.vocab_size)
    found = windows(documents, context, stride)
    return Passages(documents, found[:limit], context, stride, tokenizer, batch_size)


def _ids(text: str, tokenizer: Any, cfg: Config) -> list[int]:
    if tokenizer is None:
        raise UsageError(
            "text needs a tokenizer, and there is none: give one (tokenizer=) with a model in memory, put the "
            "checkpoint's tokenizer.json beside it, or give token ids"
        )
    return [cfg.bos_token_id, *tokenizer.encode(text)]


def _within(name: str, value: object, least: int, most: int | None, why: str) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most} ({why})"
        raise UsageError(f"{name} must be a whole number, {bounds}, not {value!r}; nothing was run")
