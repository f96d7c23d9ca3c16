"""Cutting a checkpoint's matrices into the model's, in every storage."""

import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from convert.read import weights
from convert.read.weights import detect
from convert.transform import cut
from dsv32_jax.config import Config
from dsv32_jax.layout import Cut, Leaf, leaves
from dsv32_jax.quantization.quantize import fp8_dequantize, fp8_quantize, nvfp4_dequantize, nvfp4_quantize

from . import fakes


def dense(name, w):
    return {name: w.astype(ml_dtypes.bfloat16)}


def fp8(name, w):
    values, grid = fp8_quantize(w)
    return {name: values, name + "_scale_inv": grid * np.float32(0.7)}


def nvfp4(name, w):
    codes, scale, scalar = nvfp4_quantize(w)
    return {name: codes, name + "_scale": scale, name + "_scale_2": scalar.reshape(())}


def nvfp4_bs32(name, w):
    codes, scale, scalar = nvfp4_quantize(w)
    return {name: codes, name + "_scale": np.ascontiguousarray(scale[:, ::2]), name + "_scale_2": scalar.reshape(())}


def values_of(form: cut.LeafFormat, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if form.format == "nvfp4":
        return nvfp4_dequantize(**arrays)
    if form.format == "fp8_block":
        return fp8_dequantize(arrays["values"], arrays["block_scale"])
    return arrays["values"].astype(np.float32)


class Sources:
    """The tensors that some leaves are made of, drawn at random and stored by `encode`."""

    def __init__(self, encode, seed: int = 0):
        self.encode, self.rng = encode, np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}

    def read(self, tensor):
        return self.arrays[tensor.name]

    def stored(self, leaf: Leaf):
        for name in leaf.sources:
            if not any(other.startswith(name) for other in self.arrays):
                self.arrays |= self.encode(name, self.rng.standard_normal(leaf.source_shape, np.float32))
        tensors = fakes.tensors(self.arrays)
        return [detect(name, tensors) for name in leaf.sources]

    def build(self, leaf: Leaf):
        stored = self.stored(leaf)
        form = cut.choose_format(leaf, stored)
        return form, cut.build(leaf, stored, form, self.read)

    def expected(self, leaf: Leaf) -> np.ndarray:
        """The values of `leaf`, cut from the dequantized matrices by the letters of its name."""
        stored = self.stored(leaf)
        matrices = []
        for one in stored:
            parts = weights.read_components(one, self.read)
            form = cut.LeafFormat(one.format, one.block, "")
            matrices.append(values_of(form, parts))
        return np.stack([by_hand(leaf, m) for m in matrices]) if leaf.stacked else by_hand(leaf, matrices[0])


def by_hand(leaf: Leaf, matrix: np.ndarray) -> np.ndarray:
    """The positions that `leaf` takes of a source, computed by listing them."""
    keep = [np.arange(size) for size in matrix.shape]
    if leaf.cut is not None:
        axis = keep[leaf.cut.axis]
        keep[leaf.cut.axis] = axis[(axis % leaf.cut.size >= leaf.cut.start) & (axis % leaf.cut.size < leaf.cut.stop)]
    return matrix[np.ix_(*keep)].reshape(leaf.shape[leaf.stacked :])


def matrices(cfg: Config) -> list[Leaf]:
    """Every leaf of two layers and the MTP layer that is made of matrices."""
    cfg = dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=32)
    return [leaf for leaf in leaves(cfg) if len(leaf.source_shape) == 2]


def by_path(cfg: Config, path: str) -> Leaf:
    return next(leaf for leaf in leaves(cfg) if leaf.path == path)


O_PROJ = "layers.0.mla.w_o_DHP"


@pytest.mark.parametrize("encode", [dense, fp8, nvfp4, nvfp4_bs32])
@pytest.mark.parametrize("width", [16, 48, 64, 192])
def test_a_leaf_has_the_values_of_its_part_of_the_source(encode, width, tiny):
    cfg = dataclasses.replace(tiny, v_head_dim=width, num_attention_heads=4, moe_intermediate_size=96, kv_lora_rank=64)
    sources = Sources(encode)
    for leaf in matrices(cfg):
        form, arrays = sources.build(leaf)
        shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        assert shapes == cut.list_arrays(leaf, form), leaf.path
        assert all(array.flags.c_contiguous and array.ndim == len(leaf.shape) for array in arrays.values()), leaf.path
        got, want = values_of(form, arrays), sources.expected(leaf)
        want = want.astype(ml_dtypes.bfloat16).astype(np.float32) if form.dequantized else want
        assert (got == want).all(), leaf.path


def test_the_leaves_of_a_source_are_all_of_it_once(tiny):
    found: dict[str, list[np.ndarray]] = {}
    for leaf in leaves(tiny):
        if leaf.stacked or "norm" in leaf.path or len(leaf.source_shape) == 1:
            continue
        source = np.arange(np.prod(leaf.source_shape), dtype=np.float32).reshape(leaf.source_shape)
        tensors = fakes.tensors({leaf.sources[0]: source})
        stored = [detect(leaf.sources[0], tensors)]
        built = cut.build(leaf, stored, cut.choose_format(leaf, stored), lambda tensor, source=source: source)
        found.setdefault(leaf.sources[0], []).append(built["values"].ravel())
    for name, parts in found.items():
        together = np.sort(np.concatenate(parts))
        assert (together == np.arange(together.size)).all(), name


@pytest.mark.parametrize(
    "encode, width, format, blocks",
    [
        (fp8, 64, "fp8_block", 1),
        (fp8, 128, "fp8_block", 1),
        (fp8, 256, "fp8_block", 2),
        (fp8, 48, "dense", None),
        (fp8, 192, "dense", None),
        (nvfp4, 8, "nvfp4", 1),
        (nvfp4, 48, "nvfp4", 3),
        (nvfp4, 64, "nvfp4", 4),
        (nvfp4, 24, "dense", None),
        (nvfp4_bs32, 64, "nvfp4", 2),
        (nvfp4_bs32, 48, "dense", None),
    ],
)
def test_heads_keep_the_format_where_scales_allow(encode, width, format, blocks, tiny):
    cfg = dataclasses.replace(tiny, v_head_dim=width, num_attention_heads=4)
    leaf = by_path(cfg, O_PROJ)
    form, arrays = Sources(encode).build(leaf)
    assert form.format == format
    if format == "dense":
        assert form.dtype == "bfloat16" and "straddle" in str(form.dequantized)
    else:
        assert form.dequantized is None and arrays["block_scale"].shape == (cfg.hidden_size, 4, blocks)


@pytest.mark.parametrize("rank, rope, rows", [(512, 64, 576), (128, 64, 192)])
def test_fp8_rows_keep_their_scale_across_partial_blocks(rank, rope, rows, tiny):
    cfg = dataclasses.replace(tiny, kv_lora_rank=rank, qk_rope_head_dim=rope, index_head_dim=rope, hidden_size=160)
    sources = Sources(fp8)
    for path in ("layers.0.mla.w_dkv_CD", "layers.0.mla.w_kr_RD", "layers.0.mla.w_qr_HRQ"):
        leaf = by_path(cfg, path)
        form, arrays = sources.build(leaf)
        assert form.format == "fp8_block"
        assert (values_of(form, arrays) == sources.expected(leaf)).all()
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    values, grid = sources.arrays[name], sources.arrays[name + "_scale_inv"]
    assert values.shape == (rows, 160) and grid.shape == (-(-rows // 128), 2)
    row, column = np.arange(rows)[:, None], np.arange(160)[None]
    blockwise = (values.astype(np.float32) * grid[row // 128, column // 128]).astype(ml_dtypes.bfloat16)
    assert (sources.expected(by_path(cfg, "layers.0.mla.w_kr_RD")) == blockwise[rank:].astype(np.float32)).all()


def test_quantized_halves_of_eh_proj(tiny):
    for size, formats in [(128, ["fp8_block"] * 2), (192, ["fp8_block", "dense"])]:
        cfg = dataclasses.replace(tiny, hidden_size=size)
        sources = Sources(fp8)
        built = [sources.build(by_path(cfg, path)) for path in ("mtp.w_e_AD", "mtp.w_h_AD")]
        assert [form.format for form, _ in built] == formats


def test_experts_that_are_stored_differently_become_bfloat16(tiny):
    leaf = by_path(tiny, "layers.1.ffn.w_gate_EMD")
    sources = Sources(lambda name, w: (nvfp4 if ".3." in name else dense)(name, w))
    form, arrays = sources.build(leaf)
    assert form.format == "dense" and form.dtype == "bfloat16" and "nvfp4 in blocks of 16" in str(form.dequantized)
    want = sources.expected(leaf).astype(ml_dtypes.bfloat16)
    assert (arrays["values"] == want).all()
    sources = Sources(lambda name, w: {name: w if ".3." in name else w.astype(ml_dtypes.bfloat16)})
    form, arrays = sources.build(leaf)
    assert form == cut.LeafFormat("dense", 1, "float32") and (arrays["values"] == sources.expected(leaf)).all()


def test_every_expert_keeps_its_tensor_scale(tiny):
    leaf = by_path(tiny, "layers.1.ffn.w_down_EDM")
    sources = Sources(nvfp4)
    _, arrays = sources.build(leaf)
    own = [float(sources.arrays[name + "_scale_2"]) for name in leaf.sources]
    assert arrays["tensor_scale"].shape == (12, 1, 1) and len(set(own)) == 12
    assert (arrays["tensor_scale"].ravel() == own).all()


def test_experts_are_stacked_one_by_one(tiny):
    """Peak: the leaf and little more than one expert."""
    cfg = dataclasses.replace(tiny, hidden_size=512, moe_intermediate_size=256, n_routed_experts=24)
    leaf = by_path(cfg, "layers.1.ffn.w_up_EMD")
    sources = Sources(dense)
    stored = sources.stored(leaf)
    tracemalloc.start()
    arrays = cut.build(leaf, stored, cut.choose_format(leaf, stored), lambda tensor: sources.arrays[tensor.name].copy())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= arrays["values"].nbytes * (1 + 3 / 24)


@given(heads=st.integers(1, 4), first=st.integers(1, 5), second=st.integers(1, 5), width=st.integers(1, 4))
def test_row_cuts_interleave_heads(heads, first, second, width):
    """q_b: for each head, N rows of one leaf and then R of the other."""
    source = np.arange(heads * (first + second) * width, dtype=np.float32).reshape(-1, width)
    for start, stop in ((0, first), (first, first + second)):
        shape = (heads, stop - start, width)
        leaf = Leaf("x_HNQ", "HNQ", shape, ("x.weight",), source.shape, Cut(0, first + second, start, stop), False)
        stored = [detect("x.weight", fakes.tensors({"x.weight": source}))]
        values = cut.build(leaf, stored, cut.choose_format(leaf, stored), lambda tensor: source)["values"]
        for head in range(heads):
            begin = head * (first + second)
            assert (values[head] == source[begin + start : begin + stop]).all()
