"""A tokenizer in the shape of DeepSeek's, trained on a few lines."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsv32_jax.chat import Tokenizer, template
from dsv32_jax.config import Config

REGEXES = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""How DeepSeek cuts text before its byte pairs are merged."""

OTHERS = ("<｜▁pad▁｜>", "<｜fim▁hole｜>", "<|EOT|>", "<｜tool▁calls▁begin｜>", "<｜place▁holder▁no▁0｜>")
"""Some of the special tokens that the message format does not use."""


@pytest.fixture(scope="session")
def cfg(tiny: Config) -> Config:
    """A model with more rows than the tokenizer has tokens."""
    return dataclasses.replace(tiny, vocab_size=640)


@pytest.fixture(scope="session")
def library():
    """The library's own tokenizer, with everything in it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in REGEXES]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[template.BOS, template.EOS, OTHERS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([template.TOOLS, "The quick brown fox, 12345. 你好世界 😀 naïve"] * 3, trainer)
    specials = [*template.SPECIAL[2:], template.DSML, *OTHERS[1:]]
    made.add_tokens([tokenizers.AddedToken(str(text), normalized=False) for text in specials])
    return made


@pytest.fixture(scope="session")
def raw(library) -> dict:
    """Its tokenizer.json; tests change copies of it."""
    return json.loads(library.to_str())


@pytest.fixture(scope="session")
def folder(raw, tmp_path_factory) -> Path:
    """A checkpoint's folder, as far as text is concerned."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder, cfg) -> Tokenizer:
    """What the package makes of it."""
    return Tokenizer.load(folder, cfg)
