"""Every array's name tells its axes, in every function of the model."""

import dataclasses
import functools
import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.load import place_on_host
from dsv32_jax.evaluation import layer_errors
from dsv32_jax.generation import batch as batches, prefill_decode, score, speculative
from dsv32_jax.generation.sampler import make_params
from dsv32_jax.inspect import observations
from dsv32_jax.inspect.trace_format import KINDS
from dsv32_jax.kernels import VARIABLE, cpu, dispatch, host_experts
from dsv32_jax.layout import leaves
from dsv32_jax.model import cache, experts, indexer, model, validation
from tests import models
from tests.shapes import suffix, suffixed_functions, watched

MODULES = (
    *("quantization.cache_formats", "kernels.reference", "kernels.dispatch", "kernels.cpu", "kernels.host_experts"),
    *("model.ops", "model.cache", "model.mla", "model.indexer", "model.attention", "model.experts", "model.moe"),
    *("model.block", "model.mtp", "model.model", "model.validation"),
    *("generation.sampler", "generation.prefill_decode", "generation.speculative"),
    *("generation.request", "generation.constraint", "generation.batch", "generation.score"),
    *("inspect.observations", "inspect.interventions", "inspect.edited_modules", "inspect.contrasts"),
    *("evaluation.divergence", "evaluation.layer_errors"),
)

LOWERCASE = {
    "a": ("assignments of tokens to experts", lambda size: size["t"] * size["X"]),
    "b": ("rows of a block", None),
    "c": ("rows of a chunk of prompts", None),
    "d": ("pages of a row", None),
    "e": ("experts of a group", lambda size: size["E"] // size["G"]),
    "g": ("groups of index heads that are scored one after the other", lambda size: size["I"] // size["i"]),
    "i": ("index heads of such a group", None),
    "k": ("selected positions", lambda size: min(size["K"], size["S"])),
    "m": ("slots for the new tokens of a row", None),
    "n": ("blocks of rows, each of which is multiplied by one matrix of a bank", None),
    "o": ("outputs of a matrix, its other axes as one", None),
    "p": ("parts of a sum that is split", None),
    "q": ("slots of a page", None),
    "r": ("pairs that are rotated", lambda size: size["R"] // 2),
    "s": ("some of the S positions", None),
    "t": ("tokens of all rows, one after the other", lambda size: size["B"] * size["T"]),
    "u": ("tokens of a decode step: the last one and its drafts", None),
    "v": ("the part of V that a device has", None),
    "w": ("most likely tokens that are reported", None),
    "y": ("pages of the cache", None),
    "z": ("inputs of a matrix, its contracted axes as one", None),
}
"""Letters for sizes that are not the config's: one meaning each for the whole library, and the size where it follows
from others."""

RULES = {letter: rule for letter, (_, rule) in LOWERCASE.items()}

UNWATCHED = {"kernels.triton_products", "kernels.gpu_products", "kernels.triton_attention", "kernels.gpu_attention"}
"""Modules that only run with a GPU. Those of bench, which run at true sizes, and of serve, which has no arrays, are
not watched either."""


@pytest.fixture(scope="module")
def watching(tiny, tmp_path_factory):
    """What the check saw while every public function was traced, nothing being compiled but the host's own code."""
    with watched(tiny.dims, RULES) as shapes:
        _trace(tiny)
        _run(tiny, tmp_path_factory.mktemp("names"))
    return shapes


def _trace(cfg) -> None:
    """Trace forward, generate and the MTP layer, in shapes of their own: what was traced before is not traced again."""
    weights = models.abstract(cfg)
    long, short = 3 * cfg.index_topk + 1, cfg.index_topk - 3
    for batch, count, capacity in [(11, long, long + 2), (11, short, short), (11, 1, short + 1), (11, 2, long)]:
        tokens_BT = jax.ShapeDtypeStruct((batch, count), jnp.int32)
        empty = jax.eval_shape(lambda batch=batch, capacity=capacity: cache.empty(cfg, batch, capacity, jnp.float32))
        jax.eval_shape(_forward, weights, tokens_BT, empty, jax.ShapeDtypeStruct((batch,), jnp.int32))
        h_BTD = jax.ShapeDtypeStruct((batch, count, cfg.hidden_size), jnp.float32)
        jax.eval_shape(_draft, weights, h_BTD, tokens_BT, empty.layers[0], tokens_BT)
        layer = weights.layers[-1]
        jax.eval_shape(layer_errors.compare_blocks, layer, layer, h_BTD, empty.layers[0], tokens_BT)
        jax.eval_shape(layer_errors.mtp_block_input, weights.mtp, h_BTD, tokens_BT, empty.layers[0], tokens_BT)
    changes = {"experts_off": [(1, 0)], "add": {0: np.ones(cfg.hidden_size)}, "heads_off": [(0, 1)], "skip": [2]}
    edited = ds.inspect.edit(models.random_model(cfg), window=2, **changes)
    empty = cache.empty(cfg, 11, long, jnp.float32)
    jax.eval_shape(_forward, edited, np.zeros((11, long), np.int32), empty, np.zeros(11, np.int32))
    moe = weights.layers[-1].ffn
    on_mesh = dataclasses.replace(moe, mesh=ds.mesh("expert=1,model=1"))
    jax.eval_shape(lambda moe, h_BTD: moe(h_BTD), on_mesh, jax.ShapeDtypeStruct((11, 23, cfg.hidden_size), jnp.float32))
    _trace_kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "xla")
        for count in (short - 1, 1):
            empty = jax.eval_shape(lambda: cache.empty(cfg, 11, short - 1, jnp.float32))
            tokens_BT = jax.ShapeDtypeStruct((11, count), jnp.int32)
            jax.eval_shape(_forward, weights, tokens_BT, empty, jax.ShapeDtypeStruct((11,), jnp.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "KEYS", 8)
        patch.setattr(cpu, "MAX_INDEX_MATCHES", 0)
        _trace_generation(cfg, weights)


def _trace_kernels() -> None:
    """Each form of product, with kernels and without, also where they were not compiled."""
    x_nbz, expert_n = jax.ShapeDtypeStruct((11, 23, 5), jnp.float32), jax.ShapeDtypeStruct((11,), jnp.int32)
    jax.eval_shape(dispatch.multiply_blocks, x_nbz, expert_n, jax.ShapeDtypeStruct((9, 7, 5), jnp.float32))
    jax.eval_shape(dispatch.multiply_columns, x_nbz, jax.ShapeDtypeStruct((11, 5, 7), jnp.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "find_kernels", lambda w, rows, dtype=None: {"cpu": cpu.multiply_blocks})
        for spec, left, right in (
            ("BTD,QD->BTQ", (2, 3, 96), (64, 96)),
            ("BTHC,HPC->BTHP", (2, 3, 5, 48), (5, 16, 48)),
            ("BTHN,HNC->BTHC", (2, 3, 5, 24), (5, 24, 48)),
        ):
            operands = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (left, right))
            jax.eval_shape(functools.partial(dispatch.einsum, spec), *operands)


def _trace_generation(cfg, weights) -> None:
    """Prefill, scoring, and decoding with and without drafts."""
    samplings = [ds.Sampling(temperature=1.0, allowed_ids=[5, 6])] * 11
    params = make_params(samplings, cfg.vocab_size, cfg.vocab_size, cfg.eos_token_id, 2, [9] * 11)
    tokens_BT, row_B = jax.ShapeDtypeStruct((11, 19), jnp.int32), jax.ShapeDtypeStruct((11,), jnp.int32)
    tokens_cT, row_c = jax.ShapeDtypeStruct((4, 19), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    for draft, dtype, step in ((0, jnp.float8_e4m3fn, prefill_decode.step), (3, jnp.float32, speculative.step)):
        empty = functools.partial(prefill_decode.empty_caches, cfg, 11, 37, np.dtype(dtype), draft)
        caches = jax.eval_shape(empty)
        paged = jax.eval_shape(lambda cache: cache_with_pages(cache), caches[0]), caches[1]
        state = jax.eval_shape(lambda caches, u=draft: prefill_decode.new_state(weights, caches, u), paged)
        state = jax.eval_shape(prefill_decode.prefill, weights, state, tokens_cT, tokens_cT, row_c, row_c)
        jax.eval_shape(functools.partial(batches.copy_pages, None), paged, row_B, row_B)
        new = make_params(samplings[:4], cfg.vocab_size, cfg.vocab_size, cfg.eos_token_id, 2, [9] * 4)
        seat = functools.partial(batches.seat_rows, None)
        jax.eval_shape(seat, state, params, row_c, {"new_B": row_c}, new)
        decode = functools.partial(prefill_decode.decode, step, slots=9, width=4)
        jax.eval_shape(decode, weights, params, state, 5, 0)
        observe = functools.partial(observations.observe, observations.Keep(tuple(KINDS), (0,)))
        jax.eval_shape(observe, weights, caches[0], tokens_BT, tokens_BT, row_B)
        jax.eval_shape(functools.partial(score.score_chunk, width=4), weights, caches[0], tokens_BT, tokens_BT, row_B)


def cache_with_pages(contiguous):
    """Eleven pages for as many rows, three pages a row."""
    table_Bd = jnp.zeros((len(contiguous.length_B), 3), jnp.int32)
    return dataclasses.replace(contiguous, table_Bd=table_Bd)


def _forward(weights, tokens_BT, filled, count_B):
    arguments = {"cache": filled, "count_B": count_B}
    return [model.forward(weights, tokens_BT, seen=seen, **arguments) for seen in (False, True)]


def _draft(weights, h_BTD, next_BT, layer_cache, position_BT):
    h_BTD, layer_cache = weights.mtp(h_BTD, next_BT, layer_cache, position_BT)
    return weights.mtp.logits(h_BTD), layer_cache, weights.mtp.observe(h_BTD, next_BT, layer_cache, position_BT)


def _run(cfg, folder) -> None:
    """What works on numbers rather than on shapes."""
    assert validation.check_capacity(5, np.array([3, 2]), 9) == 5
    validation.check_room(cache.empty(cfg, 2, 5, jnp.float32), validation.check_counts(np.array([3, 2]), 2, 3))
    one_row = dataclasses.replace(cfg, num_hidden_layers=1, num_nextn_predict_layers=0)
    session = ds.session(models.random_model(one_row), capacity=32)
    session.generate([5, 6, 7], max_new_tokens=2)
    session.generate([5, 6, 9], max_new_tokens=2)
    session.save(folder / "session")
    assert ds.load_session(session.model, folder / "session").tokens == session.tokens
    constraint = SimpleNamespace(allowed=lambda: np.ones(cfg.vocab_size, bool), add=lambda token: None)
    ds.generate(session.model, [[5, 6, 7]], max_new_tokens=2, constraint=lambda: constraint)
    drafting = models.random_model(dataclasses.replace(cfg, num_hidden_layers=1))
    ds.generate(drafting, [[5, 6, 7]], max_new_tokens=3, draft=1, constraint=lambda: constraint)
    ds.generate(session.model, [[5, 6, 7]], max_new_tokens=2, layerwise=True)
    ds.score(session.model, [[5, 6, 7]])
    ds.inspect.trace(session.model, [[5, 6, 7], list(range(5, 36))], {"mass"})
    ds.inspect.patch(session.model, [5, 6, 7], [5, 8, 7], 9)
    ds.inspect.contrast(session.model, [[5, 6, 7], [5, 6]], [[8, 7], [5, 8, 7]])
    ds.evaluation.kl(session.model, session.model, [[5, 6, 7]])
    random_checkpoint.write(folder / "hf", one_row, "bf16")
    convert(folder / "hf", folder / "converted")
    assert len(list(ds.evaluation.layers(folder / "converted", folder / "converted", [[5, 6, 7]]))) == 3
    if cpu.find_obstacle():
        return
    banks = [leaf for leaf in leaves(cfg) if leaf.stacked][:3]
    routed = [place_on_host(np.zeros(leaf.shape, np.float32), leaf, None) for leaf in banks]
    chosen = 2, cfg.num_experts_per_tok
    tokens = jnp.zeros((2, cfg.hidden_size)), jnp.zeros(chosen, jnp.int32), jnp.ones(chosen)
    for fetch in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_experts, "pays_to_fetch", lambda tokens, fetch=fetch: fetch)
            experts.apply_host_experts(*tokens, *routed)


def test_names_tell_the_truth(watching):
    """Every local, argument and field with axes in its name has those axes."""
    assert not watching.wrong, "\n".join(watching.wrong)


@pytest.mark.parametrize("name", MODULES)
def test_every_function_was_watched(watching, name):
    """No function with suffixed names was left out of the check."""
    visited = {where for where, _ in watching.seen}
    functions = suffixed_functions(importlib.import_module(f"dsv32_jax.{name}"))
    assert functions, f"{name} has no suffixed names: take it off the list"
    assert sorted(set(functions) - visited) == []


@pytest.mark.parametrize("name", MODULES)
def test_every_letter_has_one_meaning(tiny, name):
    """Capitals are sizes of the config, or B, T and S; lowercase letters are in the table."""
    known = {*tiny.dims, *LOWERCASE, *"BTS1"}
    functions = suffixed_functions(importlib.import_module(f"dsv32_jax.{name}"))
    assert not {f"{function}: {axes}" for function, used in functions.items() for axes in used if set(axes) - known}


def test_other_modules_have_no_suffixed_names():
    """A module with suffixed names is on the list above."""
    folder = Path(ds.__file__).parent
    names = {".".join(file.relative_to(folder).with_suffix("").parts) for file in folder.rglob("*.py")}
    others = {name for name in names if not name.endswith(("__init__", "__main__"))} - set(MODULES) - UNWATCHED
    others = {name for name in others if not name.startswith(("bench.", "serve."))}
    named = {name for name in others if suffixed_functions(importlib.import_module(f"dsv32_jax.{name}"))}
    assert named == set()


@pytest.mark.parametrize(
    "code",
    [
        "def misnamed(x_BTD):\n    y_BTQ = x_BTD\n    return y_BTQ",
        "def misnamed(x_BTD):\n    y_BT = x_BTD\n    return y_BT",
        "def misnamed(x_BTD):\n    y_TBD = x_BTD\n    return y_TBD",
        "def misnamed(x_BTD):\n    y_B1D = x_BTD\n    return y_B1D",
        "def misnamed(x_BTD):\n    y_nnD = x_BTD\n    return y_nnD",
        "def misnamed(x_BTD):\n    y_BTY = x_BTD\n    return y_BTY",
        "def misnamed(x_BTD):\n    y_BTh = x_BTD\n    return y_BTh",
        "def misnamed(x_BTD):\n    y_BTr = x_BTD\n    return y_BTr",
        "def misnamed(x_BTD):\n    y_tD = x_BTD[0]\n    return y_tD",
        "def misnamed(x_BTD):\n    y_BTk, z_BSk = x_BTD, x_BTD\n    return y_BTk, z_BSk",
        "def misnamed(x_BTD):\n    return LayerCache(x_BTD, x_BTD, x_BTD).write(POSITION, x_BTD, x_BTD, x_BTD)",
    ],
)
def test_a_misnamed_array_is_caught(tiny, code):
    """The check can fail: wrong size, rank, order, size-one axis, repeated letter, unknown letters,
    sizes that follow from others, field."""
    place = {"__name__": "dsv32_jax.made_up", "LayerCache": cache.LayerCache, "POSITION": jnp.zeros((2, 3), jnp.int32)}
    exec(code, place)
    with watched(tiny.dims, RULES) as shapes:
        jax.eval_shape(place["misnamed"], jax.ShapeDtypeStruct((2, 3, tiny.hidden_size), jnp.float32))
    assert any("dsv32_jax.made_up.misnamed" in line or "dsv32_jax.model.cache" in line for line in shapes.wrong)


def test_suffix():
    """Which names carry axes."""
    assert [
        suffix(name) for name in ("w_uq_HNQ", "cos_BTr", "slot_B11", "order_a", "x_nbz", "w_gate", "layer_cache", "x")
    ] == [
        "HNQ",
        "BTr",
        "B11",
        "a",
        "nbz",
        None,
        None,
        None,
    ]


def test_every_size_differs(tiny):
    """The check sees two sizes mixed up only where they differ."""
    sizes = {letter: size for letter, size in tiny.dims.items() if letter not in "AL"}
    assert len(set(sizes.values())) == len(sizes), sizes
    assert not {2, 3} & set(sizes.values()) - {tiny.num_experts_per_tok}
