"""`dsv32 bench model`: decode and prefill with random NVFP4 weights at true dimensions, on one device or a mesh.

Each device makes its own weights: there is no file and no copy. Caches hold synthetic values. All contexts
share one capacity, so a batch size takes one program.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..checkpoint.weight_shapes import sum_step_bytes
from ..errors import pluralize
from ..generation.prefill_decode import new_state
from ..generation.programs import DEEP, WHOLE, chunk_size
from ..layout import leaves
from ..model.model import Model
from ..parallel import sharding
from ..system.compilation import count_compilations
from ..system.host import get_peak_memory
from ..system.progress import parse_size
from .decode_step import DTYPE, DecodeStep, count_weight_bytes, fill_cache, make_model
from .measure import Row, format_line, measure_median
from .plan import Plan, make_plan, require_room
from .profile import profile_scopes
from .roofline import count_all_reduces, measure_all_reduce, measure_host_call, measure_host_speed, measure_move_speed

EXPLANATION = """\
step: ms of a decode step of all rows, median; cpu: the processor time in it, all cores together; tok/s: tokens a second
of all rows together. experts: the share that the rows of a device choose together in a layer, for the last tokens after
a short context. weights: GB a device reads in a step, these experts and all the rest. GB/s: the two together, and as a
share of what the device moves a second at best in this run: a plain read by all cores of a CPU, elsewhere a copy, read
and written. host GB: read of experts in host memory, and its share of a plain read by all cores. floor: ms that reading
these weights at these speeds and the step's all-reduces take. ratio: step / floor. A call of the host: us that a layer
with experts there takes for a row that chose none.
Below the first row of a batch size, of a model that is not deep: ms of a step by part, from a profile, as a device is
busy with it; on a GPU of the same step without CUDA graphs, inside which a profile sees nothing."""

COLUMNS = (
    ("batch", 5, lambda row: str(row["batch"])),
    ("context", 7, lambda row: str(row["context"])),
    ("step ms", 8, lambda row: f"{row['step'] * 1e3:.2f}"),
    ("cpu ms", 8, lambda row: f"{row['cpu'] * 1e3:.1f}"),
    ("tok/s", 8, lambda row: f"{row['batch'] / row['step']:.1f}"),
    ("experts", 7, lambda row: f"{row['experts']:.1%}"),
    ("weights GB", 10, lambda row: f"{row['read'] / 1e9:.3f}"),
    ("GB/s", 7, lambda row: f"{row['read'] / row['step'] / 1e9:.1f}"),
    ("of best", 7, lambda row: f"{row['share']:.1%}"),
    ("host GB", 7, lambda row: f"{row['host_read'] / 1e9:.2f}" if row["host_read"] else ""),
    ("of best", 7, lambda row: f"{row['host_share']:.1%}" if row["host_read"] else ""),
    ("floor ms", 8, lambda row: f"{row['floor'] * 1e3:.2f}"),
    ("ratio", 6, lambda row: f"{row['step'] / row['floor']:.2f}"),
    ("memory GB", 9, lambda row: f"{row['memory'] / 1e9:.2f}"),
    ("compile s", 9, lambda row: f"{row['compile']:.1f}" if row["compile"] > 1 else ""),
)

BATCHES, CONTEXTS = (1, 8), (1024, 8192)
SHORT = 128


def measure_expert_share(model: Model, tokens: jax.Array) -> float:
    """Return the share of experts that the rows of a device choose together for these tokens after a short context:
    the mean over layers and devices."""
    cache = fill_cache(model.cfg, SHORT, DTYPE, len(tokens), None, model.mesh)
    groups = sharding.count_row_groups(model.mesh, len(tokens))
    _, _, seen = model.observe(tokens[:, None], cache, jnp.ones(len(tokens), jnp.int32))
    chosen = [np.asarray(layer.routing.expert_BTX) for layer in seen if layer.routing is not None]
    counts = [len(np.unique(rows)) for experts in chosen for rows in np.split(experts, groups)]
    return float(np.mean(counts)) / model.cfg.n_routed_experts if counts else 0.0


def measure_model(plan: Plan, seconds: float = 2.0) -> Iterator[Row]:
    """Yield a row about the weights, one for each batch and context with one about its parts, and one for reading a
    chunk at the beginning and behind each context; each as soon as it is known."""
    start = time.perf_counter()
    model = make_model(plan.cfg, plan.mesh, plan.host)
    made = {"kind": "made", "seconds": time.perf_counter() - start, "memory": _get_device_peak(plan.mesh)}
    speeds = _measure_speeds(plan, model)
    yield {**made, "host_memory": get_peak_memory(), **speeds}
    for batch in plan.batches:
        program = None
        for context in plan.contexts:
            cache = fill_cache(plan.cfg, plan.capacity, plan.cache_dtype, batch, context, plan.mesh)
            with count_compilations() as compiled:
                step = DecodeStep(model, cache, plan.steps, program)
            program, about = step.program, {"batch": batch, "context": context, "compile": compiled.seconds}
            times = measure_median(lambda step=step: jax.block_until_ready(step.run()), seconds)
            about |= {"step": times.wall / plan.steps, "cpu": times.cpu / plan.steps}
            about["memory"] = _get_device_peak(plan.mesh)
            reduced = count_all_reduces(program.as_text()) * speeds["all_reduce"]
            yield {"kind": "decode", **about, **_bound_step(plan, model, step, about["step"], speeds, reduced)}
            if context == plan.contexts[0] and plan.cfg.num_hidden_layers < DEEP:
                step.program = step.compile_for_profile()
                spent = profile_scopes(step.program, step.run)
                yield {"kind": "parts", "parts": {name: time / plan.steps for name, time in spent.items()}}
            del step, cache
    yield from _measure_prefill(plan, model, seconds)


def _measure_speeds(plan: Plan, model: Model) -> dict[str, float]:
    """Return the bytes a second that a device moves and the host reads, and the seconds of an all-reduce and of a call
    of the host; 0 for what there is not."""
    host_speed, call = (measure_host_speed(), measure_host_call(model)) if plan.host else (0.0, 0.0)
    copied, reduced = measure_move_speed(plan.mesh), measure_all_reduce(plan.cfg, plan.mesh)
    return {"copied": copied, "all_reduce": reduced, "host_read": host_speed, "host_call": call}


def _bound_step(
    plan: Plan, model: Model, step: DecodeStep, taken: float, speeds: dict[str, float], reduced: float
) -> dict[str, float]:
    """Return what a step that took so many seconds must read, its least time, and shares of the best speeds."""
    table, share = {leaf.path: leaf for leaf in leaves(plan.cfg)}, measure_expert_share(model, step.state.token_B)
    weights = {path: size for path, size in count_weight_bytes(plan.cfg, plan.mesh).items() if path not in plan.host}
    in_host = {path: size for path, size in count_weight_bytes(plan.cfg, None).items() if path in plan.host}
    read, host_read = (sum_step_bytes(table, some, share) for some in (weights, in_host))
    host_floor = host_read / speeds["host_read"] if host_read else 0.0
    return {
        "experts": share,
        "read": read,
        "share": read / taken / speeds["copied"],
        "host_read": host_read,
        "host_share": host_floor / taken,
        "floor": read / speeds["copied"] + host_floor + reduced,
    }


def _measure_prefill(plan: Plan, model: Model, seconds: float) -> Iterator[Row]:
    """Yield the seconds of one row's chunk at the beginning and behind each context."""
    cfg, count = plan.cfg, np.full(1, chunk_size(), np.int32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, chunk_size()), np.int32)
    row = np.zeros(1, np.int32)
    for length in (0, *plan.contexts):
        cache = fill_cache(cfg, plan.read_capacity, plan.cache_dtype, 1, length, plan.mesh)
        state, lengths = new_state(model, (cache, None), 0), np.asarray(cache.length_B)
        del cache

        def run(lengths=lengths) -> Any:
            nonlocal state
            cache = dataclasses.replace(state.cache, length_B=sharding.shard_rows(plan.mesh, jnp.asarray(lengths)))
            state = WHOLE.prefill(model, dataclasses.replace(state, cache=cache), tokens, tokens, count, row)
            return jax.block_until_ready(state.hidden_BuD)

        with count_compilations() as compiled:
            times = measure_median(run, seconds)
        yield {"kind": "read", "context": length, "step": times.wall, "compile": compiled.seconds}


def _get_device_peak(mesh: Mesh | None) -> int:
    """Return the most bytes the first device has held; on a CPU, the process."""
    stats = (jax.local_devices()[0] if mesh is None else mesh.local_devices[0]).memory_stats()
    return stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else get_peak_memory()


def run(arguments: argparse.Namespace) -> None:
    """Print the rows as they come, as lines or as JSON."""
    sizes = arguments.batch or BATCHES, arguments.context or CONTEXTS
    where = arguments.config, arguments.layers, arguments.mesh
    plan = make_plan(*where, *sizes, arguments.cache_dtype, arguments.steps, arguments.experts)
    budget = require_room(plan, arguments.host_memory and parse_size(arguments.host_memory))
    if not arguments.json:
        print(EXPLANATION, flush=True)
    planned = {"kind": "plan", "host_layers": plan.host_layers, **budget._asdict()}
    for row in chain([planned], measure_model(plan)):
        print(json.dumps(row) if arguments.json else format_row(row), flush=True)


def format_row(row: Row) -> str:
    """Return the line of a row."""
    if row["kind"] == "plan":
        experts = f"experts of {pluralize(row['host_layers'], 'layer')} in host memory: {row['host']:,} bytes"
        on_host = f"; {experts} of {row['host_free']:,} free" if row["host"] else ""
        return (
            f"on each device: {row['weights']:,} bytes of weights and at most {row['caches']:,} of caches, of "
            f"{row['free']:,} free{on_host}"
        )
    if row["kind"] == "made":
        reduced = f", an all-reduce takes {row['all_reduce'] * 1e6:.0f} us" if row["all_reduce"] else ""
        if row["host_read"]:
            reduced += f", the host reads {row['host_read'] / 1e9:.0f} GB/s and a call of it takes "
            reduced += f"{row['host_call'] * 1e6:.0f} us; the process has taken {row['host_memory'] / 1e9:.2f} GB"
        return (
            f"weights made in {row['seconds']:.1f} s, {row['memory'] / 1e9:.2f} GB held; a device moves "
            f"{row['copied'] / 1e9:.0f} GB/s{reduced}\n{format_line(COLUMNS)}"
        )
    if row["kind"] == "read":
        speed = f"{chunk_size() / row['step']:.0f} tokens/s, {row['step'] * 1e3:.0f} ms"
        return f"prefill of {chunk_size()} tokens after {row['context']}: {speed}"
    if row["kind"] == "parts":
        parts = sorted(row["parts"].items(), key=lambda part: -part[1])
        return f"       {', '.join(f'{name} {spent * 1e3:.2f}' for name, spent in parts)}"
    return format_line(COLUMNS, row)
