"""How a token is chosen: truncation, penalties, bias, and the draw itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import dsv32_jax as ds
from dsv32_jax.errors import UsageError
from dsv32_jax.generation import sampler
from dsv32_jax.generation.request import expand_samplings
from dsv32_jax.generation.sampler import make_params

VOCABULARY = 12


def oracle(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which logits are kept: those not below the k-th, then those not below the one that completes p."""
    kept = logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    if top_p >= 1:
        return kept
    weights = np.where(kept, np.exp((logits - logits.max()).astype(np.float64)), 0)
    weights /= weights.sum()
    for smallest in np.unique(logits[kept])[::-1]:
        if weights[logits >= smallest].sum() >= top_p:
            return kept & (logits >= smallest)
    return kept


_truncate_jit = jax.jit(sampler.truncate)


def _truncate(logits, top_k, top_p, min_p=0.0):
    rows = len(logits)
    columns = (np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32), np.full(rows, min_p, np.float32))
    return _truncate_jit(jnp.asarray(logits), *map(jnp.asarray, columns))


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
    st.integers(1, VOCABULARY),
    st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.77, 0.9, 1.0]),
)
def test_truncation(logits, top_k, top_p):
    """top_k and top_p keep what a sort in float64 keeps, wherever the sum is not within rounding of p."""
    logits = np.array([logits, logits[::-1]], np.float32)
    got = np.asarray(_truncate(logits, top_k, top_p))
    for row, kept in zip(logits, np.isfinite(got), strict=True):
        bounds = [oracle(row, top_k, p) for p in (max(top_p - 1e-5, 1e-9), min(top_p + 1e-5, 0.99999 + (top_p == 1)))]
        assert (bounds[0] <= kept).all() and (kept <= bounds[1] | bounds[0]).all(), (row, kept)
    np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=VOCABULARY, max_size=VOCABULARY), st.integers(1, 12))
def test_truncation_keeps_all_that_tie(logits, top_k):
    """Equal logits are kept or dropped together, by top_k as by a tiny top_p."""
    logits = np.array([logits, logits[::-1]], np.float32)
    got = np.isfinite(_truncate(logits, top_k, 1))
    np.testing.assert_array_equal(got, [oracle(row, top_k, 1.0) for row in logits])
    got = np.isfinite(_truncate(logits, VOCABULARY, 1e-6))
    np.testing.assert_array_equal(got, logits == logits.max())


@pytest.mark.parametrize("extreme", [3e38, 1e-36, 0.0])
def test_truncation_of_extreme_logits(extreme):
    """Any normal float32 can be the smallest that is kept."""
    logits = np.linspace(-1, 1, VOCABULARY, dtype=np.float32)[None].repeat(2, 0) * np.float32(extreme)
    got = np.isfinite(_truncate(logits, 3, 1))
    np.testing.assert_array_equal(got, [oracle(row, 3, 1.0) for row in logits])


def test_temperature_zero_is_greedy_without_division():
    """No infinity, no NaN, whatever the logits; and the lowest id of those that tie."""
    logits = jnp.asarray([[1e30, -1e30, 0.0, 1e30], [0.0, 0.0, 0.0, 0.0], [-1e-30, 0.0, 1e-30, 0.0]])
    params = make_params(expand_samplings(ds.Sampling(top_k=2, top_p=0.5), 3, 1), 4, 4)
    assert jax.jit(sampler.sample)(params, logits, jnp.zeros(3, jnp.int32)).tolist() == [0, 0, 2]


def test_frequencies():
    """Drawn tokens are as frequent as the truncated, tempered distribution says."""
    rows, logits = 20_000, np.array([2.0, 1.5, 1.0, 0.0, -1.0, 3.0], np.float32)
    settings = ds.Sampling(temperature=2.0, top_k=5, top_p=0.9, seed=range(rows))
    params = make_params(expand_samplings(settings, rows, 1), 6, 6)
    batch = jnp.broadcast_to(jnp.asarray(logits), (rows, 6))
    tokens = jax.jit(sampler.sample)(params, batch, jnp.full(rows, 7, jnp.int32))
    kept = oracle(logits / 2, 5, 0.9)
    weights = np.where(kept, np.exp(logits / 2), 0)
    expected = rows * weights / weights.sum()
    counts = np.bincount(tokens, minlength=6)
    assert kept.sum() == 4 and (counts[~kept] == 0).all()
    assert (((counts - expected)[kept] ** 2) / expected[kept]).sum() < 20


def test_the_users_random_generator_is_of_no_consequence():
    """Keys name their implementation: TPU users set rbg, and a seed means the same everywhere."""
    params = make_params(expand_samplings(ds.Sampling(temperature=1.0, seed=range(50)), 50, 1), 6, 6)
    arguments = params, jnp.zeros((50, 6)), jnp.arange(50)
    want = sampler.sample(*arguments)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(sampler.sample(*arguments), want)
    assert len(set(want.tolist())) == 6


@given(st.lists(st.floats(-9, 9, width=32), min_size=VOCABULARY, max_size=VOCABULARY), st.floats(0.01, 1.0))
def test_min_p(logits, min_p):
    """What is less likely than min_p times the likeliest is dropped, whatever else is kept."""
    logits = np.array([logits], np.float32)
    ratio = np.exp(logits[0].astype(np.float64) - logits.max())
    kept = np.isfinite(_truncate(logits, VOCABULARY, 1.0, min_p))[0]
    assert (kept | (ratio < min_p * 1.001)).all() and (~kept | (ratio > min_p * 0.999)).all()


def test_penalties_and_bias():
    """Repetition looks at the prompt too, presence and frequency at made tokens alone; neutral values do nothing."""
    logits = np.array([[2.0, -2.0, 1.0, 0.5, 0.25, -1.0]] * 2, np.float32)
    in_prompt = np.array([[1, 1, 0, 0, 0, 0]] * 2, bool)
    made = np.array([[0, 0, 1, 3, 0, 0]] * 2, np.int32)
    one = ds.Sampling(
        repetition_penalty=2.0, presence_penalty=0.125, frequency_penalty=0.25, logit_bias={4: 8.0}, forbidden_ids=[5]
    )
    params = make_params([ds.Sampling(), one], 6, 6)
    got = sampler.process_logits(params, *map(jnp.asarray, (logits, in_prompt, made)))
    np.testing.assert_array_equal(got[0], logits[0])
    np.testing.assert_array_equal(got[1], [1.0, -4.0, 0.5 - 0.375, 0.25 - 0.875, 8.25, -np.inf])


def test_each_row_has_its_own_settings():
    """A greedy row beside a drawn one beside one that may only choose a single token; unused ids are never chosen."""
    rows = [ds.Sampling(), ds.Sampling(temperature=5.0, seed=3), ds.Sampling(temperature=5.0, allowed_ids=[2])]
    params = make_params(rows, 6, 4)
    logits = jnp.asarray([[1.0, 3.0, 2.0, 0.0, 9.0, 9.0]] * 3)
    logits = sampler.process_logits(params, logits, jnp.zeros((3, 6), bool), jnp.zeros((3, 6), jnp.int32))
    sample = jax.jit(sampler.sample)
    drawn = np.array([sample(params, logits, jnp.full(3, i, jnp.int32)) for i in range(40)])
    assert set(drawn[:, 0]) == {1} and set(drawn[:, 1]) == {0, 1, 2, 3} and set(drawn[:, 2]) == {2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {3: float("-inf")}}, "logit_bias"),
        ({"logit_bias": {3: 1e39}}, "logit_bias"),
        ({"logit_bias": {3: 10**400}}, "logit_bias"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"allowed_ids": "abc"}, "allowed_ids"),
        ({"forbidden_ids": 3}, "forbidden_ids"),
    ],
    ids=str,
)
def test_wrong_settings(wrong, said):
    """Refused when the Sampling is made, with the value."""
    with pytest.raises(UsageError, match=said):
        ds.Sampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"logit_bias": {6: 1.0}}, "logit_bias holds 1 id outside the vocabulary of 0..5: 6"),
        ({"allowed_ids": [0, -1, 99]}, "allowed_ids holds 2 ids"),
        ({"forbidden_ids": [True]}, "forbidden_ids holds 1 id"),
        ({"forbidden_ids": [1.5]}, "1.5"),
        ({"allowed_ids": []}, "no token to sample"),
        ({"allowed_ids": [2], "forbidden_ids": [2]}, "no token to sample"),
        ({"allowed_ids": [5]}, "no token to sample"),
    ],
    ids=str,
)
def test_ids_that_no_vocabulary_has(wrong, said):
    """Refused when the vocabulary is known; id 5 has a row but no token."""
    with pytest.raises(UsageError, match=said):
        make_params([ds.Sampling(**wrong)], 6, 5)


def test_one_sampling_a_prompt():
    """As many as prompts; the continuations of a prompt have the seeds that follow."""
    rows = expand_samplings([ds.Sampling(seed=7), ds.Sampling(temperature=1.0, seed=2**63 - 1)], 2, 2)
    assert [row.seed for row in rows] == [7, 8, 2**63 - 1, 0] and [row.temperature for row in rows] == [0, 0, 1, 1]
    assert expand_samplings(None, 3, 1) == [ds.Sampling()] * 3
    with pytest.raises(UsageError, match="2 samplings for 3 prompts"):
        expand_samplings([ds.Sampling()] * 2, 3, 1)


EDGES = [1e-320, 5e-45, 1e-38, 1.1e-38, 1.2e-38, 2e-38, 3e-38, 1e-30, 1e-9]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_numbers_at_the_edge_of_float32(name, edge):
    """A temperature whose quotient overflows and a share that is zero in float32 give the likeliest token."""
    one = ds.Sampling(**{"temperature": 1.0, name: edge}, seed=3)
    params = make_params([one], 6, 6)
    for logits in (
        [1.0, 3.0, 2.0, 0.0, -9.0, 2.5],
        [-30.0, 60.0, -30.0, 0.0, 1.0, 2.0],
        [-9.0, -1.0, -2.0, -3, -4, -5],
    ):
        assert int(sampler.sample(params, jnp.asarray([logits]), jnp.zeros(1, jnp.int32))[0]) == 1


@pytest.mark.parametrize("temperature", EDGES)
def test_a_large_bias_at_a_low_temperature(temperature):
    one = ds.Sampling(temperature=temperature, logit_bias={4: 1e30, 5: -1e30}, forbidden_ids=[0])
    params = make_params([one], 6, 6)
    logits = jnp.asarray([[1.0, 3.0, 2.0, 0.0, -9.0, 2.5]])
    logits = sampler.process_logits(params, logits, jnp.zeros((1, 6), bool), jnp.zeros((1, 6), jnp.int32))
    assert int(sampler.sample(params, logits, jnp.zeros(1, jnp.int32))[0]) == 4
