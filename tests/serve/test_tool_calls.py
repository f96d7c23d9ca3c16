"""Completions that call tools, as a client meets them; the rows say what they are told."""

import asyncio
import json
import re

import httpx2
import openai
import pytest
from hypothesis import given, settings, strategies as st

from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.serve.app import Server
from dsv32_jax.serve.connections import Limits
from dsv32_jax.serve.reading import Reader
from tests.chat.dialogues import answers
from tests.chat.test_vectors import MODES
from tests.conftest import DATA
from tests.serve.servers import ScriptedDriver

ASKED = [{"role": "user", "content": "go"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "é\\n", "n": [1, {"a": null}]}'}}


@pytest.fixture(scope="module")
def talk(served, tokenizer):
    """talk(scripts, sizes, body): what the real client makes of rows that say so, and the server."""
    reader = Reader("demo", served.engine, tokenizer, {})

    def run(scripts, sizes=(1,), reader=reader, path="chat", **body):
        driver = ScriptedDriver(served.engine, tokenizer, scripts, sizes)
        app = Server(reader, driver, Limits()).make_app()

        async def ask():
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:
                async with openai.AsyncOpenAI(base_url="http://here/v1", api_key="-", http_client=http) as client:
                    create = {"chat": client.chat.completions, "completions": client.completions}[path].create
                    given = {"messages": ASKED, "n": len(scripts), **body}
                    made = await create(model="demo", **{name: one for name, one in given.items() if one is not None})
                    return [event async for event in made] if body.get("stream") else made

        return asyncio.run(ask()), driver

    return run


def write(message: dict, thinking: bool) -> str:
    """The completion that says `message`."""
    return chat.encode([message], thinking=thinking, context=ASKED).removesuffix(template.EOS)


def fold(events) -> dict[int, dict]:
    """The messages of a stream."""
    found: dict[int, dict] = {}
    for event in events:
        for choice in event.choices:
            delta, empty = choice.delta, {"content": "", "reasoning_content": "", "calls": [], "end": None}
            message = found.setdefault(choice.index, empty)
            message["content"] += delta.content or ""
            message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            message["end"] = choice.finish_reason or message["end"]
            for call in delta.tool_calls or ():
                if call.index == len(message["calls"]):
                    message["calls"].append([call.id, call.function.name, ""])
                assert call.index == len(message["calls"]) - 1
                message["calls"][-1][2] += call.function.arguments or ""
    return found


@settings(max_examples=25)
@given(
    st.data(), st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([(), ["e", "\n\n"]])
)
def test_a_stream_is_the_whole(talk, data, thinking, sizes, stop):
    """Reasoning, content and calls, however their tokens come, with stop strings too; and what the model said."""
    messages = data.draw(st.lists(answers(thinking), min_size=1, max_size=2))
    scripts = [write(message, thinking) for message in messages]
    body = {"tools": TOOLS, "stop": stop, "extra_body": {"thinking": thinking}}
    whole, _ = talk(scripts, sizes, **body)
    streamed = fold(talk(scripts, sizes[::-1], stream=True, **body)[0])
    for choice, message in zip(whole.choices, messages, strict=True):
        told, found = choice.message, streamed[choice.index]
        calls = [(call.function.name, call.function.arguments) for call in told.tool_calls or ()]
        assert found["content"] == (told.content or "") and found["end"] == choice.finish_reason
        assert found["reasoning_content"] == (getattr(told, "reasoning_content", None) or "")
        assert [(name, arguments) for _, name, arguments in found["calls"]] == calls
        if not stop:
            expected = [
                (one["function"]["name"], json.loads(one["function"]["arguments"])) for one in message["tool_calls"]
            ]
            assert [(name, json.loads(arguments)) for name, arguments in calls] == expected
            assert (told.content or "") == message["content"]
            assert choice.finish_reason == ("tool_calls" if calls else "stop")


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(2, 600), max_size=40), min_size=1, max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([(), ["e", "\ufffd", "th"]]),
    st.booleans(),
)
def test_any_tokens_stream_as_the_whole(talk, tokenizer, scripts, sizes, stop, echo):
    """Of completions: bytes that are no whole characters, special tokens, stop strings across tokens, logprobs."""
    body = {"messages": None, "prompt": "é", "logprobs": 0, "max_tokens": 99, "stop": stop, "echo": echo}
    body["path"] = "completions"
    (whole, driver), (events, _) = talk(scripts, sizes, **body), talk(scripts, sizes[::-1], stream=True, **body)
    for choice in whole.choices:
        said = [one for event in events for one in event.choices if one.index == choice.index]
        assert "".join(one.text for one in said) == choice.text and said[-1].finish_reason == choice.finish_reason
        streamed = [one.logprobs for one in said if one.logprobs]
        for part in ("tokens", "token_logprobs", "text_offset"):
            assert [value for one in streamed for value in getattr(one, part)] == getattr(choice.logprobs, part)
        if not stop:
            expected = tokenizer.decode(driver.say(scripts[choice.index])[:-1])
            assert choice.text == (tokenizer.decode(driver.jobs[0].rows[0].prompt) if echo else "") + expected


def test_half_a_call_is_no_call(talk):
    """Cut off or malformed, it does not end with "tool_calls", and a warning says why; no tag is in the content."""
    text = write({"role": "assistant", "content": "so", "tool_calls": [CALL]}, False)
    for script in (text[:-60], text.replace("</｜DSML｜invoke>", "oops")):
        made, _ = talk([script], tools=TOOLS)
        (choice,) = made.choices
        assert choice.finish_reason == "stop" and choice.message.content == "so"
        assert choice.parse_warnings and "DSML" not in choice.message.content
        with pytest.raises(json.JSONDecodeError):
            json.loads(choice.message.tool_calls[0].function.arguments)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_is_written_as_it_was_sampled(talk, served, tokenizer, thinking):
    """Its prompt goes on token by token from what was sampled, in loose spelling too; unless the client changed it."""
    message = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    message |= {"reasoning_content": "Where?"} if thinking else {}
    script = write(message, thinking).replace('"a": null', '"a":null').replace("\n\n<｜", "\n\n<｜", 1)
    reader = Reader("demo", served.engine, tokenizer, {})
    body = {"tools": TOOLS, "extra_body": {"thinking": thinking}, "reader": reader}
    made, driver = talk([script], **body)
    told = made.choices[0].message.model_dump(exclude_none=True)
    (row,) = driver.jobs[0].rows
    sampled = row.prompt + row.tokens
    result = {"role": "tool", "tool_call_id": told["tool_calls"][0]["id"], "content": "42"}
    for changes, is_same in (
        ({}, True),
        ({"reasoning_content": None}, True),
        ({"content": "I looked."}, False),
        ({"tool_calls": [{**told["tool_calls"][0], "function": {"name": "look", "arguments": "{}"}}]}, False),
    ):
        answer, driver = talk(["done"], **body, messages=[*ASKED, {**told, **changes}, result])
        prompt = driver.jobs[0].rows[0].prompt
        assert (prompt[: len(sampled)] == sampled) == is_same
        part = "reasoning_content" if thinking else "content"
        assert getattr(answer.choices[0].message, part) == "done"


VECTORS = json.loads((DATA / "encoding" / "vectors.json").read_text(encoding="utf-8"))


def test_the_vectors_of_the_encoder(served, tokenizer):
    """Messages have the tokens of the reference's prompt over HTTP too, or are refused: as there, or because it is not
    the model's turn."""
    answers = {}
    with httpx2.Client(base_url=served.url) as client:
        for vector in VECTORS:
            if vector["kind"] == "encode" and vector["kwargs"].keys() == {"thinking_mode"}:
                thinking = MODES.get(vector["kwargs"]["thinking_mode"], vector["kwargs"]["thinking_mode"])
                body = {"messages": vector["messages"], "thinking": thinking}
                answers[vector["name"]] = vector, client.post("/tokenize", json=body)
    refused = [name for name, (_, answer) in answers.items() if answer.status_code == 400]
    for name, (vector, answer) in answers.items():
        if name not in refused:
            assert answer.json()["tokens"] == tokenizer.encode(vector["expected_prompt"], allow_special=True), name
        elif "expected_error" not in vector:
            assert re.search("not the model's turn|pending tool calls", answer.json()["error"]["message"]), name
    assert len(answers) - len(refused) == 13


def test_the_tokens_of_messages(served, tokenizer):
    """Of text and messages, and back; the prompt is that of the encoder."""
    with httpx2.Client(base_url=served.url) as client:
        told = client.post(
            "/tokenize", json={"model": "demo", "messages": ASKED, "tools": TOOLS, "thinking": True}
        ).json()
        assert told["tokens"] == chat.prepare(ASKED, tokenizer, tools=TOOLS, thinking=True).ids
        back = client.post("/detokenize", json={"tokens": told["tokens"]}).json()
        assert back == {"prompt": chat.encode(ASKED, tools=TOOLS, thinking=True)}
        told = client.post("/tokenize", json={"prompt": "a é"}).json()
        assert told["tokens"] == chat.prepare("a é", tokenizer).ids and told["count"] == len(told["tokens"])
        told = client.post("/tokenize", json={"prompt": f"a{template.EOS}", "add_special_tokens": False}).json()
        assert told["tokens"] == [*tokenizer.encode("a"), served.engine.model.cfg.eos_token_id[0]]
        assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
        assert client.post("/tokenize", json={}).status_code == 400
