"""The model's forward pass as training needs it: whole sequences, masks in place of gathers, and the indexer's loss.

Projections, norms, rotations, the index scores and the gate are the library's own. Two things are computed otherwise,
because a step over 32,768 tokens would wait for them: sparse attention masks the positions that are not selected
instead of gathering those that are, and all experts see all tokens, those that a token does not use with weight 0.
`check.py` compares the result with `dsv32_jax.forward`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.layout import COPIES
from dsv32_jax.model.block import MLP, Block
from dsv32_jax.model.experts import apply_shared_expert
from dsv32_jax.model.indexer import Indexer, index_scores
from dsv32_jax.model.mla import MLA, softmax_scale
from dsv32_jax.model.model import Model, build
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.ops import dot, einsum, einsum32, rms_norm, rotation


class Phase(NamedTuple):
    """What attention does: `aligned`, the indexer learns; `sparse`, only the tokens that it selects are visible."""

    aligned: bool
    sparse: bool


class Pass(NamedTuple):
    """float32 logits of the next token and, from MTP, of the one after it; per layer, MTP's last: the indexer's loss,
    and how many tokens each expert got (None in a dense layer)."""

    logits_BTV: jax.Array
    draft_BTV: jax.Array
    divergence: list[jax.Array]
    load: list[jax.Array | None]


def model_of(weights: dict[str, jax.Array], cfg, dtype) -> Model:
    """The model of float32 master weights (layout path -> array): matrices in `dtype`, gains and biases as they are."""

    def leaf(path: str) -> jax.Array:
        w = weights[COPIES.get(path, path)]
        return w.astype(dtype) if w.ndim > 1 else w

    return build(cfg, dtype, leaf)


def run(model: Model, tokens_BT: jax.Array, phase: Phase) -> Pass:
    """T + 1 tokens a row give the logits of T positions: the last one is only ever embedded by MTP."""
    cfg, now_BT, next_BT = model.cfg, tokens_BT[:, :-1], tokens_BT[:, 1:]
    position_BT = jnp.arange(now_BT.shape[1], dtype=jnp.int32)[None]
    angles = rotation(position_BT, cfg)
    divergence, load = [], []

    def through(block: Block, x_BTD: jax.Array) -> jax.Array:
        x_BTD, layer_divergence, layer_load = layer(block, x_BTD, angles, phase)
        divergence.append(layer_divergence)
        load.append(layer_load)
        return x_BTD

    def normed(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
        return rms_norm(x_BTD.astype(jnp.float32), gain_D, cfg.rms_norm_eps).astype(model.dtype)

    x_BTD = model.embed_VD[now_BT].astype(jnp.float32)
    for block in model.layers:
        x_BTD = through(block, x_BTD)
    h_BTD = normed(x_BTD, model.norm_D)

    mtp = model.mtp
    assert mtp is not None
    e_BTD, h_mtp_BTD = normed(mtp.embed_VD[next_BT], mtp.e_norm_D), normed(h_BTD, mtp.h_norm_D)
    u_BTA = einsum32("BTD,AD->BTA", e_BTD, mtp.w_e_AD) + einsum32("BTD,AD->BTA", h_mtp_BTD, mtp.w_h_AD)
    z_BTD = normed(through(mtp.block, u_BTA), mtp.norm_D)
    return Pass(model.logits(h_BTD), mtp.logits(z_BTD), divergence, load)


def layer(block: Block, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], phase: Phase):
    """The stream after `block`, its indexer's loss, its experts' load."""
    eps = block.cfg.rms_norm_eps
    h_BTD = rms_norm(x_BTD, block.attn_norm_D, eps).astype(block.dtype)
    a_BTD, divergence = attention(block.mla, block.indexer, h_BTD, *angles, phase)
    mid_BTD = x_BTD + a_BTD.astype(jnp.float32)
    f_BTD, load = feed_forward(block.ffn, rms_norm(mid_BTD, block.ffn_norm_D, eps).astype(block.dtype))
    return mid_BTD + f_BTD, divergence, load


def attention(mla: MLA, indexer: Indexer, h_BTD: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array, phase: Phase):
    """Attention of all heads, and KL(attention || indexer) over what was visible.

    The indexer learns from detached inputs, and by this loss alone (DeepSeek-V3.2, section 2.1).
    """
    c_q_BTQ = mla.latent_query(h_BTD)
    q_c_BTHN, q_r_BTHR = mla.queries(c_q_BTQ, cos_BTr, sin_BTr)
    c_kv_BSC, k_r_BSR = mla.keys(h_BTD, cos_BTr, sin_BTr)
    visible_1TS = jnp.tril(jnp.ones((h_BTD.shape[1],) * 2, bool))[None]
    index_BTS = jnp.zeros(())
    if phase.aligned:
        index_BTS = _index(indexer, *jax.lax.stop_gradient((h_BTD, c_q_BTQ)), cos_BTr, sin_BTr, visible_1TS)
    visible_BTS = visible_1TS & _largest(index_BTS, mla.cfg.index_topk) if phase.sparse else visible_1TS

    k_c_BSHN, v_BSHP = einsum("BSC,HNC->BSHN", c_kv_BSC, mla.w_uk_HNC), einsum("BSC,HPC->BSHP", c_kv_BSC, mla.w_uv_HPC)
    score_BHTS = dot("BTHN,BSHN->BHTS", q_c_BTHN, k_c_BSHN) + dot("BTHR,BSR->BHTS", q_r_BTHR, k_r_BSR)
    score_BHTS = jnp.where(visible_BTS[:, None], score_BHTS * softmax_scale(mla.cfg), -jnp.inf)
    weight_BHTS = jax.nn.softmax(score_BHTS, axis=-1)
    o_BTHP = dot("BHTS,BSHP->BTHP", weight_BHTS.astype(v_BSHP.dtype), v_BSHP).astype(v_BSHP.dtype)
    if not phase.aligned:
        return mla.output(o_BTHP), jnp.zeros(())
    return mla.output(o_BTHP), _divergence(jax.lax.stop_gradient(weight_BHTS).mean(axis=1), index_BTS, visible_BTS)


def _index(indexer: Indexer, h_BTD, c_q_BTQ, cos_BTr, sin_BTr, visible_1TS) -> jax.Array:
    queries = indexer.queries(c_q_BTQ, cos_BTr, sin_BTr)
    return index_scores(queries, indexer.head_weights(h_BTD), indexer.keys(h_BTD, cos_BTr, sin_BTr), visible_1TS)


def _largest(score_BTS: jax.Array, count: int) -> jax.Array:
    """Whether a score is among the `count` largest of its row (more where the last ones are equal)."""
    least_BT1 = jax.lax.top_k(jax.lax.stop_gradient(score_BTS), count)[0][..., -1:]
    return score_BTS >= least_BT1


def _divergence(target_BTS: jax.Array, index_BTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Mean over queries of KL(target || softmax(index)) over the visible positions."""
    log_index_BTS = jax.nn.log_softmax(jnp.where(visible_BTS, index_BTS, -1e30), axis=-1)
    log_target_BTS = jnp.log(jnp.maximum(target_BTS, 1e-30))
    return jnp.sum(target_BTS * jnp.where(visible_BTS, log_target_BTS - log_index_BTS, 0), axis=-1).mean()


def feed_forward(ffn: MLP | MoE, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """float32 output and the tokens of each expert."""
    if isinstance(ffn, MLP):
        return ffn(h_BTD)
    routing = ffn.route(h_BTD)
    chosen_BTXE = jax.nn.one_hot(routing.expert_BTX, ffn.cfg.n_routed_experts, dtype=jnp.float32)
    gate_BTE = jnp.einsum("BTX,BTXE->BTE", routing.gate_BTX, chosen_BTXE)
    hidden_BTEM = jax.nn.silu(einsum("BTD,EMD->BTEM", h_BTD, ffn.w_gate_EMD).astype(jnp.float32))
    hidden_BTEM *= einsum("BTD,EMD->BTEM", h_BTD, ffn.w_up_EMD).astype(jnp.float32) * gate_BTE[..., None]
    routed_BTD = einsum32("BTEM,DEM->BTD", hidden_BTEM.astype(h_BTD.dtype), ffn.w_down_EDM.swapaxes(0, 1))
    shared_tD = apply_shared_expert(h_BTD.reshape(-1, h_BTD.shape[-1]), *ffn.shared)
    return routed_BTD + shared_tD.reshape(h_BTD.shape), chosen_BTXE.sum(axis=(0, 1, 2))
