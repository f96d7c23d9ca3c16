"""Trains the demo model (one GPU, minutes): see README.md in this folder.

    PYTHONPATH=. python tests/demo_training/train.py WORK OUT [--seconds N]

Reads WORK/train.npy and WORK/heldout.npy, writes OUT/weights-*.npy (float32, the leaves in the order of their paths)
and OUT/log.jsonl. With OUT's files of an earlier run in WORK/resume it goes on from there, with new moments.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from forward import Phase, model_of, run

from dsv32_jax import Config
from dsv32_jax.layout import COPIES, leaves

CONFIG = Path(__file__).parents[2] / "dsv32_jax" / "demo_checkpoint" / "config.json"

SCHEDULE = (
    (0.58, Phase(aligned=False, sparse=False), 32, 1024),
    (0.67, Phase(aligned=True, sparse=False), 32, 1024),
    (1.00, Phase(aligned=True, sparse=True), 16, 2048),
)
"""Until which fraction of the time: how attention works, sequences a step, tokens a sequence."""

UNITS, WARM_UP = 6000, 200
"""The learning rate's schedule in units of its own: a longer or shorter run needs no other program."""

PEAK_RATE, DRAFT_WEIGHT, BIAS_STEP = 2e-3, 0.3, 1e-3
FILES = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=550, help="time for all of it")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--batch", type=int, default=None, help="sequences a step, for trials")
    train(Config.from_json(parser.parse_args().config), parser.parse_args(), time.perf_counter())


def train(cfg: Config, args: argparse.Namespace, start: float) -> None:
    """Go through the schedule in the time there is: progress is time used, so that it always reaches its end."""
    args.out.mkdir(parents=True, exist_ok=True)
    data, heldout = (jnp.asarray(np.load(args.work / f"{name}.npy")) for name in ("train", "heldout"))
    begun, weights = 0.0, first_weights(cfg, jax.random.key(0))
    if (args.work / "resume").exists():
        begun, weights = restore(args.work / "resume", cfg)
    optimizer = make_optimizer(UNITS)
    state = optimizer.init(weights)

    def step(phase: Phase, batch: int, length: int, weights, state, number: int, progress: float):
        tokens = windows(data, jax.random.fold_in(jax.random.key(1), number), args.batch or batch, length + 2)
        state = optax.tree_utils.tree_set(state, count=jnp.int32(progress * UNITS))
        return update(cfg, optimizer, phase, weights, state, tokens)

    for _, *row in SCHEDULE:
        trial = step(*row, *step(*row, weights, state, 0, 0.0)[:2], 0, 0.0)
        print(f"compiled {row}: {float(evaluate(cfg, row[0], trial[0], heldout)):.4f}", flush=True)
    seconds = args.seconds - (time.perf_counter() - start)
    clock = start = time.perf_counter()
    progress, number, saved = begun, 0, begun
    while progress < 1:
        row = next(row for until, *row in SCHEDULE if progress < until)
        weights, state, seen = step(*row, weights, state, number, progress)
        number += 1
        if number % 10 == 0:
            seen = {name: round(float(value), 4) for name, value in seen.items()}
            progress = begun + (1 - begun) * (time.perf_counter() - start) / seconds
        if number % 50 == 0:
            record = {"step": number, "progress": round(progress, 4), "phase": list(row[0]), **seen}
            record["seconds"], clock = round((time.perf_counter() - clock) / 50, 4), time.perf_counter()
            if number % 200 == 0:
                record["heldout"] = round(float(evaluate(cfg, row[0], weights, heldout)), 4)
            with (args.out / "log.jsonl").open("a") as log:
                print(json.dumps(record), file=log)
            print(json.dumps(record), flush=True)
        if progress >= saved + 0.1:
            saved = progress
            save(args.out, weights, progress)
    save(args.out, weights, 1.0)
    print("held-out loss:", *(float(evaluate(cfg, row[1], weights, heldout)) for row in SCHEDULE))


def first_weights(cfg: Config, key: jax.Array) -> dict[str, jax.Array]:
    """float32 master weights: gains 1, biases 0, matrices that keep the scale of what they multiply (those that are
    added to the residual stream make it grow less), a small head."""
    weights = {}
    for leaf in leaves(cfg):
        if leaf.path in COPIES:
            continue
        name = leaf.path.rpartition(".")[2]
        if len(leaf.source_shape) == 1:
            weights[leaf.path] = jnp.full(leaf.shape, 0.0 if "bias" in name else 1.0)
            continue
        scale = {"embed_VD": 0.1, "head_VD": 0.02}.get(name, leaf.source_shape[-1] ** -0.5)
        if name in ("w_o_DHP", "w_down_DF", "w_down_EDM", "shared_down_DM"):
            scale *= (2 * cfg.num_hidden_layers) ** -0.5
        key, own = jax.random.split(key)
        weights[leaf.path] = scale * jax.random.normal(own, leaf.shape)
    return weights


def make_optimizer(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(WARM_UP, steps // 10), steps, PEAK_RATE / 50)
    matrices = functools.partial(jax.tree.map, lambda w: w.ndim > 1)
    adam = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


@functools.partial(jax.jit, static_argnums=(2, 3))
def windows(data: jax.Array, key: jax.Array, batch: int, length: int) -> jax.Array:
    """Random stretches of the training text."""
    start = jax.random.randint(key, (batch, 1), 0, data.size - length)
    return data[start + jnp.arange(length)].astype(jnp.int32)


def loss(weights: dict[str, jax.Array], cfg: Config, phase: Phase, tokens_BT: jax.Array):
    """Cross-entropy of the next token, MTP's of the one after it, and the indexers' divergence.

    The first two never reach an indexer, the last reaches nothing else: their sum is one loss for all weights.
    """
    seen = run(model_of(weights, cfg, jnp.bfloat16), tokens_BT[:, :-1], phase)
    main = optax.softmax_cross_entropy_with_integer_labels(seen.logits_BTV, tokens_BT[:, 1:-1]).mean()
    draft = optax.softmax_cross_entropy_with_integer_labels(seen.draft_BTV, tokens_BT[:, 2:]).mean()
    divergence = sum(seen.divergence) / len(seen.divergence)
    return main + DRAFT_WEIGHT * draft + sum(seen.divergence), (main, draft, divergence, seen.load)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def update(cfg: Config, optimizer, phase: Phase, weights, state, tokens_BT: jax.Array):
    """One step: AdamW, and the routing biases by the sign of what their experts lack (DeepSeek-V3, section 2.1.2)."""
    slopes, (main, draft, divergence, load) = jax.grad(loss, has_aux=True)(weights, cfg, phase, tokens_BT)
    change, state = optimizer.update(slopes, state, weights)
    weights = optax.apply_updates(weights, change)
    loads = dict(zip(bias_paths(cfg), (each for each in load if each is not None), strict=True))
    for path, load_E in loads.items():
        weights[path] += BIAS_STEP * jnp.sign(load_E.mean() - load_E)
    imbalance = jnp.stack([load_E.max() / load_E.mean() for load_E in loads.values()]).max()
    return weights, state, {"main": main, "draft": draft, "divergence": divergence, "imbalance": imbalance}


def bias_paths(cfg: Config) -> list[str]:
    """The routing biases, in the order of the layers."""
    return [leaf.path for leaf in leaves(cfg) if leaf.path.endswith("bias_E")]


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(cfg: Config, phase: Phase, weights, heldout: jax.Array) -> jax.Array:
    """The next token's loss over the held-out text in stretches of 1024."""
    length = 1024
    start = jnp.arange((heldout.size - 2) // length)[:, None] * length
    return loss(weights, cfg, phase, heldout[start + jnp.arange(length + 2)].astype(jnp.int32))[1][0]


def save(out: Path, weights: dict[str, jax.Array], progress: float) -> None:
    flat = np.concatenate([np.asarray(weights[path]).ravel() for path in sorted(weights)])
    for i, part in enumerate(np.array_split(flat, FILES)):
        np.save(out / f"weights-{i}.npy", part)
    (out / "progress.json").write_text(json.dumps(progress))


def restore(folder: Path, cfg: Config) -> tuple[float, dict[str, jax.Array]]:
    """What `save` wrote: the progress and the weights."""
    flat = np.concatenate([np.load(folder / f"weights-{i}.npy") for i in range(FILES)])
    shapes = {leaf.path: leaf.shape for leaf in leaves(cfg) if leaf.path not in COPIES}
    ends = np.cumsum([math.prod(shapes[path]) for path in sorted(shapes)])
    assert ends[-1] == flat.size, f"{folder} holds {flat.size} weights, the config has {ends[-1]}"
    parts = zip(sorted(shapes), np.split(flat, ends[:-1]), strict=True)
    weights = {path: jnp.asarray(part.reshape(shapes[path])) for path, part in parts}
    return json.loads((folder / "progress.json").read_text()), weights


if __name__ == "__main__":
    main()
