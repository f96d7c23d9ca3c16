"""Where logits that are no numbers began."""

from collections.abc import Sequence

import jax.numpy as jnp

from ..model.model import Model, forward


def not_finite(model: Model, bad: Sequence[int], tokens: Sequence[int], new: int) -> FloatingPointError:
    """An error that names the first of the `bad` rows, its step `new`, and the first layer whose output is not a
    number when it processes `tokens`."""
    out = forward(model, [list(tokens)], seen=True)
    assert out.seen is not None
    streams = [seen.x_BTD for seen in out.seen] + [out.hidden]
    names = ["the embedding", *(f"layer {i}" for i in range(len(out.seen) - 1)), "the last layer or the final norm"]
    first = next((name for name, x in zip(names, streams, strict=True) if not jnp.isfinite(x).all()), "the head")
    return FloatingPointError(
        f"the logits of {len(bad)} rows are not numbers: row {bad[0]}, new token {new}; the first output that is "
        f"not finite is that of {first}. Check the checkpoint's weights"
    )
