"""`dsv32 bench kernels`, at tiny size so that it cannot rot: what it counts, and that all compute the same."""

import jax
import pytest

from dsv32_jax import cli
from dsv32_jax.bench import kernels as bench
from dsv32_jax.config import Config


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Banks that take no time, and few repeats."""
    monkeypatch.setitem(bench.BANK, "cpu", 1 << 14)
    monkeypatch.setattr(bench, "SECONDS", 0.0)


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "bf16"])
def test_rows(format):
    """Every implementation at every number of rows, with the same small error."""
    shape = bench.Shape("small", 96, 256)
    rows = list(bench.measure_kernels([shape], [format], (1, 3), ("auto", "xla")))
    assert [(row["by"], row["rows"]) for row in rows] == [("auto", 1), ("auto", 3), ("xla", 1), ("xla", 3)]
    bits = {"nvfp4": 4.5, "fp8": 8 + 32 / 128, "bf16": 16}[format]
    for row in rows:
        assert row["bytes"] == 96 * 256 * bits / 8 + 4 * (format == "nvfp4")
        assert row["operations"] == 2 * row["rows"] * 96 * 256 and row["seconds"] > 0
        assert row["limit"] > 0
        assert row["error"] < 1e-6


def test_shapes(tiny):
    """Those of the model that is asked about."""
    sizes = {shape.name: (shape.out, shape.size) for shape in bench.list_shapes(tiny)}
    assert sizes["expert-up"] == (tiny.moe_intermediate_size, tiny.hidden_size)
    assert sizes["output"] == (tiny.hidden_size, tiny.num_attention_heads * tiny.v_head_dim)


def test_the_command(monkeypatch, capsys, tiny):
    """A table with a line for each row."""
    monkeypatch.setattr(Config, "from_json", lambda path: tiny)
    monkeypatch.setattr(bench, "list_shapes", lambda cfg: [bench.Shape("small", 96, 256), bench.Shape("other", 32, 64)])
    assert cli.main(["bench", "kernels", "--weight", "small", "--rows", "2", "--by", "auto", "--format", "fp8"]) == 0
    explanation, table = capsys.readouterr().out.split("weight  ")
    assert "memory is read" in explanation and len(table.splitlines()) == 2 and "small fp8" in table
    assert jax.default_backend() == "cpu"
