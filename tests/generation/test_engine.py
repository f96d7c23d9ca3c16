"""The engine: a row's tokens are its own, whatever comes, goes, is shared, preempted or fails around it."""

import asyncio
import concurrent.futures
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dsv32_jax as ds
from dsv32_jax.errors import CapacityError, UsageError
from dsv32_jax.generation.batch import Batch
from dsv32_jax.generation.request import validate_for
from dsv32_jax.system.compilation import count_compilations
from tests import models

SHARED = [0, *[7, 9, 11, 13, 15] * 30]
PROMPTS = [SHARED[:97], SHARED[:130] + [5], [*SHARED[:70], 44, 45, 46], [0, 250, 8], [3], SHARED[:130] + [6, 7, 8]]
LIMITS = [40, 70, 9, 30, 65, 1]
SAMPLINGS = [
    ds.Sampling(),
    ds.Sampling(temperature=1.5, seed=11),
    ds.Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2, seed=5),
    ds.Sampling(logit_bias={5: 3.0}),
    ds.Sampling(temperature=1.0, top_k=20, presence_penalty=0.5, seed=2**40),
    ds.Sampling(),
]


@pytest.fixture(scope="module")
def model(tiny):
    return models.random_model(dataclasses.replace(tiny, num_hidden_layers=2, eos_token_id=(1, 300)))


@pytest.fixture(scope="module")
def alone(model):
    """Each row alone, without pages of others."""
    options = [
        {"max_new_tokens": limit, "sampling": sampling} for limit, sampling in zip(LIMITS, SAMPLINGS, strict=True)
    ]
    made = [ds.generate(model, [prompt], **own) for prompt, own in zip(PROMPTS, options, strict=True)]
    return [(one.tokens[0], one.finish_reason[0]) for one in made]


def submit(engine, i: int, **options):
    return engine.submit(PROMPTS[i], max_new_tokens=LIMITS[i], sampling=SAMPLINGS[i], **options)


def is_idle(engine) -> bool:
    """Nobody has a place, waits, or uses a page but the tree."""
    stats = engine.stats()
    with engine.core.pause():
        known = sum(pool.known for pool in engine.core.loop.scheduler.pools)
        return not any(stats[name] for name in ("running", "reading", "waiting", "pages_of_rows")) and known == sum(
            len(pool.users) - len(pool.free) for pool in engine.core.loop.scheduler.pools
        )


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "drafts"])
def small(model, request):
    """An engine of two rows and as few pages as the longest row needs, or a few more."""
    with ds.engine(model, rows=2, capacity=256, pages=5, draft=request.param) as engine:
        yield engine


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=9))
def test_any_company(small, alone, arrivals):
    """Rows that come while others run, with too few pages for them, and some that are closed on the way."""
    waiting, streams = list(arrivals), []
    while waiting or any(stream is not None for *_, stream in streams):
        if waiting:
            i, rest, leave = waiting.pop()
            streams.append([i, leave, [], submit(small, i)])
            if rest and waiting:
                continue
        for entry in streams:
            i, leave, tokens, stream = entry
            while stream is not None:
                token = next(stream, None)
                if token is not None:
                    tokens.append(token.token)
                if token is None or (leave < 20 and len(tokens) > leave):
                    stream.close()
                    assert tokens == alone[i][0][: len(tokens)]
                    assert leave < 20 or stream.result().finish_reason == [alone[i][1]]
                    stream = entry[3] = None
                elif len(tokens) % 7 == 0:
                    break
    assert is_idle(small)


@pytest.mark.parametrize("draft", [0, 2])
def test_lists_of_limits_and_samplings(model, alone, draft):
    """One a prompt, more prompts than rows; results in order."""
    made = ds.generate(model, PROMPTS, max_new_tokens=LIMITS, sampling=SAMPLINGS, batch_size=2, draft=draft)
    assert list(zip(made.tokens, made.finish_reason, strict=True)) == alone


def test_the_longest_row_of_a_request_comes_first(model):
    """Rows of equal length in the order of their prompts; requests in theirs."""
    with ds.engine(model, rows=1, capacity=256) as engine:
        requests = [validate_for(model, [[5]] * 4, None, max_new_tokens=limits) for limits in ([3, 9, 3, 20], [90] * 4)]
        first, second = map(engine.core.add, requests)
        with engine.core.pause():
            waiting = list(engine.core.loop.scheduler.waiting)
        assert waiting == [*(first[i] for i in (3, 1, 0, 2)), *second]


@pytest.mark.parametrize("draft", [0, 2])
def test_rows_that_are_preempted(model, draft):
    """Pages for little more than one row: the youngest gives way, is read again, and goes on where it was."""
    prompts, options = [[3], [0, 250, 8], [7, 7]], {"max_new_tokens": 140, "min_new_tokens": 140}
    sampling = ds.Sampling(temperature=1.2, frequency_penalty=0.3, seed=4)
    want = [ds.generate(model, [prompt], sampling=sampling, **options).tokens[0] for prompt in prompts]
    with ds.engine(model, rows=4, capacity=256, pages=4, draft=draft) as engine:
        streams = [engine.submit(prompt, sampling=sampling, **options) for prompt in prompts]
        assert [[token.token for token in stream] for stream in streams] == want
        assert engine.stats()["preemptions"] > 0 and is_idle(engine)


def test_what_was_read_is_not_read_again(model):
    """By another prompt with the same beginning, by a continuation of an answer, and while the first still runs."""
    with ds.engine(model, rows=4, capacity=512) as engine:
        first = engine.submit(SHARED, max_new_tokens=80)
        begun = [next(first).token]
        beside = engine.submit([*SHARED[:140], 5], max_new_tokens=3).result
        assert beside().stats.prompt_tokens <= 141
        other = engine.submit([*SHARED[:140], 5], max_new_tokens=3)
        list(other)
        assert other.result().stats.prompt_tokens == 1
        answer = begun + [token.token for token in first]
        longer = engine.submit([*SHARED, *answer, 4, 4], max_new_tokens=2)
        list(longer)
        assert longer.result().stats.prompt_tokens <= 4
        assert engine.stats()["prefix_hits"] > 300


def test_few_tokens_come_first(model):
    """However many short answers were quick: how many steps fit in a segment is known of steps that were taken."""
    options = {"sampling": ds.Sampling(forbidden_ids=[1, 300]), "capacity": 256}
    with ds.engine(model, rows=1, capacity=256) as engine:
        for limit in (2, 2, 2, 2, 2, 2, 2, 100):
            (row,) = engine.core.add(validate_for(model, [PROMPTS[4]], max_new_tokens=limit, **options))
            if limit == 2:
                assert len(list(engine.core.follow([row]))) == 3
        engine.core.wait(lambda: False)
        assert 1 <= len(row.tokens) <= 4


def test_many_threads(model, alone):
    """Each gets its own tokens; a stream under `async for` leaves the loop free."""
    with ds.engine(model, rows=4, capacity=256, pages=12) as engine:

        def use(i):
            return [token.token for token in submit(engine, i % 6)]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(use, range(18))) == [tokens for tokens, _ in alone] * 3

        async def together():
            async def collect(i):
                return [token.token async for token in submit(engine, i)]

            return await asyncio.gather(*map(collect, range(6)))

        assert asyncio.run(together()) == [tokens for tokens, _ in alone]
        assert is_idle(engine)


def test_results_of_streams(model, alone):
    """Asked for from threads, like those of futures: each waits for all tokens, also for those taken before."""
    with ds.engine(model, rows=4, capacity=256) as engine, concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [submit(engine, i) for i in range(4)]
        next(streams[2])
        results = [pool.submit(stream.result) for stream in streams]
        assert [(one.result(60).tokens[0], one.result().finish_reason[0]) for one in results] == alone[:4]
        assert is_idle(engine)


def test_streams_that_are_left(model):
    """Closed, cancelled before their turn, or forgotten: places and pages are free again."""
    with ds.engine(model, rows=1, capacity=256, pages=4) as engine:
        running, waiting, forgotten = (submit(engine, i) for i in (0, 1, 2))
        next(running)
        waiting.close()
        assert waiting.result().finish_reason == ["interrupted"] and waiting.result().tokens == [[]]
        del forgotten
        gc.collect()
        running.close()
        assert list(running) == [] and is_idle(engine)
        left = submit(engine, 0)
        next(left)
    assert left.result().finish_reason == ["interrupted"] and list(left) == []
    with pytest.raises(UsageError, match="the engine is closed"):
        submit(engine, 0)


def test_a_stream_that_waits_is_closed_from_another_thread(model):
    """While another row has the only place."""
    with ds.engine(model, rows=1, capacity=256, pages=4) as engine, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running, waiting = submit(engine, 0), submit(engine, 3)
        next(running)
        asked = pool.submit(list, waiting)
        waiting.close()
        assert asked.result(30) == [] and waiting.result().finish_reason == ["interrupted"]
        running.close()
        assert is_idle(engine)


def test_a_row_that_fails_alone(model, alone):
    """Its stream raises the error; the others are read again and end as they would."""
    spoilt = dataclasses.replace(model, embed_VD=model.embed_VD.at[222].set(jnp.nan))
    with ds.engine(spoilt, rows=4, capacity=256, pages=12) as engine:
        streams = [submit(engine, 0), engine.submit([*SHARED[:100], 222, 5], max_new_tokens=4), submit(engine, 3)]
        next(streams[0])
        with pytest.raises(FloatingPointError, match="row 0, new token 0.*the embedding"):
            list(streams[1])
        assert streams[1].result().tokens == [[]]
        assert [token.token for token in streams[2]] == alone[3][0]
        assert [token.token for token in streams[0]] == alone[0][0][1:] and is_idle(engine)


@pytest.mark.parametrize("program", ["seat", "read", "decode"])
def test_a_device_without_memory(model, alone, monkeypatch, program):
    """Who waits gets the error; the engine goes on with the rows of others, and with new ones."""
    with ds.engine(model, rows=2, capacity=256, pages=8) as engine:
        other = submit(engine, 0)
        begun = next(other).token

        def fail(self, *_):
            self.take()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

        with monkeypatch.context() as patch:
            patch.setattr(Batch, program, fail)
            with pytest.raises(CapacityError, match="the device is out of memory"):
                list(submit(engine, 1))
        assert [token.token for token in submit(engine, 1)] == alone[1][0]
        assert [begun, *(token.token for token in other)] == alone[0][0] and is_idle(engine)


def test_interrupted_anywhere(model, alone, monkeypatch):
    """Ctrl-C in the middle of a program: what was computed is computed again."""
    with ds.engine(model, rows=2, capacity=256, pages=8) as engine:
        other = submit(engine, 1)
        begun, fetched = [next(other).token], Batch.decode

        def interrupt(*given):
            fetched(*given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "decode", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(submit(engine, 0))
        assert begun + [token.token for token in other] == alone[1][0] and is_idle(engine)


def test_shapes_are_few(tiny):
    """Fifty mixes of lengths, samplings, limits and ends compile no more programs than there are shapes: powers of two
    of tokens read at once, of rows that are read or admitted, and of pages a row."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)
    rng = np.random.default_rng(3)
    with (
        ds.engine(models.random_model(cfg), rows=4, capacity=256, pages=16) as engine,
        count_compilations() as compiled,
    ):
        for _ in range(50):
            streams = [
                engine.submit(
                    rng.integers(2, 300, rng.integers(1, 120)).tolist(),
                    max_new_tokens=int(rng.integers(1, 30)),
                    sampling=ds.Sampling(temperature=float(rng.uniform(0, 2)), seed=int(rng.integers(9))),
                )
                for _ in range(rng.integers(1, 5))
            ]
            for stream in streams:
                list(stream)
    tokens, rows, lengths = 4, 3, 3
    assert compiled.count <= 2 + rows + lengths * (1 + tokens * rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "rows must be an integer from 1"),
        ({"pages": 0}, "pages must be an integer from 1"),
        ({"capacity": 1 << 40}, "capacity must be an integer from 1"),
        ({"draft": 17}, "draft must be an integer"),
        ({"cache_dtype": "int8"}, "cache_dtype must be"),
    ],
    ids=str,
)
def test_wrong_engines(model, options, said):
    with pytest.raises(UsageError, match=said):
        ds.engine(model, **options)


def test_what_does_not_fit(model):
    """More pages than memory, a row that could never have its pages, and options of the engine."""
    with pytest.raises(CapacityError, match="GB are free"):
        ds.engine(model, pages=1 << 26)
    engine = ds.engine(model, rows=2, capacity=512, pages=3)
    with pytest.raises(CapacityError, match="needs 4 pages of 64, but the engine has 3"):
        engine.submit([5] * 100, max_new_tokens=100)
    with pytest.raises(UsageError, match="draft belongs to the engine"):
        engine.submit([5], draft=1)
    with pytest.raises(UsageError, match="one row"):
        engine.submit([5], n=2)
    assert all(word in repr(engine) for word in ("2 rows", "0 of 3 used", "tokens/s"))
