"""`dsv32 bench record`: what the flight recorder costs in decoding, kind by kind."""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import jax

from ..config import Config
from ..generation import recording, tape
from ..model.cache import Cache
from .context import config
from .measure import Row, rounds, table
from .parts import DTYPE, Step, filled, random_model

CONTEXTS = (2048, 8192)

SIZES = {"vocab_size": 2048, "num_nextn_predict_layers": 0, "n_routed_experts": 16}
"""What differs from DeepSeek-V3.2: a token uses as many experts of the true size, out of fewer."""

MEDIAN_ERROR = 0.93
"""The standard error of a median of n normal values, in their interquartile range over the square root of n."""

EXPLANATION = """\
Decoding: ms a token, batch 1, one MoE layer of the true dimensions ({experts} experts, vocabulary {vocabulary}) at the
end of a context of synthetic values, with the recorder off and keeping one kind or all. They run in turn, round by
round, each in an order of its own. time, cpu (processor time of all cores): medians. cost: time over that of off in the
same round, less 1, the median of all rounds with its standard error. tape: what a token leaves on it. In a context of
{topk} everything is selected, and only a recorder asks for index scores."""

COLUMNS = (
    ("context", 7, lambda row: str(row["context"])),
    ("record", 10, lambda row: row["record"]),
    ("time ms", 9, lambda row: f"{row['seconds'] * 1e3:.1f}"),
    ("cpu ms", 9, lambda row: f"{row['cpu_seconds'] * 1e3:.1f}"),
    ("cost", 14, lambda row: f"{100 * row['cost']:+.1f} ± {100 * row['error']:.1f} %"),
    ("tape kB", 9, lambda row: f"{row['bytes'] / 1e3:.1f}"),
)


def print_record() -> None:
    """`dsv32 bench record`."""
    cfg = config(SIZES, 1)
    print(EXPLANATION.format(experts=cfg.n_routed_experts, vocabulary=cfg.vocab_size, topk=cfg.index_topk))
    for line in table(COLUMNS, rows(cfg)):
        print(line, flush=True)


def rows(cfg: Config, contexts: Sequence[int] = CONTEXTS, seconds: float = 90.0) -> Iterator[Row]:
    """For each context a row of the recorder off, keeping each kind, and all of them; about `seconds` of rounds each.

    `cost` is a share of the time with the recorder off, with its standard `error`; `bytes` is what a token leaves on
    the tape.
    """
    model = random_model(cfg)
    choices = {"off": (), **{kind: (kind,) for kind in tape.KINDS}, "all": tape.KINDS}
    for context in contexts:
        steps = {name: Step(model, *_ready(cfg, context, kinds)) for name, kinds in choices.items()}
        times = rounds({name: partial(_run, step) for name, step in steps.items()}, seconds)
        for name, kinds in choices.items():
            walls, cpus = zip(*times[name], strict=True)
            ratios = [one.wall / off.wall for one, off in zip(times[name], times["off"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            yield {
                "context": context,
                "record": name,
                "seconds": statistics.median(walls),
                "cpu_seconds": statistics.median(cpus),
                "cost": middle - 1,
                "error": MEDIAN_ERROR * (high - low) / len(ratios) ** 0.5,
                "bytes": tape.row_bytes(cfg, context, kinds) / context,
            }


def _ready(cfg: Config, context: int, kinds: tuple[str, ...]):
    """A full cache, with a tape where something is recorded, and the programs that go with it."""
    cache: Cache = filled(cfg, context, DTYPE)
    if kinds:
        cache = tape.RecordedCache(cache.layers, cache.length_B, tape.empty(cfg, 1, context, kinds))
    return cache, recording.whole(kinds)


def _run(step: Step) -> None:
    jax.block_until_ready(step.run())
