"""Generation: what comes out, when it stops, what it compiles, and what it refuses."""

import asyncio
import concurrent.futures
import dataclasses
import inspect
import json
import logging
import signal
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
import convert
import dsv32_jax as ds
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.config import Config
from dsv32_jax.errors import COMMAND_LINE, CapacityError, CheckpointError, DsvError, UsageError
from dsv32_jax.generation import memory, programs
from dsv32_jax.generation.batch import Batch
from dsv32_jax.generation.engine_core import plan_rows
from dsv32_jax.generation.options import Options
from dsv32_jax.generation.programs import DEFAULTS, bucket, compiler_options
from dsv32_jax.generation.request import validate_for
from dsv32_jax.generation.row import Row
from dsv32_jax.generation.stream import Stream
from dsv32_jax.model import indexer
from dsv32_jax.system import compilation
from dsv32_jax.system.compilation import count_compilations
from tests import models, oracle

NEW = 12
PROMPTS = [[0, 17, 42, 7, 99, 5, 23], [0, 250, 8], [0, 31, 31, 200, 64, 65, 66, 67, 68, 69, 70, 71, 72]]
HOT = ds.Sampling(temperature=1.5, seed=(11, 12, 13))


@pytest.fixture(scope="module")
def model(tiny):
    """Two layers; one token in thirteen ends a row."""
    ends = tuple(range(300, 320)) + (1,)
    return models.random_model(
        dataclasses.replace(tiny, num_hidden_layers=2, num_nextn_predict_layers=0, eos_token_id=ends)
    )


def test_a_users_flags_win():
    """An option of XLA that XLA_FLAGS name is not given to a program; the others are."""
    graphs = "xla_gpu_enable_command_buffer"
    assert compiler_options("--xla_gpu_enable_command_buffer_unnamed=1 --xla_cpu_multi_thread_eigen=false") == DEFAULTS
    assert DEFAULTS.items() - compiler_options(f"--xla_cpu_multi_thread_eigen=false --{graphs}=").items() == {
        (graphs, DEFAULTS[graphs])
    }


@pytest.fixture(scope="module")
def greedy(model):
    """The three prompts in one batch."""
    return ds.generate(model, PROMPTS, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def drawn(model):
    """The same at a high temperature, a seed a row."""
    return ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=HOT)


def by_forward(model, prompt, count):
    """The greedy continuation with nothing but forward and argmax, its log-probabilities, and why it ended."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(prompt)] = prompt
    out = ds.forward(model, padded, count_B=[len(prompt)], capacity=32)
    logits, tokens, logprobs = np.asarray(out.logits)[0, len(prompt) - 1], [], []
    while True:
        tokens.append(int(logits.argmax()))
        logprobs.append(float(jax.nn.log_softmax(logits)[tokens[-1]]))
        if tokens[-1] in model.cfg.eos_token_id:
            return tokens, logprobs, "stop"
        if len(tokens) == count:
            return tokens, logprobs, "length"
        out = ds.forward(model, [tokens[-1:]], cache=out.cache)
        logits = np.asarray(out.logits)[0, 0]


# ----------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("row", range(3))
def test_greedy_is_the_argmax_loop(model, greedy, row):
    """Tokens, log-probabilities and the reason are those of a loop over forward, row by row."""
    tokens, logprobs, reason = by_forward(model, PROMPTS[row], NEW)
    assert greedy.tokens[row] == tokens
    np.testing.assert_allclose(greedy.logprobs[row], logprobs, atol=2e-5)
    assert greedy.finish_reason[row] == reason


def test_both_reasons_occur(model, greedy, drawn):
    """An end token is kept and is the last; without one a row has all the tokens that were asked for."""
    assert {"stop", "length"} == set(greedy.finish_reason + drawn.finish_reason)
    for result in (greedy, drawn):
        for tokens, logprobs, reason in zip(result.tokens, result.logprobs, result.finish_reason, strict=True):
            ends = [token in model.cfg.eos_token_id for token in tokens]
            assert not any(ends[:-1]) and ends[-1] == (reason == "stop")
            assert len(tokens) == NEW if reason == "length" else len(tokens) <= NEW
            assert len(logprobs) == len(tokens) and max(logprobs) <= 0
            assert all(type(token) is int for token in tokens) and all(type(p) is float for p in logprobs)


@pytest.mark.parametrize("row", range(3))
def test_a_row_is_the_row_alone(model, greedy, drawn, row):
    """In a batch or alone, greedy or drawn, a row's text is its own: prompt, seed and positions decide."""
    alone = ds.generate(model, [PROMPTS[row]], max_new_tokens=NEW)
    assert alone.tokens[0] == greedy.tokens[row] and alone.finish_reason[0] == greedy.finish_reason[row]
    np.testing.assert_allclose(alone.logprobs[0], greedy.logprobs[row], atol=2e-5)
    own = dataclasses.replace(HOT, seed=HOT.seed[row])
    alone = ds.generate(model, [PROMPTS[row]], max_new_tokens=NEW, sampling=own)
    assert alone.tokens[0] == drawn.tokens[row]


def test_the_order_of_rows_is_of_no_consequence(model, drawn):
    """The batch reversed gives the results reversed."""
    backwards = dataclasses.replace(HOT, seed=HOT.seed[::-1])
    result = ds.generate(model, PROMPTS[::-1], max_new_tokens=NEW, sampling=backwards)
    assert result.tokens == drawn.tokens[::-1]


def test_seeds(model, drawn):
    """Another seed gives another text, the same one the same; equal prompts with equal seeds agree."""
    again = ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=HOT)
    assert again.tokens == drawn.tokens and again.logprobs == drawn.logprobs
    other = ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=dataclasses.replace(HOT, seed=(21, 22, 23)))
    assert all(a != b for a, b in zip(other.tokens, drawn.tokens, strict=True))
    equal = ds.generate(model, [PROMPTS[0]] * 3, max_new_tokens=NEW, sampling=dataclasses.replace(HOT, seed=5))
    assert equal.tokens[0] == equal.tokens[1] == equal.tokens[2]
    high = dataclasses.replace(HOT, seed=tuple(seed + 2**32 for seed in HOT.seed))
    assert ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=high).tokens != drawn.tokens


def test_steps_draw_anew(model):
    """A flat distribution does not give the same token at every step."""
    flat = dataclasses.replace(model, head_VD=jnp.zeros_like(model.head_VD))
    tokens = ds.generate(flat, PROMPTS, max_new_tokens=NEW, sampling=HOT).tokens
    assert all(len(set(row)) > len(row) / 2 for row in tokens) and len({tuple(row) for row in tokens}) == 3


@pytest.mark.parametrize("settings", [ds.Sampling(), ds.Sampling(temperature=1.5, top_k=50, seed=11)], ids=str)
def test_stream_is_generate(model, settings):
    """The same tokens one by one; only the last has a reason."""
    for prompt in PROMPTS[:2]:
        events = list(ds.stream(model, prompt, max_new_tokens=NEW, sampling=settings))
        whole = ds.generate(model, [prompt], max_new_tokens=NEW, sampling=settings)
        assert [event.token for event in events] == whole.tokens[0]
        np.testing.assert_allclose([event.logprob for event in events], whole.logprobs[0], atol=2e-5)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + whole.finish_reason


def test_layerwise_is_generate(model, greedy, drawn):
    """One program for each kind of layer, driven from Python: the same tokens."""
    for settings, want in ((None, greedy), (HOT, drawn)):
        got = ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=settings, layerwise=True)
        assert got.tokens == want.tokens and got.finish_reason == want.finish_reason
        np.testing.assert_allclose(np.concatenate(got.logprobs), np.concatenate(want.logprobs), atol=2e-5)


def test_every_edge_is_the_oracle(model):
    """Prompts of 1 token and around index_topk, rows that fill the cache to its last slot or one before it, and each
    engine: the greedy tokens of a float64 NumPy model that computes everything anew."""
    lengths = [1, model.cfg.index_topk - 1, model.cfg.index_topk, model.cfg.index_topk + 1]
    prompts = [row[:length].tolist() for row, length in zip(models.tokens(model.cfg, 4, 24), lengths, strict=True)]
    want = [oracle.greedy(model, prompt, 6) for prompt in prompts]
    assert ds.generate(model, prompts, max_new_tokens=6).tokens == want
    longest = prompts[-1]
    for capacity, made in ((len(longest) + 5, 5), (len(longest) + 6, 6), (len(longest) + 7, 6)):
        got = ds.generate(model, [longest], max_new_tokens=made, capacity=capacity)
        assert got.tokens == [want[-1][:made]]
    np.testing.assert_allclose(
        ds.forward(model, [longest]).logits[0], oracle.logits(model, longest), atol=2e-4, rtol=1e-4
    )


def test_stats(greedy):
    """Tokens are counted as they are, and rates follow from them."""
    stats = greedy.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.rows) == (23, sum(map(len, greedy.tokens)), 3)
    assert stats.capacity == 64 and 2 <= stats.compiles <= 4 and stats.compile_seconds > 0
    assert stats.prefill_tokens_per_second == stats.prompt_tokens / stats.prefill_seconds
    assert stats.decode_tokens_per_second == stats.new_tokens / stats.decode_seconds


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_narrowest_settings_are_greedy(model, greedy, settings):
    """One candidate left, or a temperature next to nothing: the most likely token."""
    settings = ds.Sampling(**{"temperature": 1.0, "seed": 3, **settings})
    assert ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=settings).tokens == greedy.tokens


# ------------------------------------------------------------------------------------------------------------ options


def test_several_continuations(model):
    """The prompt is read once, its last token in each row; the i-th continuation is what seed + i gives alone."""
    hot = ds.Sampling(temperature=1.5, seed=20)
    three = ds.generate(model, PROMPTS[:2], max_new_tokens=NEW, sampling=hot, n=3)
    assert three.stats.prompt_tokens == sum(map(len, PROMPTS[:2])) + 4 and three.stats.rows == 6
    for row in range(6):
        own = dataclasses.replace(hot, seed=20 + row % 3)
        alone = ds.generate(model, [PROMPTS[row // 3]], max_new_tokens=NEW, sampling=own)
        assert alone.tokens[0] == three.tokens[row]


def test_more_prompts_than_fit_at_once(model, greedy, drawn):
    """A row that ends makes room for the next; the results are in the prompts' order."""
    for size in (1, 2):
        grouped = ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=HOT, batch_size=size)
        assert grouped.tokens == drawn.tokens and grouped.finish_reason == drawn.finish_reason
    assert ds.generate(model, PROMPTS, max_new_tokens=NEW, batch_size=2).tokens == greedy.tokens


def test_a_cache_that_does_not_fit(model, monkeypatch):
    """Known before anything is allocated; where only some rows fit, so many are computed at once."""
    one = memory.compute_row_bytes(model.cfg, 64, np.dtype(np.float32), 0)
    monkeypatch.setattr(memory, "get_free_memory", lambda _: int(one * 2.6))
    assert plan_rows(model.cfg, validate_for(model, PROMPTS, max_new_tokens=NEW)) == 2
    monkeypatch.setattr(memory, "get_free_memory", lambda _: one)
    refused(lambda: ds.generate(model, PROMPTS, max_new_tokens=NEW), CapacityError, "1 row of 64", "free", "fp8")
    refused(lambda: ds.session(model, capacity=4096), CapacityError, "4096")


def test_end_tokens_of_ones_own(model, greedy):
    """stop_token_ids end a row like the model's own; min_new_tokens keeps all of them away until then."""
    row = next(tokens for tokens in greedy.tokens if len(tokens) == NEW)
    prompt = PROMPTS[greedy.tokens.index(row)]
    ended = ds.generate(model, [prompt], max_new_tokens=NEW, stop_token_ids=[row[5]])
    assert ended.tokens[0] == row[: row.index(row[5]) + 1] and ended.finish_reason == ["stop"]
    later = ds.generate(model, [prompt], max_new_tokens=NEW, stop_token_ids=[row[2]], min_new_tokens=8)
    assert len(later.tokens[0]) >= 9 or later.finish_reason == ["length"]
    assert later.tokens[0][:2] == row[:2] and row[2] not in later.tokens[0][:8]


def test_a_minimum_counts_the_answer(model):
    """Not the thoughts that a chat prompt opens; a row that lost its place counts them again."""
    prompt, drawn = PROMPTS[0], {"max_new_tokens": NEW, "sampling": ds.Sampling(temperature=1.0, seed=5)}
    (row,) = ds.generate(model, [prompt], **drawn).tokens
    assert len(set(row[:5])) == 5 and prompt[-1] not in row

    class Thinking:
        def bytes_of(self, ids):
            tags = {prompt[-1]: b"<think>", row[2]: b"</think>"}
            return b"".join(tags.get(int(token), b".") for token in ids)

    options = {**drawn, "stop_token_ids": [row[4]], "min_new_tokens": 3}
    assert ds.generate(model, [prompt], **options).tokens == [row[:5]]
    (later,) = ds.generate(model, [prompt], **options, tokenizer=Thinking()).tokens
    assert later[:4] == row[:4] and row[4] not in later[:6]
    seated = Row(validate_for(model, [prompt], **options, tokenizer=Thinking()))
    counts = []
    for token in later[:6]:
        counts.append(seated.answered)
        seated.tokens.append(token)
    assert counts == [0, 0, 0, 0, 1, 2]
    Thinking.bytes_of = lambda self, ids: b"<think>"
    with pytest.raises(UsageError, match="min_new_tokens counts from </think>, and the tokenizer has no such token"):
        ds.generate(model, [prompt], **options, tokenizer=Thinking())


def test_a_prompt_by_itself_is_the_same_in_bfloat16(model, monkeypatch):
    """To the last bit, after other requests and with less memory; of rows beside others only float32 promises that."""
    model = models.random_model(model.cfg, dtype=jnp.bfloat16)
    alone = {"max_new_tokens": NEW, "sampling": dataclasses.replace(HOT, seed=12)}
    first = ds.generate(model, [PROMPTS[1]], **alone)
    ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=HOT)
    one = memory.compute_row_bytes(model.cfg, 64, np.dtype(jnp.bfloat16), 0)
    monkeypatch.setattr(memory, "get_free_memory", lambda _: int(one * 2.6))
    again = ds.generate(model, [PROMPTS[1]], **alone)
    assert (again.tokens, again.logprobs) == (first.tokens, first.logprobs)
    stream = ds.stream(model, PROMPTS[1], **alone)
    assert [(token.token, token.logprob) for token in stream] == list(
        zip(first.tokens[0], first.logprobs[0], strict=True)
    )


class Letters:
    """A tokenizer of one letter a token; token 5 is half of an e acute, token 6 the other half."""

    def bytes_of(self, ids):
        return b"".join({5: b"\xc3", 6: b"\xa9"}.get(token, bytes([97 + token % 26])) for token in ids)


def test_text_and_stop_strings(model, greedy):
    """A string across tokens ends its row where it is complete, the text before it; other rows go on."""
    told = ds.generate(model, PROMPTS, max_new_tokens=NEW, tokenizer=Letters())
    assert told.tokens == greedy.tokens and greedy.text is None
    row = next(row for row in range(3) if len(greedy.tokens[row]) == NEW)
    text = told.text[row]
    assert text == Letters().bytes_of(greedy.tokens[row]).decode()
    stop = text[3:6]
    end = text.index(stop) + 3
    stopped = ds.generate(model, PROMPTS, max_new_tokens=NEW, tokenizer=Letters(), stop=[stop, "never"])
    assert stopped.tokens[row] == greedy.tokens[row][:end] and stopped.finish_reason[row] == "stop"
    assert stopped.text[row] == text[: end - 3]
    others = [other for other in range(3) if stop not in told.text[other]]
    assert others and all(stopped.tokens[other] == greedy.tokens[other] for other in others)
    events = list(ds.stream(model, PROMPTS[row], max_new_tokens=NEW, tokenizer=Letters(), stop=stop))
    assert "".join(event.text for event in events) == stopped.text[row] and events[-1].finish_reason == "stop"


def test_g11_half_a_character_waits(model):
    """The first half gives no text, the second the whole character; at the end what is left is marked."""
    halves = [ds.Sampling(logit_bias={5: 1e9}), ds.Sampling(logit_bias={6: 1e9})]
    first = ds.generate(model, PROMPTS[:2], max_new_tokens=1, sampling=halves, tokenizer=Letters())
    assert first.tokens == [[5], [6]] and first.text == ["\ufffd", "\ufffd"]
    told = Row(validate_for(model, PROMPTS[:1], max_new_tokens=3, tokenizer=Letters()))
    assert [told.add(token, 0.0).text for token in (5, 6, 7)] == ["", "\u00e9", "h"]


@pytest.mark.parametrize("stop", ["", [""], [3], ["a", None]], ids=repr)
def test_g35_wrong_stop_strings(model, stop):
    refused(lambda: ds.generate(model, PROMPTS, tokenizer=Letters(), stop=stop), UsageError, "stop string")


def test_g03_a_long_compilation_says_so(caplog, tmp_path):
    """After some seconds, once, where something is compiled; never where nothing is. And whether it is kept."""
    caplog.set_level(logging.INFO, "dsv32_jax")
    with count_compilations() as meter, compilation.log_slow_compilation("prefill of 1 rows", meter, after=0.05):
        jax.jit(lambda x: x + 41)(1)
        time.sleep(0.3)
    said = [(record.message, record.levelname) for record in caplog.records]
    assert said == [("compiling prefill of 1 rows", "INFO")], "a notice is no warning"
    with count_compilations() as meter, compilation.log_slow_compilation("nothing", meter, after=0.01):
        time.sleep(0.1)
    assert len(caplog.records) == 1
    assert not compilation.is_cache_enabled()
    was = {name: jax.config.values[name] for name in ("jax_enable_compilation_cache", "jax_compilation_cache_dir")}
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        assert compilation.is_cache_enabled() == (was["jax_compilation_cache_dir"] is not None)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert compilation.is_cache_enabled()
    finally:
        for name, value in was.items():
            jax.config.update(name, value)


def test_g05_a_device_without_memory(model, greedy, monkeypatch):
    """What takes how much and three remedies; the next call works. Other errors of the device stay what they are."""

    def fail(message):
        def decode(self, *_):
            raise jax.errors.JaxRuntimeError(message)

        return decode

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "decode", fail("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"))
        with pytest.raises(CapacityError, match=r"weights take .* pages of the cache .*batch_size.*capacity.*fp8"):
            ds.generate(model, PROMPTS, max_new_tokens=NEW)
        patch.setattr(Batch, "decode", fail("INTERNAL: something else"))
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            ds.generate(model, PROMPTS, max_new_tokens=NEW)
    assert ds.generate(model, PROMPTS, max_new_tokens=NEW).tokens == greedy.tokens


def test_g28_many_threads(model, greedy):
    """Calls from several threads at once give each its own result; a session takes one turn at a time."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ds.generate(model, PROMPTS, max_new_tokens=NEW).tokens, range(8)))
    assert results == [greedy.tokens] * 8
    session = ds.session(model, capacity=32)
    stream = session.stream(PROMPTS[0], max_new_tokens=4)
    next(stream)
    with pytest.raises(UsageError, match="in the middle of a turn"):
        session.generate(PROMPTS[0], max_new_tokens=4)
    stream.close()
    assert session.generate(PROMPTS[0], max_new_tokens=4).tokens[0] == greedy.tokens[0][:4]


def test_the_likeliest_tokens(model, greedy):
    """As many as asked for, the best first, their log-probabilities those of a forward."""
    got = ds.generate(model, PROMPTS, max_new_tokens=NEW, top_logprobs=3)
    assert got.tokens == greedy.tokens and greedy.top_logprobs is None
    for tokens, tops in zip(got.tokens, got.top_logprobs, strict=True):
        assert [top[0][0] for top in tops] == tokens and all(len(top) == 3 for top in tops)
    logits = ds.forward(model, [PROMPTS[2]]).logits[0, -1]
    best = np.argsort(-np.asarray(logits))[:3]
    assert [token for token, _ in got.top_logprobs[2][0]] == best.tolist()
    np.testing.assert_allclose([p for _, p in got.top_logprobs[2][0]], jax.nn.log_softmax(logits)[best], atol=2e-5)


def test_chunks_are_the_whole(model, greedy, monkeypatch):
    """A prompt read four tokens at a time, rows ending in different chunks; progress is told after each."""
    told = []
    monkeypatch.setattr(programs, "chunk_size", lambda rows=1: 4)
    got = ds.generate(model, PROMPTS, max_new_tokens=NEW, progress=lambda done, total: told.append((done, total)))
    assert got.tokens == greedy.tokens
    assert told == [(11, 23), (18, 23), (23, 23)]


def test_a_long_cache_is_scored_in_parts(tiny, monkeypatch):
    """Slots scored eight at a time, the last part overlapping, as far as the queries see: forward as in one piece."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)
    model, tokens = models.random_model(cfg), models.tokens(cfg, 3, 21)
    whole = ds.forward(model, tokens, capacity=29, seen=True)
    monkeypatch.setattr(indexer, "KEYS", 8)
    parts = ds.forward(model, tokens[:2], capacity=29, seen=True)
    np.testing.assert_allclose(parts.logits, whole.logits[:2], atol=1e-4)
    np.testing.assert_array_equal(parts.seen[0].selected_BTk, whole.seen[0].selected_BTk[:2])
    np.testing.assert_allclose(parts.seen[0].index_score_BTS, whole.seen[0].index_score_BTS[:2], atol=1e-4)


def test_the_fp8_cache_is_close(model, greedy):
    """The first token sees only its own prompt's rounding; the cache takes the bytes that the real one would."""
    got = ds.generate(model, PROMPTS, max_new_tokens=1, cache_dtype="fp8", top_logprobs=20)
    for tops, tokens in zip(got.top_logprobs, greedy.tokens, strict=True):
        assert tokens[0] in [token for token, _ in tops[0]]
    real = Config.from_json(configs.path("deepseek_v32"))
    tokens = (
        memory.compute_row_bytes(real, 1024, np.dtype(jnp.float8_e4m3fn), 0) - real.vocab_size * memory.VOCABULARY_BYTES
    )
    assert tokens == 1024 * 61 * 788


def test_ctrl_c_returns_what_is_there(model, greedy, monkeypatch):
    """The rows made so far, "interrupted" where they had not ended; the handler is put back."""
    decode = Batch.decode

    def decode_and_press(self, rows, steps, *rest):
        made = decode(self, rows, 3, *rest)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(Batch, "decode", decode_and_press)
    before = signal.getsignal(signal.SIGINT)
    got = ds.generate(model, PROMPTS, max_new_tokens=NEW)
    assert signal.getsignal(signal.SIGINT) is before
    assert got.tokens == [tokens[:3] for tokens in greedy.tokens] and got.finish_reason == ["interrupted"] * 3

    monkeypatch.setattr(Batch, "decode", decode)
    monkeypatch.setattr(programs, "chunk_size", lambda rows=1: 2)
    got = ds.generate(model, PROMPTS, max_new_tokens=NEW, progress=lambda *_: signal.raise_signal(signal.SIGINT))
    assert got.tokens == [[], greedy.tokens[1][:1], []] and got.finish_reason == ["interrupted"] * 3


def test_an_asynchronous_stream(model, greedy):
    """The same tokens, and the event loop runs meanwhile."""

    async def collect():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        tokens = [event.token async for event in ds.astream(model, PROMPTS[0], max_new_tokens=NEW)]
        ticking.cancel()
        return tokens, ticks

    tokens, ticks = asyncio.run(collect())
    assert tokens == greedy.tokens[0] and ticks > NEW


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n must be"),
        ({"n": True}, "n must be"),
        ({"top_logprobs": 21}, "top_logprobs must be an integer from 0 to 20"),
        ({"min_new_tokens": 5}, "min_new_tokens must be an integer from 0 to 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 values for 3 prompts"),
        ({"stop_token_ids": [400]}, "stop_token_ids holds 1 id "),
        ({"cache_dtype": "int4"}, "cache_dtype must be"),
        ({"stop": "x"}, "give the tokenizer"),
        ({"sampling": ds.Sampling(allowed_ids=[1]), "min_new_tokens": 1}, "only tokens that end a row"),
    ],
    ids=str,
)
def test_wrong_options(model, options, said):
    """Refused with the value and what is allowed, and nothing is compiled."""
    refused(lambda: ds.generate(model, PROMPTS, **{"max_new_tokens": 4, **options}), UsageError, said)
    with pytest.raises(UsageError, match="one row"):
        ds.stream(model, PROMPTS[0], n=2)


# -------------------------------------------------------------------------------------------------------- compilation


def test_fifty_lengths_share_three_buckets(tiny):
    """Prompts of 1 to 50 tokens: as many prefills as there are buckets, and as many decode loops as sizes of the cache.

    The last token of a prompt is read by the first decode step, and a third of a bucket is not left empty."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)
    model = models.random_model(cfg)
    lengths = range(1, 51)
    buckets = {bucket(length) for length in lengths}
    assert buckets == {16, 32, 64}
    compiled = [ds.generate(model, [[5] * length], max_new_tokens=1 + length % 2).stats.compiles for length in lengths]
    assert sum(compiled) <= 3 + len(buckets)
    assert [length for length, count in zip(lengths, compiled, strict=True) if count] == [1, 2, 23, 44]


def test_changing_a_sampling_parameter_compiles_nothing(model, greedy):
    """Greedy or not, any temperature, truncation, seed, number of tokens in the bucket and prompt in the bucket."""
    ds.generate(model, PROMPTS, max_new_tokens=NEW)
    changes = [
        ds.Sampling(temperature=0.7),
        ds.Sampling(temperature=1.0, top_p=0.3),
        ds.Sampling(temperature=1.0, top_k=7, top_p=0.9, seed=123456789123),
        ds.Sampling(seed=(1, 2, 3)),
    ]
    with count_compilations() as compiled:
        for settings in changes:
            ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=settings)
        ds.generate(model, [[5] * 9, [6, 7], [8] * 16], max_new_tokens=16)
        ds.generate(model, PROMPTS, max_new_tokens=1)
    assert compiled.count == 0


def test_a_mixed_workload_compiles_nothing_after_warming_up(model):
    """Lengths, batch sizes, continuations, samplings, ends: shapes are few, and once seen they are there."""
    lengths, rng = (1, 3, 9, 16), np.random.default_rng(5)
    for rows in (1, 2, 4):
        for read in (1, 2, 4)[: rows.bit_length()]:
            ds.generate(model, [[5 + row] * 16 for row in range(read)] + [[5]] * (rows - read), max_new_tokens=12)
    with count_compilations() as compiled:
        for rows in (1, 2, 3, 4, 3, 1):
            prompts = [[7 + row] * int(rng.choice(lengths)) for row in range(rows)]
            settings = ds.Sampling(
                temperature=float(rng.uniform(0, 2)), top_k=int(rng.integers(0, 9)), min_p=0.1,
                repetition_penalty=1.2, forbidden_ids=[3], logit_bias={4: 1.0}, seed=int(rng.integers(99)),
            )  # fmt: skip
            options = {"max_new_tokens": int(rng.integers(9, 13)), "stop_token_ids": [8], "min_new_tokens": 2}
            ds.generate(model, prompts, sampling=settings, **options)
    assert compiled.count == 0


def test_a_stream_compiles_once(model):
    """Every later token and every later stream runs the same two programs."""
    list(ds.stream(model, PROMPTS[0], max_new_tokens=4))
    with count_compilations() as compiled:
        list(ds.stream(model, PROMPTS[1], max_new_tokens=9, sampling=ds.Sampling(temperature=0.4, top_k=3)))
    assert compiled.count == 0


def test_buckets():
    """The next power of two, at least 16."""
    assert [bucket(size) for size in (1, 15, 16, 17, 32, 33, 4097)] == [16, 16, 16, 32, 32, 64, 8192]


def test_the_compilation_cache_is_on_by_default(tmp_path):
    """Programs are kept under the user's cache folder, unless JAX was told otherwise, or it cannot be written."""
    from tests.test_layers import run

    script = (
        "import jax, os; from dsv32_jax.system.compilation import enable_cache; enable_cache();"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    setting = f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}; "
    off = f"{setting}os.environ['JAX_ENABLE_COMPILATION_CACHE'] = '0'; "
    other = f"{setting}os.environ['JAX_COMPILATION_CACHE_DIR'] = '/elsewhere'; "
    assert run("-c", setting + script).stdout.strip() == str(tmp_path / "dsv32_jax" / "compiled")
    assert run("-c", off + script).stdout.strip() == "None"
    assert run("-c", other + script).stdout.strip() == "/elsewhere"
    (tmp_path / "file").touch()
    nowhere = f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path / 'file')!r}; "
    unwritable = run("-c", nowhere + script + "; enable_cache()")
    assert unwritable.stdout.strip() == "None" and unwritable.stderr.count("are not cached") == 1


# ------------------------------------------------------------------------------------------------------------- misuse


def refused(call, kind, *said: str) -> None:
    """`call` raises `kind`, says all of `said`, and compiled nothing."""
    with count_compilations() as compiled, pytest.raises(kind) as caught:
        call()
    assert compiled.count == 0
    missing = [word for word in said if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert isinstance(caught.value, DsvError | FloatingPointError)


def test_g01_a_request_that_does_not_fit(model):
    """The prompt's length, what is asked for, what there is, and both ways out."""
    refused(lambda: ds.generate(model, [[5] * 10, [5] * 30], max_new_tokens=20, capacity=40), UsageError,
            "30", "20", "40", "max_new_tokens=10", "capacity=50")  # fmt: skip
    arguments = {"max_new_tokens": 1, "capacity": 40}
    refused(lambda: ds.generate(model, [[5] * 50], **arguments), UsageError, "50", "40", "capacity=51")
    refused(lambda: ds.stream(model, [5] * 40, **arguments), UsageError, "40", "max_new_tokens=0", "capacity=41")
    refused(lambda: ds.generate(model, [[5] * 40], **arguments, layerwise=True), UsageError, "capacity=41")
    too_long = model.cfg.max_position_embeddings + 1
    refused(lambda: ds.generate(model, [[5] * too_long]), UsageError, str(too_long), str(too_long - 1), "shorten")


@pytest.mark.parametrize("capacity", [0, -1, 2**40, 16.0, "16", True], ids=repr)
def test_wrong_capacities(model, capacity):
    """A capacity is a number of tokens that positions exist for."""
    refused(lambda: ds.generate(model, [[5]], max_new_tokens=1, capacity=capacity), UsageError,
            repr(capacity), "capacity", str(model.cfg.max_position_embeddings))  # fmt: skip


@pytest.mark.parametrize("value", [-1, -0.001, 5.001, float("nan"), float("inf"), "hot", None, True], ids=repr)
def test_g07_wrong_temperatures(value):
    """Refused when the Sampling is made."""
    refused(lambda: ds.Sampling(temperature=value), UsageError, "temperature", repr(value), "0", "5")


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.001, float("nan"), float("inf"), "p", None], ids=repr)
def test_g15_wrong_top_p(value):
    """0 keeps nothing and is refused; 1 is the neutral value."""
    refused(lambda: ds.Sampling(top_p=value), UsageError, "top_p", repr(value), "1")


@pytest.mark.parametrize("value", [-1, 1.5, "k", None, True, 2**31], ids=repr)
def test_g15_wrong_top_k(value):
    """A count; 0 is the neutral value."""
    refused(lambda: ds.Sampling(top_k=value), UsageError, "top_k", repr(value), "0")


def test_g15_top_k_beyond_the_vocabulary(model):
    """Both numbers are named."""
    refused(lambda: ds.generate(model, [[5]], sampling=ds.Sampling(top_k=321)), UsageError, "321", "320")


def test_g15_neutral_values(model, drawn):
    """top_k 0 and top_p 1 keep everything, and so does top_k of the whole vocabulary."""
    neutral = dataclasses.replace(HOT, top_k=320, top_p=1.0)
    assert ds.generate(model, PROMPTS, max_new_tokens=NEW, sampling=neutral).tokens == drawn.tokens


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, "seed", None, True, (), (1, -2), (1, None)], ids=repr)
def test_wrong_seeds(value):
    """A seed is a whole number below 2^63, or one a row."""
    refused(lambda: ds.Sampling(seed=value), UsageError, "seed", repr(value))


def test_seeds_that_do_not_match_the_rows(model):
    """As many seeds as prompts, or one."""
    refused(lambda: ds.generate(model, PROMPTS, sampling=ds.Sampling(seed=(1, 2))), UsageError, "2 seeds", "3 prompts")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([5, 320], ["320", "row 1", "position 1", "0..319"]),
        ([-1, 5], ["-1", "position 0"]),
        ([5, 2**31], [str(2**31)]),
        ([5, 2**63], [str(2**63)]),
        ([400 + i for i in range(9)], ["9 token ids", "400", "404", "4 more"]),
        ([5, True], ["True", "position 1", "integers"]),
        ([5.0], ["5.0", "position 0", "integers"]),
        ([5, None], ["None", "position 1"]),
        ([5, "6"], ["'6'", "position 1"]),
        ([[5]], ["[5]", "position 0"]),
        (np.array([5, 700]), ["700", "position 1"]),
        (np.array([5.5]), ["5.5", "position 0"]),
    ],
    ids=repr,
)
def test_g10_wrong_token_ids(model, prompt, said):
    """Up to five of them with row and position."""
    refused(lambda: ds.generate(model, [[5], prompt], max_new_tokens=2), UsageError, *said)
    refused(lambda: ds.stream(model, prompt, max_new_tokens=2), UsageError, said[0])


def test_g10_whole_numbers_of_any_kind(model, greedy):
    """NumPy arrays and tuples of whole numbers are prompts as well."""
    prompts = [np.array(PROMPTS[0]), tuple(PROMPTS[1]), [np.int64(token) for token in PROMPTS[2]]]
    assert ds.generate(model, prompts, max_new_tokens=NEW).tokens == greedy.tokens


def test_g12_an_end_token_that_never_comes(model, greedy):
    """Such a row stops at the limit and says so, whatever it is."""
    row = greedy.finish_reason.index("length")
    for count in (1, 5, NEW):
        result = ds.generate(model, PROMPTS, max_new_tokens=count)
        assert result.finish_reason[row] == "length" and result.tokens[row] == greedy.tokens[row][:count]


@pytest.mark.parametrize("value", [-1, 1.0, "many", True], ids=repr)
def test_g14_wrong_numbers_of_new_tokens(model, value):
    """The value and what is meant by 0 and None."""
    said = "max_new_tokens", repr(value), "0", "None"
    refused(lambda: ds.generate(model, [[5]], max_new_tokens=value), UsageError, *said)


def test_g14_a_billion_new_tokens(model):
    """More than there are positions: the largest number that works is named."""
    largest = model.cfg.max_position_embeddings
    refused(lambda: ds.generate(model, [[5, 6]], max_new_tokens=10**9), UsageError, str(10**9), f"={largest - 2}")


def test_g14_no_new_tokens(model):
    """0 is nothing to do: rows of nothing, and nothing is compiled or run."""
    with count_compilations() as compiled:
        result = ds.generate(model, PROMPTS, max_new_tokens=0)
        assert list(ds.stream(model, PROMPTS[0], max_new_tokens=0)) == []
    assert compiled.count == 0
    assert result.tokens == [[], [], []] and result.logprobs == [[], [], []] and result.finish_reason == ["length"] * 3
    assert result.stats.new_tokens == 0 and result.stats.decode_tokens_per_second == 0


def test_g14_until_the_cache_is_full(model):
    """None means as many as the capacity has room for: the cache is used to its last slot, as by the plain loop."""
    prompt = models.tokens(model.cfg, 1, 16, seed=6)[0].tolist()
    result = ds.generate(model, [prompt], max_new_tokens=None, capacity=32)
    assert result.finish_reason == ["length"] and len(result.tokens[0]) == 16
    assert (result.tokens[0], result.finish_reason[0]) == by_forward(model, prompt, 16)[::2]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], ["empty"]),
        ([[5], []], ["prompt 1", "empty"]),
        ([[5], None], ["prompt 1", "None"]),
        ([5, 6], ["prompt 0", "5", "list"]),
        ("text", ["str", "list of lists"]),
        (["text"], ["prompt 0", "'text'"]),
        (None, ["NoneType"]),
        (7, ["int"]),
        ({}, ["dict"]),
        ({5, 6}, ["set"]),
        ([{5, 6}], ["prompt 0", "{5, 6}"]),
        ({"a": [5]}, ["dict"]),
        (np.zeros((0, 3), int), ["empty"]),
        (np.zeros((2, 0), int), ["prompt 0", "empty"]),
    ],
    ids=repr,
)
def test_g16_empty_and_missing_prompts(model, prompts, said):
    """Each is named by its index, and what a prompt is."""
    refused(lambda: ds.generate(model, prompts, max_new_tokens=2), UsageError, *said)


def test_g16_the_shortest_prompt(model):
    """The beginning-of-sentence token alone will do."""
    assert len(ds.generate(model, [[model.cfg.bos_token_id]], max_new_tokens=2).tokens[0]) in (1, 2)


@pytest.mark.parametrize("settings", ["hot", 0.7, {"temperature": 1.0}], ids=repr)
def test_sampling_that_is_none(model, settings):
    """Anything but a Sampling is named."""
    refused(lambda: ds.generate(model, [[5]], sampling=settings), UsageError, repr(settings), "Sampling")


def spoilt(model, path: str, index=...):
    """`model` with NaN at `index` of one leaf."""

    def replace(node, names):
        name, *rest = names
        if name.isdigit():
            return (*node[: int(name)], replace(node[int(name)], rest), *node[int(name) + 1 :])
        value = replace(getattr(node, name), rest) if rest else getattr(node, name).at[index].set(jnp.nan)
        return dataclasses.replace(node, **{name: value})

    return replace(model, path.split("."))


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("layers.0.mla.w_o_DHP", "layer 0"),
        ("layers.1.ffn.shared_down_DM", "the last layer"),
        ("norm_D", "the final norm"),
        ("head_VD", "the head"),
    ],
)
def test_g18_logits_that_are_no_numbers(model, path, where):
    """No token is made up: the error names row, step and the first layer whose output is not finite."""
    with pytest.raises(FloatingPointError) as caught:
        ds.generate(spoilt(model, path), PROMPTS, max_new_tokens=NEW)
    message = str(caught.value)
    assert all(word in message for word in ("3 rows", "row 0", "new token 0", where)), message


def test_g18_one_row_at_a_later_step(model, greedy):
    """The row and the step at which the numbers went bad; the other rows are not blamed."""
    row = next(row for row in range(3) if len(greedy.tokens[row]) > 4)
    others = {token for other in range(3) if other != row for token in PROMPTS[other] + greedy.tokens[other]}
    step = next(
        step
        for step, token in enumerate(greedy.tokens[row][:-1])
        if token not in others and token not in PROMPTS[row] + greedy.tokens[row][:step]
    )
    bad = spoilt(model, "embed_VD", greedy.tokens[row][step])
    with pytest.raises(FloatingPointError) as caught:
        ds.generate(bad, PROMPTS, max_new_tokens=NEW)
    message = str(caught.value)
    assert all(word in message for word in ("1 row ", f"row {row}", f"new token {step + 1}", "the embedding")), message


def test_g18_a_stream_stops_at_the_first_bad_token(model):
    """Tokens before it have been handed out, and it never is."""
    tokens = ds.generate(model, [PROMPTS[0]], max_new_tokens=NEW).tokens[0]
    bad = spoilt(model, "embed_VD", tokens[0])
    stream = ds.stream(bad, PROMPTS[0], max_new_tokens=NEW)
    assert next(stream).token == tokens[0]
    with pytest.raises(FloatingPointError, match="new token 1"):
        next(stream)


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """A converted checkpoint with random weights."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)
    folder = tmp_path_factory.mktemp("random")
    random_checkpoint.write(folder / "source", cfg)
    convert.convert(folder / "source", folder / "converted")
    return folder / "converted"


def tokenizer(size: int, without: int | None = None) -> dict:
    """A tokenizer.json with the ids below `size`."""
    return {"model": {"vocab": {f"t{i}": i for i in range(size) if i != without}}, "added_tokens": []}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (tokenizer(321), ["320", "tokenizer.json"]),
        (tokenizer(320, without=0), ["bos_token_id 0"]),
        (tokenizer(320, without=1), ["eos_token_id 1"]),
        ({"model": {}}, ["not a tokenizer"]),
        ([], ["not a tokenizer"]),
        ("{", ["not a tokenizer"]),
    ],
    ids=["too large", "no bos", "no eos", "no vocabulary", "a list", "not JSON"],
)
def test_g24_a_tokenizer_of_another_model(converted, raw, said):
    """It is compared with the config when the model is loaded, before any weight is read."""
    file = converted / "tokenizer.json"
    file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    try:
        refused(lambda: ds.load(converted, dtype=jnp.float32), CheckpointError, *said)
    finally:
        file.unlink()


def test_g24_the_right_tokenizer(converted):
    """And without one ids are all there is."""
    (converted / "tokenizer.json").write_text(json.dumps(tokenizer(320)))
    assert ds.load(converted, dtype=jnp.float32).cfg.vocab_size == 320
    (converted / "tokenizer.json").unlink()
    assert ds.load(converted, dtype=jnp.float32).cfg.vocab_size == 320


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3fn", "foo", 7])
def test_wrong_compute_dtypes(converted, dtype):
    """Weights are stored in many formats; arithmetic is done in two."""
    refused(lambda: ds.load(converted, dtype=dtype), UsageError, str(dtype), "bfloat16", "float32")


@pytest.mark.parametrize("mesh", ["expert=4", {"expert": 4}, 4], ids=repr)
def test_a_mesh_that_is_none(converted, mesh):
    """What makes one is named."""
    refused(lambda: ds.load(converted, mesh=mesh), UsageError, repr(mesh), "ds.mesh")


@pytest.mark.parametrize("sizes", [None, 4, ["expert=4"]], ids=repr)
def test_sizes_of_no_mesh(sizes):
    """A mesh is text or a mapping."""
    refused(lambda: ds.mesh(sizes), UsageError, repr(sizes), "expert=4,model=2")


@pytest.mark.parametrize("folder", [None, 7, ["a"]], ids=repr)
def test_a_path_that_is_none(folder):
    """A path is text or a Path."""
    refused(lambda: ds.load(folder), UsageError, repr(folder), "path")


@pytest.mark.parametrize("model", ["folder", None], ids=repr)
def test_a_model_that_is_none(model):
    """Every way in says what gives one."""
    for way_in in (ds.generate, partial(ds.generate, layerwise=True), ds.stream, ds.forward, ds.score):
        refused(lambda way_in=way_in: way_in(model, [[5]]), UsageError, repr(model), "ds.load")
    refused(lambda: ds.session(model), UsageError, repr(model), "ds.load")
    refused(lambda: ds.load_session(model, "file"), UsageError, repr(model), "ds.load")


def test_unknown_options(model):
    """All of them, with where they belong or what is meant; sessions alike."""
    options: dict = {"temperature": 0.7, "max_tokens": 3, "echo": True}
    said = "3 unknown options", "sampling=Sampling(temperature=...)", "do you mean max_new_tokens?", "echo;"
    refused(lambda: ds.generate(model, [[5]], **options), UsageError, *said)
    refused(lambda: ds.stream(model, [5], **options), UsageError, *said)
    refused(lambda: ds.session(model).generate([5], **options), UsageError, *said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_token_ids": None}, "stop_token_ids must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list"),
        ({"stop": None}, "stop string must be text"),
        ({"stop": 5}, "stop string must be text"),
        ({"tokenizer": "folder"}, "chat.Tokenizer.load"),
        ({"n": 1.0}, "n must be an integer"),
        ({"top_logprobs": True}, "top_logprobs must be an integer"),
    ],
    ids=str,
)
def test_options_of_another_kind(model, options, said):
    """Each is named with what it must be."""
    refused(lambda: ds.generate(model, [[5]], **options), UsageError, said)


def test_numbers_of_numpy(model, greedy):
    """Are numbers, wherever a number is asked for."""
    sampling = ds.Sampling(temperature=np.float32(0.0), top_k=np.int64(7), seed=np.arange(3))
    options = {"max_new_tokens": np.int32(NEW), "capacity": np.int64(64), "top_logprobs": np.uint8(1)}
    made = ds.generate(model, PROMPTS, sampling=sampling, **options)
    assert made.tokens == greedy.tokens and sampling.seed == (0, 1, 2)
    assert ds.Sampling(seed=np.int64(7)) == ds.Sampling(seed=7)


def test_all_tokens_are_among_the_likeliest(tiny):
    """Where a vocabulary has no more than `top_logprobs` may be."""
    cfg = dataclasses.replace(tiny, vocab_size=8, bos_token_id=0, eos_token_id=(1,))
    small = models.random_model(dataclasses.replace(cfg, num_hidden_layers=1, num_nextn_predict_layers=0))
    made = ds.generate(small, [[5]], max_new_tokens=1, top_logprobs=8)
    assert made.top_logprobs is not None
    assert sorted(token for token, _ in made.top_logprobs[0][0]) == list(range(8))
    refused(lambda: ds.generate(small, [[5]], top_logprobs=9), UsageError, "from 0 to 8")


def test_no_cache_is_longer_than_the_longest_context(tiny):
    """A bucket ends at the model's last position, whoever asks for the capacity."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0, max_position_embeddings=40)
    short = models.random_model(cfg)
    made = ds.generate(short, [[5] * 36], max_new_tokens=None)
    assert made.stats.capacity == 40 and (len(made.tokens[0]) == 4 or made.finish_reason == ["stop"])
    assert ds.session(short).generate([5] * 36, max_new_tokens=None).stats.capacity == 40
    assert len(ds.score(short, [[5] * 40]).logprobs[0]) == 39


def test_messages_speak_as_the_caller_types(model):
    """Python advises arguments, the command line options."""
    arguments = {"max_new_tokens": 20, "capacity": 40}
    refused(lambda: ds.generate(model, [[5] * 30], **arguments), UsageError, "max_new_tokens=10", "capacity=50")
    token = COMMAND_LINE.set(True)
    try:
        refused(lambda: ds.generate(model, [[5] * 30], **arguments), UsageError, "--max-new-tokens 10", "--capacity 50")
        refused(lambda: ds.generate(model, [[5]], max_new_tokens=-1), UsageError, "--max-new-tokens", "or all")
    finally:
        COMMAND_LINE.reset(token)


def test_results_show_a_summary(model, greedy):
    """A few lines with sizes, no arrays; rows and text are cut."""
    stream = ds.stream(model, PROMPTS[0], max_new_tokens=NEW)
    next(stream)
    session = ds.session(model, capacity=32)
    session.generate(PROMPTS[0], max_new_tokens=2)
    many = ds.generate(model, [PROMPTS[0]] * 20, max_new_tokens=NEW, tokenizer=Letters())
    for value, said in (
        (greedy, ("3 rows", str(greedy.tokens[1][0]), "stop", "tokens/s")),
        (many, ("20 rows", repr(many.text[0])[:20])),
        (stream, ("1 of at most 12", "capacity")),
        (session, ("of at most 32", "float32", "kB")),
        (ds.score(model, PROMPTS), ("3 rows", "20", "mean log-probability")),
    ):
        assert all(word in repr(value) for word in said), repr(value)
        assert len(repr(value)) < 1000 and len(repr(value).splitlines()) < 14


def test_help_lists_every_option():
    """Signatures and docstrings are made of the declaration."""
    options = {field.name: field for field in dataclasses.fields(Options)}
    own = {"n", "capacity", "cache_dtype", "draft"}
    for function, absent in (
        (ds.generate, set()),
        (ds.stream, {"n"}),
        (ds.Session.generate, own),
        (ds.Session.stream, own),
        (ds.Engine.submit, own),
    ):
        parameters = inspect.signature(function).parameters
        assert parameters.keys() & options.keys() == options.keys() - absent
        assert all(parameters[name].default == options[name].default for name in options.keys() - absent)
        assert all(f"\n{name} " in inspect.getdoc(function) for name in options.keys() - absent)
    assert all(f"\n{field.name} " in ds.Sampling.__doc__ for field in dataclasses.fields(ds.Sampling))


def test_users_see_what_is_theirs():
    """TAB lists no methods by which objects call each other, and `help` begins with a line that can be read."""
    surface = {
        ds.Engine: {"close", "stats", "submit", "summary"},
        ds.Session: {"fork", "generate", "save", "stream", "summary"},
        ds.Generation: {"summary", "text", "top_logprobs"},
        Stream: {"close", "result", "summary"},
    }
    for kind, names in surface.items():
        assert {name for name in dir(kind) if not name.startswith("_")} == names
    assert len(str(inspect.signature(ds.generate))) < 320


def test_a_stream_is_closed_from_another_thread(model, greedy, monkeypatch):
    """`close` waits for the step that is running; `result` then has the tokens until there."""
    decode, running, go_on = Batch.decode, threading.Event(), threading.Event()

    def decode_slowly(*given):
        running.set()
        assert go_on.wait(10)
        return decode(*given)

    stream = ds.stream(model, PROMPTS[0], max_new_tokens=NEW)
    first = next(stream).token
    monkeypatch.setattr(Batch, "decode", decode_slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        second = pool.submit(next, stream)
        assert running.wait(10)
        result = pool.submit(lambda: (stream.close(), stream.result())[1])
        go_on.set()
        assert [first, second.result(10).token] == result.result(10).tokens[0] == greedy.tokens[0][:2]
    assert result.result().finish_reason == ["interrupted"]
