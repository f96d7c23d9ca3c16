"""`dsv32 bench layer`: one MoE block and one attention block at the true dimensions, decoding one token a row.

Weights are random NVFP4. A block can be no faster than its weights can be read, so each is compared with a plain read
of as many bytes. Whether the MoE block touches only the experts that were chosen shows in two ways: its temporaries and
its time must be the same with a bank of 16 experts as with one of 256.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import leaf_maker, uniform
from ..config import Config
from ..layout import leaves
from ..model import attention
from ..model.cache import LayerCache, empty_layer
from ..model.indexer import Indexer
from ..model.mla import MLA
from ..model.moe import MoE
from .measure import Row, in_turn, peak_bytes, reader, table

DTYPE = jnp.bfloat16
"""The compute dtype, and that of activations and cache."""

EXPLANATION = """\
time: one new token a row. cpu: the processor time in it, all cores together. weights: bytes the block has to read (MoE:
the shared expert and those that were chosen). read: as many bytes only read, by all cores. ratio: time / read, 1 is the
limit. Block and read go in turn, and times are the fastest of many: what else a machine does only adds to them. temp:
memory the program needs besides weights, inputs and results. peak: memory of the process so far."""

COLUMNS = (
    ("part", 36, lambda row: row["part"]),
    ("batch", 5, lambda row: _or_dash(row["batch"])),
    ("context", 7, lambda row: _or_dash(row["context"])),
    ("compile s", 9, lambda row: _or_dash(row["compile_seconds"], ".1f")),
    ("time ms", 9, lambda row: f"{row['seconds'] * 1e3:.1f}"),
    ("cpu ms", 8, lambda row: _or_dash(row["cpu_seconds"] and row["cpu_seconds"] * 1e3, ".1f")),
    ("weights MB", 10, lambda row: f"{row['bytes'] / 1e6:.1f}"),
    ("GB/s", 6, lambda row: f"{row['bytes'] / row['seconds'] / 1e9:.2f}"),
    ("read ms", 8, lambda row: _or_dash(row["read_seconds"] and row["read_seconds"] * 1e3, ".2f")),
    ("ratio", 6, lambda row: _or_dash(row["read_seconds"] and row["seconds"] / row["read_seconds"], ".1f")),
    ("temp MB", 8, lambda row: _or_dash(row["temporary_bytes"] and row["temporary_bytes"] / 1e6, ".1f")),
    ("peak GB", 7, lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
)


def print_layer() -> None:
    """`dsv32 bench layer`."""
    print(EXPLANATION)
    for line in table(COLUMNS, layer()):
        print(line, flush=True)


def layer(
    cfg: Config | None = None,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] = (1, 4096),
    seconds: float = 3.0,
    experts: int | None = None,
) -> Iterator[Row]:
    """A row for each measurement, as it is made, on the model `cfg` (default: DeepSeek-V3.2) with `experts` a layer.

    Times and sizes are in seconds and bytes; each time is the median of about `seconds` of repeats. The contexts
    concern attention alone. The experts are freed before attention is measured.
    """
    cfg = cfg or _real()
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    cfg = dataclasses.replace(cfg, **layers, n_routed_experts=experts or cfg.n_routed_experts)
    few = cfg.n_group * max(2, -(-cfg.num_experts_per_tok // cfg.topk_group))
    yield from _moe_rows(cfg, batches, seconds)
    if few < cfg.n_routed_experts:
        yield from _moe_rows(dataclasses.replace(cfg, n_routed_experts=few), [1], seconds)
    yield from _attention_rows(cfg, batches, contexts, seconds)


def _real() -> Config:
    from .. import configs

    return Config.from_json(configs.path("deepseek_v32"))


def _moe_rows(cfg: Config, batches: Sequence[int], seconds: float) -> Iterator[Row]:
    """Making the MoE block, then running it."""
    moe, row = _made(f"making {cfg.n_routed_experts} experts", lambda: _part(MoE, cfg, "layers.0.ffn."))
    yield row
    for batch in batches:
        h = _random(cfg.hidden_size, (batch, 1))
        program, compile_seconds = _compiled(jax.jit(MoE.__call__), moe, h)
        run = partial(lambda program, h: jax.block_until_ready(program(moe, h)), program, h)
        chosen = np.asarray(run()[1].expert_BTX)
        yield _row(
            f"MoE, {len(np.unique(chosen))} of {cfg.n_routed_experts} experts chosen",
            batch=batch,
            compile_seconds=compile_seconds,
            **_measured(program, run, touched(moe, chosen), seconds),
        )


def _attention_rows(cfg: Config, batches: Sequence[int], contexts: Sequence[int], seconds: float) -> Iterator[Row]:
    """Making MLA and the indexer, then decoding the last token of each context."""

    def make():
        return _part(MLA, cfg, "layers.0.mla."), _part(Indexer, cfg, "layers.0.indexer.")

    blocks, row = _made("making attention", make)
    yield row
    for batch in batches:
        for context in contexts:
            step = _Step(cfg, blocks, batch, context)
            name = "attention, sparse" if context > cfg.index_topk else "attention"
            yield _row(
                f"{name}, {min(context, cfg.index_topk)} of {context} tokens",
                batch=batch,
                context=context,
                compile_seconds=step.compile_seconds,
                **_measured(step.program, step.run, _nbytes(blocks), seconds),
            )


class _Step:
    """Attention of the last token of `context` in each row, again and again; the cache is donated and comes back."""

    def __init__(self, cfg: Config, blocks: tuple[MLA, Indexer], batch: int, context: int):
        self.blocks, self.h = blocks, _random(cfg.hidden_size, (batch, 1))
        sizes = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim)
        seen = [_random(size, (batch, context)) for size in sizes]
        slots = jnp.broadcast_to(jnp.arange(context), (batch, context))
        self.cache = jax.jit(LayerCache.write, donate_argnums=0)(empty_layer(cfg, batch, context, DTYPE), slots, *seen)
        self.position = jnp.full((batch, 1), context - 1, jnp.int32)
        decode = jax.jit(lambda *step: attention.attention(*step)[:2], donate_argnums=3)
        self.program, self.compile_seconds = _compiled(decode, *blocks, self.h, self.cache, self.position)

    def run(self) -> None:
        out, self.cache = self.program(*self.blocks, self.h, self.cache, self.position)
        out.block_until_ready()


def touched(moe: MoE, chosen: np.ndarray) -> int:
    """Bytes of weights behind the result: all but the experts that are not among the `chosen` ids."""
    banks = _nbytes((moe.w_gate_EMD, moe.w_up_EMD, moe.w_down_EDM))
    each = banks // moe.cfg.n_routed_experts
    return _nbytes(moe) - banks + each * len(np.unique(chosen))


def _part(kind: type, cfg: Config, prefix: str):
    """A module of one layer with random weights."""
    make = leaf_maker(cfg, DTYPE)
    paths = [leaf.path for leaf in leaves(cfg) if leaf.path.startswith(prefix)]
    return kind(cfg, **{path.removeprefix(prefix): make(path) for path in paths})


def _random(size: int, shape: tuple[int, ...]) -> jax.Array:
    """Activations [*shape, size] of standard deviation 1."""
    return uniform((*shape, size), np.dtype(DTYPE).name, jnp.uint32(size), 0.0, 1.0)


def _made(name: str, make: Callable[[], Any]) -> tuple[Any, Row]:
    """What `make` returns, and a row about making it."""
    print(name, file=sys.stderr, flush=True)
    start = time.perf_counter()
    made = jax.block_until_ready(make())
    seconds = time.perf_counter() - start
    return made, _row(name, seconds=seconds, bytes=_nbytes(made))


def _compiled(function, *arguments) -> tuple[Any, float]:
    """`function` compiled for `arguments`, and the seconds that took."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - start


def _measured(program, run: Callable[[], Any], nbytes: int, seconds: float) -> Row:
    """The columns about `run`, which runs the compiled `program` and has `nbytes` of weights to read."""
    times = in_turn({"block": run, "read": reader(nbytes)}, seconds)
    return {
        "bytes": nbytes,
        "seconds": times["block"].wall,
        "cpu_seconds": times["block"].cpu,
        "read_seconds": times["read"].wall,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def _row(part: str, **columns) -> Row:
    """A row with all columns; those not given are None, where they mean nothing."""
    names = "batch context compile_seconds seconds cpu_seconds bytes read_seconds temporary_bytes".split()
    return {"part": part, **{name: columns.get(name) for name in names}, "peak_bytes": peak_bytes()}


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)
