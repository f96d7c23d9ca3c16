"""The golden cases from conversion to tokens: what the reference implementations computed is what this code computes.

Tolerances are those of tests/data/README.md's sources; sets, ids and tokens are equal. Every case is converted to an
Orbax checkpoint and loaded from it first.
"""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import dsv32_jax as ds
from dsv32_jax.layout import leaves
from dsv32_jax.model import cache
from dsv32_jax.model.ops import hadamard, rms_norm
from dsv32_jax.quantization import quantize
from dsv32_jax.quantization.formats import dequantize
from tests import golden
from tests.golden import having, routed, sets
from tests.test_units import E2M1_OF_CODE, signless_zeros

LOGITS = HIDDEN = 1e-3
GATES = 1e-5

COMPARED = (
    r"input_ids|logits|final_norm|hidden\.\d+|decode\.(gen_ids|logits|L\d+\.idx_topk)|dequant(_bf16)?\..*",
    r"L\d+\.(idx_(topk|scores|w|k|q_last4)|gate_(ids|weights)|attn_out|(kv_latent|k_pe)(_last32)?)",
    r"mtp\.(logits|draft_ids|next_ids|idx_topk|gate_ids|gate_weights|prev_hidden|eh_proj_out)",
    r"(nvfp4\.)?bf16w\.((mtp|decode|L\d+)\.)?(logits|idx_topk|gate_ids|gen_ids|draft_ids)",
    r"nvfp4\.((decode|L\d+)\.)?(logits|idx_topk|gate_ids|gen_ids)|fp8sim\.(hidden\.1|logits)",
)
"""The golden tensors that the tests below compare."""

NOT_COMPARED = {
    r"L\d+\.(idx|gate)_margin|decode\.top2_gap": "how far the reference was from choosing otherwise",
    r"bf16\.logits": "another bfloat16 run: ours is compared with the float32 logits",
    r"mtp\.block_out": "the stream before the norm, which the MTP layer does not hand out; its logits are compared",
    r"mtp\.logits_pos0_embed_zeroed": "a variant of another engine",
    r"nvfp4\.dequant\..*": "the exact bytes and all probes are compared",
    r"fp8sim\..*": "inside of FP8 products, which are not computed here; logits are compared",
}

# ------------------------------------------------------------------------------------------------------------ weights


def test_no_tensor_is_forgotten(case):
    """Every golden tensor is compared or not for a reason; what every case must have is there."""
    compared = [name for name in case.tensors if any(re.fullmatch(pattern, name) for pattern in COMPARED)]
    others = set(case.tensors) - set(compared)
    assert {name for name in others if not any(re.fullmatch(pattern, name) for pattern in NOT_COMPARED)} == set()
    assert {"input_ids", "logits", "hidden.1", "L0.idx_topk", "L1.gate_ids", "L1.gate_weights"} <= set(compared)
    assert {"decode.gen_ids", "decode.logits", "decode.L0.idx_topk"} <= set(compared)
    if "golden_nvfp4" not in str(case.folder):
        assert {"L0.idx_scores", "L0.idx_k", "L0.idx_w", "L0.idx_q_last4"} <= set(compared)


def test_every_matrix_is_what_the_checkpoint_stores(case):
    """Each leaf, dequantized in float32, equals the tensor it was cut from, element for element."""
    found = flat(case.model)
    table = leaves(case.cfg)
    assert set(found) == {leaf.path for leaf in table}
    for leaf in table:
        got = np.asarray(dequantize(found[leaf.path], jnp.float32))
        assert got.shape == leaf.shape, leaf.path
        for expert, name in enumerate(leaf.sources):
            want = cut(leaf, literal(case.stored, name))
            np.testing.assert_array_max_ulp(got[expert] if leaf.stacked else got, want, maxulp=3, dtype=np.float32)


@having("dequant.")
def test_dequantized_matrices_are_the_tools(case):
    """The quantizer's own dequantizer gives the same values."""
    found, table = flat(case.model), leaves(case.cfg)
    for name in [name for name in case.tensors if name.startswith("dequant.")]:
        want = case[name].astype(np.float32)
        got = assembled(found, table, name.removeprefix("dequant."))
        case.record("dequantized (relative)", np.abs(got / np.where(want == 0, 1, want) - (want != 0)).max())
        np.testing.assert_allclose(got, want, rtol=4e-7, atol=0)


@having("dequant_bf16.")
def test_dequantized_matrices_rounded_are_the_tools(case):
    """compressed-tensors hands out bfloat16: ours rounds to the same bits."""
    found, table = flat(case.model), leaves(case.cfg)
    for name in [name for name in case.tensors if name.startswith("dequant_bf16.")]:
        got = assembled(found, table, name.removeprefix("dequant_bf16.")).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(got.view(np.uint16), case[name].view(np.uint16))


def test_probes_of_all_quantized_matrices(case):
    """Three sums over every quantized matrix, in float64, are what they were when the case was made."""
    probes = case.readme.get("probes", {}).get("values", {})
    model = nvfp4_of(case).model if nvfp4_prefix(case) else case.model
    assert bool(probes) == ("golden_nvfp4" in str(case.folder))
    found, table = flat(model), leaves(case.cfg)
    for name, want in probes.items():
        w = assembled(found, table, name).astype(np.float64)
        weights = np.cos(np.arange(w.shape[0]))[:, None] * np.cos(np.arange(w.shape[1]))
        got = [w.sum(), np.abs(w).sum(), (w * weights).sum()]
        np.testing.assert_allclose(got, want, rtol=4e-7, atol=4e-7 * want[1], err_msg=name)


# ------------------------------------------------------------------------------------------------------------ prefill


def test_prefill(case):
    """Logits, hidden states and every layer's selection and routing over the whole prompt."""
    for layer, want in case.layers("hidden.{}").items():
        if layer < len(case.prefill.seen):
            case.close("hidden", case.prefill.seen[layer].x_BTD, want, HIDDEN)
        else:
            last = rms_norm(jnp.asarray(want), case.model.norm_D, case.cfg.rms_norm_eps)
            case.close("hidden, last, normed", case.prefill.hidden, last, HIDDEN)
    if "final_norm" in case.tensors:
        case.close("hidden, last, normed", case.prefill.hidden, case["final_norm"], HIDDEN)
    for layer, want in case.layers("L{}.idx_topk").items():
        assert sets(case.prefill.seen[layer].selected_BTk) == sets(want), f"layer {layer} selects other positions"
    for layer, want in case.layers("L{}.gate_ids").items():
        ids, weights = routed(case.prefill.seen[layer].routing)
        np.testing.assert_array_equal(ids, want, err_msg=f"experts of layer {layer}")
        if f"L{layer}.gate_weights" in case.tensors:
            case.close("gate weights", weights, case[f"L{layer}.gate_weights"], GATES)
    case.close("logits", case.prefill.logits, case["logits"], LOGITS)
    assert case.prefill.logits.dtype == jnp.float32


@having("L0.idx_scores")
def test_indexer(case):
    """Scores, head weights, queries and keys of the lightning indexer."""
    for layer, want in case.layers("L{}.idx_scores").items():
        got = np.asarray(case.prefill.seen[layer].index_score_BTS)[..., : want.shape[-1]]
        visible = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), visible)
        case.close("index scores", got[visible], want[visible], 1e-3)
    for layer, want in case.layers("L{}.idx_w").items():
        case.close("index weights", case.index_inputs[layer][1], want, 1e-4)
    for layer, want in case.layers("L{}.idx_q_last4").items():
        case.close("index queries", case.index_inputs[layer][0][:, -want.shape[1] :], want, 1e-3)
    for layer, want in case.layers("L{}.idx_k").items():
        keys = hadamard(case.prefill.cache.layers[layer].k_index_yqJ[:, : want.shape[1]])
        case.close("index keys", keys, want, 1e-3)


@having("L0.k")
def test_cache_of_the_first_layer(case):
    """The latent after its norm and the key after its rotation, at the positions they belong to."""
    length, kept = case.ids.shape[1], 0
    cache = case.prefill.cache.layers[0]
    for name, got in (("kv_latent", cache.c_kv_yqC), ("k_pe", cache.k_r_yqR)):
        for ending, last in (("", length), ("_last32", 32)):
            if f"L0.{name}{ending}" in case.tensors:
                case.close(name, got[:, length - last : length], case[f"L0.{name}{ending}"], 1e-4)
                kept += 1
    assert kept == 2 and not np.asarray(cache.c_kv_yqC[:, length:]).any()


@having("L0.attn_out")
def test_attention_output(case):
    """What attention adds to the residual stream."""
    for layer, want in case.layers("L{}.attn_out").items():
        case.close("attention", case.prefill.seen[layer].attention_BTD, want, HIDDEN)


# ------------------------------------------------------------------------------------------------------------- decode


def test_decode_step_by_step(case):
    """One token at a time over the cache: logits, greedy choices and selections of every step."""
    logits = np.concatenate([case.prefill.logits[:, -1:], *(out.logits for out in case.steps)], axis=1)
    np.testing.assert_array_equal(logits.argmax(-1), case["decode.gen_ids"])
    case.close("decode logits", logits, case["decode.logits"], LOGITS)
    for layer, want in case.layers("decode.L{}.idx_topk").items():
        for step, out in enumerate(case.steps):
            assert sets(out.seen[layer].selected_BTk[:, 0]) == sets(want[:, step]), f"layer {layer}, step {step}"
    assert case.steps[-1].cache.length_B.tolist() == [case.ids.shape[1] + 15] * len(case.ids)


def test_generate(case):
    """The greedy continuation, by the compiled loop; log-probabilities are those of the golden logits."""
    got = ds.generate(case.model, case.ids.tolist(), max_new_tokens=16)
    assert got.tokens == case["decode.gen_ids"].tolist()
    want = jax.nn.log_softmax(jnp.asarray(case["decode.logits"]), axis=-1)
    chosen = np.take_along_axis(np.asarray(want), case["decode.gen_ids"][..., None], axis=-1)[..., 0]
    case.close("log-probabilities", np.asarray(got.logprobs), chosen, LOGITS)


@having("L0.idx_scores")
def test_trace(case, tmp_path):
    """A trace of prompt and continuation, read back from its file: experts and gates, selected positions and their
    scores, most likely tokens."""
    rows, count = case["decode.gen_ids"].shape
    got = ds.generate(case.model, case.ids.tolist(), max_new_tokens=count)
    assert got.tokens == case["decode.gen_ids"].tolist()
    conversations = [[*prompt, *new[:-1]] for prompt, new in zip(case.ids.tolist(), got.tokens, strict=True)]
    ds.inspect.trace(case.model, conversations, {"routing", "indexer", "logits"}).save(tmp_path / "trace")
    trace = ds.inspect.Trace.load(tmp_path / "trace")
    read, first = case.ids.shape[1], case.cfg.first_k_dense_replace
    assert trace["length"].tolist() == [read + count - 1] * rows
    for layer, want in case.layers("L{}.gate_ids").items():
        ids = trace["expert"][layer - first, :, :read]
        order = np.argsort(ids, axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(ids, order, -1), want)
        if f"L{layer}.gate_weights" in case.tensors:
            gates = np.take_along_axis(trace["gate"][layer - first, :, :read], order, -1)
            case.close("traced gates", gates, case[f"L{layer}.gate_weights"], GATES)
    for layer, want in case.layers("L{}.idx_topk").items():
        assert sets(trace["selected"][layer, :, :read]) == sets(want)
    for layer, want in case.layers("decode.L{}.idx_topk").items():
        assert sets(trace["selected"][layer, :, read:]) == sets(want)
    for layer, scores in case.layers("L{}.idx_scores").items():
        selected = trace["selected"][layer, :, :read]
        want = np.take_along_axis(scores, np.maximum(selected, 0), axis=-1)
        case.close("traced scores", *(x[selected >= 0] for x in (trace["index_score"][layer, :, :read], want)), 1e-3)
    logits = np.concatenate([case["logits"], case["decode.logits"][:, 1:]], axis=1)
    want = np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.asarray(logits))), trace["top_id"], axis=-1)
    case.close("traced log-probabilities", trace["top_logprob"], want, LOGITS)
    np.testing.assert_array_equal(trace["top_id"][:, read - 1 :, 0], case["decode.gen_ids"])


# ---------------------------------------------------------------------------------------------------------------- MTP


@having("mtp.")
def test_mtp(case):
    """The drafting layer over the model's own hidden vectors: logits, selections, routing, draft tokens."""
    hidden, logits, seen = case.drafts
    case.close("MTP logits", logits, case["mtp.logits"], LOGITS)
    np.testing.assert_array_equal(np.asarray(logits)[:, -16:].argmax(-1), case["mtp.draft_ids"])
    assert sets(seen.selected_BTk) == sets(case["mtp.idx_topk"])
    ids, weights = routed(seen.routing)
    np.testing.assert_array_equal(ids, case["mtp.gate_ids"])
    optional = {"gate_weights": weights, "prev_hidden": hidden, "eh_proj_out": seen.x_BTD}
    for name, got in optional.items():
        if f"mtp.{name}" in case.tensors:
            case.close(f"MTP {name}", got, case[f"mtp.{name}"], GATES if name == "gate_weights" else HIDDEN)


@having("mtp.draft_ids")
def test_speculation(case):
    """The golden continuation again, in as many steps as the golden drafts that are right allow."""
    chosen, drafted = case["decode.gen_ids"], case["mtp.draft_ids"]
    count = chosen.shape[1]
    result = ds.generate(case.model, case.ids.tolist(), max_new_tokens=count, draft=1, stop_token_ids=())
    assert result.tokens == chosen.tolist()
    possible = {0}
    for row, drafts in zip(chosen, drafted, strict=True):
        each = set()
        for made in (1, 2):  # the first step reads the prompt's last token; whether its draft is right is not recorded.
            steps = 1
            while made < count:
                made += 2 if drafts[made - 1] == row[made] else 1
                steps += 1
            each.add(steps)
        possible = {sum_so_far + steps for sum_so_far in possible for steps in each}
    right = int((drafted[:, :-1] == chosen[:, 1:]).sum())
    case.record("drafts that are right", right)
    assert result.stats.steps in possible and result.stats.new_tokens == 2 * count


@having("mtp.draft_ids")
def test_longer_drafts(case):
    """Three tokens drafted at once change nothing but the number of steps."""
    result = ds.generate(case.model, case.ids.tolist(), max_new_tokens=case["decode.gen_ids"].shape[1], draft=3)
    assert result.tokens == case["decode.gen_ids"].tolist()


def test_mtp_is_there_where_the_checkpoint_has_it(case):
    """A config may announce a layer that the file lacks; a file that has it gives the model one."""
    layer = f"model.layers.{case.cfg.num_hidden_layers}."
    stored = any(name.startswith(layer) for name in case.stored)
    assert (case.model.mtp is not None) == stored == bool(case.cfg.num_nextn_predict_layers)
    assert stored == any(name.startswith("mtp.") for name in case.tensors)


# ---------------------------------------------------------------------------------------------------- rounded weights


@having("bf16w.")
def test_weights_rounded_to_bfloat16(case):
    """With every matrix rounded to bfloat16 and float32 arithmetic, the goldens that were made so."""
    check_rounded(case, golden.rounded(case.model), "bf16w.")


def check_rounded(case, model, prefix: str) -> None:
    """One forward over prompt and golden continuation against the tensors under `prefix`."""
    length = case.ids.shape[1]
    chosen = case[prefix + "decode.gen_ids"]
    out = ds.forward(model, np.concatenate([case.ids, chosen[:, :-1]], axis=1), seen=True)
    np.testing.assert_array_equal(np.asarray(out.logits)[:, length - 1 :].argmax(-1), chosen)
    tolerance = case.readme.get("tolerances", {}).get("float32_engine", {}).get("bf16w_logits_abs", LOGITS)
    case.close(prefix + "logits", out.logits[:, :length], case[prefix + "logits"], tolerance)
    for layer, want in case.layers(prefix + "L{}.idx_topk").items():
        assert sets(out.seen[layer].selected_BTk[:, :length]) == sets(want)
    for layer, want in case.layers(prefix + "L{}.gate_ids").items():
        np.testing.assert_array_equal(routed(out.seen[layer].routing)[0][:, :length], want)
    if prefix + "mtp.logits" in case.tensors:
        following = np.concatenate([case.ids, chosen], axis=1)[:, 1:]
        logits, seen = golden.draft(model, out.hidden, jnp.asarray(following))
        case.close(prefix + "mtp.logits", logits, case[prefix + "mtp.logits"], tolerance)
        np.testing.assert_array_equal(np.asarray(logits)[:, -16:].argmax(-1), case[prefix + "mtp.draft_ids"])
        assert sets(seen.selected_BTk) == sets(case[prefix + "mtp.idx_topk"])
        np.testing.assert_array_equal(routed(seen.routing)[0], case[prefix + "mtp.gate_ids"])


# ----------------------------------------------------------------------------------------------------------- bfloat16


def test_bfloat16(case):
    """Computed in bfloat16: medians over tokens, since one flipped key or expert may move a token far."""
    model = ds.load(case.converted, dtype=jnp.bfloat16)
    out = ds.forward(model, case.ids, seen=True)
    assert out.hidden.dtype == jnp.bfloat16 and out.cache.layers[0].c_kv_yqC.values.dtype == jnp.bfloat16
    off = np.abs(np.asarray(out.logits) - case["logits"]).max(axis=-1)
    nvfp4 = "golden_nvfp4" in str(case.folder)
    assert case.record("bf16 logits (median)", np.median(off)) <= (0.1 if nvfp4 else 0.15)
    assert nvfp4 or case.record("bf16 logits (p90)", np.quantile(off, 0.9)) <= 1.0
    first = np.asarray(out.seen[1].x_BTD)
    assert case.record("bf16 hidden.1 (median rel.)", np.median(relative(first, case["hidden.1"]))) <= 0.01
    if "fp8sim.hidden.1" in case.tensors:
        median = np.median(relative(first, case["fp8sim.hidden.1"].astype(np.float32)))
        assert case.record("fp8sim hidden.1 (median rel.)", median) <= 0.06
    if "fp8sim.logits" in case.tensors:
        median = np.median(np.abs(np.asarray(out.logits) - case["fp8sim.logits"]).max(axis=-1))
        assert case.record("fp8sim logits (median)", median) <= 1.5


test_bfloat16.needs = lambda folder: folder.name != "p1_sparse_yarn"  # chaotic in bfloat16, the reference as well


def test_fp8_cache(case):
    """With latents and index keys cached in FP8: the medians that an FP8 engine is allowed."""
    model = ds.load(case.converted, dtype=jnp.bfloat16)
    empty = cache.empty(model.cfg, *case.ids.shape, jnp.float8_e4m3fn)
    out = ds.forward(model, case.ids, cache=empty, seen=True)
    assert out.cache.layers[0].c_kv_yqC.values.dtype == jnp.float8_e4m3fn
    off = np.abs(np.asarray(out.logits) - case["logits"]).max(axis=-1)
    assert case.record("FP8 cache logits (median)", np.median(off)) <= 1.5
    first = np.asarray(out.seen[1].x_BTD)
    assert case.record("FP8 cache hidden.1 (median rel.)", np.median(relative(first, case["hidden.1"]))) <= 0.06
    if "fp8sim.logits" in case.tensors:
        median = np.median(np.abs(np.asarray(out.logits) - case["fp8sim.logits"]).max(axis=-1))
        assert case.record("FP8 cache, fp8sim logits (median)", median) <= 1.5


test_fp8_cache.needs = test_bfloat16.needs


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """||got - want|| / ||want|| of each token."""
    return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)


# -------------------------------------------------------------------------------------- quantizing a whole checkpoint


@having("nvfp4.")
def test_quantizer_on_a_checkpoint(case):
    """Every linear of an FP8 checkpoint in NVFP4: scale bytes and codes of the real tool, bit for bit."""
    expected = golden.read(case.folder / "expected_nvfp4.safetensors")
    source = case.stored
    matrices = [name for name in expected if name.endswith(".weight")]
    assert len(matrices) == sum(name.endswith("_scale_inv") for name in source)
    for name in matrices:
        w = literal(source, name).astype(ml_dtypes.bfloat16)
        codes, block_scale, tensor_scale = quantize.nvfp4_quantize(w)
        np.testing.assert_array_equal(tensor_scale.reshape(()), expected[f"{name}_scale_2"], err_msg=name)
        scale_bytes = expected[f"{name}_scale"].view(np.uint8)
        np.testing.assert_array_equal(block_scale.view(np.uint8), scale_bytes, err_msg=name)
        np.testing.assert_array_equal(signless_zeros(codes), signless_zeros(expected[name]), err_msg=name)


@having("nvfp4.")
def test_the_quantized_checkpoint(case):
    """The same checkpoint with those tensors in place of the FP8 ones, converted, loaded and run."""
    quantized = nvfp4_of(case)
    length = case.ids.shape[1]
    out = ds.forward(
        quantized.model, np.concatenate([case.ids, case["nvfp4.decode.gen_ids"][:, :-1]], axis=1), seen=True
    )
    np.testing.assert_array_equal(np.asarray(out.logits)[:, length - 1 :].argmax(-1), case["nvfp4.decode.gen_ids"])
    case.close("nvfp4.logits", out.logits[:, :length], case["nvfp4.logits"], LOGITS)
    for layer, want in case.layers("nvfp4.L{}.idx_topk").items():
        assert sets(out.seen[layer].selected_BTk[:, :length]) == sets(want)
    for layer, want in case.layers("nvfp4.L{}.gate_ids").items():
        np.testing.assert_array_equal(routed(out.seen[layer].routing)[0][:, :length], want)


@having("nvfp4.bf16w.")
def test_the_quantized_checkpoint_rounded_to_bfloat16(case):
    """And with its matrices rounded."""
    check_rounded(case, golden.rounded(nvfp4_of(case).model), "nvfp4.bf16w.")


def nvfp4_prefix(case) -> bool:
    """Whether the case comes with NVFP4 tensors for an FP8 checkpoint."""
    return any(name.startswith("nvfp4.") for name in case.tensors)


@functools.cache
def nvfp4_of(case) -> golden.Case:
    """The case with its FP8 linears replaced by the quantizer's tensors."""
    folder = case.scratch / f"{case.name}-nvfp4"
    folder.mkdir()
    plain = {name: array for name, array in case.stored.items() if "float8" not in array.dtype.name}
    plain = {name: array for name, array in plain.items() if not name.endswith("_scale_inv")}
    save_file(plain | golden.read(case.folder / "expected_nvfp4.safetensors"), folder / "model.safetensors")
    shutil.copyfile(case.folder / "config.json", folder / "config.json")
    return golden.Case(folder, case.scratch, {})


# ------------------------------------------------------------------------------------------------------- the reader's


def flat(model) -> dict:
    """The model's leaves by path."""
    found = {}
    for path, weight in jax.tree_util.tree_leaves_with_path(model, is_leaf=golden.is_weight):
        text = jax.tree_util.keystr(path).replace("[", ".").replace("]", "").lstrip(".")
        found[text] = weight
    return found


def literal(source: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The float32 values of one tensor of the checkpoint, written out from the description of its format."""
    if f"{name}_packed" in source:
        divisor = source[f"{name}_global_scale"].astype(np.float32)
        return nvfp4(source[f"{name}_packed"], source[f"{name}_scale"]) / divisor
    stored = source[name]
    if f"{name}_scale_2" in source:
        return nvfp4(stored, source[f"{name}_scale"]) * source[f"{name}_scale_2"].astype(np.float32).reshape(())
    if f"{name}_scale_inv" in source:
        rows, columns = np.indices(stored.shape) // 128
        product = stored.astype(np.float32) * source[f"{name}_scale_inv"][rows, columns]
        return product.astype(ml_dtypes.bfloat16).astype(np.float32)
    return stored.astype(np.float32)


def nvfp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Element 2i of a row is the low half of byte i; sixteen elements share a scale."""
    values = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    values[:, 0::2] = np.take(np.float32(E2M1_OF_CODE), codes & 15)
    values[:, 1::2] = np.take(np.float32(E2M1_OF_CODE), codes >> 4)
    return values * np.repeat(scale.astype(np.float32), 16, axis=1)


def cut(leaf, w: np.ndarray) -> np.ndarray:
    """The part of the tensor `w` that is `leaf`, in the leaf's shape."""
    if leaf.cut is not None:
        axis, size, start, stop = leaf.cut
        runs = w.reshape(*w.shape[:axis], -1, size, *w.shape[axis + 1 :])
        w = np.take(runs, range(start, stop), axis=axis + 1)
    return w.reshape(leaf.shape[leaf.stacked :])


def assembled(found: dict, table, name: str) -> np.ndarray:
    """The tensor `name` put together again from the leaves it was cut into."""
    parts = [leaf for leaf in table if name in leaf.sources]
    assert parts, f"{name} is no tensor of the model"
    w = np.full(parts[0].source_shape, np.nan, np.float32)
    for leaf in parts:
        piece = np.asarray(dequantize(found[leaf.path], jnp.float32))
        piece = piece[leaf.sources.index(name)] if leaf.stacked else piece
        index = np.arange(w.size).reshape(w.shape)
        w.reshape(-1)[cut(leaf, index).reshape(-1)] = piece.reshape(-1)
    assert not np.isnan(w).any(), f"{name} is not covered by its leaves"
    return w
