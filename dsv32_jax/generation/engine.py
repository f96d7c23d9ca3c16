"""The engine: prefills and decodes the rows of a request, batch by batch, and hands out their tokens.

The device holds one `State`, which every program is given, donates and returns. The host reads the new tokens about
twice a second.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..errors import pluralize
from ..model.model import Model, forward
from ..parallel import multihost
from ..parallel.multihost import fetch
from ..system.compilation import count_compilations, initialize, log_slow_compilation
from . import memory, prefill_decode, speculative
from .options import Sampling
from .prefill_decode import Caches, Generated, State, empty_caches, new_state, sample_first, take_rows
from .request import Request, Row, split_into_chunks
from .result import Generation, Stats, Token
from .sampler import make_params

SEGMENT_SECONDS = 0.5
"""`decode` returns to the host about this often, so that Ctrl-C is noticed."""

SEGMENT_TOKENS = 256
"""The most tokens a row generates before `decode` returns."""

DEFAULTS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,COLLECTIVES",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""XLA's CPU backend by default runs as much as it can side by side, and would dequantize all layers at once. On a GPU a
step runs as CUDA graphs that include the all-reduces, and a kernel waits only for its inputs. Each backend ignores the
options of the other."""


def compiler_options(flags: str) -> dict[str, str]:
    """Return the compiler options of whole-model programs, except those that the user's XLA_FLAGS set."""
    return {name: value for name, value in DEFAULTS.items() if f"--{name}=" not in flags}


OPTIONS = compiler_options(os.environ.get("XLA_FLAGS", ""))


class Programs(NamedTuple):
    """The functions `prefill` and `decode` of prefill_decode.py, as they are run."""

    prefill: Callable[..., State]
    decode: Callable[..., tuple[State, Generated]]


WHOLE = Programs(
    jax.jit(prefill_decode.prefill, donate_argnames="state", compiler_options=OPTIONS),
    jax.jit(
        prefill_decode.decode,
        static_argnames=("step", "slots", "width"),
        donate_argnames="state",
        compiler_options=OPTIONS,
    ),
)
"""The whole model is one program, compiled once for each bucket of shapes."""

LAYERWISE = Programs(prefill_decode.prefill, prefill_decode.decode_layerwise)
"""Each kind of layer is one program, called from Python: compiles in seconds, runs slower."""


def plan_batches(cfg: Config, request: Request, mesh: Mesh | None = None) -> list[list[int]]:
    """Return the rows that run together: prompts of similar lengths, as many as fit in memory; none if no new tokens
    are wanted. Raises CapacityError if not even the rows of one prompt fit."""
    options, prompts = request.options, request.prompts
    size = options.batch_size or memory.plan_batch(
        cfg, len(request.samplings), options.n, request.capacity, request.cache_dtype, options.draft, mesh
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if request.max_new_tokens else []
    each = max(1, size // options.n)
    batches = [order[first : first + each] for first in range(0, len(order), each)]
    return [[i * options.n + sample for i in batch for sample in range(options.n)] for batch in batches]


class Engine:
    """Runs one request on a model.

    batches  the rows that run together, by index
    rows     the tokens generated so far, row by row
    state    the device state of the current batch; None before prefill, and if a program was interrupted
    """

    def __init__(self, model: Model, request: Request, programs: Programs = WHOLE):
        initialize()
        multihost.require_same(model.mesh, request)
        options, vocab_size = request.options, model.cfg.vocab_size
        self.model, self.request, self._programs = model, request, programs
        self.batches = plan_batches(model.cfg, request, model.mesh)
        self.rows = [Row(request, index) for index in range(len(request.samplings))]
        self.state: State | None = None
        self._width = options.top_logprobs and min(memory.round_up_rows(options.top_logprobs), vocab_size)
        seconds = dict.fromkeys(("prefill_seconds", "decode_seconds", "compile_seconds"), 0.0)
        self._totals: dict[str, Any] = {"compiles": 0, "prompt_tokens": 0, "steps": 0, "accepted": 0, **seconds}

    def run(
        self,
        batch: Sequence[int],
        steps: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        caches: Caches | None = None,
        known: int = 0,
    ) -> Generator[tuple[int, Token], None, None]:
        """Prefill and decode a batch, and yield (row, token) every `steps` steps, or about every half second.

        `caches` may already hold the first `known` tokens of the prompts. The batch ends early if `should_stop` returns
        True or the generator is closed; `state` stays valid. Raises CapacityError if the device runs out of memory,
        FloatingPointError if logits are not finite.
        """
        with self._measure("prefill", batch):
            generated = self._prefill(batch, should_stop, caches, known)
        if generated is None:
            return
        self._segment = 1
        with contextlib.suppress(GeneratorExit):
            yield from self._collect(batch, generated)
            while not (fetch(self._current.done_B).all() or should_stop()):
                with self._measure("decode", batch):
                    generated = self._decode(steps)
                yield from self._collect(batch, generated)
        taken = int(fetch(self._current.step_B).sum())
        self._totals["steps"] += taken
        self._totals["accepted"] += int(np.maximum(fetch(self._current.new_B) - 1, 0).sum()) - taken

    @property
    def _current(self) -> State:
        assert self.state is not None
        return self.state

    def _take_state(self) -> State:
        """Return the state for a program that donates it; until the program's result is stored there is none."""
        state, self.state = self._current, None
        return state

    def _prefill(
        self, batch: Sequence[int], should_stop: Callable[[], bool], caches: Caches | None, known: int
    ) -> Generated | None:
        """Prefill the prompts and sample the first token of each row; return None if stopped before that."""
        model, request, options = self.model, self.request, self.request.options
        prompts = [request.prompts[row // options.n] for row in batch[:: options.n]]
        size = memory.round_up_rows(len(prompts))
        caches = caches or empty_caches(model.cfg, size, request.capacity, request.cache_dtype, options.draft)
        self.state = new_state(model, caches, prompts, options.draft)
        for tokens_BT, next_BT, count_B in split_into_chunks([prompt[known:] for prompt in prompts], size):
            if should_stop():
                return None
            state = self._programs.prefill(model, self._take_state(), tokens_BT, next_BT, count_B)
            self.state = jax.block_until_ready(state)
            self._totals["prompt_tokens"] += int(count_B.sum())
            if options.progress is not None:
                options.progress(self._totals["prompt_tokens"], sum(map(len, request.prompts)))
        if options.n > 1:
            size = memory.round_up_rows(len(batch))
            row_B = np.pad(np.repeat(np.arange(len(prompts), dtype=np.int32), options.n), (0, size - len(batch)))
            self.state = take_rows(self._current, row_B)
        padding, vocab_size = size - len(batch), model.cfg.vocab_size
        self._params = make_params(
            [request.samplings[row] for row in batch] + [Sampling()] * padding,
            vocab_size,
            model.origin.tokens or vocab_size,
            request.end_ids,
            options.min_new_tokens,
            [request.max_new_tokens] * len(batch) + [0] * padding,
        )
        found = sample_first(model, self._params, self._take_state(), self._width)
        self.state, generated = jax.block_until_ready(found)
        return generated

    def _decode(self, steps: int | None) -> Generated:
        """Take `steps` steps, or as many as fit in SEGMENT_SECONDS."""
        draft, mesh = self.request.options.draft, self.model.mesh
        step = speculative.step if draft else prefill_decode.step
        begun, state = time.perf_counter(), self._take_state()
        self.state, generated = jax.block_until_ready(
            self._programs.decode(
                step, self.model, self._params, state, steps or self._segment, SEGMENT_TOKENS, self._width
            )
        )
        if steps is None:
            slow = multihost.agree_on_any(mesh, time.perf_counter() - begun > SEGMENT_SECONDS)
            longer = min(self._segment * 2, SEGMENT_TOKENS // (1 + draft))
            self._segment = max(1, self._segment // 2) if slow else longer
        return generated

    def _collect(self, batch: Sequence[int], generated: Generated) -> Iterator[tuple[int, Token]]:
        """Yield the tokens that a program generated, and end the rows that hit a stop string."""
        count_B, token_Bm = fetch(generated.count_B), fetch(generated.token_Bm)
        self._require_finite(batch, count_B, token_Bm)
        logprob_Bm = fetch(generated.logprob_Bm)
        top_id_Bmw, top_logprob_Bmw = fetch(generated.top_id_Bmw), fetch(generated.top_logprob_Bmw)
        for b, row in enumerate(batch):
            for i in range(count_B[b]):
                if self.rows[row].finish_reason:
                    break
                top = zip(top_id_Bmw[b, i].tolist(), top_logprob_Bmw[b, i].tolist(), strict=True)
                reported = tuple(top)[: self.request.options.top_logprobs]
                yield row, self.rows[row].add(int(token_Bm[b, i]), float(logprob_Bm[b, i]), reported)
        done_B = fetch(self._current.done_B)
        ended = [self.rows[row].finish_reason is not None for row in batch]
        ended_B = np.pad(ended, (0, len(done_B) - len(ended)))
        if (ended_B & ~done_B).any():
            ended_B = jax.device_put(done_B | ended_B, self._current.done_B.sharding)
            self.state = dataclasses.replace(self._current, done_B=ended_B)

    def _require_finite(self, batch: Sequence[int], count_B: np.ndarray, token_Bm: np.ndarray) -> None:
        """Raise FloatingPointError that names the first row with logits that are not finite, and where they began."""
        if (finite_B := fetch(self._current.finite_B)).all():
            return
        bad = sorted(row for b, row in enumerate(batch) if not finite_B[b])
        b = batch.index(bad[0])
        tokens = self.rows[bad[0]].tokens + token_Bm[b, : count_B[b] - 1].tolist()
        origin = find_nonfinite(self.model, self.request.prompts[bad[0] // self.request.options.n] + tokens)
        raise FloatingPointError(
            f"the logits of {pluralize(len(bad), 'row')} are not finite: row {bad[0]}, new token {len(tokens)}; the "
            f"first output that is not finite is that of {origin}. Check the checkpoint's weights"
        )

    @contextlib.contextmanager
    def _measure(self, part: str, batch: Sequence[int]) -> Iterator[None]:
        """Add the seconds of the `with` to `part`, except those of compilation, which have an account of their own."""
        request, begun = self.request, time.perf_counter()
        program = f"{part} (batch {len(batch)}, {request.capacity} tokens)"
        with count_compilations() as compiled, log_slow_compilation(program, compiled):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                shape = (request.capacity, request.cache_dtype, request.options.draft)
                row_bytes = memory.compute_row_bytes(self.model.cfg, *shape)
                cache_bytes = row_bytes * memory.round_up_rows(len(batch))
                raise memory.explain_exhaustion(self.model, cache_bytes, error) from error
        self._totals["compiles"] += compiled.count
        self._totals["compile_seconds"] += compiled.seconds
        self._totals[f"{part}_seconds"] += max(0.0, time.perf_counter() - begun - compiled.seconds)

    def result(self) -> Generation:
        """Return what was generated. Rows that have not ended are interrupted."""
        rows, options = self.rows, self.request.options
        for row in rows:
            row.interrupt()
        stats = Stats(
            rows=len(rows),
            new_tokens=sum(len(row.tokens) for row in rows),
            capacity=self.request.capacity,
            drafts=options.draft,
            **self._totals,
        )
        return Generation(
            [row.tokens for row in rows],
            [row.logprobs for row in rows],
            [str(row.finish_reason) for row in rows],
            stats,
            None if options.tokenizer is None else [str(row.text) for row in rows],
            [row.top for row in rows] if options.top_logprobs else None,
        )


def find_nonfinite(model: Model, tokens: Sequence[int]) -> str:
    """Return the name of the first layer whose output for `tokens` is not finite."""
    out = forward(model, [tokens], seen=True)
    assert out.seen is not None
    streams = [seen.x_BTD for seen in out.seen] + [out.hidden]
    names = ["the embedding", *(f"layer {i}" for i in range(len(out.seen) - 1)), "the last layer or the final norm"]
    return next((name for name, x in zip(names, streams, strict=True) if not jnp.isfinite(x).all()), "the head")
