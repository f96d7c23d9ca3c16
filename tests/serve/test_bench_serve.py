"""`dsv32 bench serve`, with few clients, so that it cannot rot."""

import json

from dsv32_jax import cli
from dsv32_jax.bench import serve as bench


def test_figures(model, scratch, monkeypatch, capsys):
    """One JSON object: rates, ratios to the engine, times to first tokens; nothing wrong, and no page lost."""
    for name, size in {"LONGEST_PROMPT": 8, "LONGEST_ANSWER": 4, "CONTEXT": 64}.items():
        monkeypatch.setattr(bench, name, size)
    line = ["bench", "serve", str(scratch / "served"), "--clients", "6", "--rows", "2", "--seconds", "0", "--json"]
    assert cli.main(line) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["wrong"], figures["pages_leaked"], figures["rounds"]) == (0, 0, 2)
    rates = {"requests_per_s", "tokens_per_s", "ratio_whole", "ratio_streams", "first_token_p50"}
    assert all(figures[name] > 0 for name in rates)
    assert figures["first_token_p50"] <= figures["first_token_p90"] <= figures["first_token_p99"]


def test_the_table(monkeypatch, capsys):
    """Figures with what they are."""
    monkeypatch.setattr(bench, "measure", lambda checkpoint, clients, seconds, rows: {"wrong": clients + rows})
    assert cli.main(["bench", "serve", "x", "--clients", "4", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "Rounds of 4 requests" in out and "7.000" in out
