"""Operators at the real sizes, and NVFP4 as the real tools write it.

`test_no_vector_is_forgotten` holds the lists of vectors to what is there.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from dsv32_jax.kernels import cpu, reference
from dsv32_jax.model import cache, mla, ops
from dsv32_jax.model.cache import LayerCache
from dsv32_jax.model.indexer import index_scores, select_all
from dsv32_jax.model.moe import gate
from dsv32_jax.quantization import cache_formats, quantize
from dsv32_jax.quantization.formats import NVFP4, dequantize

OTHERS = tuple("actq.float gemm. kv.dequant_float kv.packed_float index.weights_folded mla.lse".split())
"""FP8 products, scales that are no powers of two, and the log-sum-exp: other engines' choices, not computed here."""

USED = (
    "actq.in_bf16 actq.ue8m0.q_u8 actq.ue8m0.scale kv.latent_bf16 kv.packed_ue8m0_u8 kv.pe_bf16 index.k_pages_u8 "
    "gate.bias gate.ids gate.logits gate.weights hadamard.in_bf16 hadamard.out_bf16 index.k_bf16 index.k_fp8_u8 "
    "index.k_scale index.q_bf16 index.q_fp8_u8 index.q_scale index.score_f32 index.top64 index.top64_margin "
    "index.weights_proj_out_f32 kv.dequant_ue8m0_bf16 mla.indices mla.out_f32 mla.q_bf16 rope.interleaved "
    "rope.neox rope.x yarn.cos yarn.inv_freq_f64 yarn.positions yarn.sin"
).split()

# --------------------------------------------------------------------------------------------------------- real sizes


def test_no_vector_is_forgotten(units):
    """Every vector is compared below or is of something that this code does not compute."""
    assert {name for name in units if not name.startswith(OTHERS)} == set(USED)


def test_yarn_table(units, real):
    """The angles are float32 as in the reference, and within a float32 product of the exact ones."""
    frequencies = ops.rope_frequencies(real)
    np.testing.assert_allclose(frequencies, units["yarn.inv_freq_f64"], rtol=3e-7)
    cos, sin = ops.rotation(jnp.asarray(units["yarn.positions"])[None], real)
    np.testing.assert_allclose(cos[0], units["yarn.cos"], atol=2e-7)
    np.testing.assert_allclose(sin[0], units["yarn.sin"], atol=2e-7)


def test_yarn_table_of_the_paper(real):
    """The first ten pairs turn as without YaRN, the last nine forty times slower."""
    plain = ops.rope_frequencies(dataclasses.replace(real, rope_scaling=None))
    stretched = ops.rope_frequencies(real)
    np.testing.assert_array_equal(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-6)
    assert np.all(stretched[11:23] < plain[11:23]) and np.all(stretched[11:23] > plain[11:23] / 40)


def test_yarn_of_equal_bounds(real):
    """Where both bounds fall on one pair the ramp is a step, not a division by zero."""
    yarn = dataclasses.replace(real.rope_scaling, beta_fast=1.0, beta_slow=1.0, original_max_position_embeddings=7)
    frequencies = ops.rope_frequencies(dataclasses.replace(real, rope_scaling=yarn))
    assert np.isfinite(frequencies).all() and (frequencies > 0).all()


def test_softmax_scale(real):
    """mscale squared, once; without YaRN the plain root."""
    assert mla.softmax_scale(real) == pytest.approx(0.1352337788608801, rel=1e-12)
    assert mla.softmax_scale(dataclasses.replace(real, rope_scaling=None)) == 192**-0.5


@pytest.mark.parametrize("kind", ["interleaved", "neox"])
def test_rope(units, kind):
    """Both conventions, on the vectors of the reference."""
    rotate = {"interleaved": ops.rotate_interleaved, "neox": ops.rotate_halves}[kind]
    cos, sin = (jnp.asarray(units[name])[None, :, None] for name in ("yarn.cos", "yarn.sin"))
    np.testing.assert_allclose(rotate(jnp.asarray(units["rope.x"]), cos, sin), units[f"rope.{kind}"], atol=2e-6)


def test_rotate_halves_passes_the_rest_through(units):
    """Only the first R elements turn; the others keep their bits."""
    x = jnp.asarray(units["index.k_bf16"])[None, :9]
    cos, sin = jnp.asarray(units["yarn.cos"])[None], jnp.asarray(units["yarn.sin"])[None]
    turned = ops.rotate_halves(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 64:], x[..., 64:])
    assert np.abs(np.asarray(turned - x, np.float32)[0, 3, :64]).max() > 0.1


def test_gate(units, real):
    """Expert ids and weights of the reference; where all scores are equal the lowest ids win."""
    routing = gate(jnp.asarray(units["gate.logits"])[None], jnp.asarray(units["gate.bias"]), real)
    ids, weights = (np.asarray(part)[0] for part in (routing.expert_BTX, routing.gate_BTX))
    order, expected_order = np.argsort(ids, axis=-1), np.argsort(units["gate.ids"], axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(ids, order, -1), np.take_along_axis(units["gate.ids"], expected_order, -1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(weights, order, -1), np.take_along_axis(units["gate.weights"], expected_order, -1), atol=1e-6
    )
    assert len(np.unique(units["gate.logits"][0])) == 1


@pytest.mark.parametrize("bias", [0.0, -0.75])
def test_gate_of_equal_scores(real, bias):
    """Where every biased score is the same, lower groups and lower ids win, each with the same weight."""
    experts = real.n_routed_experts
    routing = gate(jnp.zeros((1, 2, experts)), jnp.full(experts, bias, jnp.float32), real)
    assert np.asarray(routing.expert_BTX).tolist() == [[list(range(8))] * 2]
    np.testing.assert_allclose(np.asarray(routing.gate_BTX), 2.5 / 8, rtol=1e-6)


def test_gate_with_negative_scores(real):
    """A dropped group never wins, not even against kept experts whose biased score is negative."""
    logits = jnp.zeros((1, 1, real.n_routed_experts))
    bias = np.full(real.n_routed_experts, -5.0, np.float32)
    bias[:64:32] = 1.0
    bias[128:192:32] = 0.9
    experts = np.asarray(gate(logits, jnp.asarray(bias), real).expert_BTX)[0, 0]
    assert {0, 32, 128, 160} < set(experts.tolist()) <= set(range(64)) | set(range(128, 192))


def test_hadamard_is_byte_exact(units):
    """bfloat16 in and out, bit for bit; and the transform is its own inverse."""
    x = jnp.asarray(units["hadamard.in_bf16"])
    got = np.asarray(ops.hadamard(x))
    np.testing.assert_array_equal(got.view(np.uint16), units["hadamard.out_bf16"].view(np.uint16))
    x32 = x.astype(jnp.float32)
    np.testing.assert_allclose(ops.hadamard(ops.hadamard(x32)), x32, atol=1e-5)


@pytest.mark.parametrize("matches", [cpu.MAX_INDEX_MATCHES, 0])
def test_indexer_scores(units, monkeypatch, matches):
    """64 heads of 128 over 192 keys: the scores of the reference and its 64 best visible keys, all heads at once and
    some at a time."""
    monkeypatch.setattr(cpu, "MAX_INDEX_MATCHES", matches)
    query = _fp8(units, "index.q_fp8_u8") * units["index.q_scale"][..., None]
    key = _fp8(units, "index.k_fp8_u8") * units["index.k_scale"][:, None]
    weight = units["index.weights_proj_out_f32"] * np.float32((64 * 128) ** -0.5)
    visible = np.arange(192) <= np.arange(184, 192)[:, None]
    score = np.asarray(index_scores(*(jnp.asarray(part)[None] for part in (query, weight, key, visible))))[0]
    np.testing.assert_allclose(score[visible], units["index.score_f32"][visible], atol=1e-5)
    assert np.isneginf(score[~visible]).all() and units["index.top64_margin"].min() > 1e-4
    selected = np.asarray(reference.select_topk(jnp.asarray(score)[None], 64))[0]
    np.testing.assert_array_equal(np.sort(selected, axis=-1), np.sort(units["index.top64"], axis=-1))


@pytest.mark.parametrize("heads", [1, 5, 6, 64])
def test_heads_some_at_a_time(heads):
    """Any number of them, in bfloat16 and several rows, make the sum of all at once."""
    rng = np.random.default_rng(heads)
    query = jnp.asarray(rng.standard_normal((2, 7, heads, 16)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((2, 7, heads)), jnp.float32)
    key = jnp.asarray(rng.standard_normal((2, 33, 16)), jnp.bfloat16)
    want = np.asarray(reference.index_scores(query, weight, key))
    np.testing.assert_allclose(cpu.index_scores(query, weight, key), want, atol=1e-6 * abs(want).max())


def test_index_inputs_of_the_reference(units):
    """What FP8 rounded is the Hadamard transform of queries and keys, within FP8's own error."""
    for name in ("q", "k"):
        exact = np.asarray(ops.hadamard(jnp.asarray(units[f"index.{name}_bf16"])), np.float32)
        stored = _fp8(units, f"index.{name}_fp8_u8") * units[f"index.{name}_scale"][..., None]
        assert np.linalg.norm(stored - exact) < 0.04 * np.linalg.norm(exact)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_fp8_rows(units, compiled):
    """Values and scales of the reference's activation quantizer: zeros, 448 and 449, tiny and huge rows."""
    quantize_rows = jax.jit(cache_formats.quantize) if compiled else cache_formats.quantize
    got = quantize_rows(jnp.asarray(units["actq.in_bf16"]))
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), units["actq.ue8m0.q_u8"])
    np.testing.assert_array_equal(got.scale, units["actq.ue8m0.scale"])


def test_fp8_cache_bytes(units, real):
    """The cache of a layer holds byte for byte FlashMLA's 656 a token and DeepGEMM's pages of index keys."""
    count = len(units["kv.latent_bf16"])
    empty = cache.empty_layer(real, 1, count, jnp.float8_e4m3fn)
    position = jnp.arange(count)[None]
    latent, rotated = (jnp.asarray(units[name])[None] for name in ("kv.latent_bf16", "kv.pe_bf16"))
    filled = empty.write(position, latent, rotated, jnp.zeros((1, count, 128), jnp.bfloat16))
    parts = (filled.c_kv_yqC.values, filled.c_kv_yqC.scale, filled.k_r_yqR.values)
    packed = np.concatenate([np.ascontiguousarray(part[0]).view(np.uint8) for part in parts], axis=1)
    np.testing.assert_array_equal(packed, units["kv.packed_ue8m0_u8"])
    read = np.concatenate([np.asarray(part[0]) for part in filled.latents(jnp.bfloat16)], axis=1)
    np.testing.assert_array_equal(read.view(np.uint16), units["kv.dequant_ue8m0_bf16"].view(np.uint16))
    some = jnp.asarray([[[5, 129, 0]]])
    np.testing.assert_array_equal(
        cache_formats.read_at(filled.c_kv_yqC, some, jnp.bfloat16)[0, 0], read[[5, 129, 0], :512]
    )

    keys = ops.hadamard(jnp.asarray(units["index.k_bf16"]))
    page = 64
    stored = cache.empty_layer(real, 1, len(keys), jnp.float8_e4m3fn)
    zeros = jnp.zeros((1, len(keys), 512), jnp.bfloat16)
    stored = stored.write(jnp.arange(len(keys))[None], zeros, zeros[..., :64], keys[None]).k_index_yqJ
    values, scales = (np.asarray(part[0]).reshape(-1, page * part.shape[-1]) for part in (stored.values, stored.scale))
    pages = np.concatenate([values.view(np.uint8), scales.view(np.uint8)], axis=1)
    np.testing.assert_array_equal(pages, units["index.k_pages_u8"])


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=300))
def test_fp8_rows_of_anything(numbers):
    """Within half a step of E4M3 of the value, relative to the tile's largest; never infinite, never not a number."""
    x = np.pad(np.array(numbers, np.float32), (0, 300 - len(numbers)))
    tiles = [x[i : i + 128] for i in range(0, len(x), 128)]
    got = np.asarray(cache_formats.read(cache_formats.quantize(jnp.asarray(x)), jnp.float32))
    for tile, back in zip(tiles, [got[i : i + 128] for i in range(0, len(x), 128)], strict=True):
        largest = max(float(np.abs(tile).max()), cache_formats.SMALLEST_AMAX)
        step = np.maximum(np.abs(tile.astype(np.float64)) / 16, largest / 448 * 2**-9)
        assert (np.abs(back - tile.astype(np.float64)) <= step * 1.01).all()


def _fp8(units, name: str) -> np.ndarray:
    return units[name].view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_select_keeps_nan():
    """A score that is no number is not dropped: it is seen in what attention makes of it."""
    got = np.asarray(reference.select_topk(jnp.asarray([[[1.0, np.nan, 3.0, -np.inf]]]), 4))[0, 0]
    assert set(got[:3].tolist()) == {0, 1, 2} and got[3] == -1


def test_select_on_ties_and_short_rows():
    """The lower position wins a tie; a query with fewer keys than k gets -1; nothing invisible is ever selected."""
    inf = np.inf
    scores = jnp.asarray([[[0.0, 1, 0, 0, -2], [3, -inf, -inf, -inf, -inf], [-1, -2, -inf, -inf, -inf]]])
    got = np.asarray(reference.select_topk(scores, 3))[0]
    assert [sorted(row.tolist()) for row in got] == [[0, 1, 2], [-1, -1, 0], [-1, 0, 1]]


def test_sparse_attention(units, real):
    """Attention over the selected latents with the real scale, as in float64; -1 is nothing."""
    query, kv = (jnp.asarray(units[name])[None].astype(jnp.float32) for name in ("mla.q_bf16", "kv.dequant_ue8m0_bf16"))
    indices = units["mla.indices"]
    assert (indices < 0).any() and (indices >= 0).any(axis=-1).all()
    latent = real.kv_lora_rank
    identity = jnp.broadcast_to(jnp.eye(latent), (query.shape[2], latent, latent))
    up_projected = SimpleNamespace(cfg=real, w_uk_HNC=identity, w_uv_HPC=identity)
    cache = LayerCache(kv[..., :latent], kv[..., latent:], jnp.zeros((1, kv.shape[1], 1)))
    queries = query[..., :latent], query[..., latent:]
    position = jnp.full(query.shape[:2], kv.shape[1] - 1)
    got = mla.attend_sparse(up_projected, *queries, cache, jnp.asarray(indices)[None], position)
    np.testing.assert_allclose(got[0], units["mla.out_f32"], atol=2e-5)


def test_the_three_forms_agree(real):
    """Expanded, absorbed, and sparse over everything visible, at the real head sizes."""
    heads, tokens, slots = 4, 3, 17
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    layer = SimpleNamespace(cfg=real, w_uk_HNC=random(heads, 128, 512) / 512**0.5, w_uv_HPC=random(heads, 128, 512))
    cache = LayerCache(random(2, slots, 512), random(2, slots, 64), random(2, slots, 1))
    q_c, q_r = random(2, tokens, heads, 128), random(2, tokens, heads, 64)
    position = jnp.asarray([[0, 7, 16], [3, 4, 5]])
    visible = jnp.arange(slots) <= position[..., None]
    expanded = mla.attend_expanded(layer, q_c, q_r, cache, visible)
    absorbed = mla.attend_absorbed(layer, q_c, q_r, cache, visible)
    sparse = mla.attend_sparse(layer, q_c, q_r, cache, select_all(visible), position)
    tolerance = 1e-5 * float(jnp.abs(expanded).max())
    np.testing.assert_allclose(absorbed, expanded, atol=tolerance, rtol=0)
    np.testing.assert_allclose(sparse, expanded, atol=tolerance, rtol=0)
    alone = jnp.einsum("hpc,c->hp", layer.w_uv_HPC, cache.c_kv_yqC[0, 0])
    np.testing.assert_allclose(expanded[0, 0], alone, atol=tolerance, rtol=0)


def test_form_by_cost(real):
    """One query over a long cache is absorbed, a whole prompt is expanded."""
    assert mla.choose_dense(real, 1, 4096) is mla.attend_absorbed
    assert mla.choose_dense(real, 1024, 1024) is mla.attend_expanded


# -------------------------------------------------------------------------------------------------------------- NVFP4

E2M1_OF_CODE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

QUANTIZER_SETS = ["random_bf16", "random_f32", "ties", "scale_ties", "edge", "fp8_source"]
"""What our quantizer must reproduce; `all_zero` (ModelOpt divides by zero) and `ws2_20pct_low` (a scale that does not
fit) are read only."""


def test_every_byte(nvfp4_units):
    """All 256 bytes decode to the two values of the literal table, low nibble first."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    np.testing.assert_array_equal(nvfp4_units["decode.bytes"], codes[0])
    got = _both(codes, np.ones((1, 32), ml_dtypes.float8_e4m3fn), 1.0)[0]
    literal = [[E2M1_OF_CODE[byte & 15], E2M1_OF_CODE[byte >> 4]] for byte in range(256)]
    np.testing.assert_array_equal(got.reshape(256, 2), literal)
    np.testing.assert_array_equal(np.signbit(got.reshape(256, 2)), np.signbit(literal))
    np.testing.assert_array_equal(got[0::2], nvfp4_units["decode.low"])
    np.testing.assert_array_equal(got[1::2], nvfp4_units["decode.high"])


def test_every_scale(nvfp4_units):
    """All E4M3 codes as block scales, over sixteen ones; the two NaNs stand for the largest."""
    scales = np.arange(256, dtype=np.uint8).reshape(1, 256).view(ml_dtypes.float8_e4m3fn)
    got = _both(np.full((1, 256 * 8), 0x22, np.uint8), scales, 1.0)[0].reshape(256, 16)
    want = np.where(np.isnan(nvfp4_units["e4m3.values"]), 448.0, nvfp4_units["e4m3.values"])
    assert np.isnan(nvfp4_units["e4m3.values"]).sum() == 2
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None], got.shape))


def test_nan_scales(nvfp4_units):
    """A NaN scale is 448 where the block is not zero; zero and subnormal scales are what they are."""
    scale = nvfp4_units["nan.weight_scale_u8"].view(ml_dtypes.float8_e4m3fn)
    assert np.isnan(scale.astype(np.float32)).any() and (scale.view(np.uint8) == 0).any()
    got = _both(nvfp4_units["nan.weight"], scale, nvfp4_units["nan.weight_scale_2"])
    np.testing.assert_allclose(got, nvfp4_units["nan.dequant"], rtol=4e-7, atol=0)


@pytest.mark.parametrize("name", QUANTIZER_SETS)
def test_quantizer(nvfp4_units, name):
    """Scale bytes, tensor scale and code magnitudes are ModelOpt's; only the sign of zeros is free."""
    expected = {part: nvfp4_units[f"{name}.modelopt.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")}
    codes, block_scale, tensor_scale = quantize.nvfp4_quantize(nvfp4_units[f"{name}.input"])
    assert tensor_scale.shape == (1, 1) and tensor_scale.dtype == np.float32
    np.testing.assert_array_equal(tensor_scale.reshape(()), expected["weight_scale_2"])
    np.testing.assert_array_equal(block_scale.view(np.uint8), expected["weight_scale"].view(np.uint8))
    np.testing.assert_array_equal(signless_zeros(codes), signless_zeros(expected["weight"]))


@pytest.mark.parametrize("name", [*QUANTIZER_SETS, "ws2_20pct_low"])
def test_dequantizer_of_modelopt(nvfp4_units, name):
    """What ModelOpt stores has the values that ModelOpt's dequantizer gives it."""
    stored = (nvfp4_units[f"{name}.modelopt.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    np.testing.assert_allclose(_both(*stored), nvfp4_units[f"{name}.modelopt.dequant"], rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("name", [*QUANTIZER_SETS, "all_zero"])
def test_dequantizer_of_compressed_tensors(nvfp4_units, name):
    """The global scale of compressed-tensors divides; rounded to bfloat16 the values are the tool's, bit for bit."""
    codes, block_scale, divisor = (
        nvfp4_units[f"{name}.ct.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")
    )
    exact = _both(codes, block_scale, 1 / divisor[0]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(exact.astype(np.float32), nvfp4_units[f"{name}.ct.dequant_bf16"].astype(np.float32))


def test_all_zero_matrix(nvfp4_units):
    """ModelOpt stores NaN scales and a tensor scale of 0 for zeros: they read as zeros, and so does what we store."""
    stored = [nvfp4_units[f"all_zero.modelopt.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")]
    assert np.isnan(stored[1].astype(np.float32)).all() and stored[2] == 0
    zeros = np.zeros((16, 64), np.float32)
    np.testing.assert_array_equal(_both(*stored), zeros)
    codes, block_scale, tensor_scale = quantize.nvfp4_quantize(zeros)
    assert np.isfinite(block_scale.astype(np.float32)).all() and tensor_scale.item() > 0
    np.testing.assert_array_equal(_both(codes, block_scale, tensor_scale), zeros)


def _both(codes, block_scale, tensor_scale) -> np.ndarray:
    """The dequantized matrix, which NumPy and JAX must agree on bit for bit."""
    parts = codes, block_scale, np.asarray(tensor_scale, np.float32).reshape(1, 1)
    on_host = quantize.nvfp4_dequantize(*parts)
    on_device = np.asarray(dequantize(NVFP4(*map(jnp.asarray, parts)), jnp.float32))
    np.testing.assert_array_equal(on_host.view(np.uint32), on_device.view(np.uint32))
    return on_host


def signless_zeros(codes: np.ndarray) -> np.ndarray:
    """Both codes of every byte, minus zero written as zero."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return np.where(pairs == 8, 0, pairs)
