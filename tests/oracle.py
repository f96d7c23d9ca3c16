"""The model once more, in NumPy and float64, one token after the other: no cache, no batch, no chunks, no padding.

Written from the papers' formulas for dense float32 weights: what the engine makes, whatever way it goes, is compared
with this.
"""

import numpy as np

from dsv32_jax.model import ops
from dsv32_jax.model.mla import softmax_scale


def logits(model, tokens: list[int]) -> np.ndarray:
    """[T, V]: the logits after each token of one row."""
    cfg = model.cfg
    x = array(model.embed_VD)[tokens]
    for layer in model.layers:
        h = rms(x, layer.attn_norm_D, cfg)
        x = x + attention(layer.mla, layer.indexer, h, cfg)
        h = rms(x, layer.ffn_norm_D, cfg)
        x = x + (moe(layer.ffn, h, cfg) if hasattr(layer.ffn, "router_ED") else mlp(h, *matrices(layer.ffn)))
    return rms(x, model.norm_D, cfg) @ array(model.head_VD).T


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens, each found by computing everything anew; an end token is the last."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits(model, tokens)[-1].argmax()))
        if tokens[-1] in model.cfg.eos_token_id:
            break
    return tokens[len(prompt) :]


def attention(mla, indexer, h, cfg):
    """MLA with keys and values of every head, each token over the index_topk earlier ones of the largest score."""
    count = len(h)
    angle = np.arange(count)[:, None] * ops.rope_frequencies(cfg).astype(np.float64)
    c_q = rms(h @ array(mla.w_dq_QD).T, mla.q_norm_Q, cfg)
    c_kv = rms(h @ array(mla.w_dkv_CD).T, mla.kv_norm_C, cfg)
    q = np.einsum("tq,hnq->thn", c_q, array(mla.w_uq_HNQ))
    q_r = interleaved(np.einsum("tq,hrq->thr", c_q, array(mla.w_qr_HRQ)), angle[:, None])
    k = np.einsum("sc,hnc->shn", c_kv, array(mla.w_uk_HNC))
    k_r = interleaved(h @ array(mla.w_kr_RD).T, angle)
    v = np.einsum("sc,hpc->shp", c_kv, array(mla.w_uv_HPC))
    score = (np.einsum("thn,shn->ths", q, k) + np.einsum("thr,sr->ths", q_r, k_r)) * softmax_scale(cfg)
    weight = np.where(selected(indexer, h, c_q, angle, cfg)[:, None], score, -np.inf)
    weight = np.exp(weight - weight.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return np.einsum("ths,shp,dhp->td", weight, v, array(mla.w_o_DHP))


def selected(indexer, h, c_q, angle, cfg):
    """[T, S] bool. Queries and keys without the Hadamard transform, which changes no product."""
    k = h @ array(indexer.w_k_JD).T
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = halves(k * array(indexer.k_norm_J) + array(indexer.k_bias_J), angle)
    q = halves(np.einsum("tq,ijq->tij", c_q, array(indexer.w_q_IJQ)), angle[:, None])
    w = h @ array(indexer.w_w_ID).T * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    score = np.einsum("ti,tis->ts", w, np.maximum(np.einsum("tij,sj->tis", q, k), 0))
    chosen = np.zeros(score.shape, bool)
    for t in range(len(h)):
        chosen[t, np.argsort(-score[t, : t + 1], kind="stable")[: cfg.index_topk]] = True
    return chosen


def moe(ffn, h, cfg):
    """The shared expert and the routed ones, token by token."""
    out = mlp(h, *(array(w) for w in (ffn.shared_gate_MD, ffn.shared_up_MD, ffn.shared_down_DM)))
    affinity = 1 / (1 + np.exp(-h @ array(ffn.router_ED).T))
    biased = affinity + array(ffn.bias_E)
    size = cfg.n_routed_experts // cfg.n_group
    for t in range(len(h)):
        groups = np.sort(biased[t].reshape(cfg.n_group, size), axis=-1)[:, -2:].sum(-1)
        kept = np.argsort(-groups, kind="stable")[: cfg.topk_group]
        eligible = np.where(np.isin(np.arange(cfg.n_routed_experts) // size, kept), biased[t], -np.inf)
        experts = np.argsort(-eligible, kind="stable")[: cfg.num_experts_per_tok]
        gates = affinity[t, experts] / affinity[t, experts].sum() * cfg.routed_scaling_factor
        for expert, gate in zip(experts, gates, strict=True):
            out[t] += gate * mlp(h[t], *(array(w[expert]) for w in (ffn.w_gate_EMD, ffn.w_up_EMD, ffn.w_down_EDM)))
    return out


def mlp(h, gate, up, down):
    """SwiGLU."""
    a = h @ gate.T
    return (a / (1 + np.exp(-a)) * (h @ up.T)) @ down.T


def matrices(ffn):
    """Those of a dense feed-forward layer."""
    return array(ffn.w_gate_FD), array(ffn.w_up_FD), array(ffn.w_down_DF)


def rms(x, gain, cfg):
    """Root mean square norm."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.rms_norm_eps) * array(gain)


def interleaved(x, angle):
    """Pairs (x[2j], x[2j+1]) turned."""
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def halves(x, angle):
    """Pairs (x[j], x[j + R/2]) of the first R turned."""
    half = angle.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def array(x) -> np.ndarray:
    """In float64."""
    return np.asarray(x, np.float64)
