"""Small checkpoints for the converter's tests, written once."""

from pathlib import Path

import pytest

from dsv32_jax import random_checkpoint
from dsv32_jax.config import Config

STORAGES = ("bf16", "fp8", "nvfp4", "compressed-tensors")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tiny: Config) -> dict[str, Path]:
    """configs/tiny.json with random weights, in every storage."""
    root = tmp_path_factory.mktemp("checkpoints")
    for storage in STORAGES:
        random_checkpoint.write(root / storage, tiny, storage)
    return {storage: root / storage for storage in STORAGES}
