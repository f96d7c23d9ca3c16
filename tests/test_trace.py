"""A trace holds what the layers computed when the answer was generated, and is saved and loaded as one file."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsv32_jax as ds
from dsv32_jax.errors import CapacityError, CheckpointError, StorageError, UsageError
from dsv32_jax.generation import score
from dsv32_jax.inspect import observations, trace_format, tracing
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
        patch.setattr(score, "chunk_size", lambda rows=1: 16)
        return ds.inspect.trace(model, rows, trace_format.KINDS)


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
    weight, spread = observations.attention_weights(layer, one, cache, position)
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
    same(ds.inspect.trace(model, rows, trace_format.KINDS, batch_size=1), trace)


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
    assert lines[0].startswith("Trace of attention, experts, indexer, lens, logits, mass, residual, routing: 3 x 43 t")
    assert any(line.split() == ["expert", "[1,", "3,", "43,", "2]"] for line in lines) and len(lines) == len(trace) + 1
    assert "<table>" in trace._repr_html_() and "[1, 3, 43, 2]" in trace._repr_html_()


DAMAGE = {
    "kinds": lambda facts, arrays: facts.update(kinds=["routing", "colours"]),
    "types": lambda facts, arrays: facts.update(kinds="routing"),
    "no config": lambda facts, arrays: facts.update(about={"config": []}),
    "a bad config": lambda facts, arrays: facts.update(about={"config": {"vocab_size": -5}}),
    "missing": lambda facts, arrays: arrays.pop("gate"),
    "unknown": lambda facts, arrays: arrays.update(extra=arrays["gate"]),
    "dtype": lambda facts, arrays: arrays.update(expert=arrays["expert"].astype(np.float32)),
    "rows": lambda facts, arrays: arrays.update(gate=arrays["gate"][:, :1].copy()),
    "axes": lambda facts, arrays: arrays.update(tokens=arrays["tokens"].reshape(-1)),
    "tokens": lambda facts, arrays: arrays.update(length=arrays["length"] + 1),
    "an expert that is not there": lambda facts, arrays: arrays["expert"].fill(2**31 - 1),
    "a token below padding": lambda facts, arrays: arrays["tokens"].fill(-2),
    "a position beyond the context": lambda facts, arrays: arrays["position"].fill(2**30),
    "a layer that is not there": lambda facts, arrays: arrays["layer"].fill(1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused(model, tmp_path, what):
    """Inconsistent arrays, ids out of range, bytes that are not safetensors, another kind, and a missing file are
    refused."""
    file = tmp_path / "trace"
    kinds = ["residual", "routing"]
    arrays = {
        name: np.zeros(shape, trace_format.ARRAYS[name].dtype)
        for name, shape in trace_format.shapes(model.cfg, kinds, 2, 3, 1, 2).items()
    }
    arrays["length"][:] = 3
    facts = {"kinds": kinds, "about": {"config": model.cfg.to_dict()}}
    array_file.write_arrays(file, trace_format.KIND, facts, arrays)
    assert ds.inspect.Trace.load(file).kinds == tuple(kinds)
    assert set(load_file(file)) == set(arrays)
    DAMAGE[what](facts, arrays)
    array_file.write_arrays(file, trace_format.KIND, facts, arrays)
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


def test_shapes_are_checked_before_anything_is_read(trace, tmp_path, monkeypatch):
    """A file that does not fit in memory, and one with a wrong shape, are refused from their headers."""
    trace.save(tmp_path / "whole")
    arrays = {**trace, "gate": trace["gate"][..., :1].copy()}
    facts = {"kinds": trace.kinds, "about": dict(trace.about)}
    array_file.write_arrays(tmp_path / "wrong", trace_format.KIND, facts, arrays)
    monkeypatch.setattr(array_file, "_hash", lambda *read: pytest.fail("arrays were read"))
    with pytest.raises(CheckpointError, match="gate is F32"):
        ds.inspect.Trace.load(tmp_path / "wrong")
    monkeypatch.setattr(host, "get_free_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match="nothing was read"):
        ds.inspect.Trace.load(tmp_path / "whole")
    with pytest.raises(CapacityError, match="use the arrays"):
        trace.table("attention")


def test_the_residual_stream(model, rows, trace, seen):
    """After every layer it is what enters the next one; chosen positions are those of the whole trace."""
    two = models.random_model(dataclasses.replace(model.cfg, num_hidden_layers=2))
    every = ds.inspect.trace(two, rows, {"residual", "lens", "logits"})
    out = ds.forward(two, np.maximum(every["tokens"], 0), count_B=every["length"], seen=True)
    for b, length in enumerate(every["length"]):
        np.testing.assert_allclose(every["residual"][0, b, :length], out.seen[1].x_BTD[b, :length], atol=1e-4)
        np.testing.assert_allclose(two.normalize(every["residual"][1, b, :length]), out.hidden[b, :length], atol=1e-4)
        assert np.isnan(every["residual"][:, b, length:]).all() and (every["position"][b, length:] == -1).all()
    last = every["lens_logprob"][1]
    np.testing.assert_allclose(last, every["top_logprob"][..., : trace_format.LENS], atol=1e-5)
    first = jax.nn.log_softmax(two.logits(two.normalize(jnp.asarray(every["residual"][0]))))
    best = np.asarray(first.max(axis=-1))
    np.testing.assert_allclose(every["lens_logprob"][0, ..., 0], np.where(every["tokens"] < 0, np.nan, best), atol=1e-4)
    some = ds.inspect.trace(two, rows, {"residual"}, layers=[1], positions=[2, -1, 0])
    assert some["layer"].tolist() == [1] and some["residual"].shape == (1, 3, 3, two.cfg.hidden_size)
    for b, length in enumerate(every["length"]):
        assert some["position"][b].tolist() == [2, length - 1, 0]
        np.testing.assert_allclose(some["residual"][0, b], every["residual"][1, b, some["position"][b]], atol=1e-5)


def test_norms_of_expert_outputs(model, trace, seen):
    """Each is that of the expert's feed-forward applied alone."""
    (layer,), (one,) = model.layers, seen.seen
    h = rms_norm(one.x_BTD + one.attention_BTD, layer.ffn_norm_D, model.cfg.rms_norm_eps)[0, 3]
    for expert, norm in zip(trace["expert"][0, 0, 3], trace["norm"][0, 0, 3], strict=True):
        gate, up, down = (bank[expert] for bank in layer.ffn.routed)
        want = down @ (jax.nn.silu(gate @ h) * (up @ h))
        np.testing.assert_allclose(norm, jnp.linalg.norm(want), rtol=1e-4)
    assert np.isnan(trace["norm"][:, 1, trace["length"][1] :]).all()


def test_tables(trace):
    """A record for each value that is not padding, with its place and token."""
    routing = trace.table("routing")
    assert routing.dtype.names == ("layer", "row", "position", "choice", "token", "expert", "gate")
    assert len(routing) == trace["length"].sum() * 2
    one = routing[100]
    assert one["gate"] == trace["gate"][0, one["row"], one["position"], one["choice"]]
    assert one["token"] == trace["tokens"][one["row"], one["position"]]
    attention = trace.table("attention")
    assert len(attention) == (trace["selected"] >= 0).sum() and not np.isnan(attention["weight"]).any()
    np.testing.assert_array_equal(attention["spread"], trace["spread"][0, attention["row"], attention["position"]])
    assert len(trace.table("tokens")) == trace["length"].sum() and trace.table("length")["length"].sum() == sum(
        trace["length"]
    )
    residual = trace.table("residual")
    assert len(residual) == trace["length"].sum() * trace.config.hidden_size
    assert trace.table("layer")["layer"].tolist() == trace["layer"].tolist()
    places = trace.table("position")
    assert len(places) == trace["length"].sum() and places["token"][-1] == trace["tokens"][2, places["position"][-1]]
    assert residual[-1]["residual"] == trace["residual"][0, 2, -1, -1] and residual[-1]["position"] == 42


def test_frames(trace, monkeypatch):
    """Every table as a DataFrame, with its columns, dtypes and values, to group and count by."""
    for name in (*trace.kinds, *trace):
        table, frame = trace.table(name), trace.frame(name)
        assert tuple(frame.columns) == table.dtype.names and len(frame) == len(table)
        for column in table.dtype.names:
            assert frame[column].dtype == table[column].dtype
            np.testing.assert_array_equal(frame[column].to_numpy(), table[column])
    counts = trace.frame("routing").groupby(["layer", "expert"]).size()
    assert counts.sum() == trace.count_experts().sum()
    for (layer, expert), count in counts.items():
        assert count == trace.count_experts()[layer - trace.config.first_k_dense_replace, expert]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        trace.frame("expert")


def test_misuse(model, trace, tmp_path, monkeypatch):
    """Unknown kinds, arrays that were not kept, missing folders, too little memory."""
    for wrong in ("colours", {"routing", "colours"}, [3], 5):
        with pytest.raises(UsageError, match="keep takes a set of attention, experts, indexer, lens, .*, routing, not"):
            ds.inspect.trace(model, PROMPTS, wrong)
    with pytest.raises(UsageError, match="prompts must be a list of lists.*ds.chat.prepare"):
        ds.inspect.trace(model, "text")
    with pytest.raises(UsageError, match="prompt 0 must be a list of token ids.*ds.chat.prepare"):
        ds.generate(model, ["text"])
    with pytest.raises(UsageError, match=r"prompt 0 must be a list of token ids, not 0; one prompt is written \[\["):
        ds.generate(model, [0, 17])
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
    for wrong in ({"layers": [1]}, {"layers": [True]}, {"positions": [7]}, {"positions": [0, -4]}):
        with pytest.raises(UsageError, match="layers|positions"):
            ds.inspect.trace(model, PROMPTS[1:], {"residual"}, **wrong)
    with pytest.raises(UsageError, match="add 'residual' to keep"):
        ds.inspect.trace(model, PROMPTS, positions=[0])
    monkeypatch.setattr(host, "get_free_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match=r"a trace of 3 rows of up to 37 tokens .* expert 0.0 kB"):
        ds.inspect.trace(model, PROMPTS, {"routing", "indexer"})


def test_memory(tiny, model, monkeypatch):
    """Ids and gates in layers of experts, positions and scores in all; a chunk's arrays count beside the cache."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=2)

    def size(tokens, *kinds, **chosen):
        nothing = ds.inspect.estimate_bytes(cfg, (), tokens=tokens)
        return ds.inspect.estimate_bytes(cfg, kinds, tokens=tokens, **chosen) - nothing

    assert ds.inspect.estimate_bytes(cfg, (), rows=3, tokens=64) == 3 * (4 * 64 + 4)
    assert size(64, "residual") == 4 * (2 + 64 + 2 * 64 * cfg.hidden_size)
    assert size(64, "residual", layers=1, positions=3) == 4 * (1 + 3 + 3 * cfg.hidden_size)
    assert size(64, "lens") == 2 * 64 * (8 * trace_format.LENS + 4)
    assert size(64, "routing", "experts") == 64 * 12 * cfg.num_experts_per_tok
    assert size(64, "routing") == 64 * 8 * cfg.num_experts_per_tok
    assert size(64, "indexer") == 2 * 64 * 8 * cfg.index_topk
    assert size(10, "attention") == 2 * 10 * (8 * 10 + 4)
    assert size(64, "logits") == 64 * (8 * trace_format.TOP + 4)
    assert size(64, "attention", "indexer") == 2 * 64 * (12 * cfg.index_topk + 4)
    asked = []
    monkeypatch.setattr(tracing.memory, "plan_batch", lambda *given: asked.append(given[-1]) or 1)
    ds.inspect.trace(model, PROMPTS[:1], {"routing"})
    assert asked == [ds.inspect.estimate_bytes(model.cfg, {"routing"}, tokens=16)]
