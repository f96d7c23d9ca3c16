"""A server of the demo model. Its tests need the libraries of the extras [serve] and [test]."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax.cli import demo


@pytest.fixture(scope="session")
def model(scratch):
    convert(demo.CHECKPOINT, scratch / "served")
    return ds.load(scratch / "served", dtype=jnp.float32)


@pytest.fixture(scope="session")
def tokenizer(model, scratch):
    return ds.chat.Tokenizer.load(scratch / "served", model.cfg)


@pytest.fixture(scope="session")
def served(model, tokenizer):
    """`url`, `server` and `engine` of the demo model, which is greedy unless a request says otherwise."""
    from tests.serve import servers

    server = servers.make_server(model, tokenizer)
    with servers.listen(server.make_app()) as url:
        yield SimpleNamespace(url=url, server=server, engine=server.driver.engine)
