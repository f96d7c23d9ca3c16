"""Small models and checkpoints that the tests of evaluation share."""

import dataclasses
from pathlib import Path

import pytest
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax.checkpoint import random_checkpoint
from tests import models

DEMO = Path(ds.__file__).parent / "demo_checkpoint"


class Bytes:
    """A tokenizer whose tokens are bytes; ids 0 to 2 are special."""

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def bytes_of(self, ids) -> bytes:
        return bytes(i - 3 for i in ids if 3 <= i < 259)

    def decode(self, ids) -> str:
        return self.bytes_of(ids).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def two_layers(tiny):
    """One dense layer and one of experts, without an MTP layer."""
    return dataclasses.replace(tiny, num_hidden_layers=2, num_nextn_predict_layers=0, max_position_embeddings=64)


@pytest.fixture(scope="session")
def model(two_layers):
    """Random weights in memory."""
    return models.random_model(two_layers)


@pytest.fixture(scope="session")
def folders(two_layers, tmp_path_factory):
    """A random checkpoint in BF16, the same in NVFP4, and another model."""
    root = tmp_path_factory.mktemp("evaluation")
    with_mtp = dataclasses.replace(two_layers, num_nextn_predict_layers=1)
    random_checkpoint.write(root / "hf", with_mtp, "bf16")
    convert(root / "hf", root / "bf16")
    convert(root / "hf", root / "nvfp4", to="nvfp4", policy="full")
    random_checkpoint.write(root / "other-hf", dataclasses.replace(with_mtp, vocab_size=321, index_topk=16))
    convert(root / "other-hf", root / "other")
    return root


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The first layer of the bundled model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("demo") / "converted"
    convert(DEMO, folder, layers="0-0")
    return folder
