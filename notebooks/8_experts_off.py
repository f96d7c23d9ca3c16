# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Experts off
#
# **Does the model lose its docstrings if the experts that docstrings use are switched off, and only these?** Published
# work does this to ten of R1's 14,848 experts; here ten of the small bundled model's 48, on held-out text.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
# There, ten experts are a thousandth of all rather than a fifth.
#
# *Fixed by rule:* ten experts, ranked on the first half of the rows and judged on the second; random draws and samples
# with the seeds 0 to 4. How syntax is judged was written before the first sample was seen. *Chosen by hand, perhaps
# after looking:* the three functions at the end.

# %%
import codeop
import re
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect
from dsv32_jax.evaluation.perplexities import estimate_mean, exponentiate

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")

OFF, ROWS, TOKENS = 10, 24, 128
kinds = {
    "docstrings": "\n\n".join(re.findall(r'"""(.*?)"""', text, re.S)),
    "code": re.sub(r'"""(.*?)"""', "", text, flags=re.S),
}
rows = {}
for kind, part in kinds.items():
    ids = tokenizer.encode(part)
    rows[kind] = [ids[start : start + TOKENS] for start in range(0, 2 * ROWS * TOKENS, TOKENS)]

# %% [markdown]
# ## Which experts do docstrings use?
#
# The share of tokens that select an expert, in docstrings and in code, from the first half of each text. Rows are the
# sample, so that the error counts that tokens of one row depend on each other. Experts that differ most are first.

# %%
found = inspect.contrast(model, rows["docstrings"][:ROWS], rows["code"][:ROWS])
found

# %% [markdown]
# ## Switched off
#
# The ten experts that docstrings use most in excess of code, and as a control ten experts at random, five times. The
# perplexity is that of the second half of each text, which the ranking has not seen. An expert that is off is never
# selected; a token takes the next best instead.

# %%
ranked = [(int(one["layer"]), int(one["expert"])) for one in found.experts if one["difference"] > 0][:OFF]
every = [(int(one["layer"]), int(one["expert"])) for one in found.experts]
draws = [np.random.default_rng(seed).permutation(len(every))[:OFF] for seed in range(5)]
edits = {"docstring experts off": [ranked], "ten at random off": [[every[i] for i in draw] for draw in draws]}


def losses(model, kind: str) -> list[np.ndarray]:
    """The loss of every token of a kind of text, a row each."""
    return [-np.array(row) for row in ds.score(model, rows[kind][ROWS:]).logprobs]


before = {kind: losses(model, kind) for kind in rows}
change = {name: {} for name in edits}
for name, choices in edits.items():
    for kind in rows:
        after = [losses(inspect.edit(model, experts_off=off), kind) for off in choices]
        mean = [np.mean(one, axis=0) for one in zip(*after, strict=True)]
        difference = estimate_mean([a - b for a, b in zip(mean, before[kind], strict=True)])
        change[name][kind] = difference.mean, difference.standard_error
        old, new = (exponentiate(estimate_mean(one)) for one in (before[kind], mean))
        print(
            f"{name}, {kind}: perplexity {old.mean:.1f} ± {old.standard_error:.1f} became {new.mean:.1f} ± "
            f"{new.standard_error:.1f}; loss {difference.mean:+.3f} ± {difference.standard_error:.3f} nats"
        )
inspect.plots.groups(change, "kind of text", "change of loss (nats a token)")

# %% [markdown]
# **Docstrings lose 3.2 times as much as code if their experts are off; if ten at random are, 1.4 times.** Bars are one
# standard error of the paired difference over rows, at random of the mean of the five draws. Code is not spared: in a
# model of 48 experts the ten serve code too, and two fifths of its tokens use the most frequent one.
#
# ## Does it lose Python's syntax?
#
# The first lines of all functions of the held-out text, continued with 64 tokens at temperature 0.7, with five seeds:
# by the model, with the docstrings' experts off, and with one of the five random draws off for each seed. The last line
# is dropped, as the limit cuts it. Python's own prompt (`codeop`) then tells text that is wrong from text that could go
# on, such as an open bracket or string. Errors are those of a mean over functions.

# %%
signatures = list(dict.fromkeys(re.findall(r"^def \w+\([^()\n]*\):$", text, re.M)))
starts = [ds.chat.prepare(f"{line}\n", tokenizer).ids for line in signatures]
SEEDS = range(5)


def judge(line: str, rest: str) -> tuple[bool, bool, bool]:
    """Whether a function is not Python, is Python so far but open at its end, and begins with a docstring."""
    docstring = re.match(r"\s*r?\"\"\"", rest) is not None
    try:
        whole = codeop.compile_command(f"{line}\n{rest}".rpartition("\n")[0] + "\n", symbol="exec")
    except (SyntaxError, ValueError):
        return True, False, docstring
    return False, whole is None, docstring


def write(models) -> np.ndarray:
    """The shares (%) of the three judgements [functions, 3], a model for each seed."""
    found = []
    for seed, one in zip(SEEDS, models, strict=True):
        sampling = ds.Sampling(temperature=0.7, seed=seed)
        gen = ds.generate(one, starts, max_new_tokens=64, sampling=sampling, tokenizer=tokenizer)
        found.append([judge(line, rest) for line, rest in zip(signatures, gen.text, strict=True)])
    return 100 * np.mean(found, axis=0)


def mean_and_error(percent: np.ndarray) -> list[tuple[float, float]]:
    """The mean of each judgement over functions, and its standard error."""
    return list(zip(percent.mean(axis=0), percent.std(axis=0, ddof=1) / np.sqrt(len(percent)), strict=True))


written = {"all experts": write([model for _ in SEEDS])}

# %%
edited = inspect.edit(model, experts_off=ranked)
written["docstring experts off"] = write([edited for _ in SEEDS])

# %%
drawn = [inspect.edit(model, experts_off=[every[i] for i in draw]) for draw in draws]
written["ten at random off"] = write(drawn)

# %%
judgements = ("not Python", "open at its end", "with a docstring")
shares = {}
for name, percent in written.items():
    both = [mean_and_error(each) for each in (percent, percent - written["all experts"])]
    shares[name] = dict(zip(judgements, both[0], strict=True))
    for judgement, (share, error), (more, its_error) in zip(judgements, *both, strict=True):
        print(f"{name:22}{judgement:16}{share:5.1f} ± {error:.1f} %, change {more:+5.1f} ± {its_error:.1f}")
print(f"{len(signatures)} functions, {len(signatures) * len(SEEDS)} samples of each model")
inspect.plots.groups(shares, "the function written is", "share of samples (%)")

# %% [markdown]
# **Syntax is lost whichever experts are off: 8 % of what the whole model writes is not Python, 31 % with the
# docstrings' experts off and 34 % with ten at random.** The two cannot be told apart. **The habit of a docstring
# stays**: 77 % of functions begin with one, 74 % before, but 57 % with ten at random off. The ranked experts choose a
# docstring's words, not whether there is one. Errors are over functions, for these five draws. Nearly half of all texts
# are open at their end, such as in a docstring that 64 tokens do not finish: the code after it is not judged.

# %% [markdown]
# ## What it writes
#
# The same beginnings of functions, greedily.

# %%
for name in ("read_lines(path)", "is_empty(self)", "close(self)"):
    prompt = ds.chat.prepare(f"def {name}:\n", tokenizer).ids
    for title, one in (("all experts", model), ("docstring experts off", edited)):
        gen = ds.generate(one, [prompt], max_new_tokens=28, tokenizer=tokenizer)
        print(f"{title:22}def {name}: {gen.text[0]!r}")
