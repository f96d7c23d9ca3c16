"""`dsv32 bench context`: what a long context costs in decoding and in reading prompts, and what a batch saves.

Beside sparse attention stands the same result by a mask over all positions, whose cost grows with the context.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from ..config import Config
from ..errors import UsageError
from ..generation.request import CHUNK
from . import parts, reading
from .measure import Row, table

SECTIONS = ("decode", "prefill", "batch")
CONTEXTS = (2048, 8192, 32768, 131072)
CACHES = ("bfloat16", "fp8")

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 16,
}
"""What differs from DeepSeek-V3.2 where contexts are long: heads, their sizes and the indexer are the true ones."""

SMALL = {**WIDE, "hidden_size": 256, "num_attention_heads": 8, "q_lora_rank": 128, "index_n_heads": 8}
"""And where a batch is compared with single rows."""

ROWS, SHORTEST, LONGEST, NEW = 32, 8, 96, 32

DECODE = """\
Decoding: ms a token, batch 1, {layers} layers with the true heads and indexer (hidden size {hidden}, {experts} experts)
at the end of a context of synthetic values. scoring: index scores of all cached keys. top-k: the {topk} largest.
attention: over those. dense: the same result by a mask over all positions, which the model never does. rest: the whole
step less the first three (projections, experts, head, choice, writing the cache). A context of {topk} is attended to as
a whole. growth: x in S^x, from the first longer context to the last."""

PREFILL = """
Reading a prompt: chunks of {chunk}, {layers} of these layers, bfloat16 cache. temp: memory that the program of a chunk
needs beside weights, cache and results. time: from the first token on, compilation apart."""

BATCH = """
A batch: {rows} prompts of {shortest} to {longest} tokens, {new} new ones each, a small model ({layers} layers, hidden
size {hidden}). Everything is compiled before."""

TIMES = (*parts.PARTS, "dense", "rest", "whole")
HEADINGS = {"topk": "top-k"}

DECODE_COLUMNS = (
    ("cache", 8, lambda row: row["cache"]),
    ("context", 7, lambda row: str(row["context"])),
    *((HEADINGS.get(name, name), 9, lambda row, name=name: _text(row[name], row["form"])) for name in TIMES),
)
MEMORY_COLUMNS = (
    ("capacity", 8, lambda row: str(row["capacity"])),
    ("chunk", 7, lambda row: str(row["chunk"])),
    ("temp MB", 9, lambda row: f"{row['temporary_bytes'] / 1e6:.1f}"),
    ("cache MB", 9, lambda row: f"{row['cache_bytes'] / 1e6:.1f}"),
)
TIME_COLUMNS = (
    ("tokens", 8, lambda row: str(row["tokens"])),
    ("time s", 9, lambda row: f"{row['seconds']:.2f}"),
    ("tokens/s", 9, lambda row: f"{row['tokens'] / row['seconds']:.0f}"),
)
BATCH_COLUMNS = (
    ("how", 20, lambda row: row["how"]),
    ("time s", 9, lambda row: f"{row['seconds']:.2f}"),
    ("tokens/s", 9, lambda row: f"{row['tokens'] / row['seconds']:.0f}"),
)


def print_context(sections: Sequence[str], tokens: int, layers: int) -> None:
    """`dsv32 bench context`; prompts of `tokens` tokens are read with `layers` layers. Raises UsageError."""
    if tokens < 4 * CHUNK or tokens % (4 * CHUNK) or layers < 1:
        raise UsageError(f"--prefill must be a multiple of {4 * CHUNK}, not {tokens}, and --layers at least 1")
    for section in sections:
        {"decode": decode, "prefill": partial(prefill, tokens, layers), "batch": batch}[section]()


def decode() -> None:
    """The parts of a decode step over CONTEXTS, and how they grow."""
    cfg = config(WIDE, 4)
    print(DECODE.format(topk=cfg.index_topk, **_sizes(cfg)))
    rows = (row | {"form": "ms"} for row in parts.rows(cfg, CONTEXTS, CACHES))
    for line in table(DECODE_COLUMNS, with_growth(rows, cfg.index_topk)):
        print(line, flush=True)


def with_growth(rows: Iterable[Row], topk: int) -> Iterator[Row]:
    """`rows` as they come, and after those of each cache a row of exponents, from the first beyond `topk` to the last
    context."""
    seen: list[Row] = []
    for row in rows:
        if seen and seen[-1]["cache"] != row["cache"]:
            yield _growth(seen)
            seen = []
        seen += [row] if row["context"] > topk else []
        yield row
    yield _growth(seen)


def _growth(rows: Sequence[Row]) -> Row:
    first, last = rows[0], rows[-1]
    powers = {name: power(first["context"], last["context"], first[name], last[name]) for name in TIMES}
    return {"cache": first["cache"], "context": "growth", "form": "power", **powers}


def power(size: float, larger: float, cost: float, higher: float) -> float:
    """x, where the cost is proportional to size^x."""
    return math.log(higher / cost) / math.log(larger / size) if cost > 0 and higher > 0 else math.nan


def prefill(tokens: int, layers: int) -> None:
    """Memory and time of reading a prompt, and how they grow."""
    cfg = config(WIDE, layers)
    print(PREFILL.format(chunk=CHUNK, **_sizes(cfg)))
    half, whole, longer = rows = list(reading.memory_rows(cfg, tokens, CHUNK))
    print(*table(MEMORY_COLUMNS, rows), sep="\n")
    by_capacity, by_chunk = (
        power(a[size], b[size], a["temporary_bytes"], b["temporary_bytes"])
        for size, a, b in (("capacity", whole, longer), ("chunk", half, whole))
    )
    print(f"temp grows like capacity^{by_capacity:.2f} and chunk^{by_chunk:.2f}")
    rows = list(reading.time_rows(cfg, tokens, CHUNK))
    print(*table(TIME_COLUMNS, rows), sep="\n")
    _, first, last = rows
    print(f"time grows like tokens^{power(first['tokens'], last['tokens'], first['seconds'], last['seconds']):.2f}")


def batch() -> None:
    """A ragged batch against its rows one by one."""
    cfg = config(SMALL, 4)
    print(BATCH.format(rows=ROWS, shortest=SHORTEST, longest=LONGEST, new=NEW, **_sizes(cfg)))
    prompts = reading.ragged(ROWS, SHORTEST, LONGEST, cfg.vocab_size)
    together, alone = rows = list(reading.batch_rows(cfg, prompts, NEW))
    print(*table(BATCH_COLUMNS, rows), sep="\n")
    print(f"the batch makes {alone['seconds'] / together['seconds']:.1f} times as many tokens a second")


def config(sizes: dict[str, int], layers: int) -> Config:
    """DeepSeek-V3.2 with `sizes` of its own and `layers` layers, the first of several dense."""
    from .. import configs

    cfg = Config.from_json(configs.path("deepseek_v32"))
    return dataclasses.replace(cfg, **sizes, num_hidden_layers=layers, first_k_dense_replace=int(layers > 1))


def _sizes(cfg: Config) -> dict[str, int]:
    return {"layers": cfg.num_hidden_layers, "hidden": cfg.hidden_size, "experts": cfg.n_routed_experts}


def _text(value: float | None, form: str) -> str:
    """A time in ms, or the power of S by which it grows."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f}" if form == "ms" else f"S^{value:.2f}"
