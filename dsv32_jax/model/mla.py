"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one latent c^KV a token instead of a key and a value for each head. Three functions of one signature
attend over it: `attend_expanded` computes keys and values from the latents, as in the paper; `attend_absorbed` moves
W^UK to the query and W^UV to the output, so that all heads attend to the latents themselves; `attend_sparse` does so
over the positions that the indexer selected.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import Config
from ..kernels import dispatch
from ..parallel.sharding import map_rows, map_rows_and_heads
from ..quantization.cache_formats import Rows, read_at
from ..quantization.formats import Weight
from .cache import LayerCache
from .ops import dot, einsum, einsum32, rms_norm, rotate_interleaved
from .summary import Module


@dataclasses.dataclass(eq=False, repr=False)
class MLA(Module):
    """The paper's matrices: D down-projection, U up-projection, R rotated part; Q query, K key, V value."""

    cfg: Config
    w_dq_QD: Weight = nnx.data()
    q_norm_Q: jax.Array = nnx.data()
    w_uq_HNQ: Weight = nnx.data()
    w_qr_HRQ: Weight = nnx.data()
    w_dkv_CD: Weight = nnx.data()
    kv_norm_C: jax.Array = nnx.data()
    w_kr_RD: Weight = nnx.data()
    w_uk_HNC: Weight = nnx.data()
    w_uv_HPC: Weight = nnx.data()
    w_o_DHP: Weight = nnx.data()

    @jax.named_scope("projections")
    def latent_query(self, h_BTD: jax.Array) -> jax.Array:
        """Return c^Q [B, T, Q], from which the queries of MLA and of the indexer are computed."""
        c_q_BTQ = rms_norm(einsum32("BTD,QD->BTQ", h_BTD, self.w_dq_QD), self.q_norm_Q, self.cfg.rms_norm_eps)
        return c_q_BTQ.astype(h_BTD.dtype)

    @jax.named_scope("projections")
    def queries(self, c_q_BTQ: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the content part q^C [B, T, H, N] and the rotated part q^R [B, T, H, R] of each head's query."""
        q_c_BTHN = einsum("BTQ,HNQ->BTHN", c_q_BTQ, self.w_uq_HNQ)
        q_r_BTHR = einsum32("BTQ,HRQ->BTHR", c_q_BTQ, self.w_qr_HRQ)
        q_r_BTHR = rotate_interleaved(q_r_BTHR, cos_BTr[:, :, None], sin_BTr[:, :, None])
        return q_c_BTHN, q_r_BTHR.astype(c_q_BTQ.dtype)

    @jax.named_scope("projections")
    def keys(self, h_BTD: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what is cached: the latent c^KV [B, T, C] and the rotated key k^R [B, T, R]."""
        c_kv_BTC = rms_norm(einsum32("BTD,CD->BTC", h_BTD, self.w_dkv_CD), self.kv_norm_C, self.cfg.rms_norm_eps)
        k_r_BTR = rotate_interleaved(einsum32("BTD,RD->BTR", h_BTD, self.w_kr_RD), cos_BTr, sin_BTr)
        return c_kv_BTC.astype(h_BTD.dtype), k_r_BTR.astype(h_BTD.dtype)

    @jax.named_scope("projections")
    def output(self, o_BTHP: jax.Array) -> jax.Array:
        """Project the heads' outputs to [B, T, D]."""
        return einsum("BTHP,DHP->BTD", o_BTHP, self.w_o_DHP)


@jax.named_scope("attention")
def attend_expanded(
    mla: MLA, q_c_BTHN: jax.Array, q_r_BTHR: jax.Array, cache: LayerCache, visible_BTS: jax.Array
) -> jax.Array:
    """Attend with a key and a value of each head for every cached token. Returns o [B, T, H, P]."""
    c_kv_BSC, k_r_BSR = cache.latents(q_c_BTHN.dtype)
    k_c_BSHN = einsum("BSC,HNC->BSHN", c_kv_BSC, mla.w_uk_HNC)
    v_BSHP = einsum("BSC,HPC->BSHP", c_kv_BSC, mla.w_uv_HPC)
    score_BTHS = dot("BTHN,BSHN->BTHS", q_c_BTHN, k_c_BSHN) + dot("BTHR,BSR->BTHS", q_r_BTHR, k_r_BSR)
    weight_BTHS = _softmax(softmax_scale(mla.cfg), score_BTHS, visible_BTS).astype(v_BSHP.dtype)
    return dot("BTHS,BSHP->BTHP", weight_BTHS, v_BSHP).astype(v_BSHP.dtype)


@jax.named_scope("attention")
def attend_absorbed(
    mla: MLA, q_c_BTHN: jax.Array, q_r_BTHR: jax.Array, cache: LayerCache, visible_BTS: jax.Array
) -> jax.Array:
    """Attend with queries and outputs in the latents' space. Returns o [B, T, H, P]."""
    weight_BTHS, c_kv_BSC = absorbed_weights(mla, q_c_BTHN, q_r_BTHR, cache, visible_BTS)
    o_BTHC = dot("BTHS,BSC->BTHC", weight_BTHS.astype(q_c_BTHN.dtype), c_kv_BSC).astype(q_c_BTHN.dtype)
    return einsum("BTHC,HPC->BTHP", o_BTHC, mla.w_uv_HPC)


def absorbed_weights(
    mla: MLA, q_c_BTHN: jax.Array, q_r_BTHR: jax.Array, cache: LayerCache, visible_BTS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the attention weights, float32 [B, T, H, S], and the latents [B, S, C]."""
    c_kv_BSC, k_r_BSR = cache.latents(q_c_BTHN.dtype)
    q_c_BTHC = einsum("BTHN,HNC->BTHC", q_c_BTHN, mla.w_uk_HNC)
    score_BTHS = dot("BTHC,BSC->BTHS", q_c_BTHC, c_kv_BSC) + dot("BTHR,BSR->BTHS", q_r_BTHR, k_r_BSR)
    return _softmax(softmax_scale(mla.cfg), score_BTHS, visible_BTS), c_kv_BSC


@jax.named_scope("attention")
def attend_sparse(
    mla: MLA,
    q_c_BTHN: jax.Array,
    q_r_BTHR: jax.Array,
    cache: LayerCache,
    selected_BTk: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Attend to each query's selected positions only, in the latents' space. Returns o [B, T, H, P].

    The position -1 is none; all of them stand behind the selected ones.
    """
    q_c_BTHC = einsum("BTHN,HNC->BTHC", q_c_BTHN, mla.w_uk_HNC)
    scale = softmax_scale(mla.cfg)
    kernels = find_sparse_kernels(mla.cfg, q_c_BTHN.dtype, cache)
    attend = partial(attend_selected, scale)
    if kernels:
        attend = dispatch.differentiable(attend, {name: partial(kernel, scale) for name, kernel in kernels.items()})
    attend = map_rows_and_heads(attend, ("BTH", "BTH", "y", "y", "BT", "BT"), "BTH")
    slot_BTk = map_rows(LayerCache.slots)(cache, selected_BTk)
    o_BTHC = attend(q_c_BTHC, q_r_BTHR, cache.c_kv_yqC, cache.k_r_yqR, slot_BTk, position_BT)
    return einsum("BTHC,HPC->BTHP", o_BTHC, mla.w_uv_HPC)


def find_sparse_kernels(cfg: Config, dtype, cache: LayerCache) -> dict[str, dispatch.Kernel]:
    """Return the kernel that attends over this cache under the name of its platform, or nothing."""
    return dispatch.find_attend(dtype, (cache.c_kv_yqC, cache.k_r_yqR), (cfg.kv_lora_rank, cfg.qk_rope_head_dim))


def attend_selected(
    softmax_scale: float,
    q_c_BTHC: jax.Array,
    q_r_BTHR: jax.Array,
    c_kv_yqC: Rows,
    k_r_yqR: Rows,
    slot_BTk: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Return each head's weighted sum of the latents in its slots, [B, T, H, C] in the queries' dtype.

    A query has at most position + 1 slots, which bounds the work of a kernel; the reference looks at all.
    """
    operands = (q_c_BTHC, q_r_BTHR, c_kv_yqC, k_r_yqR, slot_BTk)
    weight_BTHk, c_kv_BTkC = selected_weights(softmax_scale, *operands)
    return dot("BTHk,BTkC->BTHC", weight_BTHk.astype(q_c_BTHC.dtype), c_kv_BTkC).astype(q_c_BTHC.dtype)


def selected_weights(
    softmax_scale: float,
    q_c_BTHC: jax.Array,
    q_r_BTHR: jax.Array,
    c_kv_yqC: Rows,
    k_r_yqR: Rows,
    slot_BTk: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the weight of each slot, float32 [B, T, H, k], and the latents there [B, T, k, C].

    The many latents come first in the products: the other order takes XLA's CPU backend several times as long.
    """
    c_kv_BTkC, k_r_BTkR = (read_at(rows, slot_BTk, q_c_BTHC.dtype) for rows in (c_kv_yqC, k_r_yqR))
    score_BTkH = dot("BTkC,BTHC->BTkH", c_kv_BTkC, q_c_BTHC) + dot("BTkR,BTHR->BTkH", k_r_BTkR, q_r_BTHR)
    return _softmax(softmax_scale, jnp.swapaxes(score_BTkH, 2, 3), slot_BTk >= 0), c_kv_BTkC


def sparse_weights(
    mla: MLA, q_c_BTHN: jax.Array, q_r_BTHR: jax.Array, cache: LayerCache, selected_BTk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `selected_weights` of queries that are not absorbed yet."""
    q_c_BTHC = einsum("BTHN,HNC->BTHC", q_c_BTHN, mla.w_uk_HNC)
    weigh = map_rows_and_heads(
        partial(selected_weights, softmax_scale(mla.cfg)), ("BTH", "BTH", "y", "y", "BT"), ("BTH", "BT")
    )
    slot_BTk = map_rows(LayerCache.slots)(cache, selected_BTk)
    return weigh(q_c_BTHC, q_r_BTHR, cache.c_kv_yqC, cache.k_r_yqR, slot_BTk)


def choose_dense(cfg: Config, tokens: int, capacity: int):
    """Return `attend_expanded` or `attend_absorbed`, whichever multiplies less for these sizes."""
    latent, head = cfg.kv_lora_rank, cfg.qk_nope_head_dim + cfg.v_head_dim
    cost_expanded = capacity * latent * head + tokens * capacity * (head + cfg.qk_rope_head_dim)
    cost_absorbed = tokens * latent * head + tokens * capacity * (2 * latent + cfg.qk_rope_head_dim)
    return attend_expanded if cost_expanded < cost_absorbed else attend_absorbed


def softmax_scale(cfg: Config) -> float:
    """Return (N + R)^-1/2, with YaRN times mscale squared."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    yarn = cfg.rope_scaling
    if yarn is None or yarn.factor <= 1:
        return scale
    return scale * (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2


def _softmax(softmax_scale: float, score_BTHs: jax.Array, visible_BTs: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(visible_BTs[:, :, None], score_BTHs * softmax_scale, -jnp.inf), axis=-1)
