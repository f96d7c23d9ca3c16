"""The engine: prefills and decodes the rows of a request, batch by batch, and hands out their tokens.

The device holds one `State`, which every program takes, donates and returns. The host reads the tokens of about half a
second at a time.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

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
from .prefill_decode import Caches, Generated, State, Step, empty_caches, new_state, sample_first, take_rows
from .request import Request, split_into_chunks
from .result import Generation, Row, Stats, Token
from .sampler import SamplerParams, make_params

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
    """Return the options for programs of the whole model, but those that the user's XLA_FLAGS set."""
    return {name: value for name, value in DEFAULTS.items() if f"--{name}=" not in flags}


OPTIONS = compiler_options(os.environ.get("XLA_FLAGS", ""))


class Programs(NamedTuple):
    """The two programs that run the model: `prefill_decode.prefill` and `prefill_decode.decode`."""

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
"""A program is the whole model, compiled once for each bucket of shapes."""


def decode_layerwise(
    step: Step, model: Model, params: SamplerParams, state: State, steps: int, slots: int, width: int
) -> tuple[State, Generated]:
    """Run `prefill_decode.decode` from Python."""
    generated = prefill_decode.nothing_generated(len(state.token_B), slots, width)
    for _ in range(steps):
        if fetch(state.done_B).all():
            break
        state, generated = step(model, params, state, generated)
    return state, generated


LAYERWISE = Programs(prefill_decode.prefill, decode_layerwise)
"""A program is one kind of layer, called from Python: it compiles in seconds and runs slower."""


def plan_batches(cfg: Config, request: Request, mesh: Mesh | None = None) -> list[list[int]]:
    """Return the rows that run together: prompts alike in length, as many as fit in memory; none where no token is
    wanted. Raises CapacityError where not even the rows of one prompt fit."""
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

    `batches` lists the rows that run together; `rows` holds what each generated so far. `state` is the device state of
    the batch that runs, None where a program was broken off. Raises CapacityError where not even the rows of one prompt
    fit in memory.
    """

    def __init__(self, model: Model, request: Request, programs: Programs = WHOLE):
        initialize()
        multihost.require_same(model.mesh, request)
        options = request.options
        self.model, self.request, self._programs = model, request, programs
        self.rows = [
            Row(request.end_ids, request.max_new_tokens, options.tokenizer, options.stop) for _ in request.samplings
        ]
        self.batches = plan_batches(model.cfg, request, model.mesh)
        self.state: State | None = None
        self._read = self._steps = self._accepted = self._compiles = 0
        self._seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}

    def run(
        self,
        batch: Sequence[int],
        steps: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        caches: Caches | None = None,
        known: int = 0,
    ) -> Generator[tuple[int, Token], None, None]:
        """Prefill and decode a batch to its end, and yield (row, token) every `steps` steps, or every half second.

        `caches` may hold the first `known` tokens of the prompts already. The batch ends early where `should_stop`
        returns True or the generator is closed; its `state` stays valid.
        """
        with self._measure("prefill", batch):
            generated = self._prefill(batch, should_stop, caches, known)
        if generated is None:
            return
        self._segment = 1
        with contextlib.suppress(GeneratorExit):
            yield from self._collect(batch, generated)
            while not (fetch(self._held.done_B).all() or should_stop()):
                with self._measure("decode", batch):
                    generated = self._decode(steps)
                yield from self._collect(batch, generated)
        steps_taken = int(fetch(self._held.step_B).sum())
        self._steps += steps_taken
        self._accepted += int(np.maximum(fetch(self._held.new_B) - 1, 0).sum()) - steps_taken

    @property
    def _held(self) -> State:
        assert self.state is not None
        return self.state

    def _take_state(self) -> State:
        """Return the state for a program, which donates it. Until a new one is stored there is none."""
        state, self.state = self._held, None
        return state

    def _prefill(
        self,
        batch: Sequence[int],
        should_stop: Callable[[], bool],
        caches: Caches | None,
        known: int,
    ) -> Generated | None:
        """Prefill the prompts and sample the first token of each row; None where that was stopped before."""
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
            self._report(int(count_B.sum()))
        if options.n > 1:
            size = memory.round_up_rows(len(batch))
            row_B = np.pad(np.repeat(np.arange(len(prompts), dtype=np.int32), options.n), (0, size - len(batch)))
            self.state = take_rows(self._held, row_B)
        self._params = self._sampler_params(batch, size)
        self.state, generated = jax.block_until_ready(
            sample_first(model, self._params, self._take_state(), self._width)
        )
        return generated

    def _sampler_params(self, batch: Sequence[int], size: int) -> SamplerParams:
        """Return the parameters of the rows of a batch, and of the padding, which has no tokens to generate."""
        request, vocab_size = self.request, self.model.cfg.vocab_size
        padding = size - len(batch)
        return make_params(
            [request.samplings[row] for row in batch] + [Sampling()] * padding,
            vocab_size,
            self.model.origin.tokens or vocab_size,
            request.end_ids,
            request.options.min_new_tokens,
            [request.max_new_tokens] * len(batch) + [0] * padding,
        )

    @property
    def _width(self) -> int:
        """How many of the most likely tokens programs report: a power of two, as far as there are tokens."""
        wanted = self.request.options.top_logprobs
        return wanted and min(memory.round_up_rows(wanted), self.model.cfg.vocab_size)

    def _decode(self, steps: int | None) -> Generated:
        """Take `steps` steps, or as many as fit in SEGMENT_SECONDS."""
        draft = self.request.options.draft
        step = speculative.step if draft else prefill_decode.step
        take, state = steps or self._segment, self._take_state()
        begun = time.perf_counter()
        self.state, generated = jax.block_until_ready(
            self._programs.decode(step, self.model, self._params, state, take, SEGMENT_TOKENS, self._width)
        )
        if steps is None:
            slow = multihost.agree_on_any(self.model.mesh, time.perf_counter() - begun > SEGMENT_SECONDS)
            longer = min(self._segment * 2, SEGMENT_TOKENS // (1 + draft))
            self._segment = max(1, self._segment // 2) if slow else longer
        return generated

    def _collect(self, batch: Sequence[int], generated: Generated) -> Iterator[tuple[int, Token]]:
        """Yield the tokens a program generated; a row that hits a stop string ends."""
        count_B = fetch(generated.count_B)
        self._require_finite(batch, generated, count_B)
        if not count_B.any():
            return
        token_Bm, logprob_Bm = fetch(generated.token_Bm), fetch(generated.logprob_Bm)
        top_id_Bmw, top_logprob_Bmw = fetch(generated.top_id_Bmw), fetch(generated.top_logprob_Bmw)
        for b, row in enumerate(batch):
            for i in range(count_B[b]):
                if self.rows[row].finish_reason:
                    break
                top = zip(top_id_Bmw[b, i].tolist(), top_logprob_Bmw[b, i].tolist(), strict=True)
                reported = tuple(top)[: self.request.options.top_logprobs]
                yield row, self.rows[row].add(int(token_Bm[b, i]), float(logprob_Bm[b, i]), reported)
        self._end_rows(np.array([bool(self.rows[row].finish_reason) for row in batch]))

    def _end_rows(self, ended_b: np.ndarray) -> None:
        """Tell the device which rows have ended: it does not know of stop strings."""
        done_B = fetch(self._held.done_B)
        ended_B = np.pad(ended_b, (0, len(done_B) - len(ended_b)))
        if (ended_B & ~done_B).any():
            device_done_B = jax.device_put(done_B | ended_B, self._held.done_B.sharding)
            self.state = dataclasses.replace(self._held, done_B=device_done_B)

    def _require_finite(self, batch: Sequence[int], generated: Generated, count_B: np.ndarray) -> None:
        """Raise FloatingPointError where logits are not finite."""
        bad = np.flatnonzero(~fetch(self._held.finite_B))
        if bad.size:
            b = min(map(int, bad), key=lambda b: batch[b])
            tokens = self.rows[batch[b]].tokens + fetch(generated.token_Bm)[b, : count_B[b] - 1].tolist()
            prompt = self.request.prompts[batch[b] // self.request.options.n]
            raise explain_nonfinite(self.model, sorted(batch[b] for b in bad.tolist()), prompt, tokens)

    def _report(self, count: int) -> None:
        self._read += count
        if self.request.options.progress is not None:
            self.request.options.progress(self._read, sum(map(len, self.request.prompts)))

    @contextlib.contextmanager
    def _measure(self, part: str, batch: Sequence[int]) -> Iterator[None]:
        """Add the seconds of the `with` block to `part`, but those of compilation to their own account.

        Raises CapacityError where the device runs out of memory.
        """
        begun, what = time.perf_counter(), f"{part} (batch {len(batch)}, {self.request.capacity} tokens)"
        with count_compilations() as compiled, log_slow_compilation(what, compiled):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                raise memory.explain_exhaustion(self.model, self._cache_bytes(len(batch)), error) from error
        self._compiles += compiled.count
        self._seconds["compile"] += compiled.seconds
        self._seconds[part] += max(0.0, time.perf_counter() - begun - compiled.seconds)

    def _cache_bytes(self, rows: int) -> int:
        request = self.request
        row = memory.compute_row_bytes(self.model.cfg, request.capacity, request.cache_dtype, request.options.draft)
        return row * memory.round_up_rows(rows)

    def result(self) -> Generation:
        """Return what was generated; rows that have not ended are interrupted."""
        for row in self.rows:
            row.interrupt()
        stats = Stats(
            rows=len(self.rows),
            compile_seconds=self._seconds["compile"],
            compiles=self._compiles,
            prefill_seconds=self._seconds["prefill"],
            decode_seconds=self._seconds["decode"],
            prompt_tokens=self._read,
            new_tokens=sum(len(row.tokens) for row in self.rows),
            capacity=self.request.capacity,
            steps=self._steps,
            drafts=self.request.options.draft,
            accepted=self._accepted,
        )
        return Generation(
            [row.tokens for row in self.rows],
            [row.logprobs for row in self.rows],
            [str(row.finish_reason) for row in self.rows],
            stats,
            None if self.request.options.tokenizer is None else [str(row.text) for row in self.rows],
            [row.top for row in self.rows] if self.request.options.top_logprobs else None,
        )


def explain_nonfinite(model: Model, rows: Sequence[int], prompt: Sequence[int], tokens: Sequence[int]) -> Exception:
    """Return the error that names the first of the `rows`, whose logits are not finite after `prompt` and `tokens`, and
    the first layer whose output is not."""
    out = forward(model, [[*prompt, *tokens]], seen=True)
    assert out.seen is not None
    streams = [seen.x_BTD for seen in out.seen] + [out.hidden]
    names = ["the embedding", *(f"layer {i}" for i in range(len(out.seen) - 1)), "the last layer or the final norm"]
    first = next((name for name, x in zip(names, streams, strict=True) if not jnp.isfinite(x).all()), "the head")
    return FloatingPointError(
        f"the logits of {pluralize(len(rows), 'row')} are not finite: row {rows[0]}, new token {len(tokens)}; the "
        f"first output that is not finite is that of {first}. Check the checkpoint's weights"
    )
