"""`dsv32 bench engine`: ragged requests, shared beginnings, and a long prompt among running rows, on random weights."""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import Config
from ..generation.engine import engine as make_engine
from ..generation.generate import generate
from ..generation.result import Generation
from ..model.model import Model
from .decode_step import make_model

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 16,
    "num_attention_heads": 16,
    "q_lora_rank": 256,
    "index_n_heads": 8,
}
"""The sizes that differ from DeepSeek-V3.2 in the small model."""

LONGEST_PROMPT, LONGEST_ANSWER = 512, 256
CAPACITY = LONGEST_PROMPT + LONGEST_ANSWER
SHARING, SHARED, PROMPT = 64, 1024, 1100
RUNNING, LONG = 8, 8192

EXPLANATION = """\
ragged: new tokens a second of {requests} requests, prompts of 8-512 tokens, answers of 1-256, {rows} rows at once.
static: in groups that begin together, each until its longest answer ends. full: {rows} rows of the mean lengths, none
of which waits for another. prefix: how much faster 64 prompts of 1,100 tokens are read that share 1,024. stretch: 99th
percentile of the time between tokens of 8 rows while a prompt of 8,192 is read, as a multiple of the usual time.
Compilation is not counted."""


def draw(rng: np.random.Generator, cfg: Config, length: int) -> list[int]:
    """Return random token ids."""
    return rng.integers(3, cfg.vocab_size, length).tolist()


def measure_ragged(model: Model, requests: int, rows: int) -> dict[str, float]:
    """Return the rates of ragged requests in one call, in groups, and of rows of equal lengths."""
    rng, cfg = np.random.default_rng(0), model.cfg
    lengths = sorted(rng.integers(8, LONGEST_PROMPT + 1, requests).tolist())
    limits = rng.integers(1, LONGEST_ANSWER + 1, requests).tolist()
    sorted_requests = [(draw(rng, cfg, length), limit) for length, limit in zip(lengths, limits, strict=True)]
    shuffled = [sorted_requests[i] for i in rng.permutation(requests)]
    groups = [sorted_requests[i : i + rows] for i in range(0, requests, rows)]
    length, limit = round(statistics.mean(lengths)), round(statistics.mean(limits))
    equal = [(draw(rng, cfg, length), limit) for _ in range(rows)]
    return {
        "ragged_tokens_per_s": _rate([_generate(model, shuffled, rows)]),
        "static_tokens_per_s": _rate([_generate(model, group, rows) for group in groups]),
        "full_tokens_per_s": _rate([_generate(model, equal)]),
    }


def _generate(model: Model, requests: Sequence[tuple[list[int], int]], rows: int | None = None) -> Generation:
    """Continue each prompt for so many tokens."""
    prompts, limits = zip(*requests, strict=True)
    return generate(model, prompts, max_new_tokens=limits, min_new_tokens=1, batch_size=rows, capacity=CAPACITY)


def _rate(made: Sequence[Generation]) -> float:
    """Return new tokens a second."""
    seconds = sum(one.stats.prefill_seconds + one.stats.decode_seconds for one in made)
    return sum(one.stats.new_tokens for one in made) / seconds


def measure_prefixes(model: Model, rows: int) -> float:
    """Return how much faster prompts are read that share most of their tokens."""
    rng, cfg = np.random.default_rng(1), model.cfg
    seconds = []
    for shared in (draw(rng, cfg, SHARED), None):
        prompts = [(shared or draw(rng, cfg, SHARED)) + draw(rng, cfg, PROMPT - SHARED) for _ in range(SHARING)]
        for _ in range(2):
            with make_engine(model, rows=rows, capacity=PROMPT + 1) as engine:
                begun = time.perf_counter()
                streams = [engine.submit(prompt, max_new_tokens=1) for prompt in prompts]
                for stream in streams:
                    list(stream)
                spent = time.perf_counter() - begun - engine.core.loop.totals["compile_seconds"]
        seconds.append(spent)
    return seconds[1] / seconds[0]


def measure_stretch(model: Model) -> tuple[float, int]:
    """Return the stretch of the time between tokens while a long prompt is read, and the pages that are leaked."""
    rng, cfg = np.random.default_rng(2), model.cfg
    capacity = min(LONG + 1024, cfg.max_position_embeddings)
    length, most = min(LONG, capacity - 1), capacity - 16
    usual: list[float] = []
    stretched: list[float] = []
    with make_engine(model, rows=RUNNING + 1, capacity=capacity) as engine:
        for _ in range(2):
            for seconds, prompt in ((usual, None), (stretched, draw(rng, cfg, length))):
                seconds.clear()
                prompts = [draw(rng, cfg, 8) for _ in range(RUNNING)]
                running = [engine.submit(one, max_new_tokens=most, min_new_tokens=most) for one in prompts]
                for stream in running:
                    next(stream)
                late = None if prompt is None else engine.submit(prompt, max_new_tokens=1)
                while len(seconds) < 64 if late is None else engine.core.loop.scheduler.reading or not seconds:
                    begun, before = time.perf_counter(), engine.core.loop.totals["compile_seconds"]
                    engine.core.wait(lambda: False, steps=1)
                    compiled = engine.core.loop.totals["compile_seconds"] - before
                    seconds.append(time.perf_counter() - begun - compiled)
                for stream in [*running, *([late] if late else [])]:
                    stream.close()
            gc.freeze()  # the collector would look through all that JAX has traced, for 0.2 to 1 s at a time
        stats = engine.stats()
        known = sum(pool.known for pool in engine.core.loop.scheduler.pools)
        leaked = int(stats["pages_of_rows"] + stats["pages_used"] - known)
    gc.unfreeze()
    return statistics.quantiles(stretched, n=100)[98] / statistics.median(usual), leaked


def measure_engine(cfg: Config, requests: int, rows: int) -> dict[str, Any]:
    """Return all figures."""
    model = make_model(cfg)
    figures: dict[str, Any] = measure_ragged(model, requests, rows)
    figures["prefix_speedup"] = measure_prefixes(model, rows)
    figures["stretch_p99"], figures["pages_leaked"] = measure_stretch(model)
    return figures


def run(arguments: argparse.Namespace) -> None:
    """Print the figures as a table or as one JSON object."""
    from .. import configs

    cfg = Config.from_json(arguments.config or configs.path("deepseek_v32"))
    cfg = cfg if arguments.config else dataclasses.replace(cfg, **SIZES)
    figures = measure_engine(cfg, arguments.requests, arguments.rows)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(EXPLANATION.format(requests=arguments.requests, rows=arguments.rows))
    for name, value in figures.items():
        print(f"{name:22}{value:10.2f}")
