"""A trace holds what the layers computed when the answer was generated, and is saved and loaded as one file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsv32_jax as ds
from dsv32_jax.errors import CapacityError, CheckpointError, StorageError, UsageError
from dsv32_jax.generation import request
from dsv32_jax.inspect import capture, traces
from dsv32_jax.model import mla
from dsv32_jax.model.ops import rms_norm, rotation
from dsv32_jax.quantization import cache_formats
from dsv32_jax.system import array_file, host
from tests import models

PROMPTS = [[0, 17, 42, 7, 99, 5, 23], [0, 250, 8], list(range(3, 40))]
NEW = 6


@pytest.fixture(scope="module")
def model(tiny):
    """An MoE layer and an MTP head; one token in sixteen ends a row."""
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    return models.random_model(dataclasses.replace(tiny, **layers, eos_token_id=(1, *range(300, 320))))


@pytest.fixture(scope="module")
def generated(model):
    """The prompts continued with drafts."""
    return ds.generate(model, PROMPTS, max_new_tokens=NEW, draft=1, top_logprobs=5)


@pytest.fixture(scope="module")
def rows(generated):
    """Prompts with their answers."""
    return [[*prompt, *new] for prompt, new in zip(PROMPTS, generated.tokens, strict=True)]


@pytest.fixture(scope="module")
def trace(model, rows):
    """All kinds; the longest row is read in three chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "chunk_size", lambda rows=1: 16)
        return ds.inspect.trace(model, rows, traces.KINDS)


@pytest.fixture(scope="module")
def seen(model, generated, trace):
    """One forward of prompts and answers, with as many slots as the generation had."""
    tokens = np.where(trace["tokens"] < 0, 0, trace["tokens"])
    return ds.forward(model, tokens, count_B=trace["length"], capacity=generated.stats.capacity, seen=True)


def test_generation_chose_the_most_likely_tokens(generated, trace):
    """Greedy tokens, their log-probabilities and the alternatives are those of the trace, with drafts too."""
    for b, (prompt, new) in enumerate(zip(PROMPTS, generated.tokens, strict=True)):
        predicted = slice(len(prompt) - 1, len(prompt) + len(new) - 1)
        np.testing.assert_array_equal(trace["top_id"][b, predicted, 0], new)
        np.testing.assert_allclose(trace["top_logprob"][b, predicted, 0], generated.logprobs[b], atol=1e-4)
        want = np.array(generated.top_logprobs[b])
        np.testing.assert_array_equal(trace["top_id"][b, predicted, :5], want[..., 0])
        np.testing.assert_allclose(trace["top_logprob"][b, predicted, :5], want[..., 1], atol=1e-4)


def test_each_decode_step_saw_what_the_trace_holds(model, generated, trace):
    """Prompt at once, then a token at a time over the cache, as generation does."""
    prompt, new = PROMPTS[2], generated.tokens[2]
    out = ds.forward(model, [prompt], capacity=generated.stats.capacity, seen=True)
    for position, token in enumerate(new, len(prompt)):
        out = ds.forward(model, [[token]], cache=out.cache, seen=True)
        (layer,) = out.seen
        order, want = np.argsort(trace["expert"][0, 2, position]), np.argsort(layer.routing.expert_BTX[0, 0])
        np.testing.assert_array_equal(trace["expert"][0, 2, position][order], layer.routing.expert_BTX[0, 0][want])
        np.testing.assert_allclose(trace["gate"][0, 2, position][order], layer.routing.gate_BTX[0, 0][want], atol=1e-5)
        selected = trace["selected"][0, 2, position]
        assert set(selected) - {-1} == set(np.asarray(layer.selected_BTk[0, 0])) - {-1}
        scores = np.asarray(layer.index_score_BTS)[0, 0, selected[selected >= 0]]
        np.testing.assert_allclose(trace["index_score"][0, 2, position][selected >= 0], scores, rtol=1e-4, atol=1e-4)


def test_routing_of_a_model_without_experts(tiny, tmp_path):
    """Routing arrays have no layers; the file can be read all the same."""
    dense = models.random_model(
        dataclasses.replace(tiny, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    )
    ds.inspect.trace(dense, PROMPTS[:1], {"routing", "logits"}).save(tmp_path / "trace")
    read = ds.inspect.Trace.load(tmp_path / "trace")
    assert read["expert"].shape[0] == read["gate"].shape[0] == 0 and read["top_id"].shape[0] == 1


def test_rows_are_whole(rows, trace):
    """Every token of every row is traced, and padding is marked."""
    assert trace["length"].tolist() == [len(row) for row in rows]
    for b, row in enumerate(rows):
        assert trace["tokens"][b].tolist() == row + [-1] * (trace["tokens"].shape[1] - len(row))
        assert (trace["expert"][:, b, len(row) :] == -1).all() and (trace["selected"][:, b, len(row) :] == -1).all()
        assert (trace["index_score"][:, b, len(row) :] == -np.inf).all()
        for name in ("gate", "weight", "spread", "mass_selected"):
            assert np.isnan(trace[name][:, b, len(row) :]).all() and not np.isnan(trace[name][:, b, : len(row)]).any()
        assert np.isnan(trace["entropy"][b, len(row) :]).all()
        assert (trace["expert"][:, b, : len(row)] >= 0).all()


def test_routing_and_indexer_are_those_of_forward(trace, seen):
    """Experts, gates, selections and scores of every token."""
    for b, length in enumerate(trace["length"]):
        (routing,) = (layer.routing for layer in seen.seen if layer.routing is not None)
        np.testing.assert_array_equal(trace["expert"][0, b, :length], routing.expert_BTX[b, :length])
        np.testing.assert_allclose(trace["gate"][0, b, :length], routing.gate_BTX[b, :length], atol=1e-5)
        for i, layer in enumerate(seen.seen):
            selected = trace["selected"][i, b, :length]
            np.testing.assert_array_equal(
                np.sort(selected), np.sort(layer.selected_BTk[b, :length, : len(selected[0])])
            )
            scores = np.take_along_axis(np.asarray(layer.index_score_BTS[b, :length]), np.maximum(selected, 0), axis=-1)
            got = trace["index_score"][i, b, :length]
            np.testing.assert_allclose(got[selected >= 0], scores[selected >= 0], rtol=1e-4, atol=1e-4)
            assert (got[selected < 0] == -np.inf).all()


def test_logits_are_those_of_forward(trace, seen):
    """The most likely tokens at every position, the prompt's too, and the entropy."""
    logprob = np.asarray(jax.nn.log_softmax(seen.logits))
    for b, length in enumerate(trace["length"]):
        want = np.take_along_axis(logprob[b, :length], trace["top_id"][b, :length], axis=-1)
        np.testing.assert_allclose(trace["top_logprob"][b, :length], want, atol=1e-4)
        entropy = -(np.exp(logprob[b, :length]) * logprob[b, :length]).sum(-1)
        np.testing.assert_allclose(trace["entropy"][b, :length], entropy, atol=1e-4)


@pytest.mark.parametrize("capacity", [20, 64], ids=["whole", "sparse"])
def test_attention_is_that_of_the_layer(model, capacity):
    """With one head, the weights times the attended values are attention's output."""
    cfg = dataclasses.replace(model.cfg, num_attention_heads=1, num_hidden_layers=1, num_nextn_predict_layers=0)
    single = models.random_model(cfg)
    (layer,), tokens = single.layers, models.tokens(cfg, 2, 18)
    out = ds.forward(single, tokens, capacity=capacity, seen=True)
    (one,), (cache,) = out.seen, out.cache.layers
    position = jnp.broadcast_to(jnp.arange(18, dtype=jnp.int32), (2, 18))
    weight, spread = capture.attention_weights(layer, one, cache, position)
    selected = np.asarray(one.selected_BTk)
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-5)
    assert (np.asarray(weight)[selected < 0] == 0).all()
    latent = cache_formats.read_at(cache.c_kv_yqC, cache.slots(one.selected_BTk), jnp.float32)
    values = jnp.einsum("btk,btkc,hpc->bthp", weight, latent, layer.mla.w_uv_HPC)
    np.testing.assert_allclose(layer.mla.output(values), one.attention_BTD, atol=1e-4)
    np.testing.assert_allclose(spread, jax.scipy.special.entr(weight).sum(-1), atol=1e-4)
    h = rms_norm(one.x_BTD, layer.attn_norm_D, cfg.rms_norm_eps)
    queries = layer.mla.queries(layer.mla.latent_query(h), *rotation(position, cfg))
    sparse, _ = mla.sparse_weights(layer.mla, *queries, cache, one.selected_BTk)
    np.testing.assert_allclose(weight, sparse[:, :, 0], atol=1e-6)
    assert (spread[:, 0] == 0).all() and (spread[:, 5:] > 0).any()


def same(got, want):
    """Compare two traces of the same tokens, read in different batches or caches."""
    assert got.kinds == want.kinds and set(got) == set(want)
    for name, array in want.items():
        if name == "selected":
            np.testing.assert_array_equal(np.sort(got[name]), np.sort(array))
        elif name in ("index_score", "weight"):
            np.testing.assert_allclose(np.sort(got[name]), np.sort(array), atol=1e-4)
        elif array.dtype == np.int32:
            np.testing.assert_array_equal(got[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


def test_batches(model, rows, trace):
    """Each row is the same alone as in a batch."""
    same(ds.inspect.trace(model, rows, traces.KINDS, batch_size=1), trace)


def test_a_conversation(model):
    """A session of several turns, with a context longer than index_topk."""
    model = models.random_model(dataclasses.replace(model.cfg, index_topk=16))
    session = ds.session(model, draft=1)
    one = session.generate(PROMPTS[1], max_new_tokens=2)
    longer = [*PROMPTS[1], *one.tokens[0], *range(3, 40)]
    two = session.generate(longer, max_new_tokens=NEW)
    trace = ds.inspect.trace(model, [[*longer, *two.tokens[0]]])
    assert trace.kinds == ("attention", "indexer", "logits", "routing")
    assert trace["selected"].shape[-1] == 16 < trace["length"][0]
    predicted = trace["top_id"][0, :, 0].tolist()
    assert predicted[2:4] == one.tokens[0] and predicted[len(longer) - 1 : -1] == two.tokens[0]


def test_a_compressed_cache(model, rows, trace):
    """With an FP8 cache the trace is that of a generation with one."""
    fp8 = ds.inspect.trace(model, rows, {"logits"}, cache_dtype="fp8")
    assert set(fp8) == {"tokens", "length", "top_id", "top_logprob", "entropy"}
    want = ds.score(model, rows, top_logprobs=1, cache_dtype="fp8").top_logprobs[2]
    np.testing.assert_allclose(fp8["top_logprob"][2, :-1, 0], [pairs[0][1] for pairs in want], atol=1e-5)
    assert np.abs(fp8["entropy"] - trace["entropy"])[2].max() > 1e-4


def test_a_file_holds_it(trace, tmp_path):
    """A saved trace is read back equal, with its config, and leaves no other file."""
    trace.save(tmp_path / "run.safetensors")
    again = ds.inspect.Trace.load(tmp_path / "run.safetensors")
    assert again.kinds == trace.kinds and again.config == trace.config
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    for name, array in trace.items():
        np.testing.assert_array_equal(again[name], array)


def test_repr(trace):
    """A few lines: kinds, size, and the shape of every array; no values."""
    lines = repr(trace).splitlines()
    assert lines[0].startswith("Trace of attention, indexer, logits, mass, routing: 3 x 43 tokens, ")
    assert any(line.split() == ["expert", "[1,", "3,", "43,", "2]"] for line in lines) and len(lines) == len(trace) + 1


def _damaged(facts, arrays, what):
    """Damage one thing in the facts or arrays of a file."""
    match what:
        case "kinds":
            facts["kinds"] = ["routing", "colours"]
        case "types":
            facts["kinds"] = "routing"
        case "config":
            facts["about"] = {"config": []}
        case "missing":
            del arrays["gate"]
        case "unknown":
            arrays["extra"] = arrays["gate"]
        case "dtype":
            arrays["expert"] = arrays["expert"].astype(np.float32)
        case "rows":
            arrays["gate"] = arrays["gate"][:, :1].copy()
        case "tokens":
            arrays["length"] = arrays["length"] + 1


@pytest.mark.parametrize("what", "kinds types config missing unknown dtype rows tokens".split())
def test_a_damaged_file_is_refused(tmp_path, what):
    """Inconsistent arrays, bytes that are not safetensors, another kind, and a missing file are refused."""
    file = tmp_path / "trace"
    arrays = {
        "tokens": np.zeros((2, 3), np.int32),
        "length": np.full(2, 3, np.int32),
        "expert": np.zeros((1, 2, 3, 2), np.int32),
        "gate": np.zeros((1, 2, 3, 2), np.float32),
    }
    facts = {"kinds": ["routing"], "about": {"config": {}}}
    array_file.write_arrays(file, traces.KIND, facts, arrays)
    assert ds.inspect.Trace.load(file).kinds == ("routing",)
    assert set(load_file(file)) == set(arrays)
    _damaged(facts, arrays, what)
    array_file.write_arrays(file, traces.KIND, facts, arrays)
    with pytest.raises(CheckpointError, match="is damaged"):
        ds.inspect.Trace.load(file)
    array_file.write_arrays(file, "dsv32_jax session 1", facts, arrays)
    with pytest.raises(CheckpointError, match="is not a trace of this version .*session 1"):
        ds.inspect.Trace.load(file)
    file.write_bytes(b"no trace")
    with pytest.raises(CheckpointError, match="is not a trace"):
        ds.inspect.Trace.load(file)
    with pytest.raises(CheckpointError, match="nowhere"):
        ds.inspect.Trace.load(tmp_path / "nowhere")


def test_misuse(model, trace, tmp_path, monkeypatch):
    """Unknown kinds, arrays that were not kept, missing folders, too little memory."""
    for wrong in ("colours", {"routing", "colours"}, [3], 5):
        with pytest.raises(UsageError, match="keep takes a set of attention, indexer, logits, mass, routing, not"):
            ds.inspect.trace(model, PROMPTS, wrong)
    with pytest.raises(UsageError, match="prompts must be a list of lists"):
        ds.inspect.trace(model, "text")
    with pytest.raises(UsageError, match="batch_size"):
        ds.inspect.trace(model, PROMPTS, batch_size=0)
    only = dataclasses.replace(trace, arrays={"tokens": trace["tokens"]})
    with pytest.raises(UsageError, match="'attention' or 'indexer'"):
        only["selected"]
    with pytest.raises(UsageError, match="no array 'colour'"):
        only["colour"]
    assert "selected" not in only and "tokens" in only
    with pytest.raises(StorageError):
        trace.save(tmp_path / "nowhere" / "trace")
    monkeypatch.setattr(host, "get_free_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match=r"a trace of 3 rows of up to 37 tokens .* routing 0.0 kB"):
        ds.inspect.trace(model, PROMPTS, {"routing", "indexer"})


def test_memory(tiny, model, monkeypatch):
    """Ids and gates in layers of experts, positions and scores in all; a chunk's arrays count beside the cache."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=2)

    def size(tokens, *kinds):
        return capture.nbytes(cfg, kinds, 1, tokens) - capture.nbytes(cfg, (), 1, tokens)

    assert capture.nbytes(cfg, (), 3, 64) == 3 * (4 * 64 + 4)
    assert size(64, "routing") == 64 * 8 * cfg.num_experts_per_tok
    assert size(64, "indexer") == 2 * 64 * 8 * cfg.index_topk
    assert size(10, "attention") == 2 * 10 * (8 * 10 + 4)
    assert size(64, "logits") == 64 * (8 * traces.TOP + 4)
    assert size(64, "attention", "indexer") == 2 * 64 * (12 * cfg.index_topk + 4)
    asked = []
    monkeypatch.setattr(capture.memory, "plan_batch", lambda *given: asked.append(given[-1]) or 1)
    ds.inspect.trace(model, PROMPTS[:1], {"routing"})
    assert asked == [capture.nbytes(model.cfg, ("routing",), 1, 16)]
