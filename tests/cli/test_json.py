"""Programs get JSON of every command that prints results, of failures too."""

import argparse
import json
from collections.abc import Iterator

import pytest

from dsv32_jax.cli import app

WITHOUT_RESULTS = {"chat", "serve", "completion"}
"""Commands that talk, or print a script for a shell."""


def list_commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that `parser` knows, without those of its groups."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words
    for name, below in ((name, below) for group in groups for name, below in group.choices.items()):
        yield from list_commands(below, (*words, name))


COMMANDS = [words for words in list_commands(app.parser()) if words[0] not in WITHOUT_RESULTS]


def test_all_commands_are_there():
    assert len(COMMANDS) >= 15 and {("demo",), ("convert",), ("eval", "kl"), ("bench", "kernels")} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_has_json_on_failure_too(words, dsv32):
    """`--json` is one of its options, and what is wrong stands in the one object on stdout."""
    assert "--json" in dsv32(*words, "--help")[1]
    code, out, err = dsv32(*words, "--json", "--nonsense")
    told = json.loads(out)
    assert code == told["code"] == 2 and told["error"] in err


@pytest.mark.parametrize("words", [*COMMANDS, ("chat",), ("serve",)], ids=" ".join)
def test_abbreviated_options_are_refused(words, dsv32):
    """`--api-key KEY` is not read as `--api-key-file KEY`."""
    assert dsv32(*words, "--hel")[0] == 2


@pytest.mark.parametrize("command", ["convert nowhere out", "inspect nowhere", "verify nowhere", "fit nowhere"])
def test_a_missing_input_is_json_too(command, dsv32, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = dsv32(*command.split(), "--json")
    assert code == json.loads(out)["code"] == 3 and "nowhere" in json.loads(out)["error"]


def test_a_refused_dry_run_says_what_it_found(checkpoint, dsv32, tmp_path):
    """The estimate and the refusal are one object."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    code, out, _ = dsv32("convert", checkpoint.parent / "terminal-hf", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(out)
    assert code == told["code"] == 6 and told["would_write"] > 0 and "holds something else" in told["error"]


def test_the_demo_as_json(dsv32, tmp_path):
    """And the model that it keeps is there for other commands, which the last line names."""
    code, out, err = dsv32("demo", "--max-new-tokens", "1", "--json", "--keep", tmp_path / "kept")
    told = json.loads(out)
    assert code == 0 and told["text"] and told["perplexity"] > 1 and len(told["seconds"]) == 4
    assert all(step in err for step in told["seconds"])
    assert err.endswith(f"next: dsv32 chat {tmp_path / 'kept'}\n") and dsv32("verify", tmp_path / "kept")[0] == 0
