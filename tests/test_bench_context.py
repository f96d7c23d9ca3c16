"""`dsv32 bench context` at tiny sizes: its parts are the model's own, its rows complete, whatever they time."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import cli
from dsv32_jax.bench import context as bench
from dsv32_jax.bench import decode_step, measure
from dsv32_jax.bench.decode_step import DecodeStep, fill_cache
from dsv32_jax.errors import CapacityError
from dsv32_jax.model.attention import attention
from dsv32_jax.model.cache import Cache, dtype_of
from dsv32_jax.quantization import cache_formats
from tests import models


@pytest.fixture(scope="module")
def single(tiny):
    """A dense layer."""
    return dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def model(single):
    """`single` with random weights in float32."""
    return models.random_model(single)


@pytest.fixture
def ready(model, monkeypatch):
    """The bench takes `model` instead of making one."""
    monkeypatch.setattr(bench, "make_model", lambda cfg: model)


@pytest.mark.parametrize("stored, more", [("float32", 0), ("fp8", 21)], ids=["whole", "sparse"])
def test_the_parts_are_the_models_own(single, model, stored, more):
    """What scoring, top-k and attention make one after the other is what `attention` makes of the same cache."""
    (layer,), cache = model.layers, fill_cache(single, single.index_topk + more, dtype_of(stored, jnp.float32))
    hidden = jax.random.normal(jax.random.key(0), (1, 1, single.hidden_size))
    position = cache.length_B[:, None]
    out, written, (scores, selected) = jax.jit(attention)(layer.mla, layer.indexer, hidden, cache.layers[0], position)
    cache = Cache((written,), cache.length_B)
    queries = bench.make_queries(model, hidden, position)
    if more:
        (found,) = bench.score_cache(queries, cache)
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5 * np.abs(scores).max())
        (positions,) = bench.select_topk([found], single.index_topk)
        np.testing.assert_array_equal(positions, selected)
        (attended,) = bench.attend_to_selected(model, queries, cache, [positions])
    else:
        (attended,) = bench.attend_to_all(model, queries, cache)
    np.testing.assert_allclose(layer.mla.output(attended), out, atol=1e-5 * np.abs(out).max())


def test_a_filled_cache_has_no_empty_slot(single):
    """Different in every slot, component and layer, of standard deviation 1; the last slot is for the new token."""
    cfg = dataclasses.replace(single, num_hidden_layers=2)
    cache = fill_cache(cfg, 64, dtype_of("bfloat16", jnp.bfloat16))
    assert cache.length_B.tolist() == [63] and cache.capacity == 64 and len(cache.layers) == 2
    values = [layer.latents(jnp.float32)[0] for layer in cache.layers]
    values += [cache_formats.read(layer.k_index_yqJ, jnp.float32)[:, :64] for layer in cache.layers]
    assert len({value.tobytes() for array in values for value in np.asarray(array)[0, :, :16]}) == 4 * 64
    assert all(abs(float(array.std()) - 1) < 0.05 for array in values)


@pytest.fixture
def rows(single, ready, monkeypatch):
    """Every row of the decode section, at a context that is attended to as a whole and one beyond; without the step."""

    class Slow:
        def __init__(self, model, cache):
            self.capacity = cache.capacity

        def run(self):
            time.sleep(0.05)

    monkeypatch.setattr(bench, "DecodeStep", Slow)
    return list(bench.decode_rows(single, (single.index_topk, 48), ("fp8",), seconds=0.01))


def test_decode_rows(rows, tiny):
    """A row a cache and context; what is left of the whole is the rest; a short context is not searched."""
    assert [(row["cache"], row["context"]) for row in rows] == [("fp8", tiny.index_topk), ("fp8", 48)]
    short, long = rows
    assert all(short[name] is None for name in ("scoring", "topk")) and short["attention"] > 0
    assert all(long[name] > 0 for name in (*bench.PARTS, "whole"))
    for row in rows:
        assert row["whole"] > 0.05
        spent = sum(row[name] or 0 for name in bench.PARTS)
        assert math.isclose(row["rest"] + spent, row["whole"], rel_tol=1e-9)


def test_a_step_stays_in_the_last_slot(single, model):
    """Each run processes one token at the same place, the cache having been handed over."""
    cache = fill_cache(single, 32, dtype_of("bfloat16", jnp.bfloat16))
    before = np.asarray(cache_formats.read(cache.layers[0].k_index_yqJ, jnp.float32)[:, :32])
    step = DecodeStep(model, cache)
    for _ in range(3):
        step.run()
    assert step.state.cache.length_B.tolist() == [32] and step.state.step_B.tolist() == [3]
    after = np.asarray(cache_formats.read(step.state.cache.layers[0].k_index_yqJ, jnp.float32)[:, :32])
    assert (before != after).any(axis=-1).tolist() == [[False] * 31 + [True]]


def test_prefill_rows(single, ready):
    """A quarter, half and all of the prompt, each including the one before; one program."""
    found = list(bench.prefill_rows(single, 64, 16))
    assert [row["tokens"] for row in found] == [16, 32, 64]
    seconds = [row["seconds"] for row in found]
    assert 0 < seconds[0] < seconds[1] < seconds[2] and len({row["temporary_bytes"] for row in found}) == 1
    assert len({len(line) for line in measure.format_table(bench.PREFILL_COLUMNS, found)}) == 1


def test_the_table_fits():
    """All lines end in the same column."""
    row = {"cache": "bfloat16", "scoring": None, **dict.fromkeys((*bench.PARTS[1:], "rest", "whole"), 12.3456)}
    given = [{**row, "context": 2048}, *({**row, "scoring": 1.0, "context": size} for size in (8192, 131072))]
    heading, *lines = measure.format_table(bench.DECODE_COLUMNS, given)
    assert {len(line) for line in lines} == {len(heading)} and "top-k" in heading


def test_the_command_runs_the_sections_that_are_asked_for(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(bench, "decode_rows", lambda cfg, *_: ran.append(cfg.num_hidden_layers) or [])
    monkeypatch.setattr(bench, "prefill_rows", lambda cfg, n, _: ran.append((n, cfg.num_hidden_layers)) or [])
    assert cli.main(["bench", "context"]) == 0
    assert cli.main(["bench", "context", "--section", "prefill", "--prefill", "32768", "--layers", "4"]) == 0
    assert ran == [4, (8192, 1), (32768, 4)]
    for option, value, rule in (
        ("--prefill", "1000", "a multiple of 2048"),
        ("--prefill", "0", "a multiple of 2048"),
        ("--layers", "0", "an integer from 1 to 1000"),
    ):
        assert cli.main(["bench", "context", option, value]) == 2
        assert f"{option} must be {rule}" in capsys.readouterr().err
    assert len(ran) == 3


def test_what_does_not_fit_is_refused(monkeypatch, capsys):
    """Before anything is made."""
    monkeypatch.setattr(decode_step.memory, "get_free_memory", lambda devices: 10_000_000)
    assert cli.main(["bench", "context"]) == CapacityError.exit_code
    assert "nothing was made" in capsys.readouterr().err


def test_the_models_have_true_heads(real):
    """What is smaller says nothing about contexts."""
    cfg = bench.make_config(bench.WIDE, 4)
    differing = {
        field.name for field in dataclasses.fields(cfg) if getattr(cfg, field.name) != getattr(real, field.name)
    }
    assert differing == {*bench.WIDE, "num_hidden_layers", "first_k_dense_replace"}
    assert bench.make_config(bench.WIDE, 1).first_k_dense_replace == 0
