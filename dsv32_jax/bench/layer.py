"""`dsv32 bench layer`: one MoE block and one attention block at the true dimensions, decoding one token a row.

Weights are random NVFP4. A block can be no faster than its weights can be read, so each is compared with a plain read
of as many bytes.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import leaf_maker, uniform
from ..config import Config
from ..layout import leaves
from ..model import attention
from ..model.indexer import Indexer
from ..model.mla import MLA
from ..model.moe import MoE
from .decode_step import DTYPE, fill_cache
from .measure import Row, format_table, get_peak_memory, make_reader, measure_fastest

EXPLANATION = """\
time: one new token a row. cpu: the processor time in it, all cores together. weights: bytes the block must read (MoE:
the shared expert and the chosen ones). read: a plain read of as many bytes by all cores. ratio: time / read; 1 is the
limit. Block and read run in turn, and times are the fastest of many, as other load on the machine only adds to them.
temp: memory of the program beside weights, inputs and results. peak: memory of the process so far."""

COLUMNS = (
    ("part", 36, lambda row: row["part"]),
    ("batch", 5, lambda row: str(row["batch"])),
    ("context", 7, lambda row: "-" if row["context"] is None else str(row["context"])),
    ("compile s", 9, lambda row: f"{row['compile_seconds']:.1f}"),
    ("time ms", 9, lambda row: f"{row['seconds'] * 1e3:.1f}"),
    ("cpu ms", 8, lambda row: f"{row['cpu_seconds'] * 1e3:.1f}"),
    ("weights MB", 10, lambda row: f"{row['bytes'] / 1e6:.1f}"),
    ("GB/s", 6, lambda row: f"{row['bytes'] / row['seconds'] / 1e9:.2f}"),
    ("read ms", 8, lambda row: f"{row['read_seconds'] * 1e3:.2f}"),
    ("ratio", 6, lambda row: f"{row['seconds'] / row['read_seconds']:.1f}"),
    ("temp MB", 8, lambda row: f"{row['temporary_bytes'] / 1e6:.1f}"),
    ("peak GB", 7, lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
)


def run(_: argparse.Namespace) -> None:
    """Print the table for DeepSeek-V3.2."""
    from .. import configs

    print(EXPLANATION)
    for line in format_table(COLUMNS, measure_layer(Config.from_json(configs.path("deepseek_v32")))):
        print(line, flush=True)


def measure_layer(
    cfg: Config, batches: Sequence[int] = (1, 8), contexts: Sequence[int] = (1, 4096), seconds: float = 3.0
) -> Iterator[Row]:
    """Yield a row for the MoE block of each batch, then for attention of each batch and context.

    Times take about `seconds` of repeats each. The experts are freed before attention is measured.
    """
    cfg = dataclasses.replace(cfg, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    yield from _measure_moe(cfg, batches, seconds)
    yield from _measure_attention(cfg, batches, contexts, seconds)


def _measure_moe(cfg: Config, batches: Sequence[int], seconds: float) -> Iterator[Row]:
    moe = make_block(MoE, cfg, "layers.0.ffn.")
    for batch in batches:
        hidden = uniform((batch, 1, cfg.hidden_size), DTYPE.name, jnp.uint32(batch), 0.0, 1.0)
        program, compile_seconds = _compile(jax.jit(MoE.__call__), moe, hidden)
        chosen = np.asarray(program(moe, hidden)[1].expert_BTX)
        part = f"MoE, {len(np.unique(chosen))} of {cfg.n_routed_experts} experts chosen"

        def run(program=program, hidden=hidden) -> Any:
            return jax.block_until_ready(program(moe, hidden))

        facts = {"part": part, "batch": batch, "context": None, "compile_seconds": compile_seconds}
        yield facts | _measure(program, run, count_read_bytes(moe, chosen), seconds)


def _measure_attention(cfg: Config, batches: Sequence[int], contexts: Sequence[int], seconds: float) -> Iterator[Row]:
    blocks = make_block(MLA, cfg, "layers.0.mla."), make_block(Indexer, cfg, "layers.0.indexer.")
    step = jax.jit(lambda *arguments: attention.attention(*arguments)[:2], donate_argnums=3)
    for batch in batches:
        for context in contexts:
            hidden = uniform((batch, 1, cfg.hidden_size), DTYPE.name, jnp.uint32(batch), 0.0, 1.0)
            position = jnp.full((batch, 1), context - 1, jnp.int32)
            (cache,) = fill_cache(cfg, context, DTYPE, batch).layers
            program, compile_seconds = _compile(step, *blocks, hidden, cache, position)

            def run(program=program, hidden=hidden, position=position) -> None:
                nonlocal cache
                out, cache = program(*blocks, hidden, cache, position)
                out.block_until_ready()

            kind = "attention, sparse" if context > cfg.index_topk else "attention"
            part = f"{kind}, {min(context, cfg.index_topk)} of {context} tokens"
            facts = {"part": part, "batch": batch, "context": context, "compile_seconds": compile_seconds}
            yield facts | _measure(program, run, _count_bytes(blocks), seconds)


def make_block(kind: Callable[..., Any], cfg: Config, prefix: str) -> Any:
    """Return a module of one layer with random weights."""
    print(f"making {prefix}*", file=sys.stderr, flush=True)
    make = leaf_maker(cfg, DTYPE)
    paths = [leaf.path for leaf in leaves(cfg) if leaf.path.startswith(prefix)]
    return jax.block_until_ready(kind(cfg, **{path.removeprefix(prefix): make(path) for path in paths}))


def count_read_bytes(moe: MoE, chosen: np.ndarray) -> int:
    """Return the bytes of weights a step must read: all but the experts that are not among the `chosen` ids."""
    banks = _count_bytes((moe.w_gate_EMD, moe.w_up_EMD, moe.w_down_EDM))
    return _count_bytes(moe) - banks + banks // moe.cfg.n_routed_experts * len(np.unique(chosen))


def _compile(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Return the compiled function and the seconds it took."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - start


def _measure(program: Any, run: Callable[[], Any], nbytes: int, seconds: float) -> Row:
    """Return the columns about `run`, which runs `program` and must read `nbytes` of weights."""
    times = measure_fastest({"block": run, "read": make_reader(nbytes)}, seconds)
    return {
        "bytes": nbytes,
        "seconds": times["block"].wall,
        "cpu_seconds": times["block"].cpu,
        "read_seconds": times["read"].wall,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": get_peak_memory(),
    }


def _count_bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))
