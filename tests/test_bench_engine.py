"""`dsv32 bench engine`, at tiny size so that it cannot rot."""

import dataclasses
import json

import pytest

from dsv32_jax import cli
from dsv32_jax.bench import engine as bench


@pytest.fixture
def small_sizes(monkeypatch):
    """A few short requests."""
    sizes = {"LONGEST_PROMPT": 40, "LONGEST_ANSWER": 12, "SHARING": 4, "SHARED": 130, "PROMPT": 140}
    for name, size in {**sizes, "RUNNING": 2, "LONG": 100}.items():
        monkeypatch.setattr(bench, name, size)


def test_figures(small_sizes, tiny, tmp_path, capsys):
    """One JSON object: rates, a speedup by reuse, how far a long prompt holds up others, and no page lost."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    line = ["bench", "engine", "--config", str(tmp_path / "config.json"), "--requests", "6", "--rows", "2"]
    assert cli.main([*line, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    rates = {"ragged_tokens_per_s", "static_tokens_per_s", "full_tokens_per_s", "prefix_speedup", "stretch_p99"}
    assert figures.keys() == {*rates, "pages_leaked"} and figures["pages_leaked"] == 0
    assert all(figures[name] > 0 for name in rates)


def test_the_table(monkeypatch, capsys):
    """Figures with what they are."""
    monkeypatch.setattr(bench, "measure_engine", lambda cfg, requests, rows: {"pages_leaked": requests + rows})
    assert cli.main(["bench", "engine", "--rows", "3", "--requests", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 requests" in out and "7.00" in out
