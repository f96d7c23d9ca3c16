"""An edited model shares its weights, does what the edit says and nothing else, and works everywhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import dsv32_jax as ds
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.errors import UsageError
from dsv32_jax.generation.session_file import identity
from dsv32_jax.inspect import edit
from dsv32_jax.kernels import cpu
from dsv32_jax.model import model as model_module
from dsv32_jax.system.compilation import count_compilations
from tests import edit_cost, models

TOKENS = [[0, *range(5, 45)]]
"""Twice as long as index_topk."""


@pytest.fixture(scope="module")
def model(tiny):
    """A dense layer, an MoE layer and an MTP head, bound to a device as `load` does."""
    return jax.device_put(models.random_model(dataclasses.replace(tiny, num_hidden_layers=2)), jax.devices()[0])


@pytest.fixture(scope="module")
def direction(tiny):
    """A direction of the residual stream."""
    return np.random.default_rng(0).normal(size=tiny.hidden_size).astype(np.float32)


def observe(model) -> Any:
    """What the layers saw."""
    return ds.forward(model, TOKENS, seen=True).seen


def hidden(model) -> np.ndarray:
    """The hidden vectors after the final norm."""
    return np.asarray(ds.forward(model, TOKENS).hidden)


EDITS: dict[str, dict[str, Any]] = {
    "bias": {"experts_off": [(1, 3)], "favour": {(1, 5): 0.5}},
    "direction": {"add": {0: np.ones(96, np.float32)}, "start": 7},
    "heads": {"heads_off": [(0, 1), (1, 4)]},
    "skip": {"skip": [1]},
    "window": {"window": 4, "positions": [0, 2]},
    "topk": {"index_topk": 5},
}


def lowered(model) -> str:
    """The program of a forward pass."""
    cache = model_module.empty(model.cfg, 1, 41, model.dtype)
    return model_module._forward.lower(model, jnp.asarray(TOKENS), cache, np.full(1, 41, np.int32)).as_text()


def test_editing_nothing_changes_nothing(model):
    """The model itself comes back, and edits of biases run its very program."""
    assert edit(model) is model and edit(model, index_topk=model.cfg.index_topk) is model
    assert lowered(edit(model, **EDITS["bias"])) == lowered(model)


@pytest.mark.parametrize("name", EDITS)
def test_all_other_weights_are_shared(model, name):
    """The arrays are the same objects but those of the edit; the identity differs, and so do the results."""
    edited = edit(model, **EDITS[name])
    own = {id(array) for array in jax.tree.leaves(model)}
    new = [array for array in jax.tree.leaves(edited) if id(array) not in own]
    assert sum(array.nbytes for array in new) < 10_000
    assert identity(edited) != identity(model)
    assert repr(edited).startswith("DeepSeek-V3.2, edited\n") and repr(model).startswith("DeepSeek-V3.2\n")
    assert "<div>DeepSeek-V3.2, edited</div>" in edited._repr_html_()
    assert not np.array_equal(hidden(edited), hidden(model))


def test_every_edit_has_an_identity(model, direction):
    """Edits that differ in one value differ; equal ones are equal."""
    made = [edit(model, **EDITS[name]) for name in EDITS]
    made += [edit(model, add={0: direction}), edit(model, add={0: direction}, scale=2), edit(model, add={1: direction})]
    made += [edit(model, add={0: -direction})]
    made += [edit(made[0], **EDITS["heads"]), edit(model, window=5), edit(model, window=5, layers=[0])]
    assert len({identity(one) for one in made}) == len(made)
    assert identity(edit(model, window=5)) == identity(made[-2])


def test_an_expert_that_is_off_is_never_selected(model, tiny):
    """However much it is favoured. The gates of the others sum to the scaling factor, each in proportion to its
    affinity."""
    before = ds.inspect.trace(model, TOKENS, {"routing"})
    used = int(np.bincount(before["expert"].ravel()).argmax())
    edited = edit(edit(model, favour={(1, used): 4.0}), experts_off=[(1, used)])
    after = ds.inspect.trace(edited, TOKENS, {"routing"})
    assert used in before["expert"] and used not in after["expert"]
    np.testing.assert_allclose(after["gate"].sum(axis=-1), tiny.routed_scaling_factor, rtol=1e-5)
    seen = observe(edited)[1]
    affinity = jax.nn.sigmoid(np.asarray(_router_logits(edited.layers[1], seen)))
    chosen = np.take_along_axis(np.asarray(affinity), np.asarray(seen.routing.expert_BTX), axis=-1)
    want = chosen / chosen.sum(axis=-1, keepdims=True) * tiny.routed_scaling_factor
    np.testing.assert_allclose(seen.routing.gate_BTX, want, rtol=1e-4)


def _router_logits(layer, seen):
    eps = layer.cfg.rms_norm_eps
    h_BTD = model_module.rms_norm(seen.x_BTD + seen.attention_BTD, layer.ffn_norm_D, eps)
    return h_BTD @ layer.ffn.router_ED.T


def test_a_favoured_expert_is_selected(model):
    """A bias above all affinities selects it for every token."""
    favoured = ds.inspect.trace(edit(model, favour={(1, 5): 4.0}), TOKENS, {"routing"})
    assert (favoured["expert"] == 5).any(axis=-1).all()


def test_a_direction_is_added(model, direction):
    """A zero direction is no change; another one is added after its layer from a position on, `scale` times."""
    np.testing.assert_array_equal(hidden(edit(model, add={0: 0 * direction})), hidden(model))
    edited = edit(model, add={0: direction}, scale=3, start=7)
    x, y = (np.asarray(observe(one)[1].x_BTD) for one in (model, edited))
    np.testing.assert_array_equal(y[:, :7], x[:, :7])
    np.testing.assert_allclose(y[:, 7:], x[:, 7:] + 3 * direction, rtol=1e-6, atol=1e-6)
    twice = edit(edit(model, add={0: direction}), add={0: -direction})
    np.testing.assert_allclose(hidden(twice), hidden(model), atol=1e-5)


def test_a_skipped_layer_is_absent(model):
    """The model without the layer, exactly."""
    shorter = dataclasses.replace(
        model, cfg=dataclasses.replace(model.cfg, num_hidden_layers=1), layers=model.layers[:1]
    )
    np.testing.assert_array_equal(hidden(edit(model, skip=[1])), hidden(shorter))


def test_a_direction_is_added_after_a_skipped_layer(model, direction):
    """Whichever of the two edits is made first, and in one call."""
    both = {"skip": [0], "add": {0: direction}}
    once = edit(model, **both)
    for edited in (once, edit(edit(model, skip=[0]), add={0: direction}), edit(edit(once, skip=[0]), skip=[0])):
        first, second = observe(edited)
        np.testing.assert_array_equal(second.x_BTD, first.x_BTD + direction)


def test_silent_heads_are_zero_columns(model):
    """As if their columns of W^O were zero."""
    mla = model.layers[0].mla
    w_o_DHP = mla.w_o_DHP.at[:, jnp.array([1, 3])].set(0)
    layer = dataclasses.replace(model.layers[0], mla=dataclasses.replace(mla, w_o_DHP=w_o_DHP))
    want = hidden(dataclasses.replace(model, layers=(layer, *model.layers[1:])))
    np.testing.assert_allclose(hidden(edit(edit(model, heads_off=[(0, 1)]), heads_off=[(0, 3)])), want, atol=1e-6)


@pytest.mark.parametrize("capacity", [41, 16], ids=["sparse", "dense"])
def test_a_restricted_indexer_selects_within_its_window(model, capacity):
    """Positions of the window and those given, whether the cache is longer than index_topk or not."""
    tokens = [TOKENS[0][:capacity]]
    found = ds.inspect.trace(edit(model, window=4, positions=[0, 2], layers=[1]), tokens, {"indexer", "attention"})
    for t in range(capacity):
        selected = set(found["selected"][1, 0, t].tolist()) - {-1}
        assert selected == {s for s in range(t + 1) if s > t - 4 or s in (0, 2)}
    np.testing.assert_allclose(np.nansum(found["weight"], axis=-1), 1, rtol=1e-5)
    untouched = ds.inspect.trace(model, tokens, {"indexer"})
    np.testing.assert_array_equal(found["selected"][0], untouched["selected"][0])
    wide = hidden(edit(model, window=model.cfg.max_position_embeddings))
    np.testing.assert_array_equal(wide, hidden(model))


def test_dense_by_edit(model):
    """index_topk beyond the cache attends to everything, as a model with that config does."""
    dense = edit(model, index_topk=model.cfg.max_position_embeddings)
    want = models.random_model(dataclasses.replace(model.cfg, index_topk=41))
    np.testing.assert_array_equal(hidden(dense), hidden(want))
    assert dense.mtp is not None
    assert dense.mtp.block.mla.cfg.index_topk == dense.layers[0].indexer.cfg.index_topk == dense.cfg.index_topk


def test_another_value_compiles_nothing(model, direction):
    """One program for each kind of edit."""
    others: dict[str, dict[str, Any]] = {
        "direction": {"add": {0: direction}, "start": 3},
        "heads": {"heads_off": [(0, 2), (1, 0)]},
        "window": {"window": 9},
        "bias": {"experts_off": [(1, 7)]},
    }
    for name, other in others.items():
        hidden(edit(model, **EDITS[name]))
        edited = edit(model, **other)
        with count_compilations() as compiled:
            hidden(edited)
        assert compiled.count == 0, name


def test_an_edit_costs_at_most_a_hundredth_of_a_step():
    """At true dimensions: experts off run the very program, a direction after every layer adds little to it."""
    model = edit_cost.shape_model(edit_cost.true_dimensions(1, 1))
    edits = edit_cost.make_edits(model)
    plain, off, direction = (edit_cost.make_step(one).program for one in (model, *edits.values()))
    assert list(edits) == ["experts off", "direction"] and off.as_text() == plain.as_text()
    before, after = edit_cost.count(plain), edit_cost.count(direction)
    for name in edit_cost.COUNTED:
        assert before[name] < after[name] <= 1.01 * before[name], name


def test_ratios_of_one_round():
    """The script that measures them: times of the same round are compared, so that a machine that slows cancels."""
    steps = {"once": lambda: sum(range(100_000)), "twice": lambda: sum(range(200_000))}
    times = edit_cost.measure(steps, 0.0)
    assert all(found.shape == (3, 2) and (found > 0).all() for found in times.values())
    slow = np.linspace(1, 9, 200) + np.random.default_rng(0).normal(0, 0.01, 200)
    found = edit_cost.estimate_ratio(1.01 * slow, np.linspace(1, 9, 200))
    assert found.low < found.median < found.high and found.high - found.low < 0.01
    assert 1.005 < found.low and found.high < 1.015


def test_edits_work_with_drafts_and_layerwise(model):
    """All kinds at once, those of layers together on one layer: the same tokens in every way of generating."""
    edited = edit(model, **EDITS["window"])
    for name in ("bias", "direction", "heads", "topk"):
        edited = edit(edited, **EDITS[name])
    plain, drafted = (ds.generate(edited, TOKENS, max_new_tokens=4, draft=draft) for draft in (0, 1))
    layerwise = ds.generate(edited, TOKENS, max_new_tokens=4, layerwise=True)
    assert plain.tokens == drafted.tokens == layerwise.tokens
    assert [event.token for event in ds.stream(edited, TOKENS[0], max_new_tokens=4)] == plain.tokens[0]
    scored = ds.score(edited, [TOKENS[0] + plain.tokens[0]]).logprobs[0]
    np.testing.assert_allclose(scored[-4:], plain.logprobs[0], atol=1e-4)


def test_edits_work_on_a_mesh_and_from_host_memory(tiny, tmp_path):
    """The same tokens, norms, contrasts and patches as on one device."""
    random_checkpoint.write(tmp_path / "hf", dataclasses.replace(tiny, num_hidden_layers=2), "fp8")
    convert.convert(tmp_path / "hf", tmp_path / "same")
    placements = [{}, {"mesh": ds.mesh("expert=2")}]
    if not cpu.find_obstacle():
        placements.append({"experts": "host"})
    found = []
    for placement in placements:
        edited = ds.load(tmp_path / "same", dtype=jnp.float32, **placement)
        for name in ("bias", "direction", "heads", "window"):
            edited = edit(edited, **EDITS[name])
        norms = ds.inspect.trace(edited, TOKENS, {"experts"})["norm"]
        use = ds.inspect.contrast(edited, 2 * TOKENS, [[5, 6, 7], [8, 9]]).experts["count_a"]
        patched = ds.inspect.patch(edited, [5, 6, 7], [5, 8, 7], 9).patched
        found.append((ds.generate(edited, TOKENS, max_new_tokens=4).tokens, norms, use, patched))
    for other in found[1:]:
        assert other[0] == found[0][0]
        for got, want in zip(other[1:], found[0][1:], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_pages_of_one_edit_are_never_used_for_another(model):
    """Engines side by side, the same prompt in each: every model's own tokens, from its own pages."""
    several = [model, edit(model, **EDITS["direction"]), edit(model, **EDITS["bias"])]
    want = [ds.generate(one, TOKENS, max_new_tokens=3).tokens[0] for one in several]
    assert len(set(map(tuple, want))) > 1
    engines = [ds.engine(one, rows=1, capacity=64) for one in several]
    for _ in range(2):
        streams = [one.submit(TOKENS[0], max_new_tokens=3) for one in engines]
        assert [[each.token for each in stream] for stream in streams] == want


def test_a_session_belongs_to_its_edit(model, tmp_path):
    """A saved session is continued by the same edit and refused to any other."""
    edited = edit(model, **EDITS["direction"])
    session = ds.session(edited)
    answer = session.generate(TOKENS[0], max_new_tokens=3)
    assert answer.tokens == ds.generate(edited, TOKENS, max_new_tokens=3).tokens
    session.save(tmp_path / "session")
    assert ds.load_session(edit(model, **EDITS["direction"]), tmp_path / "session").tokens == session.tokens
    for other in (model, edit(model, **EDITS["bias"])):
        with pytest.raises(UsageError, match="another model"):
            ds.load_session(other, tmp_path / "session")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts_off": [(0, 3)]}, "dense"),
        ({"experts_off": [(1, 99), (7, 0)]}, r"\(1, 99\).*\(7, 0\)"),
        ({"experts_off": [(1, 0), (1, 2), (1, 4)]}, "too few experts"),
        ({"experts_off": (3, 5)}, r"takes pairs, such as \[\(3, 5\)\], not \(3, 5\)"),
        ({"experts_off": {3: [5]}}, "takes pairs"),
        ({"heads_off": ["ab"]}, "takes pairs"),
        ({"favour": [(1, 0)]}, "favour takes a mapping"),
        ({"add": np.ones((3, 96))}, "add takes a mapping, such as {3: direction}, not a ndarray"),
        ({"scale": 2}, "scale multiplies the directions of add"),
        ({"favour": {(1, 0): float("nan")}}, "finite"),
        ({"add": {0: np.ones(5)}}, r"\[96\]"),
        ({"add": {2: np.ones(96)}}, "add"),
        ({"heads_off": [(0, 5)]}, "heads_off"),
        ({"skip": [-1]}, "skip"),
        ({"window": 0}, "window"),
        ({"positions": [4096]}, "positions"),
        ({"index_topk": 0}, "index_topk"),
    ],
)
def test_bad_edits(model, change, message):
    """Each says what is wrong."""
    with pytest.raises(UsageError, match=message):
        edit(model, **change)
