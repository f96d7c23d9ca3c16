"""The figures of the shipped checkpoint, by the library's own forward pass in bfloat16.

    PYTHONPATH=. python tests/demo_training/measure.py

The held-out files, one after the other, are read in stretches of 1024 tokens that know nothing of each other.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax.chat import Tokenizer
from dsv32_jax.model.cache import empty_layer
from dsv32_jax.model.model import Model
from tests.findings import shares_kept

FOLDER = Path(__file__).parents[2] / "dsv32_jax" / "demo_checkpoint"
LENGTH = 1024
VARIANTS = (
    ("FP8, as shipped", {}),
    ("NVFP4, to nearest", {"to": "nvfp4"}),
    ("NVFP4, four-over-six", {"to": "nvfp4", "scales": "four-over-six"}),
    ("NVFP4, searched scales", {"to": "nvfp4", "scales": "mse"}),
    ("NVFP4 everywhere, searched scales", {"to": "nvfp4", "scales": "mse", "policy": "full"}),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        convert(FOLDER, Path(scratch, "model"))
        model = ds.load(Path(scratch, "model"))
        tokens = heldout(Tokenizer.load(FOLDER, model.cfg))
        stretches = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, 1, LENGTH)
        share = np.bincount(tokens, minlength=model.cfg.vocab_size) / len(tokens)
        print(f"{stretches.size} tokens; perplexity of unigrams {np.exp(-np.sum(share * np.log(share + 1e-30))):.0f}")
        print(f"dense attention: perplexity {perplexity(dense(Path(scratch)), stretches):.3f}", flush=True)
        for i, (name, options) in enumerate(VARIANTS):
            convert(FOLDER, Path(scratch, str(i)), **options)
            print(f"{name}: perplexity {perplexity(ds.load(Path(scratch, str(i))), stretches):.3f}", flush=True)
    look_inside(model, stretches)


def heldout(tokenizer: Tokenizer) -> np.ndarray:
    """The token ids of the held-out files, each from its bos to its eos."""
    files = re.split("^##### .*\n", (FOLDER / "heldout.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return np.array([i for text in files for i in (0, *tokenizer.encode(text.removesuffix("\n")), 1)], np.int32)


def dense(scratch: Path) -> Model:
    """The same weights with an index_topk that no stretch exceeds."""
    copy = scratch / "hf"
    shutil.copytree(FOLDER, copy)
    config = json.loads((FOLDER / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "index_topk": LENGTH}))
    convert(copy, scratch / "dense")
    return ds.load(scratch / "dense")


def perplexity(model: Model, stretches: np.ndarray) -> float:
    losses = []
    for tokens_BT in stretches:
        logprob_BTV = jax.nn.log_softmax(ds.forward(model, tokens_BT).logits[:, :-1])
        losses.append(-jnp.take_along_axis(logprob_BTV, tokens_BT[:, 1:, None], axis=-1).mean())
    return float(jnp.exp(jnp.stack(losses).mean()))


def look_inside(model: Model, stretches: np.ndarray) -> None:
    """MTP's loss and acceptance, the experts' load, and the attention mass of the selected tokens."""
    assert model.mtp is not None
    positions = jnp.arange(LENGTH - 1)[None]
    agreed, draft_losses, kept, load = [], [], [], []
    for tokens_BT in stretches:
        out = ds.forward(model, tokens_BT)
        cache = empty_layer(model.cfg, 1, LENGTH, model.dtype)
        z_BTD, _ = model.mtp(out.hidden[:, :-1], jnp.asarray(tokens_BT[:, 1:]), cache, positions)
        draft_BTV = model.mtp.logits(z_BTD)
        agreed.append((draft_BTV.argmax(-1) == out.logits[:, 1:].argmax(-1)).mean())
        logprob_BTV = jax.nn.log_softmax(draft_BTV[:, :-1])
        draft_losses.append(-jnp.take_along_axis(logprob_BTV, tokens_BT[:, 2:, None], axis=-1).mean())
        kept.append(shares_kept(model, tokens_BT[0].tolist()))
        routings = [seen.routing for seen in out.seen if seen.routing is not None]
        load.append([np.bincount(np.ravel(r.expert_BTX), minlength=model.cfg.n_routed_experts) for r in routings])
    print(f"MTP: loss {np.mean(draft_losses):.3f}, greedy draft agrees with the model {100 * np.mean(agreed):.1f} %")
    load = np.sum(load, axis=0)
    print("experts' load by layer: max / mean", (load.max(-1) / load.mean(-1)).round(2), end=", ")
    print("min / mean", (load.min(-1) / load.mean(-1)).round(2))
    shares = np.mean(kept, axis=0).T
    for name, share in zip(("the selected 128", "the best 128", "the last 128"), shares, strict=True):
        print(f"attention mass from position 512 on, {name}: by layer {share.round(3)}, mean {share.mean():.3f}")


if __name__ == "__main__":
    main()
