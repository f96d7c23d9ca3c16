"""The map from tensors of the Hugging Face checkpoint to parameters of the model, which is generated for a Config.

A parameter's name ends in its axes, one letter a size (`Config.dims`). A row names a tensor, the letters of its two
axes [out, in], and the parameters it is cut into:

    "H(N|R),Q"   out: for each of H heads, N rows of the first parameter, then R rows of the second;  in: Q
    "D,HP"       out: D;  in: H x P, reshaped to two axes and not cut

The model's shapes and shardings, the converter's plan and its inverse follow from this table.
"""

import math
import re
from typing import NamedTuple

from .config import Config

MODEL = (
    ("model.embed_tokens.weight", "V,D", "embed_VD"),
    ("model.norm.weight", "D", "norm_D"),
    ("lm_head.weight", "V,D", "head_VD"),
)

ATTENTION = (
    ("input_layernorm.weight", "D", "attn_norm_D"),
    ("self_attn.q_a_proj.weight", "Q,D", "mla.w_dq_QD"),
    ("self_attn.q_a_layernorm.weight", "Q", "mla.q_norm_Q"),
    ("self_attn.q_b_proj.weight", "H(N|R),Q", "mla.w_uq_HNQ mla.w_qr_HRQ"),
    ("self_attn.kv_a_proj_with_mqa.weight", "C|R,D", "mla.w_dkv_CD mla.w_kr_RD"),
    ("self_attn.kv_a_layernorm.weight", "C", "mla.kv_norm_C"),
    ("self_attn.kv_b_proj.weight", "H(N|P),C", "mla.w_uk_HNC mla.w_uv_HPC"),
    ("self_attn.o_proj.weight", "D,HP", "mla.w_o_DHP"),
    ("self_attn.indexer.wq_b.weight", "IJ,Q", "indexer.w_q_IJQ"),
    ("self_attn.indexer.wk.weight", "J,D", "indexer.w_k_JD"),
    ("self_attn.indexer.k_norm.weight", "J", "indexer.k_norm_J"),
    ("self_attn.indexer.k_norm.bias", "J", "indexer.k_bias_J"),
    ("self_attn.indexer.weights_proj.weight", "I,D", "indexer.w_w_ID"),
    ("post_attention_layernorm.weight", "D", "ffn_norm_D"),
)

DENSE = (
    ("mlp.gate_proj.weight", "F,D", "ffn.w_gate_FD"),
    ("mlp.up_proj.weight", "F,D", "ffn.w_up_FD"),
    ("mlp.down_proj.weight", "D,F", "ffn.w_down_DF"),
)

MOE = (
    ("mlp.gate.weight", "E,D", "ffn.router_ED"),
    ("mlp.gate.e_score_correction_bias", "E", "ffn.bias_E"),
    ("mlp.experts.{e}.gate_proj.weight", "M,D", "ffn.w_gate_EMD"),
    ("mlp.experts.{e}.up_proj.weight", "M,D", "ffn.w_up_EMD"),
    ("mlp.experts.{e}.down_proj.weight", "D,M", "ffn.w_down_EDM"),
    ("mlp.shared_experts.gate_proj.weight", "M,D", "ffn.shared_gate_MD"),
    ("mlp.shared_experts.up_proj.weight", "M,D", "ffn.shared_up_MD"),
    ("mlp.shared_experts.down_proj.weight", "D,M", "ffn.shared_down_DM"),
)

MTP = (
    ("embed_tokens.weight", "V,D", "embed_VD"),
    ("enorm.weight", "D", "e_norm_D"),
    ("hnorm.weight", "D", "h_norm_D"),
    ("eh_proj.weight", "A,D|D", "w_e_AD w_h_AD"),
    ("shared_head.norm.weight", "D", "norm_D"),
    ("shared_head.head.weight", "V,D", "head_VD"),
)

COPIES = {"mtp.embed_VD": "embed_VD", "mtp.head_VD": "head_VD"}
"""Parameters that DeepSeek shares (V3 report, section 2.2). A checkpoint stores copies or omits them."""


LOOKED_UP = "embed_VD"
"""The parameter, of the model and of the MTP head, whose rows are looked up, so that it must be a plain array. Any
other matrix may be quantized."""


LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


class Cut(NamedTuple):
    """The part of a tensor's axis that a parameter takes: positions start..stop-1 of every run of `size`."""

    axis: int
    size: int
    start: int
    stop: int


class Leaf(NamedTuple):
    """A parameter of the model and its source tensors: one, or one for each expert.

    `stacked`: the sources are stacked along a leading expert axis.
    """

    path: str
    letters: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    cut: Cut | None
    stacked: bool


def split_layer(name: str) -> tuple[int | None, str]:
    """Return the layer of a tensor or parameter (None outside the layers), and its name within the layer."""
    match = LAYER.match(name)
    return (int(match[1]), name[match.end() :]) if match else (None, name)


def fold_expert(name: str) -> str:
    """Return `name` with a star in place of the expert's number."""
    return EXPERT.sub(r"\1experts.*.", name)


def leaves(cfg: Config) -> tuple[Leaf, ...]:
    """Return every parameter of the model, in the order in which a checkpoint is streamed."""
    first, *last = MODEL
    found = _rows(cfg, [first], "", "")
    for i in range(cfg.num_hidden_layers):
        found += _rows(cfg, layer_rows(cfg, i), f"model.layers.{i}.", f"layers.{i}.")
    found += _rows(cfg, last, "", "")
    if cfg.num_nextn_predict_layers:
        i = cfg.num_hidden_layers
        found += _rows(cfg, MTP, f"model.layers.{i}.", "mtp.")
        found += _rows(cfg, layer_rows(cfg, i), f"model.layers.{i}.", "mtp.block.")
    return tuple(found)


def layer_rows(cfg: Config, i: int) -> tuple[tuple[str, str, str], ...]:
    """Return the rows of decoder layer `i`; the first `first_k_dense_replace` have a dense feed-forward."""
    return ATTENTION + (DENSE if i < cfg.first_k_dense_replace else MOE)


def _rows(cfg: Config, rows, source_prefix: str, path_prefix: str) -> list[Leaf]:
    return [leaf for row in rows for leaf in _leaves_of_row(cfg, row, source_prefix, path_prefix)]


def _leaves_of_row(cfg: Config, row: tuple[str, str, str], source_prefix: str, path_prefix: str) -> list[Leaf]:
    """Return the parameters that a tensor, or one of each expert, is cut into."""
    name, axes, paths = row
    stacked = "{e}" in name
    experts = range(cfg.n_routed_experts) if stacked else [None]
    sources = tuple(source_prefix + name.replace("{e}", str(e)) for e in experts)
    parsed = [_axis(cfg.dims, axis) for axis in axes.split(",")]
    source_shape = tuple(axis.size for axis in parsed)
    found = []
    for part, path in enumerate(paths.split()):
        cuts = [Cut(i, *axis.runs[part]) for i, axis in enumerate(parsed) if axis.runs]
        letters = path.rpartition("_")[2]
        shape = tuple(cfg.dims[letter] for letter in letters)
        cut = cuts[0] if cuts else None
        found.append(Leaf(path_prefix + path, letters, shape, sources, source_shape, cut, stacked))
    return found


class _Axis(NamedTuple):
    """An axis of a tensor: its size, and (run, start, stop) of each parameter that it is cut into."""

    size: int
    runs: list[tuple[int, int, int]]


def _axis(dims: dict[str, int], text: str) -> _Axis:
    """Parse an axis of the table: "HP", "C|R" or "H(N|R)"."""
    heads, _, parts = text.rstrip(")").rpartition("(")
    if "|" not in parts:
        return _Axis(math.prod(dims[letter] for letter in parts), [])
    sizes = [dims[letter] for letter in parts.split("|")]
    stops = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    runs = [(stops[-1], stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return _Axis(stops[-1] * math.prod(dims[letter] for letter in heads), runs)
