"""The cost of an edit in a decode step: `python -m tests.edit_cost`, three minutes on a machine that does nothing else.

It is counted from the compiled program of `generate` at true dimensions, and measured in rounds: a step of the model
twice, with experts off, and with a direction after every layer, in random order. A ratio is that of two times of one
round, so whatever slows the machine for longer cancels. The model against itself shows what the ratios resolve.
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import configs
from dsv32_jax.bench.decode_step import DTYPE, DecodeStep, fill_cache, make_model
from dsv32_jax.checkpoint.random_weights import storage
from dsv32_jax.checkpoint.weight_shapes import shape_weight
from dsv32_jax.config import Config
from dsv32_jax.inspect import edit
from dsv32_jax.layout import leaves
from dsv32_jax.model.model import Model, build

CONTEXT = 4096
COUNTED = ("flops", "bytes accessed")


class Ratio(NamedTuple):
    """The median of ratios, and the 95 % interval of the median (bootstrap)."""

    median: float
    low: float
    high: float


def true_dimensions(dense: int, moe: int) -> Config:
    """Return the real model's config with so many layers, and so few tokens that its layers are nearly all of a
    step."""
    cfg = Config.from_json(configs.path("deepseek_v32"))
    few = {"num_hidden_layers": dense + moe, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
    return dataclasses.replace(cfg, vocab_size=1024, **few)


def shape_model(cfg: Config) -> Model:
    """Return a model of shapes, with NVFP4 weights; only the arrays that `edit` reads or copies have values."""
    table = {leaf.path: leaf for leaf in leaves(cfg)}

    def make(path: str) -> Any:
        weight = shape_weight(table[path], storage(table[path], DTYPE))
        given = path == "norm_D" or path.endswith("bias_E")
        return jax.device_put(jnp.zeros(weight.shape, weight.dtype), jax.devices()[0]) if given else weight

    return build(cfg, DTYPE, make)


def make_edits(model: Model) -> dict[str, Model]:
    """Return the model with two experts off in every MoE layer, and with a direction after every layer."""
    layers, first = model.cfg.num_hidden_layers, model.cfg.first_k_dense_replace
    direction = np.full(model.cfg.hidden_size, 1e-3, np.float32)
    return {
        "experts off": edit(model, experts_off=[(i, expert) for i in range(first, layers) for expert in (3, 7)]),
        "direction": edit(model, add=dict.fromkeys(range(layers), direction)),
    }


def make_step(model: Model, program: Any = None) -> DecodeStep:
    """Return the decode step of one row behind CONTEXT tokens."""
    return DecodeStep(model, fill_cache(model.cfg, CONTEXT, DTYPE), program=program)


def count(program: Any) -> dict[str, float]:
    """Return the operations of a compiled step and the bytes it reads and writes, as XLA counts them; those within the
    C++ kernels it does not know."""
    found = program.cost_analysis()
    return {name: found[name] for name in COUNTED}


def measure(steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Run all steps in rounds of random order, for so many seconds but at least three rounds, and return the wall and
    the processor time of each [rounds, 2]."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names, order, end = list(steps), random.Random(0), time.perf_counter() + seconds
    for step in steps.values():
        jax.block_until_ready(step())
    while len(found[names[0]]) < 3 or time.perf_counter() < end:
        order.shuffle(names)
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(steps[name]())
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.array(times) for name, times in found.items()}


def estimate_ratio(after: np.ndarray, before: np.ndarray) -> Ratio:
    """Return the median ratio of the times of the same rounds."""
    ratio = after / before
    draws = np.random.default_rng(0).integers(0, len(ratio), (2000, len(ratio)))
    low, high = np.quantile(np.median(ratio[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratio)), float(low), float(high))


def main(seconds: float) -> None:
    """Print both tables."""
    model = shape_model(true_dimensions(1, 1))
    before = count(make_step(model).program)
    print("a dense and an MoE layer, counted: " + ", ".join(f"{before[name]:,.0f} {name}" for name in COUNTED))
    for name, edited in make_edits(model).items():
        after = count(make_step(edited).program)
        print(f"  {name:14} " + ", ".join(f"{after[key] / before[key] - 1:+.4%} {key}" for key in COUNTED))
    model = make_model(true_dimensions(0, 1))
    steps = {"unedited": make_step(model)}
    steps["unedited again"] = make_step(model, steps["unedited"].program)
    for name, edited in make_edits(model).items():
        steps[name] = make_step(edited, steps["unedited"].program if name == "experts off" else None)
    times = measure({name: step.run for name, step in steps.items()}, seconds)
    base = times.pop("unedited")
    wall, cpu = 1e3 * np.median(base, axis=0)
    print(f"an MoE layer, measured in {len(base)} rounds: {wall:.2f} ms a step, {cpu:.2f} ms of processors")
    for name, found in times.items():
        both = [estimate_ratio(found[:, i], base[:, i]) for i in range(2)]
        print(f"  {name:14} " + ", ".join(f"{one.median:.4f} [{one.low:.4f}, {one.high:.4f}]" for one in both))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="of measuring (default: 150)")
    main(parser.parse_args().seconds)
