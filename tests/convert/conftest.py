"""Small checkpoints for the converter's tests, written once."""

import dataclasses
from pathlib import Path

import pytest

import convert
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.config import Config

STORAGES = ("bf16", "fp8", "nvfp4", "compressed-tensors")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tiny: Config) -> dict[str, Path]:
    """configs/tiny.json with random weights, in every storage."""
    root = tmp_path_factory.mktemp("checkpoints")
    for storage in STORAGES:
        random_checkpoint.write(root / storage, tiny, storage)
    return {storage: root / storage for storage in STORAGES}


@pytest.fixture(scope="session")
def small(tiny: Config) -> Config:
    """Two layers (one dense, one of experts) and MTP, in sizes that a mesh of 2 x 2 divides, blocks of scales too."""
    return dataclasses.replace(
        tiny,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=64,
        vocab_size=96,
    )


@pytest.fixture(scope="session")
def originals(tmp_path_factory, small: Config) -> dict[str, Path]:
    """`small` with random weights in every storage, in Hugging Face layout."""
    root = tmp_path_factory.mktemp("originals")
    for storage in STORAGES:
        random_checkpoint.write(root / storage, small, storage)
    return {storage: root / storage for storage in STORAGES}


@pytest.fixture(scope="session")
def converted(tmp_path_factory, originals) -> dict[str, Path]:
    """`originals` converted, and "quantized": FP8 that became NVFP4 where the default policy says so."""
    root = tmp_path_factory.mktemp("converted")
    for storage in STORAGES:
        convert.convert(originals[storage], root / storage)
    convert.convert(originals["fp8"], root / "quantized", to="nvfp4")
    return {name: root / name for name in (*STORAGES, "quantized")}
