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
# # Where tokens go
#
# **Does the router use all experts, and do they specialize?** How even the load is, what groups do, and which experts
# take which kinds of token. The conversations are traced once; everything after that needs only the trace's file, no
# model.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
#
# *Fixed by rule:* the text, the first 4,000 tokens of the held-out file in eight rows, and the kinds of token. *Chosen
# by hand, perhaps after looking:* that one picture shows the last layer; the last picture has all layers.

# %%
import keyword
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO
scratch = Path(tempfile.mkdtemp())

convert.convert(SOURCE, scratch / "converted")
model = ds.load(scratch / "converted")
tokenizer = ds.chat.Tokenizer.load(scratch / "converted", model.cfg)
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
ids = tokenizer.encode(text)
rows = [ids[start : start + 500] for start in range(0, 4000, 500)]
answers = ds.generate(model, rows, max_new_tokens=12).tokens
conversations = [prompt + answer for prompt, answer in zip(rows, answers, strict=True)]
inspect.trace(model, conversations, {"routing"}).save(scratch / "run.safetensors")

# %% [markdown]
# The trace can be read on another machine, without the model:

# %%
trace = inspect.Trace.load(scratch / "run.safetensors")
trace

# %% [markdown]
# ## Load
#
# The tokens that each expert of each layer gets, relative to an equal share. Training adjusts a bias of the router
# against the load, to keep it near 1.

# %%
inspect.plots.expert_load(trace)

# %% [markdown]
# **The load is uneven on this text**: red squares are experts that get more than an equal share, blue ones get less. As
# a number of experts:

# %%
counts = trace.count_experts()
share = counts / counts.sum(axis=1, keepdims=True)
even = np.exp(-(share * np.log(share)).sum(axis=1))
for i, (layer, busiest) in enumerate(zip(even, share.max(axis=1), strict=True)):
    name = trace.config.first_k_dense_replace + i
    print(
        f"layer {name}: as if {layer:.1f} of {counts.shape[1]} experts were used evenly; the busiest gets {busiest:.0%}"
    )

# %% [markdown]
# ## Groups
#
# Experts form groups, and a token may use only experts of its best groups (in the real model 4 of 8, so that its
# experts are on few machines). Below: how many groups tokens use, and the gates of a token's experts from the largest
# to the smallest, as shares of their sum, the routed scaling factor.

# %%
cfg = trace.config
size = cfg.n_routed_experts // cfg.n_group
real = np.arange(trace["expert"].shape[2]) < trace["length"][:, None]
expert, gate = trace["expert"][:, real], trace["gate"][:, real]
groups = np.array([[len(set(token)) for token in layer] for layer in expert // size])
for i, layer in enumerate(groups):
    use = ", ".join(f"{np.mean(layer == n):.0%} use {n}" for n in range(1, cfg.topk_group + 1))
    print(f"layer {cfg.first_k_dense_replace + i}: of {cfg.n_group} groups of {size} experts, {use}")
shares = np.sort(gate, axis=-1)[..., ::-1].mean(axis=1) / cfg.routed_scaling_factor
names = [f"layer {cfg.first_k_dense_replace + i}" for i in range(len(shares))]
choices = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
places = {f"{choices[k]} choice": shares[:, k] for k in range(cfg.num_experts_per_tok)}
inspect.plots.stacks(
    {name: {place: values[i] for place, values in places.items()} for i, name in enumerate(names)},
    "share of a token's gates",
)

# %% [markdown]
# **The first choice has more than 40 % of the gates, the last about a tenth.**
#
# ## Specialization
#
# Tokens by kind, judged by their text alone. The share of each kind's choices that an expert gets, times the number of
# experts: 1 means that the kind does not matter. White lines separate groups.


# %%
def kind(text: str) -> str:
    word = text.strip()
    if not word:
        return "space, indent"
    if keyword.iskeyword(word):
        return "keyword"
    if word.isidentifier():
        return "name, word"
    return "number" if word.isdecimal() else "punctuation"


members = {name: np.zeros(real.shape, bool) for name in ("space, indent", "keyword", "name, word", "punctuation")}
for row, tokens in enumerate(trace["tokens"]):
    for i, token in enumerate(tokens[: trace["length"][row]]):
        if (name := kind(tokenizer.decode([token]))) in members:
            members[name][row, i] = True
{name: int(mask.sum()) for name, mask in members.items()}

# %%
inspect.plots.experts_by_kind(trace, cfg.num_hidden_layers - 1, members)

# %% [markdown]
# **Experts specialize**: one that is red in one row and blue in the others has. In the small model indentation and
# keywords, which begin a line, share the first group; names and words prefer another expert.
#
# The distance of each kind's use of experts from that of all tokens, layer by layer: half the sum of absolute
# differences, so 0 is the same use and 1 means no expert in common.

# %%
total = share[:, None]
kinds = np.stack([trace.count_experts(mask) for mask in members.values()], axis=1)
distance = np.abs(kinds / kinds.sum(axis=-1, keepdims=True) - total).sum(axis=-1) / 2
numbers = [name.removeprefix("layer ") for name in names]
inspect.plots.heat(distance.T, "layer", "kind of token", "distance from all tokens", list(members), numbers)

# %% [markdown]
# **Keywords stand out in layer 2, indentation in the layers after it**; names and words are closest to the average in
# nearly every layer.
