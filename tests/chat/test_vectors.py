"""Byte for byte what the reference encoder and parser of DeepSeek-V3.2 make of messages and completions."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from dsv32_jax import chat
from dsv32_jax.chat import template

DATA = Path(__file__).parents[1] / "data" / "encoding"
MODES = {"thinking": True, "chat": False}
KEYWORDS = {"context": "context", "drop_thinking": "drop_thinking", "add_default_bos_token": "bos"}


def pytest_generate_tests(metafunc):
    """One test a vector: those in tests/data, and with --shared all in that folder instead."""
    if "vector" in metafunc.fixturenames:
        shared = metafunc.config.getoption("--shared")
        files = sorted((shared / "vectors" / "encoding").rglob("*_*.json")) if shared else []
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if "official" not in str(file)]
        vectors = found or json.loads((DATA / "vectors.json").read_text(encoding="utf-8"))
        metafunc.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def run(vector: dict):
    """What we make of it."""
    given = vector["kwargs"]
    thinking = MODES.get(given["thinking_mode"], given["thinking_mode"])
    if vector["kind"] == "parse":
        return chat.parse(vector["text"], thinking=thinking)
    options = {KEYWORDS[name]: value for name, value in given.items() if name != "thinking_mode"}
    return chat.encode(vector["messages"], thinking=thinking, **options)


def test_vector(vector):
    """The text, the message, or the error."""
    if "expected_error" in vector:
        with pytest.raises((chat.EncodingError, chat.ParsingError)) as caught:
            run(vector)
        assert caught.value.code == vector["expected_error"]["code"]
    else:
        assert run(vector) == vector.get("expected_prompt", vector.get("expected_message"))


@pytest.fixture(scope="module")
def official(request):
    """Reads a file of the model's own repository: that in tests/data, and with --shared that in its folder instead."""
    shared = request.config.getoption("--shared")

    def read(name: str) -> str:
        if shared:
            return (shared / "vectors" / "encoding" / "hf_official" / name).read_bytes().decode("utf-8")
        return gzip.decompress((DATA / f"{name}.gz").read_bytes()).decode("utf-8")

    return read


@pytest.mark.parametrize("name", ["search_wo_date", "search_w_date"])
def test_official_search(official, name):
    """The two long dialogues of the model's own repository."""
    messages = json.loads(official(f"test_input_{name}.json"))["messages"]
    assert chat.encode(messages, thinking=True) == official(f"test_output_{name}.txt")


@pytest.fixture(scope="module")
def weather(official) -> tuple[list, list]:
    """The official dialogue with tools."""
    read = json.loads(official("test_input.json"))
    return read["messages"], read["tools"]


def test_official_tools(official, weather):
    """Tools as an argument stand where the official test puts them."""
    messages, tools = weather
    assert chat.encode(messages, thinking=True, tools=tools) == official("test_output.regenerated.txt")
    first = {**messages[0], "tools": tools}
    assert chat.encode([first, *messages[1:]], thinking=True) == official("test_output.regenerated.txt")


@pytest.mark.parametrize("position", [4, -6])
def test_official_round_trip(weather, position):
    """A message encoded after its context is parsed back."""
    messages, _ = weather
    message, position = messages[position], position % len(messages)
    text = chat.encode([message], thinking=True, context=messages[:position])
    found = chat.parse(text, thinking=True)
    calls = [{"type": "function", "function": call["function"]} for call in message.get("tool_calls", [])]
    assert found["reasoning_content"] == message["reasoning_content"]
    assert (found["content"], found["tool_calls"]) == (message.get("content", ""), calls)


def test_the_tools_text_has_its_blank_lines():
    """Copies of the reference have lost seven of them."""
    digest = hashlib.sha256(template.TOOLS.encode()).hexdigest()
    assert digest == "963a72ee9be43f07d21bec2348ed2d7e45185e4b502f2a4da35a540299dc2b03"
    assert (template.TOOLS + template.TOOLS_END).count("\n") == 32
