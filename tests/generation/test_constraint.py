"""Rows that are told after each token what may come next."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax.errors import UsageError
from dsv32_jax.generation import batch as batches
from dsv32_jax.generation.constraint import look_ahead
from dsv32_jax.generation.programs import WHOLE, Programs
from dsv32_jax.generation.request import validate_for
from dsv32_jax.generation.row import Row
from tests import models

HOT = ds.Sampling(temperature=2.0, top_p=0.9, seed=3, frequency_penalty=0.5)
PROMPTS = [[0, 17, 42], [0, 250, 8], [0, 31, 31, 200]]


class Rising:
    """Each token is larger than the one before by at most 9; after `most` of them the row must end."""

    def __init__(self, vocab_size: int, most: int = 5):
        self.vocab_size, self.most, self.last, self.count = vocab_size, most, 20, 0

    def allowed(self):
        allowed = np.zeros(self.vocab_size, bool)
        allowed[[1] if self.count == self.most else range(self.last + 1, self.last + 10)] = True
        return allowed

    def add(self, token: int):
        assert self.last < token < self.last + 10
        self.last, self.count = token, self.count + 1


@pytest.fixture(scope="module")
def model(tiny):
    return models.random_model(
        dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=1, eos_token_id=(1,))
    )


def test_each_row_keeps_its_own(model):
    """Greedy and drawn, a constraint for each of n rows; they end when nothing else is allowed."""
    made = []

    def make():
        made.append(Rising(model.cfg.vocab_size))
        return made[-1]

    sampling = ds.Sampling(temperature=2.0, seed=3, logit_bias={25: 2.0})
    gen = ds.generate(model, PROMPTS, n=2, sampling=sampling, max_new_tokens=20, constraint=make)
    assert len(made) == 6 and gen.finish_reason == ["stop"] * 6
    assert all(len(tokens) == 6 and tokens[-1] == 1 for tokens in gen.tokens) and len({*map(tuple, gen.tokens)}) > 3
    greedy = ds.generate(model, PROMPTS[:1], max_new_tokens=20, constraint=make)
    scores = ds.score(model, [PROMPTS[0] + greedy.tokens[0]]).logprobs[0][-6:]
    assert greedy.logprobs[0] == pytest.approx(scores, abs=1e-4)


def test_others_are_not_disturbed(model):
    """Rows beside them have the tokens that they have alone; places are taken again, and pages that run out."""
    alone = [ds.generate(model, [prompt], max_new_tokens=70).tokens[0] for prompt in PROMPTS]
    with ds.engine(model, rows=2, capacity=128, pages=3) as engine:
        streams = []
        for prompt in PROMPTS:
            streams.append(engine.submit(prompt, max_new_tokens=70))
            own = {"constraint": lambda: Rising(model.cfg.vocab_size, 30)}
            streams.append(engine.submit(prompt, max_new_tokens=31, **own))
        tokens = [[token.token for token in stream] for stream in streams]
        assert engine.stats()["preemptions"]
    assert tokens[::2] == alone
    assert all(len(row) == 31 and row[:-1] == sorted(row[:-1]) for row in tokens[1::2])


@pytest.mark.parametrize("layerwise, sampling", [(False, None), (True, HOT)], ids=["greedy", "drawn"])
def test_drafts_keep_it_too(model, sampling, layerwise):
    """Token for token what one by one gives, beside a row without a constraint; drafts are right at times."""

    def run(draft):
        with ds.engine(model, rows=2, capacity=128, draft=draft, layerwise=layerwise) as engine:
            options = {"max_new_tokens": 16, "sampling": sampling}
            constraint = {"constraint": lambda: Rising(model.cfg.vocab_size, 15)}
            streams = [engine.submit(PROMPTS[0], **options, **own) for own in (constraint, {})]
            tokens = [[token.token for token in stream] for stream in streams]
            return tokens, streams[0].result().stats.steps

    plain, steps = run(0)
    drafted, fewer = run(2)
    assert drafted == plain and plain[0][:-1] == sorted(plain[0][:-1]) and fewer < steps == 16


class Dead(Rising):
    """Allows nothing behind a token that can be divided by four."""

    def allowed(self):
        return super().allowed() & (self.last % 4 != 0)


@pytest.mark.parametrize(
    "drafts, expected, known",
    [
        ([21, 25, 31], [21, 25, 31], 3),
        ([21, 24, 25], [21, -1, 25], 1),
        ([21, 50, 51], [21, 50, 51], 1),
        ([21, 1, 22], [21, 1, 22], 1),
    ],
    ids=["right", "dead end", "not allowed", "end"],
)
def test_what_comes_behind_drafts(model, drafts, expected, known):
    """Biases up to the first draft that cannot be right; one behind which nothing may come is never right."""
    make = {"constraint": lambda: Dead(model.cfg.vocab_size, 9), "draft": 3, "max_new_tokens": 9}
    row = Row(validate_for(model, [PROMPTS[0]], **make))
    row.slot, row.constraint.last = 1, 19
    tokens_Bu, allowed_cuV = look_ahead(model, [row], np.array([[0, 5, 5, 5], [19, *drafts]]))
    assert tokens_Bu.tolist() == [[0, 5, 5, 5], [19, *expected]] and row.constraint.last == 19
    known_uV = [one for one in allowed_cuV[0] if not one.all()]
    behind = [19, *drafts[:known]]
    assert [np.flatnonzero(one).tolist() for one in known_uV] == [[*range(last + 1, last + 10)] for last in behind]


@pytest.mark.parametrize("draft", [0, 2])
def test_the_host_works_while_the_device_does(model, monkeypatch, draft):
    """The first mask is found while the prompt is read, others while tokens are: when the program has been dispatched,
    and before anybody waits for it. Behind drafts too, which alone are waited for."""
    events = []

    class Watched(Rising):
        def allowed(self):
            events.append("mask")
            return super().allowed()

    def note(name, run):
        return lambda *arguments: (events.append(name), run(*arguments))[1]

    with ds.engine(model, rows=2, capacity=128, draft=draft) as engine:
        noted = {name: note(name, run) for name, run in WHOLE._asdict().items()}
        monkeypatch.setattr(engine.core.loop.batch, "_programs", Programs(**noted))
        monkeypatch.setattr(batches, "fetch", note("fetch", batches.fetch))
        monkeypatch.setattr(jax, "block_until_ready", note("wait", jax.block_until_ready))
        stream = engine.submit(PROMPTS[0], max_new_tokens=9, constraint=lambda: Watched(model.cfg.vocab_size))
        other = engine.submit(PROMPTS[1], max_new_tokens=2)
        assert [token.token for token in stream][-1] == 1 and len(list(other)) == 2
    order = " ".join(events) + " "
    begin, end = ("catch_up fetch ", "draft process fetch (mask )*") if draft else ("process fetch ", "")
    end += "wait (fetch ){8}"
    assert re.fullmatch(f"wait prefill mask wait {begin}{end}({begin}mask {end})+", order), order


def test_what_cannot_be_kept(model):
    """No token is left: that row ends with an error, and others go on."""
    own = {"constraint": lambda: Rising(model.cfg.vocab_size)}
    with ds.engine(model, rows=2, capacity=128, pages=3) as engine:
        bad = engine.submit([0, 5], sampling=ds.Sampling(forbidden_ids=range(21, 30)), **own)
        good = engine.submit([0, 5], max_new_tokens=3)
        assert len(list(good)) == 3
        with pytest.raises(UsageError, match="leaves no token to sample after 0 new tokens"):
            next(bad)
    with pytest.raises(UsageError, match="min_new_tokens=2 cannot be used with a constraint"):
        ds.generate(model, [[0, 5]], min_new_tokens=2, **own)
