"""The flight recorder: what it keeps is what forward sees, and a run without it knows nothing of it."""

import asyncio
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dsv32_jax as ds
from dsv32_jax.errors import CapacityError, CheckpointError, StorageError, UsageError
from dsv32_jax.generation import prefill_decode, recording, request, tape
from dsv32_jax.generation.batch import WHOLE
from dsv32_jax.model import cache, mla
from dsv32_jax.model.ops import rms_norm, rotation
from dsv32_jax.system import host
from tests import models

PROMPTS = [[0, 17, 42, 7, 99, 5, 23], [0, 250, 8], list(range(3, 40))]
ALL = ("routing", "indexer", "attention", "logits")
NEW = 6


@pytest.fixture(scope="module")
def model(tiny):
    """A layer of experts and a drafting layer; one token in sixteen ends a row."""
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    return models.random_model(dataclasses.replace(tiny, **layers, eos_token_id=(1, *range(300, 320))))


@pytest.fixture(scope="module")
def drafted(model):
    """The prompts continued with drafts, everything recorded; the longest is read in three chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "CHUNK", 16)
        return ds.generate(model, PROMPTS, max_new_tokens=NEW, draft=1, record=ALL)


@pytest.fixture(scope="module")
def seen(model, drafted):
    """What one forward of prompt and new tokens sees, with as many slots as the run had."""
    record = drafted.record
    tokens = np.where(record["tokens"][:, :-1] < 0, 0, record["tokens"][:, :-1])
    return ds.forward(model, tokens, count_B=record["length"], capacity=drafted.stats.capacity, seen=True)


def test_it_changes_nothing(model, drafted):
    """Tokens and log-probabilities are those of a run that keeps nothing, with drafts and without."""
    plain = ds.generate(model, PROMPTS, max_new_tokens=NEW)
    assert drafted.tokens == plain.tokens and plain.record is None
    for row, want in zip(drafted.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(row, want, atol=1e-4)


def test_routing_of_a_model_without_experts(tiny, tmp_path):
    """Has no layers; the rest of the file is read all the same."""
    dense = models.random_model(
        dataclasses.replace(tiny, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    )
    record = ds.generate(dense, PROMPTS[:1], max_new_tokens=2, record={"routing", "logits"}).record
    record.save(tmp_path / "record")
    read = type(record).load(tmp_path / "record")
    assert read["expert"].shape[0] == read["gate"].shape[0] == 0 and read["top_id"].shape[0] == 1


def test_rows_are_whole(drafted):
    """Prompt and new tokens but the last, padding marked as such."""
    record = drafted.record
    for b, (prompt, new) in enumerate(zip(PROMPTS, drafted.tokens, strict=True)):
        row = [*prompt, *new]
        assert record["tokens"][b].tolist() == row + [-1] * (record["tokens"].shape[1] - len(row))
        assert record["prompt"][b] == len(prompt) and record["length"][b] == len(row) - 1
        assert (record["expert"][:, b, len(row) - 1 :] == -1).all()
        assert np.isnan(record["gate"][:, b, len(row) - 1 :]).all()
        assert (record["expert"][:, b, : len(row) - 1] >= 0).all()


def test_routing_and_indexer_are_those_of_forward(drafted, seen):
    """Experts, gates, selections and scores, of prompts and of tokens that were drafted, kept or rejected."""
    record = drafted.record
    for b, length in enumerate(record["length"]):
        (routing,) = (layer.routing for layer in seen.seen if layer.routing is not None)
        np.testing.assert_array_equal(record["expert"][0, b, :length], routing.expert_BTX[b, :length])
        np.testing.assert_allclose(record["gate"][0, b, :length], routing.gate_BTX[b, :length], atol=1e-5)
        for i, layer in enumerate(seen.seen):
            selected = record["selected"][i, b, :length]
            np.testing.assert_array_equal(np.sort(selected), np.sort(layer.selected_BTk[b, :length]))
            scores = np.take_along_axis(np.asarray(layer.index_score_BTS[b, :length]), np.maximum(selected, 0), axis=-1)
            got = record["index_score"][i, b, :length]
            np.testing.assert_allclose(got[selected >= 0], scores[selected >= 0], rtol=1e-4, atol=1e-4)
            assert (got[selected < 0] == -np.inf).all()


def test_logits_are_those_of_forward(drafted, seen):
    """The likeliest tokens of every position, the prompt's too, and the entropy."""
    record = drafted.record
    logprob = np.asarray(jax.nn.log_softmax(seen.logits))
    for b, length in enumerate(record["length"]):
        want = np.take_along_axis(logprob[b, :length], record["top_id"][b, :length], axis=-1)
        np.testing.assert_allclose(record["top_logprob"][b, :length], want, atol=1e-4)
        entropy = -(np.exp(logprob[b, :length]) * logprob[b, :length]).sum(-1)
        np.testing.assert_allclose(record["entropy"][b, :length], entropy, atol=1e-4)
        new = drafted.tokens[b]
        np.testing.assert_array_equal(record["top_id"][b, length - len(new) : length, 0], new)


@pytest.mark.parametrize("capacity", [20, 64], ids=["whole", "sparse"])
def test_attention_is_that_of_the_layer(model, capacity):
    """The weights times what the heads attend to is attention's output where all heads weigh alike: with one head."""
    cfg = dataclasses.replace(model.cfg, num_attention_heads=1, num_hidden_layers=1, num_nextn_predict_layers=0)
    single = models.random_model(cfg)
    (layer,), tokens = single.layers, models.tokens(cfg, 2, 18)
    out = ds.forward(single, tokens, capacity=capacity, seen=True)
    (one,), (cache,) = out.seen, out.cache.layers
    position = jnp.broadcast_to(jnp.arange(18, dtype=jnp.int32), (2, 18))
    weight, spread = tape.attended(layer, one, cache, position)
    selected = np.asarray(one.selected_BTk)
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-5)
    assert (np.asarray(weight)[selected < 0] == 0).all()
    latent, _ = cache.latents_at(jnp.maximum(one.selected_BTk, 0), jnp.float32)
    values = jnp.einsum("btk,btkc,hpc->bthp", weight, latent, layer.mla.w_uv_HPC)
    np.testing.assert_allclose(layer.mla.output(values), one.attention_BTD, atol=1e-4)
    np.testing.assert_allclose(spread, jax.scipy.special.entr(weight).sum(-1), atol=1e-4)
    h = rms_norm(one.x_BTD, layer.attn_norm_D, cfg.rms_norm_eps)
    queries = layer.mla.queries(layer.mla.latent_query(h), *rotation(position, cfg))
    sparse, _ = mla.sparse_weights(layer.mla, *queries, cache, one.selected_BTk)
    np.testing.assert_allclose(weight, sparse[:, :, 0], atol=1e-6)
    assert (spread[:, 0] == 0).all() and (spread[:, 5:] > 0).any()


def test_off_is_off(model):
    """The program of a run that keeps nothing is the same text before and after one that does, and smaller."""
    plan = request.plan(model, PROMPTS, kinds=())
    assert plan.record == () and recording.whole(("routing",)) is recording.whole(("routing",))
    texts = [_program(model, prefill_decode.blank, prefill_decode.step) for _ in range(2)]
    kinds = ("routing",)
    step = recording._recorded(kinds, prefill_decode.step)
    recorded = _program(model, functools.partial(tape.recorded_blank, kinds), step)
    texts.append(_program(model, prefill_decode.blank, prefill_decode.step))
    assert texts[0] == texts[1] == texts[2]
    assert len(recorded) > len(texts[0]) and WHOLE.blank is prefill_decode.blank


def _program(model, blank, step) -> str:
    """The text of the decode loop."""
    float32 = np.dtype(np.float32)
    plan = request.plan(model, PROMPTS)
    task = request.task(model, plan, range(3), 4)
    context = jax.eval_shape(functools.partial(blank, model.cfg, float32, 4, 64, float32, 0))
    begin = functools.partial(prefill_decode.begin, slots=4, width=0, drafts=0)
    in_prompt = jax.ShapeDtypeStruct((4, model.cfg.vocab_size), bool)
    state = jax.eval_shape(begin, model, task, context, in_prompt)
    return str(jax.make_jaxpr(functools.partial(prefill_decode.decode, step))(model, task, state, 5))


def test_batches_and_samples(model):
    """Two continuations of each prompt, a prompt at a time, layer by layer: every row is what it is alone."""
    options = {"max_new_tokens": 3, "record": {"routing"}}
    model = dataclasses.replace(model, mtp=None)
    some = ds.generate.layerwise(model, PROMPTS[:2], n=2, batch_size=2, **options)
    assert some.record.kinds == ("routing",) and set(some.record.arrays) == {
        *"tokens prompt length expert gate".split()
    }
    assert some.record["prompt"].tolist() == [7, 7, 3, 3]
    padded = np.where(some.record["tokens"][:, :-1] < 0, 0, some.record["tokens"][:, :-1])
    (routing,) = (
        one.routing for one in ds.forward(model, padded, capacity=32, seen=True).seen if one.routing is not None
    )
    for b, length in enumerate(some.record["length"]):
        np.testing.assert_array_equal(some.record["expert"][0, b, :length], routing.expert_BTX[b, :length])


def same(got, want):
    """Two records of the same tokens, made in other steps or in a cache of another size."""
    assert got.kinds == want.kinds and set(got.arrays) == set(want.arrays)
    for name, array in want.arrays.items():
        if name == "selected":
            np.testing.assert_array_equal(np.sort(got[name]), np.sort(array))
        elif name in ("index_score", "weight"):
            np.testing.assert_allclose(np.sort(got[name]), np.sort(array), atol=1e-4)
        elif array.dtype == np.int32:
            np.testing.assert_array_equal(got[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


def test_a_stream_gives_it(model):
    """At its end what generate gives, taken in a loop or an event loop; left early, what was processed until then."""
    options = {"max_new_tokens": NEW, "record": {"routing", "logits"}}
    whole = ds.generate(model, PROMPTS[:1], **options)
    stream = ds.stream(model, PROMPTS[0], **options)
    assert [event.token for event in stream] == whole.tokens[0]
    made = stream.result()
    assert (made.tokens, made.finish_reason) == (whole.tokens, whole.finish_reason)
    assert made.stats.steps == whole.stats.steps and made.stats.prompt_tokens == len(PROMPTS[0])
    same(made.record, whole.record)

    async def first_two(stream):
        return [(await anext(stream)).token for _ in range(2)]

    left = ds.astream(model, PROMPTS[0], **options)
    tokens = asyncio.run(first_two(left))
    some = left.result()
    assert list(left) == [] and some.finish_reason == ["interrupted"]
    assert tokens == some.tokens[0] == whole.tokens[0][:2] and some.stats.steps == 1
    length = len(PROMPTS[0]) + 1
    assert some.record["length"].tolist() == [length] and some.record["expert"].shape[2] == length
    np.testing.assert_array_equal(some.record["expert"], whole.record["expert"][:, :, :length])
    assert ds.stream(model, PROMPTS[0], **options).result().record["length"].tolist() == [0]


def test_a_session_records_its_conversation(model, tmp_path):
    """Each turn gives the record of all tokens so far, those of earlier turns too, which are not read again: while its
    cache grows beyond index_topk, in a fork, from a file, and where an earlier turn is taken back."""
    model = models.random_model(dataclasses.replace(model.cfg, index_topk=40))
    session = ds.session(model, draft=1, record=ALL)
    one = session.generate(PROMPTS[1], max_new_tokens=2)
    longer = [*PROMPTS[1], *one.tokens[0], *range(3, 40)]
    assert one.stats.capacity <= model.cfg.index_topk < len(longer)
    whole = ds.generate(model, [longer], max_new_tokens=NEW, record=ALL)
    session.save(tmp_path / "session")
    loaded, forked = ds.load_session(model, tmp_path / "session"), session.fork()
    stream = session.stream(longer, max_new_tokens=NEW)
    assert [event.token for event in stream] == whole.tokens[0]
    others = [other.generate(longer, max_new_tokens=NEW) for other in (loaded, forked)]
    for turn in (stream.result(), *others):
        assert turn.tokens == whole.tokens and turn.stats.prompt_tokens < len(longer)
        same(turn.record, whole.record)
    session.save(tmp_path / "session")
    again = ds.load_session(model, tmp_path / "session")
    same(again.generate(longer, max_new_tokens=NEW).record, whole.record)
    back = [*longer[:35], 9]
    taken_back = again.generate(back, max_new_tokens=NEW)
    assert taken_back.stats.prompt_tokens <= 2
    same(taken_back.record, ds.generate(model, [back], max_new_tokens=NEW, record=ALL).record)


def test_a_session_that_keeps_nothing(model):
    """No tape beside its cache, no record; and a turn cannot ask for what earlier turns have not kept."""
    session = ds.session(model)
    assert session.generate(PROMPTS[1], max_new_tokens=2).record is None
    assert type(session._context.cache) is cache.Cache
    with pytest.raises(UsageError, match=r"record belongs to the session: give it to ds.session"):
        session.generate(PROMPTS[1], max_new_tokens=2, record={"routing"})
    with pytest.raises(UsageError, match="record takes a set of"):
        ds.session(model, record={"colours"})


def test_nothing_made(model):
    """Without new tokens nothing is read, and the record is empty but whole."""
    record = ds.generate(model, PROMPTS, max_new_tokens=0, record={"routing"}).record
    assert record["length"].tolist() == [0, 0, 0] and record["expert"].shape == (1, 3, 0, 2)


def test_a_file_holds_it(drafted, tmp_path):
    """Saved and read back, with the config, and nothing left beside it."""
    drafted.record.save(tmp_path / "run.safetensors")
    again = ds.inspect.Record.load(tmp_path / "run.safetensors")
    assert again.kinds == drafted.record.kinds and again.config == drafted.record.config
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    for name, array in drafted.record.arrays.items():
        np.testing.assert_array_equal(again[name], array)
    assert "expert [1, 3, " in repr(again)


def _damaged(about, arrays, what):
    """The file's text and arrays with one thing wrong."""
    match what:
        case "kind":
            about["kind"] = "dsv32_jax session 1"
        case "kinds":
            about["kinds"] = json.dumps(["routing", "colours"])
        case "config":
            about["about"] = json.dumps({"config": []})
        case "json":
            about["about"] = "{"
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


@pytest.mark.parametrize("what", "kind kinds config json missing unknown dtype rows tokens".split())
def test_a_damaged_file_is_refused(tmp_path, what):
    """Whatever does not fit together, by name; bytes that are no safetensors; no file."""
    file = tmp_path / "record"
    arrays = {
        "tokens": np.zeros((2, 4), np.int32),
        "prompt": np.ones(2, np.int32),
        "length": np.full(2, 3, np.int32),
        "expert": np.zeros((1, 2, 3, 2), np.int32),
        "gate": np.zeros((1, 2, 3, 2), np.float32),
    }
    about = {"kind": "dsv32_jax record 1", "kinds": json.dumps(["routing"]), "about": json.dumps({"config": {}})}
    save_file(arrays, file, about)
    assert ds.inspect.Record.load(file).kinds == ("routing",)
    assert set(load_file(file)) == set(arrays)
    _damaged(about, arrays, what)
    save_file(arrays, file, about)
    with pytest.raises(CheckpointError, match="record"):
        ds.inspect.Record.load(file)
    file.write_bytes(b"no record")
    with pytest.raises(CheckpointError, match="is not a record"):
        ds.inspect.Record.load(file)
    with pytest.raises(CheckpointError, match="nowhere"):
        ds.inspect.Record.load(tmp_path / "nowhere")


def test_misuse(model, drafted, tmp_path, monkeypatch):
    """Unknown kinds, arrays that were not kept, folders that are not there, and what does not fit."""
    for wrong in ("colours", {"routing", "colours"}, [3], 5):
        with pytest.raises(UsageError, match="record takes a set of attention, indexer, logits, routing, not"):
            ds.generate(model, PROMPTS, record=wrong)
    only = dataclasses.replace(drafted.record, arrays={"tokens": drafted.record["tokens"]})
    with pytest.raises(UsageError, match="'indexer' or 'attention'"):
        only["selected"]
    with pytest.raises(UsageError, match="no 'colour'"):
        only["colour"]
    with pytest.raises(StorageError):
        drafted.record.save(tmp_path / "nowhere" / "record")
    with pytest.raises(UsageError, match="record takes a set of"):
        ds.stream(model, PROMPTS[0], record={"colours"})
    monkeypatch.setattr(host, "available", lambda: 10_000)
    with pytest.raises(CapacityError, match=r"the record of 3 rows of up to 101 tokens .* routing 0.0 kB"):
        ds.generate(model, PROMPTS, record={"routing", "indexer"})
    with pytest.raises(CapacityError, match="the cache and the record of 1 rows of 64 tokens"):
        ds.session(model, capacity=64, record=ALL)


def test_memory_counts_it(tiny):
    """A row's tape: ids and gates in layers of experts, positions and scores in all."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=2)
    assert tape.row_bytes(cfg, 64, ()) == 0
    assert tape.row_bytes(cfg, 64, ("routing",)) == 64 * 8 * cfg.num_experts_per_tok
    assert tape.row_bytes(cfg, 64, ("indexer",)) == 2 * 64 * 8 * cfg.index_topk
    assert tape.row_bytes(cfg, 10, ("attention",)) == 2 * 10 * (8 * 10 + 4)
    assert tape.row_bytes(cfg, 64, ("logits",)) == 64 * (8 * tape.LIKELIEST + 4)
    both = tape.row_bytes(cfg, 64, ("attention", "indexer"))
    assert both == 2 * 64 * (12 * cfg.index_topk + 4)
