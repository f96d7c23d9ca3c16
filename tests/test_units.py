"""Operators at the real sizes, and NVFP4 as the real tools write it.

The vectors of what does not exist yet are LATER; `test_no_vector_is_forgotten` holds the list to that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv32_jax import mla, ops, quantize
from dsv32_jax.cache import LayerCache
from dsv32_jax.formats import NVFP4, dequantize
from dsv32_jax.indexer import index_scores, select, select_all
from dsv32_jax.moe import gate

LATER = ("actq.", "gemm.", "kv.", "index.k_fp8_u8", "index.k_pages_u8", "index.k_scale", "index.q_fp8_u8",
         "index.q_scale", "index.weights_folded_f32")  # fmt: skip
"""FP8 activations, FP8 products, packed caches and FP8 index keys."""

USED = (
    "gate.bias gate.ids gate.logits gate.weights hadamard.in_bf16 hadamard.out_bf16 index.k_bf16 index.q_bf16 "
    "index.score_f32 index.top64 index.top64_margin index.weights_proj_out_f32 mla.indices mla.lse_natural_f32 mla.out_f32 "
    "mla.q_bf16 rope.interleaved rope.neox rope.x yarn.cos yarn.inv_freq_f64 yarn.positions yarn.sin"
).split()

# ----------------------------------------------------------------------------------------------------------- real sizes


def test_no_vector_is_forgotten(units):
    """Every vector is compared below or belongs to what does not exist yet."""
    assert {name for name in units if not name.startswith(LATER)} == set(USED)


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
    assert real.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert dataclasses.replace(real, rope_scaling=None).softmax_scale == 192**-0.5


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
    ids, weights = np.asarray(routing.expert_BTX)[0], np.asarray(routing.gate_BTX)[0]
    order = np.argsort(ids[1:], axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(ids[1:], order, -1), np.sort(units["gate.ids"][1:], axis=-1))
    expected = np.take_along_axis(units["gate.weights"][1:], np.argsort(units["gate.ids"][1:], axis=-1), -1)
    np.testing.assert_allclose(np.take_along_axis(weights[1:], order, -1), expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), real.routed_scaling_factor, rtol=1e-6)


def test_gate_of_equal_scores(units, real):
    """The first row's scores are all equal: lower groups and lower ids win, each with the same weight."""
    logits = units["gate.logits"][:1]
    assert len(np.unique(logits)) == 1
    for bias in (np.zeros_like(units["gate.bias"]), np.full_like(units["gate.bias"], -0.3)):
        routing = gate(jnp.asarray(logits)[None], jnp.asarray(bias), real)
        assert np.asarray(routing.expert_BTX)[0, 0].tolist() == list(range(8))
        np.testing.assert_allclose(np.asarray(routing.gate_BTX)[0, 0], 2.5 / 8, rtol=1e-6)


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


def test_indexer_scores(units):
    """64 heads of 128 over 192 keys: the scores of the reference and its 64 best keys."""
    queries, keys = (jnp.asarray(units[name])[None].astype(jnp.float32) for name in ("index.q_bf16", "index.k_bf16"))
    weights = jnp.asarray(units["index.weights_proj_out_f32"])[None] * (64 * 128) ** -0.5
    visible = jnp.arange(192) <= jnp.arange(184, 192)[None, :, None]
    want = units["index.score_f32"]
    for hadamard in (lambda x: x, ops.hadamard):
        score = np.asarray(index_scores(hadamard(queries), weights, hadamard(keys), visible))[0]
        seen = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(score), seen)
        np.testing.assert_allclose(score[seen], want[seen], atol=2e-5)
        selected = np.asarray(select(jnp.asarray(score)[None], 64))[0]
        assert units["index.top64_margin"].min() > 4e-5
        np.testing.assert_array_equal(np.sort(selected, axis=-1), np.sort(units["index.top64"], axis=-1))


def test_select_on_ties_and_short_rows():
    """The lower position wins a tie; a query with fewer keys than k gets -1; nothing invisible is ever selected."""
    inf = np.inf
    scores = jnp.asarray([[[0.0, 1, 0, 0, -2], [3, -inf, -inf, -inf, -inf], [-1, -2, -inf, -inf, -inf]]])
    got = np.asarray(select(scores, 3))[0]
    assert [sorted(row.tolist()) for row in got] == [[0, 1, 2], [-1, -1, 0], [-1, 0, 1]]


# -------------------------------------------------------------------------------------------------------- sparse attention


@dataclasses.dataclass(frozen=True)
class Latents:
    """Attention at the real sizes in the form that needs no up-projection: W^UK and W^UV are cut-outs of the identity."""

    cfg: object
    w_uk_HNC: jax.Array
    w_uv_HPC: jax.Array


@pytest.fixture(scope="module")
def latents(units, real):
    """Queries in the latents' space, 16 heads of 512 + 64, over 130 keys, and a 512 x 512 identity as up-projections."""
    cfg = dataclasses.replace(real, qk_nope_head_dim=512, v_head_dim=512, num_attention_heads=16)
    eye = jnp.broadcast_to(jnp.eye(512), (16, 512, 512))
    query = jnp.asarray(units["mla.q_bf16"])[None].astype(jnp.float32)
    return _Scaled(cfg, real.softmax_scale), eye, query[..., :512], query[..., 512:]


class _Scaled:
    """A config whose head sizes are those of the latents, but whose softmax scale is the real one."""

    def __init__(self, cfg, scale):
        self.cfg, self.softmax_scale = cfg, scale


def test_sparse_attention(units, latents, request):
    """Scores, softmax and values over the selected positions, as in float64; -1 and repeats of nothing are ignored."""
    keys = _keys(units)
    if keys is None:
        return
    scaled, eye, q_c, q_r = latents
    layer = Latents(scaled, eye, eye)
    cache = LayerCache(keys[None, :, :512], keys[None, :, 512:], jnp.zeros((1, len(keys), 1)))
    got = mla.sparse(layer, q_c, q_r, cache, jnp.asarray(units["mla.indices"])[None])
    np.testing.assert_allclose(got[0], units["mla.out_f32"], atol=2e-5)


def _keys(units):
    raise NotImplementedError
