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
# Which experts the router sends tokens to: how even the load is, what the groups do, and which experts specialize in
# which kinds of token. Runs on the small model that is shipped; set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face
# layout to use other weights. The run is traced once; everything after that reads the trace's file and needs no
# model.

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
# On another machine, without the model:

# %%
trace = inspect.Trace.load(scratch / "run.safetensors")
trace

# %% [markdown]
# ## Load
#
# How many of the tokens each expert of each layer gets. 1 is an equal share; the router's bias, which training moves
# against the load, takes part in the choice to keep it there. Bright squares are experts that get more than that.

# %%
inspect.plots.expert_load(trace)

# %%
counts = inspect.plots.count_experts(trace)
share = counts / counts.sum(axis=1, keepdims=True)
even = np.exp(-(share * np.log(share)).sum(axis=1))
for i, (layer, busiest) in enumerate(zip(even, share.max(axis=1), strict=True)):
    name = trace.config.first_k_dense_replace + i
    print(
        f"layer {name}: as if {layer:.1f} of {counts.shape[1]} experts were in even use; the busiest gets {busiest:.0%}"
    )

# %% [markdown]
# ## Groups
#
# Experts lie in groups, and a token may use experts of the best few groups only (in the real model 4 of 8, so that its
# experts lie on few machines). How many groups the tokens do use, and how the gates, which sum to the routed scaling
# factor, are spread over a token's experts from the first to the last: see how the first has more than 40 % of the
# say, the last a tenth.

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
places = {f"expert {k + 1}": shares[:, k] for k in range(cfg.num_experts_per_tok)}
inspect.plots.stacks(
    {name: {place: values[i] for place, values in places.items()} for i, name in enumerate(names)},
    "share of a token's gates",
)

# %% [markdown]
# ## Specialization
#
# Tokens by kind, from their text alone. The share of each kind's choices that an expert gets, times the number of
# experts: 1 is what it would get if kinds did not matter. White lines part the groups. Look for rows that differ: an
# expert that is bright in one row and dark in the others has specialized. In the small model indentation and keywords,
# which begin a line, share the first group; names and words have another favourite.


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
{name: int(chosen.sum()) for name, chosen in members.items()}

# %%
inspect.plots.experts_by_kind(trace, cfg.num_hidden_layers - 1, members)

# %% [markdown]
# How far each kind's use of the experts is from that of all tokens, layer by layer: half the sum of the differences, so
# that 0 is the same use and 1 no expert in common. See how keywords stand out in layer 2 and indentation in the layers
# after it; names and words are nearly everywhere closest to the average.

# %%
total = share[:, None]
kinds = np.stack([inspect.plots.count_experts(trace, chosen) for chosen in members.values()], axis=1)
distance = np.abs(kinds / kinds.sum(axis=-1, keepdims=True) - total).sum(axis=-1) / 2
inspect.plots.heat(distance.T, "layer", "kind of token", "distance from all tokens", list(members), names)
