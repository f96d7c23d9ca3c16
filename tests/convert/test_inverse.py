"""The way back: every tensor of the source from the leaves it was cut into, bit for bit, or an error."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from convert.read.converted import describe_storage
from convert.read.provenance import SourceTensor
from convert.transform import cut
from convert.verify import inverse
from convert.verify.verify import verify
from dsv32_jax.config import Config
from dsv32_jax.layout import Cut, Leaf, leaves

from . import fakes
from .test_cut import Sources, dense, fp8, nvfp4, nvfp4_bs32


def packed(name, w):
    """compressed-tensors' names; the divisor is bfloat16, so several have the same float32 inverse or none."""
    parts = nvfp4(name, w)
    divisor = (np.float32(1) / parts[name + "_scale_2"]).astype(ml_dtypes.bfloat16).reshape(1)
    return {name + "_packed": parts[name], name + "_scale": parts[name + "_scale"], name + "_global_scale": divisor}


def scalars_in_bfloat16(name, w):
    parts = nvfp4(name, w)
    return parts | {name + "_scale_2": parts[name + "_scale_2"].astype(ml_dtypes.bfloat16)}


def scales_as_bytes(name, w):
    parts = nvfp4(name, w)
    return parts | {name + "_scale": parts[name + "_scale"].view(np.uint8)}


def channel(name, w):
    """FP8 with a bfloat16 scale for each row."""
    parts = fp8(name, w)
    rows = np.random.default_rng(3).random((len(w), 1), np.float32).astype(ml_dtypes.bfloat16)
    return {name: parts[name], name + "_scale": rows}


def one_scale(name, w):
    return {name: fp8(name, w)[name], name + "_scale": np.full((), 0.3, np.float32)}


def float16(name, w):
    return {name: w.astype(np.float16)}


ENCODINGS = [dense, float16, fp8, channel, one_scale, nvfp4, nvfp4_bs32, packed, scalars_in_bfloat16, scales_as_bytes]


def groups(cfg: Config) -> list[list[Leaf]]:
    """Leaves that are cut from the same tensors."""
    found: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves(dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=32)):
        found.setdefault(leaf.sources, []).append(leaf)
    return list(found.values())


def noted(stored, arrays) -> list[SourceTensor]:
    """What the manifest would record of the tensors."""
    return [
        SourceTensor(t.name, t.dtype, t.shape, "", arrays[t.name].tobytes().hex() if "global" in t.name else "")
        for t in stored.tensors
    ]


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("width", [8, 16, 48, 64, 192])
def test_every_tensor_comes_back(encode, width, tiny):
    cfg = dataclasses.replace(tiny, v_head_dim=width, num_attention_heads=4, moe_intermediate_size=96, kv_lora_rank=64)
    sources, back = Sources(encode), 0
    for group in groups(cfg):
        stored = sources.stored(group[0]) if len(group[0].source_shape) == 2 else _vector(sources, group[0])
        forms = [cut.choose_format(leaf, stored) for leaf in group]
        if any(form.dequantized for form in forms):
            continue
        built = [cut.build(leaf, stored, form, sources.read) for leaf, form in zip(group, forms, strict=True)]
        for expert, one in enumerate(stored):
            parts = [
                {name: array[expert] if leaf.stacked else array for name, array in arrays.items()}
                for leaf, arrays in zip(group, built, strict=True)
            ]
            tensors = noted(one, sources.arrays)
            again = describe_storage(one.name, tensors)
            assert (again.kind, again.format, again.shape, again.block) == (one.kind, one.format, one.shape, one.block)
            found = inverse.restore_tensors(inverse.join_leaves(group, parts, one.format, one.block), again, tensors)
            assert found.keys() == {tensor.name for tensor in one.tensors}
            for name, array in found.items():
                want = sources.arrays[name]
                assert (array.dtype, array.shape) == (want.dtype, want.shape), name
                assert array.tobytes() == want.tobytes(), name
                back += 1
    assert back > 60


def _vector(sources: Sources, leaf: Leaf):
    from convert.read.weights import detect

    name = leaf.sources[0]
    sources.arrays[name] = sources.rng.standard_normal(leaf.source_shape, np.float32)
    return [detect(name, fakes.tensors(sources.arrays))]


def test_golden_checkpoints_are_proven_lossless(case):
    report = verify(case.converted, against=case.folder)
    assert report.lossless and not report.changed
    assert report.proven == len(fakes.load(case.folder)) - sum(".input_scale" in n for n in fakes.load(case.folder))


@given(heads=st.integers(1, 4), first=st.integers(1, 5), second=st.integers(1, 5), width=st.integers(1, 4))
def test_interleaved_rows_are_put_back(heads, first, second, width):
    source = np.arange(heads * (first + second) * width, dtype=np.float32).reshape(-1, width)
    runs = source.reshape(heads, first + second, width)
    cuts = [(0, first), (first, first + second)]
    group = [
        Leaf("x_HNQ", "HNQ", (heads, b - a, width), ("x.weight",), source.shape, Cut(0, first + second, a, b), False)
        for a, b in cuts
    ]
    joined = inverse.join_leaves(group, [{"values": runs[:, a:b]} for a, b in cuts], "dense", 1)
    assert (joined["values"] == source).all()


@given(rows=st.integers(1, 3), pieces=st.integers(1, 5), width=st.sampled_from([2, 4, 8, 16, 32, 48]))
def test_columns_and_their_scales_are_put_together(rows, pieces, width):
    """o_proj: D x (H x P), scales of 16 inputs; a narrower head has the scale of its block repeated."""
    if width % 16 and (16 % width or pieces * width % 16):
        return
    total = pieces * width
    codes = np.arange(rows * total // 2, dtype=np.uint64).astype(np.uint8).reshape(rows, pieces, width // 2)
    scales = np.arange(rows * total // 16, dtype=np.uint64).astype(np.uint8).reshape(rows, total // 16)
    own = scales.reshape(rows, pieces, width // 16) if width >= 16 else np.repeat(scales, 16 // width, 1)[..., None]
    leaf = Leaf("x_DHP", "DHP", (rows, pieces, width), ("x.weight",), (rows, total), None, False)
    parts = {"codes": codes, "block_scale": own, "tensor_scale": np.ones((1, 1, 1), np.float32)}
    joined = inverse.join_leaves([leaf], [parts], "nvfp4", 16)
    assert (joined["codes"] == codes.reshape(rows, -1)).all() and (joined["block_scale"] == scales).all()
    if width < 16:
        own[-1, -1, -1] ^= 1
        with pytest.raises(inverse.NotInvertible, match="shared an element differ"):
            inverse.join_leaves([leaf], [parts], "nvfp4", 16)


def halves(values: list[float]) -> tuple[list[Leaf], list[dict[str, np.ndarray]]]:
    """eh_proj in FP8, both halves within one block of 128 inputs: each has the block's scale."""
    group = [
        Leaf(f"w_{x}_AD", "AD", (4, 64), ("eh_proj.weight",), (4, 128), Cut(1, 128, 64 * i, 64 * i + 64), False)
        for i, x in enumerate("eh")
    ]
    numbers = np.zeros((4, 64), ml_dtypes.float8_e4m3fn)
    return group, [{"values": numbers, "block_scale": np.full((4, 1), value, np.float32)} for value in values]


def test_leaves_that_contradict_each_other_are_an_error():
    assert inverse.join_leaves(*halves([0.5, 0.5]), "fp8_block", 128)["block_scale"].tolist() == [[0.5]] * 4
    with pytest.raises(inverse.NotInvertible, match=r"w_h_AD.block_scale contradicts another leaf of eh_proj.weight"):
        inverse.join_leaves(*halves([0.5, 0.25]), "fp8_block", 128)
    leaf = Leaf("x_HNQ", "HNQ", (1, 2, 16), ("x.weight",), (4, 16), Cut(0, 4, 0, 2), False)
    other = leaf._replace(path="y_HRQ", cut=Cut(0, 4, 2, 4))
    part = {"codes": np.zeros((1, 2, 8), np.uint8), "block_scale": np.zeros((1, 2, 1), np.uint8)}
    parts = [part | {"tensor_scale": np.full((1, 1, 1), value, np.float32)} for value in (1, 2)]
    with pytest.raises(inverse.NotInvertible, match="tensor scales of its leaves differ"):
        inverse.join_leaves([leaf, other], parts, "nvfp4", 16)


@pytest.mark.parametrize("shape", [(2, 3), (192, 1), (1,), ()])
def test_scales_that_were_one_and_differ_now_are_an_error(shape):
    scale = np.random.default_rng(0).random(shape or (1,), np.float32).reshape(shape)
    rows = np.repeat(scale, 128, 0)[:192] if shape == (2, 3) else np.broadcast_to(scale.reshape(-1, 1), (192, 3))
    assert inverse.collapse_scales(rows, shape, "s").tobytes() == scale.tobytes()
    for at in ((127, 0), (191, 2)):
        wrong = rows.copy()
        wrong[at] = np.nextafter(wrong[at], np.float32(9))
        with pytest.raises(inverse.NotInvertible, match="s: rows that shared a scale have different ones now"):
            inverse.collapse_scales(wrong, shape, "s")


def test_values_that_do_not_fit_the_source_any_more_are_an_error():
    stored = describe_storage("x.weight", [SourceTensor("x.weight", "BF16", (2,), "")])
    with pytest.raises(inverse.NotInvertible, match="x.weight: the float32 values are not exact in bfloat16"):
        inverse.restore_tensors({"values": np.float32([1, 1 / 3])}, stored, [])
    shapes = {"_packed": ("U8", (1, 8)), "_scale": ("F8_E4M3", (1, 1)), "_global_scale": ("F32", (1,))}
    tensors = [SourceTensor("x.weight" + suffix, *what, "", "0000803f") for suffix, what in shapes.items()]
    joined = {"codes": np.zeros((1, 8), np.uint8), "block_scale": np.zeros((1, 1), ml_dtypes.float8_e4m3fn)}
    stored = describe_storage("x.weight", tensors)
    assert inverse.restore_tensors(joined | {"tensor_scale": np.float32([1])}, stored, tensors)
    with pytest.raises(inverse.NotInvertible, match="weight_global_scale: the stored tensor scale is not its inverse"):
        inverse.restore_tensors(joined | {"tensor_scale": np.float32([0.5])}, stored, tensors)
