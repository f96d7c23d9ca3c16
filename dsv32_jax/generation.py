"""Generation: one compiled prefill, one compiled decode loop, and the same step token by token.

Prompts are padded to buckets and capacities follow from the bucket, so that many lengths share a program.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cache import Cache, empty
from .compilation import metered
from .model import Model, forward
from .request import Request, plan
from .sampling import Knobs, Sampling, choose


@dataclasses.dataclass(frozen=True)
class Stats:
    """Where the time went. Rates count real tokens of all rows; compilation is in neither of them."""

    rows: int
    compile_seconds: float
    compiles: int
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    capacity: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens made a second, after the first of each row, which the prefill makes."""
        decoded = self.new_tokens - self.rows
        return decoded / self.decode_seconds if self.decode_seconds and decoded > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for each prompt: new tokens only, the end token included where the model chose one.

    `logprobs` are natural logarithms under the model's own distribution, before temperature and truncation.
    `finish_reason` is "stop" for an end token and "length" where max_new_tokens was reached.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    stats: Stats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes while tokens are made.

    cache       of the tokens processed so far
    token_B     the last token chosen, which the next step processes
    tokens_Bn   all tokens chosen, n slots;  logprob_Bn  their log-probabilities;  made_B  how many
    limit       how many a row may make
    done_B      rows that have ended;  finite_B  whether all logits so far were numbers
    """

    cache: Cache
    token_B: jax.Array
    tokens_Bn: jax.Array
    logprob_Bn: jax.Array
    made_B: jax.Array
    limit: jax.Array
    done_B: jax.Array
    finite_B: jax.Array


def prefill(
    model: Model, knobs: Knobs, tokens_BT: jax.Array, count_B: jax.Array, limit, slots: int, capacity: int
) -> State:
    """Process the prompts and choose each row's first token."""
    batch = tokens_BT.shape[0]
    h_BTD, cache, _ = model(tokens_BT, empty(model.cfg, batch, capacity, model.dtype), count_B)
    state = State(
        cache,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((batch, slots), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.asarray(limit, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.ones(batch, bool),
    )
    last_B1D = jnp.take_along_axis(h_BTD, (count_B - 1)[:, None, None], axis=1)
    return _chosen(model.cfg.eos_token_id, knobs, state, model.logits(last_B1D)[:, 0])


def step(model: Model, knobs: Knobs, state: State) -> State:
    """Process each row's last token and choose the next. A row that is done changes nothing."""
    h_B1D, cache, _ = model(state.token_B[:, None], state.cache, (~state.done_B).astype(jnp.int32))
    return _chosen(model.cfg.eos_token_id, knobs, dataclasses.replace(state, cache=cache), model.logits(h_B1D)[:, 0])


def decode(model: Model, knobs: Knobs, state: State) -> State:
    """`step` until every row is done."""
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), partial(step, model, knobs), state)


@partial(jax.jit, static_argnames="ends")
def _chosen(ends: tuple[int, ...], knobs: Knobs, state: State, logit_BV: jax.Array) -> State:
    """`state` with one more token in every row that is not done; a token of `ends` ends its row."""
    finite_B = state.finite_B & (state.done_B | jnp.all(jnp.isfinite(logit_BV), axis=-1))
    token_B, logprob_B = choose(knobs, logit_BV, state.cache.length_B)
    token_B = jnp.where(state.done_B, state.token_B, token_B)
    slot_B1 = jnp.where(state.done_B, state.tokens_Bn.shape[1], state.made_B)[:, None]
    row_B1 = jnp.arange(slot_B1.shape[0])[:, None]
    made_B = state.made_B + (~state.done_B).astype(jnp.int32)
    ended_B = jnp.isin(token_B, jnp.asarray(ends, jnp.int32)) | (made_B >= state.limit) | ~finite_B
    return dataclasses.replace(
        state,
        token_B=token_B,
        tokens_Bn=state.tokens_Bn.at[row_B1, slot_B1].set(token_B[:, None], mode="drop"),
        logprob_Bn=state.logprob_Bn.at[row_B1, slot_B1].set(logprob_B[:, None], mode="drop"),
        made_B=made_B,
        done_B=state.done_B | ended_B,
        finite_B=finite_B,
    )


_prefill_jit = jax.jit(prefill, static_argnames=("slots", "capacity"))
_step_jit = jax.jit(step, donate_argnames="state")
_decode_jit = jax.jit(decode, donate_argnames="state")


def _decode_layerwise(model: Model, knobs: Knobs, state: State) -> State:
    while not np.asarray(state.done_B).all():
        state = step(model, knobs, state)
    return state


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = 64,
    sampling: Sampling | None = None,
    capacity: int | None = None,
) -> Generation:
    """Continue each prompt (lists of token ids, of any lengths) until an end token or `max_new_tokens`.

    `capacity` is how many tokens a row's cache holds, prompt included; by default what is needed, rounded up.
    `max_new_tokens=None` means until the capacity is used (the model's max_position_embeddings where none is given).
    Raises UsageError before anything is compiled where the request makes no sense or does not fit, FloatingPointError
    where the model's logits are not numbers. `generate.layerwise` does the same without compiling the whole model.
    """
    return _generate(_prefill_jit, _decode_jit, model, prompts, max_new_tokens, sampling, capacity)


def _layerwise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = 64,
    sampling: Sampling | None = None,
    capacity: int | None = None,
) -> Generation:
    """`generate` with one program for each kind of layer, called from Python: compiles in seconds, runs slower."""
    return _generate(prefill, _decode_layerwise, model, prompts, max_new_tokens, sampling, capacity)


generate.layerwise = _layerwise


def _generate(run_prefill, run_decode, model: Model, prompts, max_new_tokens, sampling, capacity) -> Generation:
    request = plan(model, prompts, max_new_tokens, sampling, capacity)
    if request.limit == 0:
        empty_rows: list[Any] = [[] for _ in request.prompts]
        stats = Stats(len(empty_rows), 0.0, 0, 0.0, 0.0, 0, 0, request.capacity)
        return Generation(empty_rows, [list(row) for row in empty_rows], ["length"] * len(empty_rows), stats)
    with metered() as compiled:
        start = time.perf_counter()
        state = jax.block_until_ready(run_prefill(model, *request.arguments))
        prefill_seconds, prefill_compiling = time.perf_counter() - start, compiled.seconds
        start = time.perf_counter()
        state = jax.block_until_ready(run_decode(model, request.knobs, state))
        decode_seconds = time.perf_counter() - start
    _refuse_nonfinite(model, request.prompts, state)
    made = np.asarray(state.made_B)
    tokens = [row[:n].tolist() for row, n in zip(np.asarray(state.tokens_Bn), made, strict=True)]
    logprobs = [row[:n].tolist() for row, n in zip(np.asarray(state.logprob_Bn), made, strict=True)]
    reasons = ["stop" if row[-1] in model.cfg.eos_token_id else "length" for row in tokens]
    stats = Stats(
        rows=len(tokens),
        compile_seconds=compiled.seconds,
        compiles=compiled.count,
        prefill_seconds=max(prefill_seconds - prefill_compiling, 0.0),
        decode_seconds=max(decode_seconds - (compiled.seconds - prefill_compiling), 0.0),
        prompt_tokens=sum(map(len, request.prompts)),
        new_tokens=int(made.sum()),
        capacity=request.capacity,
    )
    return Generation(tokens, logprobs, reasons, stats)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a stream; `finish_reason` is None until the last."""

    token: int
    logprob: float
    finish_reason: str | None


def stream(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None = 64,
    sampling: Sampling | None = None,
    capacity: int | None = None,
) -> Iterator[Token]:
    """What `generate` makes of one prompt, token by token as they are chosen. The request is checked at once."""
    request = plan(model, [prompt], max_new_tokens, sampling, capacity)
    return _stream(model, request) if request.limit else iter(())


def _stream(model: Model, request: Request) -> Iterator[Token]:
    state = _prefill_jit(model, *request.arguments)
    for made in range(request.limit):
        if made:
            state = _step_jit(model, request.knobs, state)
        _refuse_nonfinite(model, request.prompts, state)
        token, logprob = int(state.tokens_Bn[0, made]), float(state.logprob_Bn[0, made])
        if state.done_B[0]:
            yield Token(token, logprob, "stop" if token in model.cfg.eos_token_id else "length")
            return
        yield Token(token, logprob, None)


def _refuse_nonfinite(model: Model, prompts: list[list[int]], state: State) -> None:
    """Raise FloatingPointError that names step, row and the first layer whose output is not a number."""
    bad = np.flatnonzero(~np.asarray(state.finite_B))
    if not bad.size:
        return
    row, made = int(bad[0]), int(state.made_B[bad[0]])
    tokens = prompts[row] + np.asarray(state.tokens_Bn)[row, : made - 1].tolist()
    out = forward(model, [tokens])
    streams = [seen.x_BTD for seen in out.seen] + [out.hidden]
    names = ["the embedding", *(f"layer {i}" for i in range(len(out.seen) - 1)), "the last layer or the final norm"]
    first = next((name for name, x in zip(names, streams, strict=True) if not jnp.isfinite(x).all()), "the head")
    raise FloatingPointError(
        f"the logits of {bad.size} rows are not numbers: row {row}, new token {made - 1}; the first output that is "
        f"not finite is that of {first}. Check the checkpoint's weights"
    )
