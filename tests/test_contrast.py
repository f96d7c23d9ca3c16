"""Contrasts count what two sets of texts use; patches put one run into another."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax.errors import UsageError
from dsv32_jax.inspect import contrast, contrasts, edit, patch, patching as patching_module, plots, tracing
from dsv32_jax.system.compilation import count_compilations
from tests import models

A = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24], [5, 9, 30]]
B = [[40, 41, 42, 43, 44, 45], [60, 61, 62]]
CLEAN, CORRUPTED, ANSWER = [0, 17, 42, 7, 99, 5, 23], [0, 17, 43, 7, 98, 5, 23], 8


@pytest.fixture(scope="module")
def model(tiny):
    """A dense layer and two MoE layers."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=3, num_nextn_predict_layers=0)
    return jax.device_put(models.random_model(cfg), jax.devices()[0])


@pytest.fixture(scope="module")
def found(model):
    """The contrast of A and B."""
    return contrast(model, A, B)


@pytest.fixture(scope="module")
def patching(model):
    """Single positions, then all at once."""
    return patch(model, CLEAN, CORRUPTED, ANSWER, positions=[*range(7), range(7)])


def test_experts_are_counted(model, found):
    """Counts, shares and standard errors are those of a trace."""
    for name, rows in (("a", A), ("b", B)):
        trace = ds.inspect.trace(model, rows, {"routing"})
        for one in found.experts:
            used = (trace["expert"][one["layer"] - 1] == one["expert"]).any(axis=-1)
            assert used.sum() == one[f"count_{name}"]
            assert np.isclose(used.sum() / trace["length"].sum(), one[f"share_{name}"])
    assert found.tokens == (16, 9)
    assert sorted(zip(found.experts["layer"], found.experts["expert"], strict=True)) == [
        (layer, expert) for layer in (1, 2) for expert in range(model.cfg.n_routed_experts)
    ]
    ratio = np.abs(found.experts["difference"]) / np.maximum(found.experts["standard_error"], 1 / 9)
    assert (np.diff(ratio) <= 0).all() and ratio[0] > 0


def test_the_standard_error_is_that_of_rows(model):
    """Rows of equal length: the error of a mean over rows. Twice the rows, the same counts: less by a known factor."""
    rows = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
    once, twice = contrast(model, rows, rows), contrast(model, 2 * rows, 2 * rows)
    trace = ds.inspect.trace(model, rows, {"routing"})
    for one in once.experts:
        share = (trace["expert"][one["layer"] - 1] == one["expert"]).any(axis=-1).mean(axis=1)
        assert np.isclose(one["standard_error"], np.sqrt(2) * share.std(ddof=1) / 2)
        assert one["difference"] == 0
    ratio = np.sort(twice.experts["standard_error"])[-1] / np.sort(once.experts["standard_error"])[-1]
    assert np.isclose(ratio, np.sqrt(3 / 7))
    assert (once.direction == 0).all() and (once.directions["ratio"] == 0).all()


def test_rows_that_agree_do_not_lead(model):
    """Equal rows show no error, and what they differ in counts no more than a token at a time could change it."""
    found = contrast(model, 2 * [[5, 6, 7]], 2 * [[5, 6, 8]])
    np.testing.assert_allclose(found.experts["standard_error"], 0, atol=1e-6)
    assert (np.diff(np.abs(found.experts["difference"])) <= 0).all() and found.experts["difference"][0] != 0
    assert (found.directions["ratio"] <= 2 * 6).all()


def test_directions_are_differences_of_means(model, found):
    """Those of the residual streams of traces."""
    means = []
    for rows in (A, B):
        trace = ds.inspect.trace(model, rows, {"residual"})
        means.append(np.nansum(trace["residual"], axis=(1, 2)) / trace["length"].sum())
    np.testing.assert_allclose(found.direction, means[0] - means[1], atol=1e-5)
    norm = {one["layer"]: one["norm"] for one in found.directions}
    np.testing.assert_allclose([norm[i] for i in range(3)], np.linalg.norm(found.direction, axis=1), rtol=1e-5)
    assert hasattr(edit(model, add={1: found.direction[1]}).layers[1], "changes")
    assert "Contrast of 16 tokens with 9" in repr(found) and "<table>" in found._repr_html_()


def test_a_patch_of_everything_equals_the_clean_run(model, patching):
    """After any layer; a patch by the same run changes nothing."""
    assert abs(patching.clean - patching.corrupted) > 1e-3
    np.testing.assert_allclose(patching.patched[:, -1], patching.clean, atol=1e-4)
    logprob = jax.nn.log_softmax(ds.forward(model, [CLEAN]).logits[0, -1])[ANSWER]
    assert np.isclose(patching.clean, logprob, atol=1e-4)
    for position in (0, 1):
        np.testing.assert_allclose(patching.change[:, position], 0, atol=1e-4)


def test_a_patch_is_local(model, patching):
    """After the last layer only the last position decides; a patch equals a run with that stream put in by hand."""
    np.testing.assert_allclose(patching.change[2, :6], 0, atol=1e-4)
    assert np.isclose(patching.patched[2, 6], patching.clean, atol=1e-4)
    streams = [ds.forward(model, [row], seen=True).seen[1].x_BTD for row in (CLEAN, CORRUPTED)]
    moved = edit(model, add={0: np.asarray(streams[0][0, 6] - streams[1][0, 6])}, start=6)
    want = jax.nn.log_softmax(ds.forward(moved, [CORRUPTED]).logits[0, -1])[ANSWER]
    assert np.isclose(patching.patched[0, 6], want, atol=1e-4)


def test_the_defaults_begin_where_prompts_differ(model, patching):
    """Positions before the first difference cannot matter. One program serves all layers and prompts."""
    with count_compilations() as compiled:
        again = patch(model, CLEAN, CORRUPTED, ANSWER)
    assert again.positions == ((2,), (3,), (4,), (5,), (6,)) and again.layers == (0, 1, 2)
    np.testing.assert_allclose(again.patched, patching.patched[:, 2:7], atol=1e-4)
    assert compiled.count == 0


def test_a_patch_of_an_edited_model(model):
    """The edit stays: patched with everything, it is the edited model's own clean run."""
    edited = edit(model, skip=[1], experts_off=[(2, 0)])
    found = patch(edited, CLEAN, CORRUPTED, ANSWER, layers=[0, 1], positions=[range(7)])
    np.testing.assert_allclose(found.patched, ds.score(edited, [[*CLEAN, ANSWER]]).logprobs[0][-1], atol=1e-4)


def test_slow_work_is_shown(model, monkeypatch):
    """All of the tokens and patches that a trace, a contrast and patches announce are counted."""
    told = []

    @contextlib.contextmanager
    def show(total, unit):
        done = []
        yield done.append
        told.append((total, unit, sum(done)))

    for module in (tracing, contrasts, patching_module):
        monkeypatch.setattr(module, "show_slow", show)
    contrast(model, A, B)
    patch(model, CLEAN, CORRUPTED, ANSWER)
    assert told == [(16, "tokens", 16), (9, "tokens", 9), (7, "tokens", 7), (15, "patches", 15)]


def test_a_heat_map(patching):
    """Layers by tokens, with all axes named."""
    picture = plots.patching(patching, [f"t{i}" for i in range(7)])
    assert [label.get_text() for label in picture.axes.get_yticklabels()] == ["0", "1", "2"]
    assert picture.axes.get_xticklabels()[0].get_text() == "t0"
    assert picture.axes.get_xlabel() and picture.axes.get_ylabel()
    assert "largest" in repr(patching)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: contrast(model, A, B[:1]), "at least two rows in b"),
        (lambda model: contrast(model, "text", B), "list of lists"),
        (lambda model: contrast(model, A, B, batch_size=0), "batch_size"),
        (lambda model: patch(model, CLEAN, CORRUPTED[:-1], ANSWER), "7 and 6 tokens"),
        (lambda model: patch(model, CLEAN, CLEAN, ANSWER), "different prompts"),
        (lambda model: patch(model, CLEAN, CORRUPTED, -1), "answer"),
        (lambda model: patch(model, CLEAN, CORRUPTED, ANSWER, positions=[7, (0, "a"), 1]), r"\(7,\), \(0, None\)"),
        (lambda model: patch(model, CLEAN, CORRUPTED, ANSWER, positions=[]), "not nothing"),
        (lambda model: patch(model, CLEAN, CORRUPTED, ANSWER, layers=[3]), "layers"),
    ],
)
def test_misuse(model, call, message):
    """Each says what is wrong, before anything runs."""
    with pytest.raises(UsageError, match=message):
        call(model)
