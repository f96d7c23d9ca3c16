"""A converted checkpoint of one layer with random weights, whose tokens are bytes."""

import dataclasses
import io
import json
import sys

import pytest
from dsv32_jax.convert import convert

from dsv32_jax import cli
from dsv32_jax.chat import template
from dsv32_jax.chat.tokenizer import BYTE_LETTERS
from dsv32_jax.checkpoint import random_checkpoint


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def byte_tokenizer() -> dict:
    """A tokenizer.json with the special tokens and a token for each byte."""
    specials = [*template.SPECIAL, template.DSML]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": str(text), "special": True} for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {letter: 7 + i for i, letter in enumerate(BYTE_LETTERS)}, "merges": []},
    }


@pytest.fixture(scope="session")
def checkpoint(tiny, scratch):
    """Its folder."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=1, num_nextn_predict_layers=0)
    random_checkpoint.write(scratch / "terminal-hf", cfg, "bf16")
    convert(scratch / "terminal-hf", scratch / "terminal")
    (scratch / "terminal" / "tokenizer.json").write_text(json.dumps(byte_tokenizer()), encoding="utf-8")
    return scratch / "terminal"


@pytest.fixture(scope="session")
def wordless(checkpoint, scratch):
    """The same checkpoint without a tokenizer."""
    folder = scratch / "wordless"
    folder.mkdir()
    for name in ("manifest.json", "weights"):
        (folder / name).symlink_to(checkpoint / name)
    return folder


@pytest.fixture
def dsv32(capsys, monkeypatch):
    """Runs the command in this process: dsv32(*argv, piped="") -> (exit code, stdout, stderr)."""

    def run(*argv, piped: bytes | str = ""):
        raw = piped.encode() if isinstance(piped, str) else piped
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        try:
            code = cli.main(list(map(str, argv)))
        except SystemExit as left:
            code = left.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
