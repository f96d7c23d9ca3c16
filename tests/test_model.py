"""The model against itself: every way of computing one thing gives the same."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import dsv32_jax as ds
from dsv32_jax import layout
from dsv32_jax.errors import UsageError
from dsv32_jax.generation import prefill_decode
from dsv32_jax.kernels import VARIABLE
from dsv32_jax.model import attention, block, experts, indexer
from dsv32_jax.model.cache import Cache, empty, empty_layer
from dsv32_jax.model.model import Origin, build
from dsv32_jax.model.ops import map_tokens, rms_norm
from dsv32_jax.system.compilation import count_compilations
from dsv32_jax.system.progress import format_count, format_size
from tests import golden, models
from tests.golden import sets

LENGTH = 25
ROOMY = 32


def same(got, want) -> None:
    """Equal up to the order of float32 sums: max |d| <= 1e-5 max |value|."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def cfg(tiny):
    """One dense and one MoE layer; LENGTH tokens are more than index_topk."""
    assert tiny.index_topk < LENGTH < ROOMY
    return dataclasses.replace(tiny, num_hidden_layers=2, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def model(cfg):
    return models.random_model(cfg)


@pytest.fixture(scope="module")
def tokens(cfg):
    return models.tokens(cfg, 3, LENGTH)


@pytest.fixture(scope="module")
def whole(model, tokens):
    """Everything in one forward."""
    return ds.forward(model, tokens, capacity=ROOMY, seen=True)


# ---------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", ["tiny", "real"])
def test_layout_is_the_tree_of_the_model(request, name):
    """Paths and shapes of the table are those of a built Model, in number and in name."""
    config = request.getfixturevalue(name)
    built = models.abstract(config)
    found = {
        re.sub(r"\[(\d+)\]", r".\1", jax.tree_util.keystr(path)).removeprefix("."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(built)
    }
    table = layout.leaves(config)
    assert found == {leaf.path: leaf.shape for leaf in table} and len(found) == len(table)


def test_keystr_of_a_component(cfg):
    """A component of a quantized weight is found under its leaf."""
    model = models.random_model(cfg, storage="nvfp4")
    names = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    assert names[".layers[1].mla.w_uq_HNQ.codes"] == (5, 24, 32)
    assert names[".layers[1].ffn.w_down_EDM.tensor_scale"] == (12, 1, 1)


def spec_tensors(layers: int = 61, experts: int = 256) -> dict[str, tuple[int, ...]]:
    """The tensors of DeepSeek-V3.2 without scales, as its repository lists them."""
    found = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }
    for i in range(layers + 1):
        rows = {
            "input_layernorm.weight": (7168,),
            "post_attention_layernorm.weight": (7168,),
            "self_attn.q_a_proj.weight": (1536, 7168),
            "self_attn.q_a_layernorm.weight": (1536,),
            "self_attn.q_b_proj.weight": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
            "self_attn.kv_a_layernorm.weight": (512,),
            "self_attn.kv_b_proj.weight": (32768, 512),
            "self_attn.o_proj.weight": (7168, 16384),
            "self_attn.indexer.wq_b.weight": (8192, 1536),
            "self_attn.indexer.wk.weight": (128, 7168),
            "self_attn.indexer.k_norm.weight": (128,),
            "self_attn.indexer.k_norm.bias": (128,),
            "self_attn.indexer.weights_proj.weight": (64, 7168),
        }
        if i < 3:
            rows |= _ffn("mlp.", 18432)
        else:
            rows |= {"mlp.gate.weight": (256, 7168), "mlp.gate.e_score_correction_bias": (256,)}
            for expert in range(experts):
                rows |= _ffn(f"mlp.experts.{expert}.", 2048)
            rows |= _ffn("mlp.shared_experts.", 2048)
        if i == layers:
            rows |= {
                "embed_tokens.weight": (129280, 7168),
                "shared_head.head.weight": (129280, 7168),
                "enorm.weight": (7168,),
                "hnorm.weight": (7168,),
                "shared_head.norm.weight": (7168,),
                "eh_proj.weight": (7168, 14336),
            }
        found |= {f"model.layers.{i}.{name}": shape for name, shape in rows.items()}
    return found


def _ffn(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (size, 7168),
        f"{prefix}up_proj.weight": (size, 7168),
        f"{prefix}down_proj.weight": (7168, size),
    }


def test_the_real_checkpoint(real):
    """Every tensor of the published repository is the source of some leaf, and every element belongs to one leaf."""
    table = layout.leaves(real)
    sources = {name: leaf.source_shape for leaf in table for name in leaf.sources}
    expected = spec_tensors()
    assert sources == expected
    quantized = [name for name in expected if _in_fp8(name)]
    assert len(expected) + len(quantized) == 92_425
    scales = sum(math.prod(-(-size // 128) for size in expected[name]) for name in quantized)
    elements = sum(math.prod(leaf.shape) for leaf in table)
    assert elements == sum(map(math.prod, expected.values())) == 685_355_329_792
    assert elements + scales == 685_396_921_376


def _in_fp8(name: str) -> bool:
    plain = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj", "shared_head")
    return not any(part in name for part in plain)


@pytest.mark.parametrize("name", ["tiny", "real"])
def test_cuts_of_a_tensor_cover_it_once(request, name):
    """The leaves that one tensor is cut into take every row and column of it exactly once."""
    config = request.getfixturevalue(name)
    taken: dict[str, list] = {}
    for leaf in layout.leaves(config):
        taken.setdefault(leaf.sources[0], []).append(leaf)
    for source, parts in taken.items():
        cuts = [leaf.cut for leaf in parts]
        if cuts == [None]:
            assert math.prod(parts[0].shape) == math.prod(parts[0].source_shape) * len(parts[0].sources)
            continue
        axis, size, *_ = cuts[0]
        assert all((cut.axis, cut.size) == (axis, size) for cut in cuts) and parts[0].source_shape[axis] % size == 0
        assert sorted(at for cut in cuts for at in range(cut.start, cut.stop)) == list(range(size)), source


def test_a_model_is_a_plain_pytree(cfg, model):
    """It can be mapped, traced and hashed; tracing it does not lose its leaves."""
    assert len(jax.tree.leaves(model)) == len(layout.leaves(cfg))
    doubled = jax.eval_shape(lambda model: jax.tree.map(lambda w: w + w, model), model)
    assert jax.tree.structure(doubled) == jax.tree.structure(model)
    assert isinstance(hash(model), int)


# ------------------------------------------------------------------------------------------------------ same and same


PIECES = {"prefill+decode": [17] + [1] * 8, "chunks": [5] * 5, "mixed": [1, 17, 5, 1, 1]}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pieces_are_the_whole(model, tokens, whole, pieces):
    """Whatever the pieces in which tokens come: logits, cache and selections are those of one forward."""
    cache, start, logits, selections = empty(model.cfg, 3, ROOMY, jnp.float32), 0, [], []
    for piece in pieces:
        out = ds.forward(model, tokens[:, start : start + piece], cache=cache, seen=True)
        cache, start = out.cache, start + piece
        logits.append(out.logits)
        selections.append(out.seen[1].selected_BTk)
    assert start == LENGTH and cache.length_B.tolist() == [LENGTH] * 3
    same(np.concatenate(logits, axis=1), whole.logits)
    assert sets(np.concatenate(selections, axis=1)) == sets(whole.seen[1].selected_BTk)
    jax.tree.map(same, cache.layers, whole.cache.layers)


@pytest.mark.parametrize("capacity", [LENGTH, 2 * ROOMY])
def test_capacities(model, tokens, whole, capacity):
    """Free slots change nothing."""
    out = ds.forward(model, tokens, capacity=capacity, seen=True)
    same(out.logits, whole.logits)
    assert sets(out.seen[1].selected_BTk) == sets(whole.seen[1].selected_BTk)
    assert out.cache.capacity == capacity


@pytest.mark.parametrize("beyond", [-19, -1, 0, 1])
def test_around_index_topk(model, tokens, whole, beyond):
    """Up to index_topk tokens attention is dense, with one more it is sparse: both as in a longer run."""
    length = model.cfg.index_topk + beyond
    out = ds.forward(model, tokens[:, :length], seen=True)
    assert out.cache.capacity == length
    same(out.logits, whole.logits[:, :length])
    same(out.seen[1].x_BTD, whole.seen[1].x_BTD[:, :length])
    selected = sets(out.seen[1].selected_BTk)
    assert selected == sets(whole.seen[1].selected_BTk[:, :length])
    sizes = [min(t + 1, model.cfg.index_topk) for t in range(length)] * 3
    assert [len(chosen) for chosen in selected] == sizes


def test_selection_matters(model, tokens, whole):
    """At this size sparse attention is not dense attention: these tests would see the difference."""
    dense = dataclasses.replace(model.cfg, index_topk=LENGTH)
    out = ds.forward(models.random_model(dense), tokens)
    assert np.abs(out.logits - whole.logits)[:, model.cfg.index_topk :].max() > 1e-2
    same(out.logits[:, : model.cfg.index_topk], whole.logits[:, : model.cfg.index_topk])


COUNTS = np.array([7, 20, 25], np.int32)


@pytest.fixture(scope="module")
def ragged(model, tokens):
    """The three rows cut to three lengths, in one batch."""
    return ds.forward(model, tokens, count_B=COUNTS, capacity=ROOMY)


@pytest.mark.parametrize("row", range(3))
def test_a_ragged_row_is_the_row_alone(model, tokens, whole, ragged, row):
    """Also when the batch goes on: one more token for each row, at its own position."""
    count = int(COUNTS[row])
    alone = ds.forward(model, tokens[row : row + 1, :count], capacity=ROOMY)
    same(ragged.logits[row, :count], alone.logits[0])
    assert ragged.cache.length_B.tolist() == COUNTS.tolist()
    following = np.array([[5], [6], [7]], np.int32)
    together = ds.forward(model, following, cache=ragged.cache, seen=True)
    apart = ds.forward(model, following[row : row + 1], cache=alone.cache, seen=True)
    same(together.logits[row], apart.logits[0])
    assert sets(together.seen[1].selected_BTk[row]) == sets(apart.seen[1].selected_BTk[0])


def test_padding_never_leaks(model, tokens, ragged):
    """What stands beyond a row's length is of no consequence, neither now nor when the row goes on."""
    other = tokens.copy()
    for row, count in zip(other, COUNTS, strict=True):
        row[count:] = 319 - row[count:]
    changed = ds.forward(model, other, count_B=COUNTS, capacity=ROOMY)
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(changed.logits[row, :count], ragged.logits[row, :count])
    following = np.array([[5], [6], [7]], np.int32)
    for _ in range(3):
        ragged = ds.forward(model, following, cache=ragged.cache)
        changed = ds.forward(model, following, cache=changed.cache)
        np.testing.assert_array_equal(changed.logits, ragged.logits)


def test_no_token_sees_the_future(model, tokens, whole):
    """A change at one position leaves everything before it as it was, and changes what follows."""
    other = tokens.copy()
    other[:, 13] = (other[:, 13] + 1) % 300
    changed = ds.forward(model, other, capacity=ROOMY)
    np.testing.assert_array_equal(changed.logits[:, :13], whole.logits[:, :13])
    assert (np.abs(changed.logits - whole.logits)[:, 13:].max(axis=-1) > 0).all()


def test_layer_by_layer_is_one_program(model, tokens, whole):
    """The model called from Python runs a compiled program for each kind of layer, and gives the same."""
    arguments = jnp.asarray(tokens), empty(model.cfg, 3, ROOMY, jnp.float32), jnp.full(3, LENGTH, jnp.int32)
    x, filled, seen = model.observe(*arguments)
    for h, cache in (model(*arguments), (model.normalize(x), filled)):
        same(model.logits(h), whole.logits)
        same(h, whole.hidden)
        jax.tree.map(same, cache.layers, whole.cache.layers)
    assert sets(seen[1].selected_BTk) == sets(whole.seen[1].selected_BTk)


def test_seen_is_what_it_says(model, tokens, whole):
    """The streams that enter the layers, what attention adds, and positions that are visible."""
    np.testing.assert_array_equal(whole.seen[0].x_BTD, model.embed_VD[tokens])
    layer, seen = model.layers[0], whole.seen[0]
    middle = seen.x_BTD + seen.attention_BTD
    ffn, routing = layer.ffn(rms_norm(middle, layer.ffn_norm_D, model.cfg.rms_norm_eps))
    same(middle + ffn, whole.seen[1].x_BTD)
    assert routing is None and seen.routing is None and whole.seen[1].routing.expert_BTX.shape == (3, LENGTH, 2)
    for position, chosen in enumerate(sets(whole.seen[1].selected_BTk[0])):
        assert max(chosen) <= position
    score = np.asarray(whole.seen[1].index_score_BTS)
    assert np.isfinite(score[:, 7, :8]).all() and np.isneginf(score[:, 7, 8:]).all()


@pytest.mark.parametrize("capacity", [20, ROOMY], ids=["dense", "sparse"])
def test_attention_in_blocks_of_queries(model, monkeypatch, capacity):
    """Long prompts go through attention a few queries at a time, and come out the same: without kernels, which keep no
    products of all heads."""
    monkeypatch.setenv(VARIABLE, "xla")
    cfg, layer = model.cfg, model.layers[1]
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, 17, cfg.hidden_size), np.float32))
    position = jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32) + 3, (2, 17))
    cache = empty_layer(cfg, 2, capacity, jnp.float32)

    def run():
        call = jax.jit(functools.partial(attention.attention, layer.mla, layer.indexer))
        return call(h, cache, position), str(jax.make_jaxpr(call)(h, cache, position))

    want, text = run()
    assert " scan[" not in text
    per_query = max(cfg.index_n_heads * capacity, cfg.num_attention_heads * 20, 20 * cfg.kv_lora_rank)
    monkeypatch.setattr(attention, "MAX_TEMPORARY", 2 * per_query * 3)
    got, text = run()
    assert " scan[" in text and "length=6" in text
    same(got[0], want[0])
    assert sets(got[2][1]) == sets(want[2][1])


@pytest.mark.parametrize("block", [1, 2, 5, 6, 100])
def test_over_tokens(block):
    """Every token passes through once, in order, in whatever blocks, and results may have any rank."""
    x = jnp.arange(2 * 11 * 3, dtype=jnp.float32).reshape(2, 11, 3)
    doubled, summed = map_tokens(lambda x, y: (2 * x, (x.sum(axis=-1) + y)), (x, x[..., 0]), block)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(summed, x.sum(axis=-1) + x[..., 0])


# ------------------------------------------------------------------------------------------------------------- experts

SHAPES = [(1, 4, 2), (3, 4, 2), (8, 3, 3), (17, 4, 2), (40, 8, 3), (300, 2, 2)]
"""Tokens, experts, experts a token: from a decode step with fewer assignments than experts to blocks of full size."""


@pytest.fixture(scope="module")
def banks():
    rng = np.random.default_rng(0)
    shapes = {"w_gate": (8, 6, 5), "w_up": (8, 6, 5), "w_down": (8, 5, 6)}
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


_apply = jax.jit(experts.apply_experts)


def one_hot_sum(h, expert, gate, w_gate, w_up, w_down) -> np.ndarray:
    """A readable reference: every expert on every token, weighted by one-hot gates."""
    hidden = np.einsum("td,emd->tem", h, w_gate)
    hidden = hidden / (1 + np.exp(-hidden)) * np.einsum("td,emd->tem", h, w_up)
    weight = (np.eye(len(w_gate))[expert] * gate[..., None]).sum(axis=1)
    return np.einsum("te,edm,tem->td", weight, w_down, hidden)


@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_experts_are_the_one_hot_sum(banks, data, shape):
    """Any routing whatever, one expert for all tokens included."""
    tokens, count, each = shape
    chosen = data.draw(st.permutations(range(count)), label="order of preference")
    peaked = data.draw(st.sampled_from([0.0, 1.0, 100.0]), label="peakedness")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    preference = np.array([chosen.index(e) for e in range(count)]) * peaked + rng.random((tokens, count))
    expert = np.argsort(preference, axis=-1)[:, :each].astype(np.int32)
    h, gate = (rng.standard_normal(size, np.float32) for size in ((tokens, 5), (tokens, each)))
    arguments = [h, expert, gate, *(np.asarray(bank)[:count] for bank in banks.values())]
    want = one_hot_sum(*(part.astype(np.float64) if part.dtype == np.float32 else part for part in arguments))
    got = _apply(*map(jnp.asarray, arguments))
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()), rtol=0)


@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_every_assignment_has_a_slot(data, shape):
    """No two assignments share a slot, each lies in a block of its expert, and holds its token."""
    tokens, count, each = shape
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    allowed = data.draw(st.integers(each, count), label="experts in use")
    expert = np.stack([rng.permutation(allowed)[:each] for _ in range(tokens)]).astype(np.int32)
    blocks = _in_blocks(jnp.asarray(expert), count)
    slot, size = np.asarray(blocks.slot_tX), blocks.token_nb.shape[1]
    assert len(np.unique(slot)) == slot.size
    np.testing.assert_array_equal(np.asarray(blocks.expert_n)[slot // size], expert)
    owner = np.asarray(blocks.token_nb).reshape(-1)[slot]
    np.testing.assert_array_equal(owner, np.broadcast_to(np.arange(tokens)[:, None], owner.shape))
    assert set(np.asarray(blocks.expert_n).tolist()) <= {*expert.reshape(-1).tolist(), count}
    assert size <= 256 and len(blocks.expert_n) * size < 2 * tokens * each + count * size


_in_blocks = jax.jit(functools.partial(experts.assign_blocks, smallest=1, largest=256), static_argnums=1)


@pytest.mark.parametrize(("storage", "count"), [("dense", LENGTH), ("nvfp4", 1), ("nvfp4", LENGTH), ("fp8", 1)])
def test_unselected_experts_are_never_touched(cfg, storage, count):
    """With NaN in every expert that nobody chose, the output is what it was."""
    moe = models.random_model(cfg, storage=storage).layers[1].ffn
    favoured = jnp.where(jnp.arange(cfg.n_routed_experts) < 8, 5.0, 0.0)
    moe = dataclasses.replace(moe, bias_E=moe.bias_E + favoured)
    h = jnp.asarray(np.random.default_rng(1).standard_normal((2, count, cfg.hidden_size), np.float32))
    run = jax.jit(lambda moe, h: moe(h))
    want, routing = run(moe, h)
    chosen = np.unique(routing.expert_BTX)
    assert len(chosen) < cfg.n_routed_experts
    spoil = ~np.isin(np.arange(cfg.n_routed_experts), chosen)
    banks = {name: jax.tree.map(lambda part: _spoilt(part, spoil), getattr(moe, name)) for name in
             ("w_gate_EMD", "w_up_EMD", "w_down_EDM")}  # fmt: skip
    got, _ = run(dataclasses.replace(moe, **banks), h)
    np.testing.assert_array_equal(got, want)
    taken = {name: jax.tree.map(lambda part: _spoilt(part, ~spoil), getattr(moe, name)) for name in banks}
    assert not np.isfinite(run(dataclasses.replace(moe, **taken), h)[0]).all()


def _spoilt(part: jax.Array, which: np.ndarray) -> jax.Array:
    """`part` with NaN, or the byte that is NaN as E4M3, in the experts of `which`."""
    if part.dtype == jnp.uint8:
        return part
    return jnp.where(jnp.asarray(which).reshape(-1, *[1] * (part.ndim - 1)), jnp.asarray(jnp.nan, part.dtype), part)


def test_shared_expert_is_not_scaled(cfg):
    """Gates sum to routed_scaling_factor; the shared expert has weight one."""
    moe = models.random_model(cfg).layers[1].ffn
    h = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, cfg.hidden_size), np.float32))
    y, routing = moe(h)
    np.testing.assert_allclose(routing.gate_BTX.sum(axis=-1), cfg.routed_scaling_factor, rtol=1e-6)
    silent = dataclasses.replace(moe, w_down_EDM=jnp.zeros_like(moe.w_down_EDM))
    same(silent(h)[0][0], experts.apply_shared_expert(h[0], *moe.shared))
    assert np.abs(silent(h)[0] - y).max() > 0.1


# ----------------------------------------------------------------------------------------------------------- gradients


def loss(model, tokens):
    """Mean cross-entropy of the next token."""
    batch, length = tokens.shape
    cache = empty(model.cfg, batch, length, model.dtype)
    h, _ = model(tokens, cache, jnp.full(batch, length, jnp.int32))
    logprob = jax.nn.log_softmax(model.logits(h)[:, :-1], axis=-1)
    return -jnp.take_along_axis(logprob, tokens[:, 1:, None], axis=-1).mean()


@pytest.fixture(scope="module")
def gradient(model, tokens):
    """The loss, compiled, and its gradient at the random weights."""
    value = jax.jit(loss)
    return value, jax.jit(jax.grad(loss))(model, jnp.asarray(tokens[:2, :22]))


@pytest.mark.parametrize(
    "path",
    ["layers[1].ffn.w_gate_EMD", "layers[1].ffn.w_down_EDM", "layers[1].ffn.router_ED", "layers[1].ffn.shared_up_MD",
     "layers[0].mla.w_uq_HNQ", "layers[1].mla.w_dkv_CD", "layers[1].mla.w_kr_RD", "layers[0].mla.w_o_DHP",
     "layers[0].ffn.w_up_FD", "layers[1].attn_norm_D", "embed_VD", "head_VD"],
)  # fmt: skip
def test_gradient(model, tokens, gradient, path):
    """Along its own direction the gradient is the slope of the loss, through sparse attention and expert blocks."""
    value, slopes = gradient
    batch = jnp.asarray(tokens[:2, :22])
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(key).lstrip(".") for key, _ in leaves]
    index, slope = names.index(path), np.asarray(jax.tree.leaves(slopes)[names.index(path)])
    size = np.linalg.norm(slope)
    assert np.isfinite(slope).all() and size > 1e-5

    def moved(step):
        parts = [part for _, part in leaves]
        parts[index] = parts[index] + jnp.asarray(step / size * slope)
        return float(value(jax.tree.unflatten(structure, parts), batch))

    step = min(3e-3 / size, 0.02)
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(size, rel=0.03)


def test_gradients_are_finite(gradient):
    """Of every leaf; the indexer and the routing bias only select, and have none."""
    for key, slope in jax.tree_util.tree_leaves_with_path(gradient[1]):
        name = jax.tree_util.keystr(key)
        assert np.isfinite(slope).all(), name
        assert (".indexer." in name or "bias_E" in name) == (not np.asarray(slope).any()), name


def test_gradients_in_bfloat16(cfg, tokens):
    """A dense bfloat16 model can be differentiated too."""
    one_layer = dataclasses.replace(cfg, num_hidden_layers=1, first_k_dense_replace=0)
    model = jax.tree.map(lambda w: w.astype(jnp.bfloat16), models.random_model(one_layer, dtype=jnp.bfloat16))
    slopes = jax.jit(jax.grad(loss))(model, jnp.asarray(tokens[:2, :22]))
    for key, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert slope.dtype == jnp.bfloat16, jax.tree_util.keystr(key)
        assert np.isfinite(np.asarray(slope, np.float32)).all(), jax.tree_util.keystr(key)


# ------------------------------------------------------------------------------------------------------------ dead code


def _shapes(function, *arguments) -> list[tuple[int, ...]]:
    """The shapes of everything that the compiled program of `function` makes."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return [tuple(map(int, found.split(","))) for found in re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)]


def test_what_nobody_looks_at_is_not_computed(model):
    """Where all fits into index_topk, a decode step scores nothing; asked for the scores, it does."""
    cfg, capacity = model.cfg, 19
    assert capacity not in cfg.dims.values() and capacity < cfg.index_topk
    arguments = model, jnp.zeros((1, 1), jnp.int32), empty(cfg, 1, capacity, jnp.float32), jnp.ones(1, jnp.int32)

    def scoring(shapes):
        return any(cfg.index_n_heads in shape and capacity in shape for shape in shapes)

    def step(model, tokens, cache, count):
        h, cache = model(tokens, cache, count)
        return model.logits(h), cache

    def watched(model, tokens, cache, count):
        x, cache, seen = model.observe(tokens, cache, count)
        return model.logits(model.normalize(x)), cache, [layer.index_score_BTS for layer in seen]

    assert not scoring(_shapes(step, *arguments))
    assert scoring(_shapes(watched, *arguments))


def test_index_keys_are_written_even_where_nothing_is_scored(model, tokens, whole):
    """A short prompt in a small cache leaves the keys that a longer run needs."""
    out = ds.forward(model, tokens[:, :19], capacity=19)
    for layer, long in zip(out.cache.layers, whole.cache.layers, strict=True):
        same(layer.k_index_yqJ, long.k_index_yqJ[:, :19])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("capacity", [20, ROOMY], ids=["dense", "sparse"])
def test_pages_in_any_order_are_a_contiguous_cache(model, tokens, monkeypatch, dtype, capacity):
    """A row's pages may be anywhere, and others' tokens between them; what has no page is dropped."""
    monkeypatch.setattr(indexer, "KEYS", 8)
    size, count, rng = 4, 18, np.random.default_rng(0)
    blocks = -(-capacity // size)
    pages = jnp.asarray(rng.permutation(3 * blocks + 5)[: 3 * blocks].reshape(3, blocks), jnp.int32)
    layers = empty(model.cfg, 3 * blocks + 5, size, dtype).layers
    layers = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 9, x.shape), x.dtype), layers)
    paged = Cache(layers, jnp.zeros(3, jnp.int32), pages.at[1, -(-count // size) :].set(-1))
    assert paged.capacity == blocks * size
    want = ds.forward(model, tokens[:, :count], cache=empty(model.cfg, 3, blocks * size, dtype), count_B=[18, 16, 5])
    got = ds.forward(model, tokens[:, :count], cache=paged, count_B=[18, 16, 5])
    for b, length in enumerate([18, 16, 5]):
        same(got.logits[b, :length], want.logits[b, :length])
    for _ in range(2):
        last = tokens[:, count : count + 1]
        want, got = (ds.forward(model, last, cache=out.cache) for out in (want, got))
        same(got.logits, want.logits)
    unused = np.setdiff1d(np.arange(3 * blocks + 5), got.cache.table_Bd)
    for before, after in zip(jax.tree.leaves(layers), jax.tree.leaves(got.cache.layers), strict=True):
        np.testing.assert_array_equal(before[unused], after[unused])


def test_pages_are_written_in_place(model, tokens):
    """A donated cache is not copied: beside it a decode step takes as much memory with many pages as with few."""

    def temporary(pages: int) -> int:
        layers = empty(model.cfg, pages, 64, jnp.bfloat16).layers
        cache = Cache(layers, jnp.zeros(3, jnp.int32), jnp.zeros((3, 2), jnp.int32))
        step = jax.jit(lambda model, *rest: model(*rest), donate_argnums=2)
        account = step.lower(model, tokens[:, :1], cache, np.ones(3, np.int32)).compile().memory_analysis()
        assert account.alias_size_in_bytes >= nbytes(jax.tree.leaves(layers))
        return account.temp_size_in_bytes

    assert temporary(512) == temporary(8)


def test_a_traced_function_sees_the_origin_of_its_own_model(model):
    """Models from two checkpoints do not share a program that looks at where they come from."""
    known = jax.jit(lambda model: model.origin.tokens)
    for tokens in (100, 200):
        assert known(dataclasses.replace(model, origin=Origin(tokens=tokens))) == tokens


def nbytes(arrays) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def test_the_output_of_forward_does_not_grow_with_layers(cfg, tokens):
    """But for the cache; what layers saw is returned on request only."""

    def output_bytes(layers: int) -> int:
        deep = models.abstract(dataclasses.replace(cfg, num_hidden_layers=layers))
        caches = jax.eval_shape(lambda: empty(cfg, 3, LENGTH, jnp.float32))
        out = jax.eval_shape(lambda deep: ds.forward(deep, tokens), deep)
        return nbytes(jax.tree.leaves(out)) - nbytes(jax.tree.leaves(caches.layers[0])) * layers

    assert output_bytes(4) == output_bytes(2)


def test_layerwise_prefill_does_not_keep_what_layers_saw(cfg, tokens, monkeypatch):
    """From one layer to the next, the memory in use grows by the new cache of that layer."""
    deep = models.random_model(dataclasses.replace(cfg, num_hidden_layers=6, first_k_dense_replace=0))
    caches = prefill_decode.empty_caches(deep.cfg, 3, ROOMY, deep.dtype, 0)
    state = prefill_decode.new_state(deep, caches, 0)
    run, alive = block.run, []

    def measured(*arguments):
        result = jax.block_until_ready(run(*arguments))
        alive.append(nbytes(jax.live_arrays()))
        return result

    monkeypatch.setattr(block, "run", measured)
    prefill_decode.prefill(deep, state, tokens, tokens, np.full(3, LENGTH, np.int32), np.arange(3))
    growth = set(np.diff(alive[1:]).tolist())
    assert growth == {nbytes(jax.tree.leaves(state.cache.layers[0]))}


@pytest.mark.parametrize("storage", ["dense", "nvfp4", "fp8"])
def test_repr_of_a_model_is_a_summary(cfg, storage):
    """A few lines, in a notebook too, instead of every array."""
    drafting = models.random_model(dataclasses.replace(cfg, num_nextn_predict_layers=1), storage=storage)
    text = repr(drafting)
    assert text == str(drafting)
    assert len(text.splitlines()) < 8 and len(text) < 600, text
    table = {leaf.path: math.prod(leaf.shape) for leaf in layout.leaves(drafting.cfg) if leaf.path not in layout.COPIES}
    copies = sum(math.prod(leaf.shape) for leaf in layout.leaves(drafting.cfg) if leaf.path in layout.COPIES)
    stated = format_count(sum(table.values()) + copies), format_size(nbytes(jax.tree.leaves(drafting)))
    for word in (*stated, "2 (1 dense, 1 MoE)", "MTP head", storage.replace("dense", "float32"), "cpu"):
        assert word in text, (word, text)
    parts = "<table>", "embedding, norm, head", "layer 0", "layer 1", "MTP head", storage.replace("dense", "float32")
    assert all(word in drafting._repr_html_() for word in (*stated, *parts))
    deep = models.abstract(dataclasses.replace(cfg, num_hidden_layers=9))
    assert "layer 1 to layer 8, each" in deep._repr_html_()
    assert len(repr(drafting.layers[1])) < 400


def test_repr_counts_shared_weights_once(model):
    """The MTP head has the model's own embedding and head unless the checkpoint stores others."""
    twice = dataclasses.replace(model, head_VD=model.embed_VD)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model)) - model.head_VD.size
    assert format_count(parameters) in repr(twice)


def test_repr_without_arrays(cfg):
    """Shapes, names in the place of arrays, and tracers are shown as well as they can be."""
    assert "none" in repr(models.abstract(cfg)) and format_size(0) in repr(build(cfg, jnp.float32, lambda path: path))
    shown = []
    jax.eval_shape(lambda model: shown.append(repr(model)), models.abstract(cfg))
    assert len(shown[0]) < 600


def test_repr_of_an_output_is_a_summary(whole):
    """Shapes instead of arrays, of its parts too."""
    for part in (whole, whole.cache, whole.cache.layers[0], whole.seen[1]):
        text = repr(part)
        assert len(text.splitlines()) < 8 and len(text) < 600, text
    assert "float32[3, 25, 320]" in repr(whole) and "2 x Seen" in repr(whole) and "3 rows x 32 slots" in repr(whole)
    assert "float32[3, 25, 320]" in whole._repr_html_()


# -------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([[1, 320]], ["320", "row 0, position 1", "0..319"]),
        ([[1, -1], [400, 2]], ["2 token ids", "-1", "400"]),
        ([[1.0, 2.0]], ["float64", "integers"]),
        ([[True, False]], ["bool", "integers"]),
        ([1, 2, 3], ["(3,)", "matrix"]),
        (np.zeros((1, 0), int), ["(1, 0)"]),
        ([], ["(0,)", "matrix"]),
        ([[1, 2], [3]], ["2 different lengths (1, 2)", "count_B"]),
        ([[[1]]], ["(1, 1, 1)"]),
    ],
    ids=str,
)
def test_forward_refuses_wrong_tokens(model, tokens, said):
    """Before anything is compiled, with the offending values."""
    with count_compilations() as compiled, pytest.raises(UsageError) as caught:
        ds.forward(model, tokens)
    assert compiled.count == 0
    assert all(word in str(caught.value) for word in said), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"capacity": 24}, ["24", "25", "capacity=25"]),
        ({"count_B": [1, 2]}, ["3 rows", "[1, 2]"]),
        ({"count_B": [0, 2, 3]}, ["[0, 2, 3]"]),
        ({"count_B": [1, 2, 26]}, ["25", "26"]),
        ({"count_B": [1.0, 2.0, 3.0]}, ["count_B"]),
        ({"capacity": 0}, ["0", "capacity"]),
        ({"capacity": -5}, ["-5", "capacity"]),
        ({"capacity": 30.0}, ["30.0", "capacity", "integer"]),
        ({"capacity": True}, ["True", "capacity", "integer"]),
        ({"capacity": 10**7}, ["10000000", "from 1 to 4096"]),
        ({"cache": 5}, ["5", "`forward` returns"]),
    ],
    ids=str,
)
def test_forward_refuses_what_does_not_fit(model, tokens, arguments, said):
    """A cache that is too small, or counts that are none."""
    with count_compilations() as compiled, pytest.raises(UsageError) as caught:
        ds.forward(model, tokens, **arguments)
    assert compiled.count == 0
    assert all(word in str(caught.value) for word in said), str(caught.value)


def test_forward_refuses_more_than_the_longest_context(model):
    """As every way in does."""
    longest = model.cfg.max_position_embeddings
    with (
        count_compilations() as compiled,
        pytest.raises(UsageError, match=f"{longest + 1} tokens.*context is {longest}"),
    ):
        ds.forward(model, np.zeros((1, longest + 1), int))
    assert compiled.count == 0


def test_a_full_cache_is_refused_and_stays_as_it_is(model, tokens, whole):
    """The next token of a full cache would overwrite the last: the error says how much is needed."""
    full = ds.forward(model, tokens, capacity=LENGTH).cache
    before = jax.tree.map(np.asarray, full)
    with count_compilations() as compiled, pytest.raises(UsageError, match=r"25 tokens.*26.*capacity=26.*unchanged"):
        ds.forward(model, tokens[:, :1], cache=full)
    with pytest.raises(UsageError, match="3 rows, but there are 2"):
        ds.forward(model, tokens[:2, :1], cache=whole.cache)
    assert compiled.count == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, full))


def test_rounding_matrices(model):
    """The helper for rounded weights rounds matrices and leaves gains alone."""
    rounded = golden.rounded(model)
    assert rounded.head_VD.dtype == jnp.bfloat16 and rounded.norm_D.dtype == jnp.float32
