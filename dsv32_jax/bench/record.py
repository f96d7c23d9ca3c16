"""`dsv32 bench record`: what the flight recorder costs in decoding, kind by kind."""

import time
from collections.abc import Iterator, Sequence

import jax

from .. import recording, tape
from ..batch import WHOLE
from ..cache import Cache
from ..config import Config
from .context import WIDE, config
from .measure import FEWEST_REPEATS, Row, table
from .parts import DTYPE, Step, filled, random_model

CONTEXTS = (2048, 8192)
LAYERS = 2

EXPLANATION = """\
Decoding: ms a token, batch 1, {layers} layers with the true heads and indexer (hidden size {hidden}, {experts} experts)
at the end of a context of synthetic values, with the recorder off and keeping one kind or all. All are run in turn,
round by round; time is the fastest of many, as a machine that is busy only adds to it. cost: time / that of off, less
1. tape: what a token leaves on it. In a context of {topk} everything is selected, and only a recorder asks for index
scores."""

COLUMNS = (
    ("context", 7, lambda row: str(row["context"])),
    ("record", 10, lambda row: row["record"]),
    ("time ms", 9, lambda row: f"{row['seconds'] * 1e3:.2f}"),
    ("cost", 8, lambda row: f"{100 * row['cost']:+.1f} %"),
    ("tape kB", 9, lambda row: f"{row['bytes'] / 1e3:.1f}"),
)


def print_record() -> None:
    """`dsv32 bench record`."""
    cfg = config(WIDE, LAYERS)
    sizes = {"hidden": cfg.hidden_size, "experts": cfg.n_routed_experts, "topk": cfg.index_topk}
    print(EXPLANATION.format(layers=LAYERS, **sizes))
    for line in table(COLUMNS, rows(cfg)):
        print(line, flush=True)


def rows(cfg: Config, contexts: Sequence[int] = CONTEXTS, seconds: float = 60.0) -> Iterator[Row]:
    """For each context a row of the recorder off, keeping each kind, and all of them; about `seconds` of rounds each.

    `cost` is a share of the time with the recorder off, `bytes` what a token leaves on the tape.
    """
    model = random_model(cfg)
    choices = {"off": (), **{kind: (kind,) for kind in tape.KINDS}, "all": tape.KINDS}
    for context in contexts:
        steps = {name: Step(model, *_ready(cfg, context, kinds)) for name, kinds in choices.items()}
        rounds = _rounds(steps, seconds)
        for name, kinds in choices.items():
            fastest, off = (min(times[one] for times in rounds) for one in (name, "off"))
            yield {
                "context": context,
                "record": name,
                "seconds": fastest,
                "cost": fastest / off - 1,
                "bytes": tape.row_bytes(cfg, context, kinds) / context,
            }


def _ready(cfg: Config, context: int, kinds: tuple[str, ...]):
    """A full cache, with a tape where something is recorded, and the programs that go with it."""
    cache: Cache = filled(cfg, context, DTYPE)
    if not kinds:
        return cache, WHOLE
    return tape.RecordedCache(cache.layers, cache.length_B, tape.empty(cfg, 1, context, kinds)), recording.whole(kinds)


def _rounds(steps: dict[str, Step], seconds: float) -> list[dict[str, float]]:
    """The seconds of each step, round by round, after one to warm up."""
    rounds: list[dict[str, float]] = []
    end = None
    while end is None or len(rounds) < FEWEST_REPEATS or time.perf_counter() < end:
        times: dict[str, float] = {}
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step.run())
            times[name] = time.perf_counter() - start
        if end is None:
            end = time.perf_counter() + seconds
        else:
            rounds.append(times)
    return rounds
