"""Measure what formats, caches, sparse attention and drafts cost and gain on the bundled model.

    python -m tests.findings          # about ten minutes on two cores; prints Markdown

Everything is measured on the bundled held-out text, as `dsv32 eval kl` reads it. Losses are paired: the
difference in nats a token between two models on the same tokens, with its standard error over windows.
"""

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax import chat
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.random_checkpoint import write
from dsv32_jax.checkpoint.reader import dtype_of
from dsv32_jax.evaluation.corpus import Corpus, build_corpus
from dsv32_jax.evaluation.divergence import HiddenStates, TokenDivergence, compare, compute_hidden_states, summarize
from dsv32_jax.evaluation.perplexities import Estimate, estimate_mean
from dsv32_jax.evaluation.variant import Variant

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"

CONVERSIONS = {
    "bf16": {"to": "bf16"},
    "fp8": {},
    **{
        f"nvfp4 {policy} {scales}": {"to": "nvfp4", "policy": policy, "scales": scales}
        for policy in ("default", "full")
        for scales in ("rtn", "four-over-six", "mse")
    },
    "nvfp4 nvidia mse": {"to": "nvfp4", "policy": "nvidia", "scales": "mse"},
    "nvfp4 experts-only mse": {"to": "nvfp4", "policy": "experts-only", "scales": "mse"},
}

VARIANTS = {
    **{name: name for name in CONVERSIONS},
    "bf16, in float32": "bf16:float32",
    "bf16, FP8 cache": "bf16:fp8-cache",
    "nvfp4 default mse, FP8 cache": "nvfp4 default mse:fp8-cache",
    "dense attention": "dense",
}

PAIRS = [
    (f"nvfp4 {policy} rtn", f"nvfp4 {policy} {scales}")
    for policy in ("default", "full")
    for scales in ("four-over-six", "mse")
] + [("nvfp4 full mse", "nvfp4 default mse"), ("nvfp4 default mse", "nvfp4 experts-only mse")]

PROMPT, NEW, ROWS = 128, 128, 16
"""Drafts are measured on greedy continuations (NEW tokens) of ROWS prompts of PROMPT tokens from all over the text."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, options in CONVERSIONS.items():
            convert(SOURCE, scratch / name, **options)
        dense(scratch)
        model = ds.load(scratch / "bf16")
        corpus = build_corpus(model.cfg, chat.Tokenizer.load(scratch / "bf16", model.cfg), None)
        states = compute_hidden_states(Variant(scratch / "bf16"), corpus)
        print_formats(scratch, states)
        for line in itertools.chain(
            unigrams_and_noise(scratch, corpus), drafts(scratch, corpus), masses(model, corpus)
        ):
            print(line, flush=True)


def print_formats(scratch: Path, states: HiddenStates) -> None:
    """One row for each variant, then the pairs."""
    print("| | MB | perplexity | KL to BF16 | same top token | loss against BF16 |\n|---|---|---|---|---|---|")
    found: dict[str, list[TokenDivergence]] = {}
    for name, text in VARIANTS.items():
        found[name] = compare(states, Variant.of(str(scratch / text)))
        one = summarize(states.corpus, found[name])
        print(
            f"| {name} | {megabytes(scratch / text.partition(':')[0]):.1f} | {text_of(one.perplexity_b, '.3f')} | "
            f"{text_of(one.kl, '.4f')} | {100 * one.same_top.mean:.2f} % | {text_of(one.loss, '+.4f')} |",
            flush=True,
        )
    print("\n| paired | nats a token | in standard errors | KL |\n|---|---|---|---|")
    for a, b in PAIRS:
        loss = estimate_mean([x.logprob_b - y.logprob_b for x, y in zip(found[a], found[b], strict=True)])
        kl = estimate_mean([y.kl - x.kl for x, y in zip(found[a], found[b], strict=True)])
        errors = loss.mean / (loss.standard_error or 1)
        print(f"| {b} - {a} | {text_of(loss, '+.4f')} | {errors:+.1f} | {text_of(kl, '+.4f')} |")
    print()


def text_of(value: Estimate, form: str) -> str:
    return f"{value.mean:{form}} ± {value.standard_error:{form.lstrip('+')}}"


def megabytes(folder: Path) -> float:
    """Return the size of the stored arrays, each counted once."""
    arrays = [array for leaf in Manifest.read(folder).leaves.values() for array in leaf.arrays.values()]
    return sum(np.prod(array.shape) * dtype_of(array.dtype).itemsize for array in arrays) / 1e6


def dense(scratch: Path) -> None:
    """Convert the same weights with an index_topk that no window exceeds."""
    shutil.copytree(SOURCE, scratch / "hf")
    config = json.loads((SOURCE / "config.json").read_text())
    (scratch / "hf" / "config.json").write_text(json.dumps({**config, "index_topk": 1024}))
    convert(scratch / "hf", scratch / "dense")


def unigrams_and_noise(scratch: Path, corpus: Corpus) -> Iterator[str]:
    """Baselines: token frequencies alone, and the architecture with random weights."""
    tokens = np.concatenate([window.scored for window in corpus.windows])
    share = np.bincount(tokens) / len(tokens)
    share = share[share > 0]
    yield f"perplexity of the text's own unigrams: {np.exp(-np.sum(share * np.log(share))):.0f}"
    cfg = ds.Config.from_json(SOURCE / "config.json")
    write(scratch / "noise-hf", cfg)
    convert(scratch / "noise-hf", scratch / "noise")
    untrained = ds.evaluation.perplexity(scratch / "noise", corpus.documents, limit=8)
    yield f"perplexity of the architecture with random weights: {untrained.perplexity.mean:.0f}"


def drafts(scratch: Path, corpus: Corpus) -> Iterator[str]:
    """Greedy continuations with MTP drafts: acceptance, and tokens per step."""
    starts = corpus.windows[:: len(corpus.windows) // ROWS][:ROWS]
    prompts = [window.tokens[:PROMPT] for window in starts]
    yield "\n| drafts a step | kept, BF16 | tokens a step | kept, NVFP4 mse | tokens a step |\n|---|---|---|---|---|"
    models = [ds.load(scratch / name) for name in ("bf16", "nvfp4 full mse")]
    for count in (1, 2, 3):
        cells = []
        for model in models:
            stats = ds.generate(model, prompts, max_new_tokens=NEW, draft=count).stats
            per_step = stats.new_tokens / stats.steps
            cells += [f"{100 * stats.acceptance:.1f} %", f"{per_step:.2f}"]
        yield f"| {count} | {' | '.join(cells)} |"


def masses(model: ds.Model, corpus: Corpus) -> Iterator[str]:
    """Shares of dense attention's weight on 128 positions, from position 512 on."""
    whole = [window.tokens for window in corpus.windows if len(window.tokens) == corpus.context][::2]
    shares = [shares_kept(model, tokens) for tokens in whole]
    layers = [f"layer {i}" for i in range(len(model.layers))]
    yield f"\n| attention mass ({len(whole)} windows) | {' | '.join(layers)} | mean |\n|---|{'---|' * len(layers)}---|"
    names = ("selected by the indexer", "the best 128", "the last 128")
    for name, share in zip(names, np.mean(shares, axis=0).T, strict=True):
        yield f"| {name} | {' | '.join(f'{100 * x:.1f} %' for x in (*share, share.mean()))} |"


def shares_kept(model: ds.Model, tokens) -> np.ndarray:
    """Return the selected, best and recent share of each layer [layers, 3], mean over positions from 512 on."""
    trace = ds.inspect.trace(model, [tokens], {"mass"})
    shares = (trace[name] for name in ("mass_selected", "mass_best", "mass_recent"))
    return np.stack([share[:, 0, 512:].mean(axis=-1) for share in shares], axis=-1)


if __name__ == "__main__":
    sys.exit(main())
