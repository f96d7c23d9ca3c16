"""Drafting and verifying: the same tokens, sooner. The drafts of this golden checkpoint are right every other time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax.errors import UsageError
from tests import golden, models
from tests.conftest import DATA

NEW, DRAFTS = 24, 2
HOT = ds.Sampling(temperature=0.7, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def checkpoint(scratch):
    return golden.case(DATA / "golden/p2_noyarn_mtp_latesparse", scratch)


@pytest.fixture(scope="module")
def prompts(checkpoint):
    """Ragged, and the longest goes over index_topk (56) while tokens are drafted."""
    return [checkpoint.ids[0].tolist(), checkpoint.ids[1, :29].tolist(), checkpoint.ids[1, 5:7].tolist()]


@pytest.mark.parametrize("settings", [None, HOT], ids=["greedy", "drawn"])
def test_drafts_change_nothing(checkpoint, prompts, settings):
    """Ragged rows, two drafts at once: token for token what one by one gives."""
    plain = ds.generate(checkpoint.model, prompts, max_new_tokens=NEW, sampling=settings)
    drafted = ds.generate(checkpoint.model, prompts, max_new_tokens=NEW, sampling=settings, draft=DRAFTS)
    assert drafted.tokens == plain.tokens and drafted.finish_reason == plain.finish_reason
    for got, want in zip(drafted.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert drafted.stats.steps < plain.stats.steps and 0.1 < drafted.stats.acceptance < 1


def test_penalties_and_ends_with_drafts(checkpoint, prompts):
    """Penalties count tokens as they are accepted; a row that ends in the middle of a step ends there."""
    settings = ds.Sampling(temperature=0.5, repetition_penalty=1.3, frequency_penalty=0.4, seed=8)
    plain = ds.generate(checkpoint.model, prompts, max_new_tokens=NEW, sampling=settings)
    ends = [plain.tokens[0][7], plain.tokens[1][4], plain.tokens[2][11]]
    options = {"max_new_tokens": NEW, "sampling": settings, "stop_token_ids": ends, "min_new_tokens": 3}
    plain = ds.generate(checkpoint.model, prompts, **options)
    drafted = ds.generate(checkpoint.model, prompts, draft=DRAFTS, **options)
    assert drafted.tokens == plain.tokens and drafted.finish_reason == plain.finish_reason
    assert "stop" in plain.finish_reason and min(map(len, plain.tokens)) > 3


def test_acceptance_behind_a_stop_string(checkpoint, prompts):
    """Steps that go beyond the stop string count with all that they made."""

    class Numbers:
        def bytes_of(self, ids):
            return b"".join(b"<%d>" % i for i in ids)

    options = {"max_new_tokens": NEW, "draft": DRAFTS, "tokenizer": Numbers(), "sampling": HOT}
    whole = ds.generate(checkpoint.model, prompts[:1], **options)
    stopped = ds.generate(checkpoint.model, prompts[:1], stop=f"<{whole.tokens[0][4]}>", **options)
    assert len(stopped.tokens[0]) <= 5
    for gen in (whole, stopped):
        assert gen.stats.acceptance == gen.stats.accepted / (gen.stats.steps * DRAFTS) >= 0
    assert whole.stats.accepted == len(whole.tokens[0]) - whole.stats.steps


def test_up_to_the_last_slot(checkpoint, prompts):
    """Drafts beyond the capacity are dropped, and the cache is used to its last slot."""
    count = len(prompts[1])
    plain = ds.generate(checkpoint.model, [prompts[1]], max_new_tokens=None, capacity=count + 9)
    drafted = ds.generate(checkpoint.model, [prompts[1]], max_new_tokens=None, capacity=count + 9, draft=DRAFTS)
    assert drafted.tokens == plain.tokens and len(plain.tokens[0]) == 9


def test_a_stream_with_drafts(checkpoint, prompts):
    """Tokens of one step come one after the other."""
    plain = ds.generate(checkpoint.model, [prompts[1]], max_new_tokens=NEW)
    events = list(ds.stream(checkpoint.model, prompts[1], max_new_tokens=NEW, draft=DRAFTS))
    assert [event.token for event in events] == plain.tokens[0]
    assert [event.finish_reason for event in events] == [None] * (NEW - 1) + plain.finish_reason


def test_the_distribution_with_drafts(checkpoint):
    """1024 continuations with seeds of their own are distributed as the model says: chi-squared with 5 degrees of
    freedom is below 20.5 (p = 0.001). Were 0.15 of the probability elsewhere, the statistic would have a noncentrality
    of at least 1024 * 0.3^2 = 92 and stay below 20.5 less than once in a thousand times."""
    allowed, count = [11, 23, 42, 77, 101, 140], 1024
    prompt = checkpoint.ids[0, :20].tolist()
    settings = ds.Sampling(temperature=2.0, allowed_ids=allowed, seed=1000)
    drawn = ds.generate(checkpoint.model, [prompt], max_new_tokens=3, sampling=settings, n=count, draft=DRAFTS)
    assert drawn.stats.steps < 2 * count
    contexts = [(a, b) for a in allowed for b in allowed]
    logits = np.asarray(ds.forward(checkpoint.model, [prompt + list(pair) for pair in contexts]).logits)[
        :, -3:, allowed
    ]
    chance = np.asarray(jax.nn.softmax(jnp.asarray(logits) / 2.0, axis=-1), np.float64)
    expected = np.zeros(6)
    for i, (a, b) in enumerate(contexts):
        expected += chance[i, 0, allowed.index(a)] * chance[i, 1, allowed.index(b)] * chance[i, 2]
    observed = np.array([sum(row[2] == token for row in drawn.tokens) for token in allowed])
    assert ((observed - count * expected) ** 2 / (count * expected)).sum() < 20.5


def test_no_drafting_layer(tiny):
    """Refused by name."""
    model = models.abstract(dataclasses.replace(tiny, num_nextn_predict_layers=0))
    with pytest.raises(UsageError, match="draft=2 needs the MTP head"):
        ds.generate(model, [[5]], draft=2)


@pytest.mark.parametrize("value", [-1, 17, 1.0, True, "two"], ids=repr)
def test_wrong_numbers_of_drafts(tiny, value):
    """A number of tokens, 16 at most."""
    with pytest.raises(UsageError, match="draft must be an integer from 0 to 16"):
        ds.generate(models.abstract(tiny), [[5]], draft=value)
