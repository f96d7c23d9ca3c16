"""A server of the demo model. Its tests need the libraries of the extras [serve] and [test]."""

import importlib.util
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from dsv32_jax.convert import convert

import dsv32_jax as ds
from dsv32_jax.cli import demo

LIBRARIES = ("starlette", "uvicorn", "prometheus_client", "openai", "anthropic", "llguidance", "tokenizers")
collect_ignore_glob = ["test_*.py"] if any(importlib.util.find_spec(name) is None for name in LIBRARIES) else []


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
