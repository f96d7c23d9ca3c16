"""Models that the tests of generation share."""

import dataclasses

import pytest

from tests import models

PROMPTS = [[0, 17, 42, 7, 99, 5, 23], [0, 250, 8], [0, 31, 31, 200, 64, 65, 66, 67, 68, 69, 70, 71, 72]]


@pytest.fixture(scope="session")
def drafting(tiny):
    """Two layers and a drafting layer that is often right: it is the last layer over again, with the same head."""
    cfg = dataclasses.replace(tiny, num_hidden_layers=2, eos_token_id=(1, *range(300, 320)))
    return models.random_model(cfg)
