"""What needs a GPU: kernels against float64, and whole models with kernels against the same without.

python -m tests.gpu          # a few minutes; ends with "all is the same", or an error
"""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import configs
import dsv32_jax as ds
from dsv32_jax.bench.decode_step import make_model
from dsv32_jax.checkpoint.random_weights import leaf_maker
from dsv32_jax.kernels import VARIABLE, dispatch, gpu_attention
from dsv32_jax.model import indexer, mla
from dsv32_jax.model.cache import LayerCache
from dsv32_jax.model.model import build
from dsv32_jax.quantization import cache_formats, quantize
from dsv32_jax.quantization.formats import NVFP4, Fp8Block

SIZES = (
    (1, 1, 1, 16), (2, 3, 17, 80), (3, 8, 96, 256), (2, 9, 33, 1536), (1, 16, 130, 7168), (2, 40, 64, 512),
    (1, 64, 70, 2048), (2, 100, 65, 384), (1, 256, 128, 1024), (1, 300, 257, 768), (4, 2, 512, 128),
)  # fmt: skip
"""Blocks, rows, outputs, inputs."""

SMALL = {
    **{"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 256},
    **{"first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "n_routed_experts": 16},
    **{"num_attention_heads": 8, "q_lora_rank": 128, "index_n_heads": 8},
}
"""Sizes of whole models that differ from DeepSeek-V3.2."""


def small_config(layers: int) -> ds.Config:
    """DeepSeek-V3.2's config with SMALL sizes and `layers` layers, the first of them dense."""
    cfg = ds.Config.from_json(configs.path("deepseek_v32"))
    return dataclasses.replace(cfg, **SMALL, num_hidden_layers=layers)


def bank(kind: str, rng, many: int, out: int, size: int):
    """Any bytes but FP8's NaN, and the values on the host."""
    if kind == "nvfp4":
        codes = rng.integers(0, 256, (many, out, size // 2), np.uint8)
        scales = rng.integers(0, 256, (many, out, size // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
        tensor = rng.random((many, 1, 1), np.float32)
        return NVFP4(*map(jnp.asarray, (codes, scales, tensor))), quantize.nvfp4_dequantize(codes, scales, tensor)
    values = rng.integers(0, 256, (many, out, size), np.uint8)
    values[values & 127 == 127] = 0
    values = values.view(ml_dtypes.float8_e4m3fn)
    scales = rng.choice([0.37, 0.5, 2.0**-9], (many, out, -(-size // 128))).astype(np.float32)
    return Fp8Block(jnp.asarray(values), jnp.asarray(scales)), quantize.fp8_dequantize(values, scales)


def kernels() -> None:
    """Every size, in both formats and dtypes."""
    rng = np.random.default_rng(0)
    for kind in ("nvfp4", "fp8"):
        for n, b, out, size in SIZES:
            size = -(-size // 128) * 128 if kind == "fp8" else size
            w, plain = bank(kind, rng, 3, out, size)
            assert "cuda" in dispatch.find_kernels(w, 1), dispatch.describe()
            expert = rng.integers(-1, 4, n).astype(np.int32)
            matrices = np.stack([plain[e] if 0 <= e < 3 else 0 * plain[0] for e in expert]).astype(np.float64)
            for dtype in (jnp.bfloat16, jnp.float32):
                x = jnp.asarray(rng.standard_normal((n, b, size)), dtype)
                got = np.asarray(jax.jit(dispatch.multiply_blocks)(x, expert, w), np.float64)
                of = np.asarray(x, np.float64)
                want = np.einsum("nbz,noz->nbo", of, matrices)
                most = np.einsum("nbz,noz->nbo", abs(of), abs(matrices)).max(axis=-1, keepdims=True)
                error = (np.abs(got - want) / (most + 1e-30)).max()
                print(f"{kind} {np.dtype(dtype)} {n} x {b} rows, {size} -> {out}: {error:.1e}", flush=True)
                assert error < (5e-6 if b > 128 else 1e-6)


def attention() -> None:
    """Index scores, selection and sparse attention against their references, in bfloat16 and FP8 caches: any lengths,
    ties, NaN and -inf among the scores."""
    rng = np.random.default_rng(2)
    sizes = ((1, 1, 70, 64), (2, 3, 301, 64), (3, 5, 300, 64), (2, 33, 9000, 512), (1, 4, 5000, 2048))
    for batch, tokens, slots, topk in sizes:
        position_BT = jnp.asarray(rng.integers(0, slots, (batch, tokens)), jnp.int32).at[0, 0].set(slots - 1)
        q_BTIJ, w_BTI = (jnp.asarray(rng.standard_normal((batch, tokens, *n)), jnp.float32) for n in ((64, 128), (64,)))
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
            shape, table_Bd = pages(rng, batch, slots)
            parts = ((512, dtype), (64, jnp.bfloat16), (128, dtype))
            cache = LayerCache(*(rows(rng, (*shape, size), stored) for size, stored in parts), table_Bd=table_Bd)
            operands = q_BTIJ.astype(jnp.bfloat16), w_BTI, cache, position_BT
            want = jax.jit(indexer.score_rows)(*operands)[..., :slots]
            operands = *operands[:2], cache.k_index_yqJ, table_Bd, position_BT
            got = jax.jit(gpu_attention.index_scores)(*operands)[..., :slots]
            same(f"index scores {np.dtype(dtype)} {batch} x {tokens} x {slots}", got, want, 1e-5)
            for score_BTS in (want, jnp.round(want / 50), want.at[..., 1::5].set(jnp.nan).at[..., 2::7].set(-jnp.inf)):
                visible = jnp.arange(slots) <= position_BT[..., None]
                score_BTS = jnp.where(visible, score_BTS, -jnp.inf)
                selected_BTk = jax.jit(gpu_attention.select_topk, static_argnums=2)(score_BTS, position_BT, topk)
                largest = np.where(np.isnan(score_BTS), np.inf, score_BTS)
                order = np.argsort(-largest, axis=-1, kind="stable")[..., :topk]
                reached = np.take_along_axis(largest, order, axis=-1) > -np.inf
                np.testing.assert_array_equal(np.sort(selected_BTk), np.sort(np.where(reached, order, -1)))
            q_c, q_r = (jnp.asarray(rng.standard_normal((batch, tokens, 128, n)), jnp.bfloat16) for n in (512, 64))
            operands = q_c, q_r, cache.c_kv_yqC, cache.k_r_yqR, cache.slots(selected_BTk), position_BT
            scale = 576**-0.5
            got, want = (jax.jit(partial(f, scale))(*operands) for f in (gpu_attention.attend, mla.attend_selected))
            same(f"attention {np.dtype(dtype)} {batch} x {tokens} over {topk} of {slots}", got, want, 1e-2)


def pages(rng, batch: int, slots: int) -> tuple[tuple[int, int], jax.Array | None]:
    """The shape of the pages of rows of `slots` tokens, and their table: pages of 64 in any order, or one a row."""
    blocks = -(-slots // 64)
    if slots % 2:
        return (batch, slots), None
    table = rng.permutation(batch * blocks + 3)[: batch * blocks].reshape(batch, blocks)
    return (batch * blocks + 3, 64), jnp.asarray(table, jnp.int32)


def rows(rng, shape: tuple[int, ...], dtype):
    """Random cache rows."""
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return cache_formats.encode_like(cache_formats.empty(shape, dtype), x)


def same(what: str, got, want, tolerance: float) -> None:
    """Fail unless the largest difference is within `tolerance` of the largest value and -inf is in the same places."""
    got, want = np.asarray(got), np.asarray(want)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    error = np.abs(got[finite] - want[finite]).max() / np.abs(want[finite]).max()
    print(f"{what}: {error:.1e}", flush=True)
    assert error < tolerance


def models(mesh: str | None) -> None:
    """The largest difference of logits between kernels and XLA's own products, and greedy tokens."""
    cfg = small_config(2)
    where = None if mesh is None else ds.mesh(mesh)
    tokens = np.random.default_rng(1).integers(3, cfg.vocab_size, (4, 40), np.int32)
    model = build(cfg, jnp.float32, leaf_maker(cfg, jnp.float32, mesh=where), mesh=where)
    found = {}
    for kernels in ("auto", "xla"):
        os.environ[VARIABLE] = kernels
        jax.clear_caches()
        logits = np.asarray(ds.forward(model, tokens).logits)
        made = ds.generate(model, tokens.tolist(), max_new_tokens=8).tokens
        found[kernels] = (logits, made)
    (a, made), (b, other) = found["auto"], found["xla"]
    off = np.abs(a - b).max() / np.abs(b).max()
    print(f"mesh {mesh}: logits differ by {off:.1e} of the largest; greedy tokens: {made == other}")
    assert off < 1e-4 and made == other


def interleaved() -> None:
    """The tokens of a prompt read in chunks between the decode steps of other rows, against the prompt alone: programs
    whose buffers move from call to call. Two layers at true dimensions."""
    cfg = dataclasses.replace(ds.Config.from_json(configs.path("deepseek_v32")), num_hidden_layers=2)
    model = make_model(dataclasses.replace(cfg, num_nextn_predict_layers=0))
    rng = np.random.default_rng(2)
    long, *short = (rng.integers(3, cfg.vocab_size, size).tolist() for size in (6000, *[8] * 8))
    with ds.engine(model, rows=9, capacity=9216) as engine:
        (alone,) = engine.submit(long, max_new_tokens=1)
    with ds.engine(model, rows=9, capacity=9216) as engine:
        running = [engine.submit(prompt, max_new_tokens=4000, min_new_tokens=4000) for prompt in short]
        for stream in running:
            next(stream)
        (beside,) = engine.submit(long, max_new_tokens=1)
        for stream in running:
            stream.close()
    print(f"{len(long)} tokens: log-probability {alone.logprob:.3f} alone, {beside.logprob:.3f} between steps")
    assert abs(alone.logprob - beside.logprob) < 0.1


if __name__ == "__main__":
    assert jax.default_backend() == "gpu"
    print(dispatch.describe())
    kernels()
    attention()
    if jax.device_count() == 1:
        interleaved()
        models(None)
    else:
        for axis in ("expert", "model", "data"):
            models(f"{axis}={jax.device_count()}")
    print("all is the same")
