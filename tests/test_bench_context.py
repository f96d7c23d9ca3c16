"""`dsv32 bench context` at tiny sizes: its parts are the model's own, its rows complete, whatever they time."""

import dataclasses
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import cli
from dsv32_jax.bench import context as bench
from dsv32_jax.bench import measure, parts, reading
from dsv32_jax.generation.batch import WHOLE
from dsv32_jax.model.attention import attention
from dsv32_jax.model.cache import Cache, dtype_of
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
    """The benches take `model` instead of making one."""
    for file in (parts, reading):
        monkeypatch.setattr(file, "random_model", lambda cfg: model)


@pytest.mark.parametrize("stored, more", [("float32", 0), ("fp8", 21)], ids=["whole", "sparse"])
def test_the_parts_are_the_models_own(single, model, stored, more):
    """What scoring, top-k and attention make one after the other is what `attention` makes of the same cache."""
    (layer,), cache = model.layers, parts.filled(single, single.index_topk + more, dtype_of(stored, jnp.float32))
    hidden = jax.random.normal(jax.random.key(0), (1, 1, single.hidden_size))
    position = cache.length_B[:, None]
    out, written, (scores, selected) = jax.jit(attention)(layer.mla, layer.indexer, hidden, cache.layers[0], position)
    cache = Cache((written,), cache.length_B)
    asked = parts.queries(model, hidden, position)
    if more:
        (found,) = parts.scoring(asked, cache)
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5 * np.abs(scores).max())
        (positions,) = parts.topk([found], single.index_topk)
        np.testing.assert_array_equal(positions, selected)
        (attended,) = parts.sparse_attention(model, asked, cache, [positions])
        (masked,) = parts.masked_attention(model, asked, cache, [positions])
        np.testing.assert_allclose(masked, attended, atol=1e-5 * np.abs(attended).max())
    else:
        (attended,) = parts.whole_attention(model, asked, cache)
    np.testing.assert_allclose(layer.mla.output(attended), out, atol=1e-5 * np.abs(out).max())


def test_a_filled_cache_has_no_empty_slot(single):
    """Different in every slot, component and layer, of standard deviation 1; the last slot is for the new token."""
    cfg = dataclasses.replace(single, num_hidden_layers=2)
    cache = parts.filled(cfg, 64, dtype_of("bfloat16", jnp.bfloat16))
    assert cache.length_B.tolist() == [63] and cache.capacity == 64 and len(cache.layers) == 2
    values = [layer.latents(jnp.float32)[0] for layer in cache.layers]
    values += [layer.index_keys(0, 64, jnp.float32) for layer in cache.layers]
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

    monkeypatch.setattr(parts, "Step", Slow)
    return list(parts.rows(single, (single.index_topk, 48), ("fp8",), seconds=0.01))


def test_decode_rows(rows, tiny):
    """A row a cache and context; what is left of the whole is the rest; a short context is not searched."""
    assert [(row["cache"], row["context"]) for row in rows] == [("fp8", tiny.index_topk), ("fp8", 48)]
    short, long = rows
    assert all(short[name] is None for name in ("scoring", "topk", "dense")) and short["attention"] > 0
    assert all(long[name] > 0 for name in (*parts.PARTS, "dense", "whole"))
    for row in rows:
        assert row["whole"] > 0.05
        spent = sum(row[name] or 0 for name in parts.PARTS)
        assert math.isclose(row["rest"] + spent, row["whole"], rel_tol=1e-9)


def test_a_step_stays_in_the_last_slot(single, model):
    """Each run processes one token at the same place, the cache having been handed over."""
    cache = parts.filled(single, 32, dtype_of("bfloat16", jnp.bfloat16))
    before = np.asarray(cache.layers[0].index_keys(0, 32, jnp.float32))
    state = parts.Step(model, cache)
    for _ in range(3):
        state.run()
    assert state.held.cache.length_B.tolist() == [32] and state.held.step_B.tolist() == [3]
    after = np.asarray(state.held.cache.layers[0].index_keys(0, 32, jnp.float32))
    assert (before != after).any(axis=-1).tolist() == [[False] * 31 + [True]]


def test_growth_stands_after_each_cache():
    """Exponents from the first context beyond top-k to the last; a part that cost nothing has none."""

    def row(cache, context, whole):
        return {"cache": cache, "context": context, **dict.fromkeys(bench.TIMES, 1.0), "rest": -1.0, "whole": whole}

    given = [row(cache, n, n / 3) for cache in ("bfloat16", "fp8") for n in (20, 40, 80, 640)]
    found = list(bench.with_growth(given, 20))
    assert [row["context"] for row in found] == [20, 40, 80, 640, "growth"] * 2
    growth = found[4]
    assert growth["cache"] == "bfloat16" and math.isclose(growth["whole"], 1) and growth["topk"] == 0
    assert math.isnan(growth["rest"])
    assert bench.power(2, 8, 5, 80) == 2 and bench.power(1, 4, 8, 4) == -0.5


def test_memory_rows(single, monkeypatch):
    """Half a chunk, a chunk, and a chunk with four times the capacity; nothing is run."""

    def read(model, context, tokens, after, count):
        square = tokens.astype(jnp.float32).T @ after.astype(jnp.float32)
        return context, jnp.tanh(square) @ jnp.tanh(square @ square)

    monkeypatch.setattr(reading, "WHOLE", WHOLE._replace(read=jax.jit(read)))
    found = list(reading.memory_rows(single, 64, 16))
    assert [(row["capacity"], row["chunk"]) for row in found] == [(64, 8), (64, 16), (256, 16)]
    assert [row["cache_bytes"] for row in found] == [slots * 2 * (48 + 8 + 32) + 4 for slots in (64, 64, 256)]
    assert all(row["temporary_bytes"] > 0 for row in found)


def test_time_rows(single, ready):
    """A quarter, half and all of the prompt, each including the one before."""
    found = list(reading.time_rows(single, 64, 16))
    assert [row["tokens"] for row in found] == [16, 32, 64]
    seconds = [row["seconds"] for row in found]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_batch_rows(single, ready, monkeypatch):
    """All prompts in one batch, then each alone, with one capacity, twice: nothing is compiled the second time."""
    ran = []

    def generate(model, rows, **options):
        ran.append((len(rows), options["capacity"], options["min_new_tokens"]))
        return SimpleNamespace(stats=SimpleNamespace(new_tokens=len(rows) * options["max_new_tokens"]))

    monkeypatch.setattr(reading, "generate", generate)
    prompts = reading.ragged(3, 2, 8, single.vocab_size)
    assert [len(prompt) for prompt in prompts] == [2, 5, 8]
    found = list(reading.batch_rows(single, prompts, 4))
    assert [(row["how"], row["tokens"]) for row in found] == [("3 rows together", 12), ("3 rows one by one", 12)]
    assert ran == [(3, 12, 4)] * 2 + [(1, 12, 4)] * 6


def test_the_table_fits():
    """All lines end in the same column."""
    row = {"cache": "bfloat16", "form": "ms", "scoring": None, **dict.fromkeys(bench.TIMES[1:], 12.3456)}
    given = [{**row, "context": 2048}, *({**row, "scoring": 1.0, "context": size} for size in (8192, 131072))]
    shown = bench.with_growth(given, 2048)
    heading, *lines = measure.table(bench.DECODE_COLUMNS, shown)
    assert {len(line) for line in lines} == {len(heading)} and "top-k" in heading and "S^" in lines[-1]


def test_the_command_runs_the_sections_that_are_asked_for(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(bench, "decode", lambda: ran.append("decode"))
    monkeypatch.setattr(bench, "prefill", lambda tokens, layers: ran.append((tokens, layers)))
    monkeypatch.setattr(bench, "batch", lambda: ran.append("batch"))
    assert cli.main(["bench", "context"]) == 0
    assert cli.main(["bench", "context", "--section", "prefill", "--prefill", "32768", "--layers", "4"]) == 0
    assert ran == ["decode", (8192, 1), "batch", (32768, 4)]
    for wrong in (["--prefill", "1000"], ["--prefill", "0"], ["--layers", "0"]):
        assert cli.main(["bench", "context", *wrong]) == 2
        assert "--prefill must be a multiple of 2048" in capsys.readouterr().err
    assert len(ran) == 4


def test_the_models_have_true_heads(real):
    """What is smaller says nothing about contexts."""
    cfg = bench.config(bench.WIDE, 4)
    differing = {
        field.name for field in dataclasses.fields(cfg) if getattr(cfg, field.name) != getattr(real, field.name)
    }
    assert differing == {*bench.WIDE, "num_hidden_layers", "first_k_dense_replace"}
    assert bench.config(bench.SMALL, 1).first_k_dense_replace == 0
