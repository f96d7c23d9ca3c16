"""What the README says, done."""

import re
import shlex
from pathlib import Path

import pytest

from dsv32_jax import convert
from dsv32_jax.cli import app, demo

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in `language`."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block"
    return found


def test_the_python_snippets_run(tmp_path, monkeypatch, capsys):
    """Line by line as a user would, on the demo model."""
    convert.convert(demo.CHECKPOINT, tmp_path / "converted")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["gen"].tokens[0]) == 16 or names["gen"].finish_reason == ["stop"]
    assert names["out"].logits.shape == (1, 1, names["model"].cfg.vocab_size)
    printed = capsys.readouterr().out.splitlines()
    assert [printed[0].strip()] == re.findall(r"^print\(gen.text\[0\]\)  # (.*)", README, re.MULTILINE)
    assert len(printed) > 1


COMMANDS = [
    line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.startswith("dsv32 ")
]


@pytest.mark.parametrize("line", [part.strip() for line in COMMANDS for part in line.split(";")])
def test_the_commands_parse(line):
    """Every option that the README shows exists."""
    _, *words = shlex.split(line)
    assert app.parser().parse_args(words)


def test_both_commands_stand_on_the_first_screen():
    """One that runs the demo, one that runs the tests, both self-contained."""
    first = "\n".join(README.splitlines()[:24])
    assert "dsv32 demo" in first and "-m pytest" in first and first.count("pip install") == 2


def test_it_is_short():
    """A newcomer reads it whole."""
    assert len(README.splitlines()) <= 200
