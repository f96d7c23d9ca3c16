"""Rows that are continued together: the host's side of `decoding`, which never waits for more than it asked for."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from ..model.model import Model
from ..parallel.multihost import any_of, fetch
from . import memory, prefill_decode, speculative
from .diagnosis import not_finite
from .memory import round_up_rows
from .prefill_decode import Context, State
from .request import Request, bucket, chunks, occurring, task
from .transcript import Token, Transcript

SEGMENT_SECONDS = 0.5
"""Decoding returns to the host about this often, to see whether someone pressed Ctrl-C."""


class Programs(NamedTuple):
    """What runs a batch: `decoding.blank`, `read`, `spread` and `begin`, and `decode` over plain and over drafting
    steps."""

    blank: Callable
    read: Callable
    spread: Callable
    begin: Callable
    decode: Callable
    decode_drafting: Callable


DEFAULTS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,COLLECTIVES",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""XLA's CPU backend by default runs as much as it can side by side: it would dequantize all layers at once. On a GPU a
step runs as CUDA graphs, all-reduces in them, whose kernels wait for nothing but what they need. Each backend reads its
own.
"""


def options(flags: str) -> dict[str, str]:
    """What programs of the whole model are compiled with: what the user's own XLA_FLAGS name is as they say."""
    return {name: value for name, value in DEFAULTS.items() if f"--{name}=" not in flags}


OPTIONS = options(os.environ.get("XLA_FLAGS", ""))

WHOLE = Programs(
    prefill_decode.blank,
    jax.jit(prefill_decode.read, donate_argnames="context", compiler_options=OPTIONS),
    jax.jit(prefill_decode.spread),
    jax.jit(prefill_decode.begin, static_argnames=("slots", "width", "drafts")),
    jax.jit(partial(prefill_decode.decode, prefill_decode.step), donate_argnames="state", compiler_options=OPTIONS),
    jax.jit(partial(prefill_decode.decode, speculative.step), donate_argnames="state", compiler_options=OPTIONS),
)
"""Every program is the whole model, compiled once a shape bucket."""


def layer_by_layer(step, model: Model, task: prefill_decode.Task, state: State, steps: int) -> State:
    """`decoding.decode`, driven from Python."""
    for _ in range(steps):
        if fetch(state.done_B).all():
            break
        state = step(model, task, state)
    return state


LAYERWISE = Programs(
    prefill_decode.blank,
    prefill_decode.read,
    prefill_decode.spread,
    prefill_decode.begin,
    partial(layer_by_layer, prefill_decode.step),
    partial(layer_by_layer, speculative.step),
)
"""One program for each kind of layer, called from Python."""


class Batch:
    """The rows `rows` of a request, their state on the device and their transcripts on the host."""

    def __init__(self, programs: Programs, model: Model, request: Request, group: Sequence[int], transcripts):
        self._programs, self._model, self._request = programs, model, request
        self._prompts = [request.prompts[i] for i in group]
        self.rows = [i * request.n + sample for i in group for sample in range(request.n)]
        self.transcripts: list[Transcript] = [transcripts[row] for row in self.rows]
        self.held: State | None = None
        self._steps = 1

    def read(
        self,
        progress: Callable[[int], None],
        asked_to_stop: Callable[[], bool],
        context: Context | None = None,
        known: int = 0,
    ) -> None:
        """Read the prompts and choose the first tokens. `context` has read the first `known` tokens of them already."""
        batch = round_up_rows(len(self._prompts))
        context = prefill_decode.placed(self._model, self._blank(batch) if context is None else context)
        for tokens_BT, next_BT, count_B in chunks([prompt[known:] for prompt in self._prompts], batch):
            if asked_to_stop():
                return
            context = self._programs.read(self._model, context, tokens_BT, next_BT, count_B)
            jax.block_until_ready(context)
            progress(int(count_B.sum()))
        self._begin(context, batch)

    def _blank(self, batch: int) -> Context:
        request, model = self._request, self._model
        return self._programs.blank(model.cfg, model.dtype, batch, request.capacity, request.cache_dtype, request.draft)

    def _begin(self, context: Context | None, batch: int) -> None:
        """Choose the first tokens, of every continuation of each prompt."""
        request, prompts = self._request, self._prompts
        if request.n > 1:
            batch = round_up_rows(len(self.rows))
            row_B = np.zeros(batch, np.int32)
            row_B[: len(self.rows)] = np.repeat(np.arange(len(prompts)), request.n)
            context = self._programs.spread(context, row_B)
            prompts = [prompt for prompt in prompts for _ in range(request.n)]
        self._task = task(self._model, request, self.rows, batch)
        self.held = self._programs.begin(
            self._model,
            self._task,
            context,
            occurring(prompts, batch, self._model.cfg.vocab_size),
            slots=bucket(request.limit),
            width=request.top_logprobs and min(round_up_rows(request.top_logprobs), self._model.cfg.vocab_size),
            drafts=request.draft,
        )

    def advance(self, steps: int | None = None) -> None:
        """Take some more steps: by default as many as fit in SEGMENT_SECONDS."""
        decode = self._programs.decode_drafting if self._request.draft else self._programs.decode
        start = time.perf_counter()
        state, self.held = self.state, None
        self.held = jax.block_until_ready(decode(self._model, self._task, state, steps or self._steps))
        if steps is None:
            slow = any_of(self._model.mesh, time.perf_counter() - start > SEGMENT_SECONDS)
            self._steps = max(1, self._steps // 2) if slow else min(self._steps * 2, 1024)

    @property
    def state(self) -> State:
        """What `held` is: nothing before the prompts are read, nor where a step was broken off."""
        assert self.held is not None
        return self.held

    @property
    def bytes(self) -> int:
        """Bytes of the caches of all rows, filled up to a power of two."""
        request = self._request
        each = memory.compute_row_bytes(self._model.cfg, request.capacity, request.cache_dtype, request.draft)
        return each * round_up_rows(len(self.rows))

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return bool(fetch(self.state.done_B).all())

    @property
    def steps(self) -> int:
        """Steps that all rows have taken."""
        return int(fetch(self.state.step_B).sum())

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept: what all rows made beyond their first token and one a step."""
        return int(np.maximum(fetch(self.state.made_B) - 1, 0).sum()) - self.steps

    def news(self) -> Iterator[tuple[int, Token]]:
        """The tokens that were made since the last call, by row of the request; a row that hits a stop string ends."""
        state = self.state
        made_B, finite_B = fetch(state.made_B), fetch(state.finite_B)
        self._refuse_nonfinite(made_B, finite_B)
        if not any(made > len(one.tokens) for made, one in zip(made_B, self.transcripts, strict=False)):
            return
        tokens_Bm, logprob_Bm = fetch(state.tokens_Bm), fetch(state.logprob_Bm)
        top_id_Bmw, top_logprob_Bmw = fetch(state.top_id_Bmw), fetch(state.top_logprob_Bmw)
        for b, one in enumerate(self.transcripts):
            for i in range(len(one.tokens), made_B[b]):
                if one.finish_reason:
                    break
                top = zip(top_id_Bmw[b, i].tolist(), top_logprob_Bmw[b, i].tolist(), strict=True)
                token = one.add(int(tokens_Bm[b, i]), float(logprob_Bm[b, i]), tuple(top)[: self._request.top_logprobs])
                yield self.rows[b], token
        self._end(np.array([bool(one.finish_reason) for one in self.transcripts]))

    def _end(self, ended_b: np.ndarray) -> None:
        """Rows that a stop string ended make no more tokens."""
        done_B = fetch(self.state.done_B)
        ended_B = np.pad(ended_b, (0, len(done_B) - len(ended_b)))
        if (ended_B & ~done_B).any():
            ended = jax.device_put(done_B | ended_B, self.state.done_B.sharding)
            self.held = dataclasses.replace(self.state, done_B=ended)

    def _refuse_nonfinite(self, made_B: np.ndarray, finite_B: np.ndarray) -> None:
        bad = np.flatnonzero(~finite_B)
        if bad.size:
            b = min(bad, key=lambda b: self.rows[b])
            new = int(made_B[b]) - 1
            made = fetch(self.state.tokens_Bm)[b, : max(new, 0)].tolist()
            tokens = self._prompts[b // self._request.n] + made
            raise not_finite(self._model, sorted(self.rows[b] for b in bad), tokens, new)
