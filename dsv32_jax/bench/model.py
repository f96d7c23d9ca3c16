"""`dsv32 bench model`: decode and prefill with random NVFP4 weights at true dimensions, on one device or a mesh.

Each device makes its own weights: there is no file and no copy on the host. Caches hold synthetic values. All contexts
share one capacity, so a batch size takes one program.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import host_split
from ..config import Config
from ..errors import UsageError, listing
from ..generation.prefill_decode import new_state
from ..generation.programs import WHOLE
from ..generation.request import bucket, chunk_size
from ..generation.weight_shapes import sum_step_bytes
from ..layout import leaves
from ..model.cache import dtype_of
from ..model.model import Model
from ..parallel import sharding
from ..system.compilation import count_compilations, require_device
from ..system.host import get_peak_memory
from .decode_step import DTYPE, DecodeStep, count_weight_bytes, fill_cache, make_model, require_memory
from .measure import Row, format_headings, format_line, measure_median
from .profile import profile_scopes
from .roofline import count_all_reduces, measure_all_reduce, measure_host_speed, measure_move_speed

EXPLANATION = """\
step: ms of a decode step of all rows, median; cpu: the processor time in it, all cores together; tok/s: tokens a second
of all rows together. experts: the share that the rows of a device choose together in a layer, for the last tokens after
a short context. weights: GB a device reads in a step, these experts and all the rest. GB/s: the two together, and as a
share of what the device moves a second at best in this run: a plain read by all cores of a CPU, elsewhere a copy, read
and written. host GB: read of experts in host memory, and its share of a plain read by all cores. floor: ms that reading
these weights at these speeds and the step's all-reduces take. ratio: step / floor.
Below each row: ms of a step by part, from a profile, as a device is busy with it; on a GPU of the same step without
CUDA graphs, inside which a profile sees nothing."""

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
STEPS = {"cpu": 8, "gpu": 64}
"""Decode steps of a call: about as long as `generate` stays on the device."""

SHORT = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The model, its mesh, batch sizes, contexts, dtype of caches, decode steps a call, and weights in host memory."""

    cfg: Config
    mesh: Mesh | None
    batches: Sequence[int]
    contexts: Sequence[int]
    cache_dtype: np.dtype
    steps: int
    host: frozenset[str]

    @property
    def capacity(self) -> int:
        """Slots of every row."""
        return bucket(max(self.contexts) + max(self.steps, chunk_size(max(self.batches))))


def make_plan(
    config: str | None,
    layers: int | None,
    mesh: str | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    cache_dtype: str,
    steps: int | None,
    experts: str = "device",
) -> Plan:
    """Check the options. Raises UsageError, ConfigError, and CapacityError if weights and caches do not fit."""
    from .. import configs

    cfg = Config.from_json(config or configs.path("deepseek_v32"))
    if layers is not None:
        dense = min(cfg.first_k_dense_replace, max(layers - 1, 0))
        cfg = dataclasses.replace(cfg, num_hidden_layers=layers, first_k_dense_replace=dense)
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    require_device()
    steps = STEPS[jax.default_backend()] if steps is None else steps
    if small := [number for number in (*batches, *contexts, steps) if number < 1]:
        raise UsageError(f"batches, contexts and steps are 1 or more, not {listing(small)}; nothing was made")
    devices = None if mesh is None else sharding.mesh(mesh)
    sizes, table = count_weight_bytes(cfg, devices), {leaf.path: leaf for leaf in leaves(cfg)}
    host = frozenset(host_split.choose(cfg, table, sizes, experts))
    plan = Plan(cfg, devices, batches, contexts, dtype_of(cache_dtype, None), steps, host)
    held = sum(size for path, size in sizes.items() if path not in host)
    require_memory(cfg, devices, batches, plan.capacity, plan.cache_dtype, held)
    return plan


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
    """Yield a row about the weights, one for each batch and context, and one for prefill behind each context."""
    start = time.perf_counter()
    model = make_model(plan.cfg, plan.mesh, plan.host)
    made = {"kind": "made", "seconds": time.perf_counter() - start, "memory": _get_device_peak(plan.mesh)}
    copied, reduced = measure_move_speed(plan.mesh), measure_all_reduce(plan.cfg, plan.mesh)
    host_speed = measure_host_speed() if plan.host else 0.0
    yield {**made, "copied": copied, "all_reduce": reduced, "host_read": host_speed}
    table = {leaf.path: leaf for leaf in leaves(plan.cfg)}
    weights = {path: size for path, size in count_weight_bytes(plan.cfg, plan.mesh).items() if path not in plan.host}
    in_host = {path: size for path, size in count_weight_bytes(plan.cfg, None).items() if path in plan.host}
    for batch in plan.batches:
        program = profiled = None
        for context in plan.contexts:
            cache = fill_cache(plan.cfg, plan.capacity, plan.cache_dtype, batch, context, plan.mesh)
            with count_compilations() as compiled:
                step = DecodeStep(model, cache, plan.steps, program)
            program = step.program
            times = measure_median(lambda step=step: jax.block_until_ready(step.run()), seconds)
            each = times.wall / plan.steps
            peak = _get_device_peak(plan.mesh)
            share = measure_expert_share(model, step.state.token_B)
            read, host_read = (sum_step_bytes(table, some, share) for some in (weights, in_host))
            host_floor = host_read / host_speed if host_read else 0.0
            step.program = profiled = profiled or step.compile_for_profile()
            parts = profile_scopes(profiled, step.run)
            yield {
                "kind": "decode",
                "batch": batch,
                "context": context,
                "compile": compiled.seconds,
                "step": each,
                "cpu": times.cpu / plan.steps,
                "experts": share,
                "read": read,
                "share": read / each / copied,
                "host_read": host_read,
                "host_share": host_floor / each,
                "floor": read / copied + host_floor + count_all_reduces(program.as_text()) * reduced,
                "memory": peak,
                "parts": {name: spent / plan.steps for name, spent in parts.items()},
            }
            del step, cache
    yield from _measure_prefill(plan, model, seconds)


def _measure_prefill(plan: Plan, model: Model, seconds: float) -> Iterator[Row]:
    """Yield the seconds of one row's chunk behind each context."""
    cfg, count, capacity = plan.cfg, np.full(1, chunk_size(), np.int32), bucket(max(plan.contexts) + chunk_size())
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, chunk_size()), np.int32)
    row = np.zeros(1, np.int32)
    for length in plan.contexts:
        cache = fill_cache(cfg, capacity, plan.cache_dtype, 1, length, plan.mesh)
        state, lengths = new_state(model, (cache, None), 0), np.asarray(cache.length_B)

        def run(lengths=lengths) -> Any:
            nonlocal state
            cache = dataclasses.replace(state.cache, length_B=sharding.shard_rows(plan.mesh, jnp.asarray(lengths)))
            state = WHOLE.prefill(model, dataclasses.replace(state, cache=cache), tokens, tokens, count, row)
            return jax.block_until_ready(state.hidden_BuD)

        yield {"kind": "read", "context": length, "step": measure_median(run, seconds).wall}


def _get_device_peak(mesh: Mesh | None) -> int:
    """Return the most bytes the first device has held; on a CPU, the process."""
    stats = (jax.local_devices()[0] if mesh is None else mesh.local_devices[0]).memory_stats()
    return stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else get_peak_memory()


def run(arguments: argparse.Namespace) -> None:
    """Print the rows as they come, as lines or as JSON."""
    sizes = arguments.batch or BATCHES, arguments.context or CONTEXTS
    where = arguments.config, arguments.layers, arguments.mesh
    plan = make_plan(*where, *sizes, arguments.cache_dtype, arguments.steps, arguments.experts)
    if not arguments.json:
        print(EXPLANATION, flush=True)
    for row in measure_model(plan):
        print(json.dumps(row) if arguments.json else format_row(row), flush=True)


def format_row(row: Row) -> str:
    """Return the line of a row."""
    if row["kind"] == "made":
        reduced = f", an all-reduce takes {row['all_reduce'] * 1e6:.0f} us" if row["all_reduce"] else ""
        reduced += f", the host reads {row['host_read'] / 1e9:.0f} GB/s" if row["host_read"] else ""
        return (
            f"weights made in {row['seconds']:.1f} s, {row['memory'] / 1e9:.2f} GB held; a device moves "
            f"{row['copied'] / 1e9:.0f} GB/s{reduced}\n{format_headings(COLUMNS)}"
        )
    if row["kind"] == "read":
        speed = f"{chunk_size() / row['step']:.0f} tokens/s, {row['step'] * 1e3:.0f} ms"
        return f"prefill of {chunk_size()} tokens after {row['context']}: {speed}"
    parts = sorted(row["parts"].items(), key=lambda part: -part[1])
    return f"{format_line(COLUMNS, row)}\n       {', '.join(f'{name} {spent * 1e3:.2f}' for name, spent in parts)}"
