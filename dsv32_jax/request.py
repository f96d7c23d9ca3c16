"""A generation request: checked on the host, and rounded up to shapes that many requests share."""

import dataclasses

import numpy as np

from . import checks
from .compilation import keep_on_disk
from .errors import UsageError
from .model import Model
from .sampling import Knobs, Sampling, knobs

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request: the prompts, how many tokens may be made, and the shapes that were chosen."""

    prompts: list[list[int]]
    limit: int
    capacity: int
    knobs: Knobs

    @property
    def arguments(self) -> tuple:
        """The arguments of `prefill`."""
        count_B = np.array([len(row) for row in self.prompts], np.int32)
        tokens_BT = np.zeros((len(count_B), bucket(count_B.max())), np.int32)
        for row, prompt in zip(tokens_BT, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return self.knobs, tokens_BT, count_B, np.int32(self.limit), bucket(self.limit), self.capacity


def plan(model: Model, prompts, max_new_tokens, sampling: Sampling | None, capacity: int | None) -> Request:
    """Check a request and choose its shapes; nothing is compiled here."""
    keep_on_disk()
    rows = checks.prompts(prompts, model.cfg.vocab_size)
    longest = max(map(len, rows))
    largest = model.cfg.max_position_embeddings
    if capacity is not None and (type(capacity) is not int or not 1 <= capacity <= largest):
        raise UsageError(
            f"capacity must be a whole number from 1 to max_position_embeddings ({largest}), not {capacity!r}"
        )
    available = (largest if capacity is None else capacity) - longest
    if max_new_tokens is None:
        max_new_tokens = max(available, 0)
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be a whole number, 0 or more, or None, not {max_new_tokens!r}")
    if max_new_tokens > available:
        need = longest + max_new_tokens
        remedies = [f"use max_new_tokens={available} or less"] if available >= 0 else ["shorten the prompt"]
        remedies += [f"use capacity={need}"] if need <= largest else []
        raise UsageError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones are asked for, but a row holds "
            f"{available + longest}; {' or '.join(remedies)}"
        )
    if capacity is None:
        capacity = bucket(bucket(longest) + max_new_tokens)
    return Request(
        rows,
        max_new_tokens,
        capacity,
        knobs(Sampling() if sampling is None else sampling, len(rows), model.cfg.vocab_size),
    )


def bucket(size: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (int(size) - 1).bit_length())
