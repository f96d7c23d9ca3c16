"""What can be asked of a generation beside its prompts and sampling."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypedDict

from ..errors import UsageError, listing, unknown
from .sampling_params import Sampling


class Options(TypedDict, total=False):
    """What `generate`, `generate.layerwise`, `stream` and sessions understand beside prompts and sampling.

    max_new_tokens  at most so many a row (64); None: until the capacity, or the model's longest context, is used
    min_new_tokens  no end token is chosen before (0)
    stop_token_ids  tokens that end a row, beside the model's own end tokens
    stop            strings that end a row; needs a tokenizer; text and tokens end before the string
    n               continuations of each prompt, which is read once; the i-th has seed + i (1)
    top_logprobs    how many of the likeliest tokens to report at each place, 20 at most (0)
    draft           tokens to draft and verify at each step with the drafting layer (MTP); the result is the same (0)
    cache_dtype     bfloat16, float32 or "fp8"; by default the compute dtype
    capacity        tokens a row's cache holds, prompt included; by default what is needed, rounded up
    batch_size      rows at once; by default as many as the free memory holds
    tokenizer       anything with the methods of `chat.Tokenizer`: adds text to the result
    progress        called with (prompt tokens read, of all) while prompts are read
    """

    max_new_tokens: int | None
    min_new_tokens: int
    stop_token_ids: Collection[int]
    stop: str | Sequence[str]
    n: int
    top_logprobs: int
    draft: int
    cache_dtype: Any
    capacity: int | None
    batch_size: int | None
    tokenizer: Any
    progress: Any


def require_known(options: Collection[str]) -> None:
    """Raise UsageError that names every option which is not one of `Options`, and where it belongs."""
    sampling = {field.name for field in dataclasses.fields(Sampling)}
    wrong = [f"{name} (it is one of sampling: sampling=Sampling({name}=...))" for name in options if name in sampling]
    wrong += unknown([name for name in options if name not in sampling], Options.__annotations__)
    if wrong:
        raise UsageError(f"{len(wrong)} options are not known: {listing(wrong)}; nothing was run")
