"""`dsv32 bench model`: decoding and reading with random NVFP4 weights at true dimensions, on one device or a mesh.

The weights are made where they belong: there is no file and no copy on the host. Caches hold synthetic values. One
capacity serves all contexts, so a batch takes one program.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..checkpoint.random_weights import random_leaf, storage
from ..config import Config
from ..errors import CapacityError, UsageError, listing
from ..generation import memory
from ..generation.batch import WHOLE
from ..generation.prefill_decode import Context
from ..generation.request import CHUNK, bucket
from ..layout import leaves
from ..model.cache import dtype_of
from ..model.model import Model
from ..parallel import sharding
from ..system.compilation import count_compilations, require_device
from . import scopes
from .limits import all_reduce_latency, all_reduces, copy_speed
from .measure import Row, medians, peak_bytes
from .parts import DTYPE, Step, filled, random_model

EXPLANATION = """\
step: ms of one decode step of all rows, median; tok/s: tokens a second of all rows together. experts: the share that
a device's rows choose together in a layer, for the last tokens behind a short context. weights: GB a device reads in a
step, these experts and all the rest. GB/s: the two together, and as a share of what the device copies a second in this
run (bytes read and written). floor: ms that reading these weights at that speed and the step's all-reduces take. Below
each row: ms of a step by part, from a profile, as a device is busy with it; on a GPU of the same step without CUDA
graphs, inside which a profile sees nothing."""

HEADINGS = "batch  context   step ms     tok/s  experts  weights GB     GB/s  of copy  floor ms  memory GB  compile s"

BATCH, CONTEXT = (1, 8), (1024, 8192)
STEPS = {"cpu": 8, "gpu": 64}
"""That a call takes: about as long as `generate` stays on the device."""

SHORT = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: a model, where, how many rows, how long their contexts, and what caches are stored in."""

    cfg: Config
    mesh: Mesh | None
    batches: Sequence[int]
    contexts: Sequence[int]
    cache_dtype: np.dtype
    steps: int

    @property
    def capacity(self) -> int:
        """Slots of every row."""
        return bucket(max(self.contexts) + max(self.steps, CHUNK))


def plan(
    config: str | None,
    layers: int | None,
    mesh: str | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    cache_dtype: str,
    steps: int | None,
) -> Plan:
    """Check what is asked for. Raises UsageError, ConfigError, CapacityError."""
    from .. import configs

    cfg = Config.from_json(config or configs.path("deepseek_v32"))
    if layers is not None:
        dense = min(cfg.first_k_dense_replace, max(layers - 1, 0))
        cfg = dataclasses.replace(cfg, num_hidden_layers=layers, first_k_dense_replace=dense)
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    require_device()
    where = None if mesh is None else sharding.mesh(mesh)
    asked = Plan(
        cfg,
        where,
        batches,
        contexts,
        dtype_of(cache_dtype, None),
        STEPS[jax.default_backend()] if steps is None else steps,
    )
    if small := [number for number in (*batches, *contexts, asked.steps) if number < 1]:
        raise UsageError(f"batches, contexts and steps are 1 or more, not {listing(map(str, small))}; nothing was made")
    if where is not None:
        sharding.check(where, [(leaf, leaf.shape) for leaf in leaves(cfg)])
    weights = sum(weight_bytes(cfg, where).values())
    free = memory.get_free_memory(1 if where is None else where.size)
    if weights > free:
        raise CapacityError(
            f"{cfg.num_hidden_layers} layers take {weights / 1e9:.1f} GB of weights on each device, but "
            f"{free / 1e9:.1f} GB are free; nothing was made. Take fewer --layers or more devices"
        )
    return asked


def weight_bytes(cfg: Config, mesh: Mesh | None) -> dict[str, int]:
    """Bytes of every leaf on each device, by its path."""
    found = {}
    for leaf in leaves(cfg):
        made = jax.eval_shape(partial(random_leaf, leaf, storage(leaf, DTYPE), 0))
        parts = jax.tree.leaves(made)
        shapes = [part.shape for part in parts]
        if mesh is not None:
            shapes = [sharding.of_leaf(mesh, leaf, shape).shard_shape(shape) for shape in shapes]
        found[leaf.path] = sum(
            math.prod(shape) * part.dtype.itemsize for shape, part in zip(shapes, parts, strict=True)
        )
    return found


def step_bytes(cfg: Config, weights: dict[str, int], touched: float) -> float:
    """Bytes of weights that a step reads on a device, if it reads this share of the experts."""
    read = [leaf for leaf in leaves(cfg) if leaf.path != "embed_VD"]
    return sum(weights[leaf.path] * (touched if leaf.stacked else 1) for leaf in read)


def touched(model: Model, tokens: jax.Array) -> float:
    """The share of the experts that the rows of a device choose together for these tokens, one each behind a short
    context: the mean over layers and devices."""
    cache = filled(model.cfg, SHORT, DTYPE, len(tokens), None, model.mesh)
    groups = sharding.groups(model.mesh, len(tokens))
    _, _, seen = model.observe(tokens[:, None], cache, jnp.ones(len(tokens), jnp.int32))
    chosen = [np.asarray(layer.routing.expert_BTX) for layer in seen if layer.routing is not None]
    counts = [len(np.unique(rows)) for experts in chosen for rows in np.split(experts, groups)]
    return float(np.mean(counts)) / model.cfg.n_routed_experts if counts else 0.0


def rows(asked: Plan, seconds: float = 2.0) -> Iterator[Row]:
    """A row for each batch and context as soon as it is measured, then one for reading a chunk of a prompt."""
    start = time.perf_counter()
    model = random_model(asked.cfg, asked.mesh)
    made = {"kind": "made", "seconds": time.perf_counter() - start, "memory": _held(asked.mesh)}
    copied, reduced = copy_speed(asked.mesh), all_reduce_latency(asked.cfg, asked.mesh)
    yield {**made, "copied": copied, "all_reduce": reduced}
    weights = weight_bytes(asked.cfg, asked.mesh)
    for batch in asked.batches:
        program = in_pieces = None
        for context in asked.contexts:
            cache = filled(asked.cfg, asked.capacity, asked.cache_dtype, batch, context, asked.mesh)
            with count_compilations() as compiled:
                step = Step(model, cache, steps=asked.steps, program=program)
            program, run = step.program, step.run
            each = medians(lambda run=run: jax.block_until_ready(run()), seconds).wall / asked.steps
            held = _held(asked.mesh)
            chosen = touched(model, step.held.token_B)
            read = step_bytes(asked.cfg, weights, chosen)
            step.program = in_pieces = in_pieces or step.in_pieces()
            parts = scopes.spent(in_pieces, run, 1)
            yield {
                "kind": "decode",
                "batch": batch,
                "context": context,
                "compile": compiled.seconds,
                "step": each,
                "experts": chosen,
                "read": read,
                "share": read / each / copied,
                "floor": read / copied + all_reduces(program.as_text()) * reduced,
                "memory": held,
                "parts": {name: spent / asked.steps for name, spent in parts.items()},
            }
            del step, run, cache
    yield from _reading(asked, model, seconds)


def _reading(asked: Plan, model: Model, seconds: float) -> Iterator[Row]:
    """Reading a chunk at the end of each context, one row."""
    cfg, count = asked.cfg, np.full(1, CHUNK, np.int32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, CHUNK), np.int32)
    for context in asked.contexts:
        cache = filled(cfg, asked.capacity, asked.cache_dtype, 1, context, asked.mesh)
        hidden = sharding.by_rows(asked.mesh, jnp.zeros((1, cfg.hidden_size), model.dtype))
        held, length = Context(cache, hidden, None), np.asarray(cache.length_B)

        def run(length=length) -> Any:
            nonlocal held
            cache = dataclasses.replace(held.cache, length_B=sharding.by_rows(asked.mesh, jnp.asarray(length)))
            held = WHOLE.read(model, dataclasses.replace(held, cache=cache), tokens, tokens, count)
            return jax.block_until_ready(held.h_BD)

        yield {"kind": "read", "context": context, "step": medians(run, seconds).wall}


def _held(mesh: Mesh | None) -> int:
    """The most bytes that the first device has held; on a CPU the process."""
    stats = (jax.local_devices()[0] if mesh is None else mesh.local_devices[0]).memory_stats()
    return stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else peak_bytes()


def print_model(asked: Plan, as_json: bool) -> None:
    """The rows as they come: lines for people, or JSON."""
    if not as_json:
        print(EXPLANATION, flush=True)
    for row in rows(asked):
        print(json.dumps(row) if as_json else _text(row), flush=True)


def _text(row: Row) -> str:
    if row["kind"] == "made":
        reduced = f", an all-reduce takes {row['all_reduce'] * 1e6:.0f} us" if row["all_reduce"] else ""
        return (
            f"weights made in {row['seconds']:.1f} s, {row['memory'] / 1e9:.2f} GB held; a device copies "
            f"{row['copied'] / 1e9:.0f} GB/s{reduced}\n{HEADINGS}"
        )
    if row["kind"] == "read":
        speed = f"{CHUNK / row['step']:.0f} tokens/s, {row['step'] * 1e3:.0f} ms"
        return f"reading {CHUNK} tokens behind {row['context']}: {speed}"
    compiled = f"{row['compile']:.1f}" if row["compile"] > 1 else ""
    parts = sorted(row["parts"].items(), key=lambda part: -part[1])
    return (
        f"{row['batch']:5}  {row['context']:7}  {row['step'] * 1e3:8.2f}  {row['batch'] / row['step']:8.1f}"
        f"  {row['experts']:7.1%}  {row['read'] / 1e9:10.3f}"
        f"  {row['read'] / row['step'] / 1e9:7.1f}  {row['share']:7.1%}"
        f"  {row['floor'] * 1e3:8.2f}  {row['memory'] / 1e9:9.2f}  {compiled:>9}\n"
        f"       {', '.join(f'{name} {spent * 1e3:.2f}' for name, spent in parts)}"
    )
