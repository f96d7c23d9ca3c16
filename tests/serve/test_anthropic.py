"""The `anthropic` client: text, thoughts and tools, whole and streamed; the rows say what they are told."""

import asyncio
import json

import anthropic
import httpx2
import pytest
from hypothesis import assume, given, settings, strategies as st

from dsv32_jax import chat
from dsv32_jax.serve.app import Server
from dsv32_jax.serve.connections import Limits
from dsv32_jax.serve.reading import Reader
from tests.chat.dialogues import answers
from tests.serve.servers import ScriptedDriver
from tests.serve.test_tool_calls import write

ASKED = [{"role": "user", "content": "go"}]
TOOL = {"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}
SHOWN = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": TOOL["input_schema"]}}


@pytest.fixture(scope="module")
def talk(served, tokenizer):
    """talk(script, **body): what the real client makes of a row that says so, whole and streamed, and its prompt."""

    def run(script, sizes=(1,), **body):
        driver = ScriptedDriver(served.engine, tokenizer, [script], sizes)
        app = Server(Reader("demo", served.engine, tokenizer, {}), driver, Limits()).make_app()
        body = {"model": "demo", "max_tokens": 500, "messages": ASKED, **body}

        async def ask():
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:
                async with anthropic.AsyncAnthropic(base_url="http://here", api_key="-", http_client=http) as client:
                    whole = await client.messages.create(**body)
                    async with client.messages.stream(**body) as stream:
                        return whole, await stream.get_final_message()

        return *asyncio.run(ask()), driver.jobs[0].rows[0].prompt

    return run


def say(message) -> list[tuple]:
    """The blocks of a message, ids left out."""
    found = []
    for block in message.content:
        match block.type:
            case "text":
                found.append(("text", block.text))
            case "thinking":
                found.append(("thinking", block.thinking))
            case "tool_use":
                found.append(("tool_use", block.name, block.input))
    return found


@settings(max_examples=15)
@given(st.data(), st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_blocks(talk, tokenizer, data, thinking, sizes):
    """What the model said, in a stream too, however its tokens come."""
    message = data.draw(answers(thinking))
    assume(len(tokenizer.encode(write(message, thinking), allow_special=True)) < 500)
    body = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinking else {}
    whole, streamed, _ = talk(write(message, thinking), sizes, tools=[TOOL], **body)
    functions = [call["function"] for call in message["tool_calls"]]
    expected = [("thinking", message["reasoning_content"]), ("text", message["content"])]
    expected = [pair for pair in expected if pair[1]]
    expected += [("tool_use", one["name"], json.loads(one["arguments"])) for one in functions]
    assert say(whole) == say(streamed) == expected
    assert whole.stop_reason == streamed.stop_reason == ("tool_use" if functions else "end_turn")
    assert whole.usage.output_tokens == streamed.usage.output_tokens


def test_a_conversation_comes_back(talk, tokenizer):
    """System text, tools, calls and their results are those of the encoder."""
    messages = [
        *ASKED,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "look", "input": {"at": "é"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    whole, _, prompt = talk("42", messages=messages, system=system, tools=[TOOL])
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    expected = [
        {"role": "system", "content": "Be brief."},
        *ASKED,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
        {"role": "user", "content": "So?"},
    ]
    assert prompt == chat.prepare(expected, tokenizer, tools=[SHOWN]).ids
    assert say(whole) == [("text", "42")]


def test_how_it_ends(talk):
    """By a stop sequence, which is told, or at the limit; a call that is cut off is no block."""
    whole, streamed, _ = talk("one two three", stop_sequences=["x", " two"])
    assert (whole.stop_reason, whole.stop_sequence, say(whole)) == ("stop_sequence", " two", [("text", "one")])
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", " two")
    whole, _, _ = talk("one two three", max_tokens=1)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 1
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "here"}'}}
    script = write({"role": "assistant", "content": "so", "tool_calls": [call]}, False)[:-60]
    whole, _, _ = talk(script, tools=[TOOL])
    assert say(whole) == [("text", "so")] and whole.stop_reason == "end_turn" and whole.parse_warnings


def test_over_http(served, tokenizer):
    """The demo model itself, the number of tokens, and errors in Anthropic's words."""
    with anthropic.Anthropic(base_url=served.url, api_key="-", max_retries=0) as client:
        made = client.messages.create(model="demo", max_tokens=5, messages=ASKED)
        count = client.messages.count_tokens(model="demo", messages=ASKED).input_tokens
        usage = made.usage
        more = {"tools": [TOOL], "system": "Be brief.", "thinking": {"type": "enabled", "budget_tokens": 1024}}
        told = [{"role": "system", "content": "Be brief."}, *ASKED]
        prompt = chat.prepare(told, tokenizer, tools=[SHOWN], thinking=True).ids
        assert client.messages.count_tokens(model="demo", messages=ASKED, **more).input_tokens == len(prompt)
        assert usage.input_tokens + usage.cache_read_input_tokens == count and usage.output_tokens == 5
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(model="other", max_tokens=5, messages=ASKED)
        assert caught.value.body["error"]["type"] == "not_found_error"
    for body, message in (
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"foo": 1}, "foo"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "tool_result"),
        ({"messages": [{"role": "system", "content": "x"}]}, "'user' or 'assistant'"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "so"}]}, "turn"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "custom"),
        ({"tool_choice": {"type": "any"}}, "no such tool"),
    ):
        body = {"model": "demo", "max_tokens": 3, "messages": ASKED, **body}
        answer = httpx2.post(f"{served.url}/v1/messages", json=body, timeout=120)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
