"""The `openai` client with the demo model: what `generate` makes comes back, whole and streamed; errors say why."""

import dataclasses
import random
import time

import httpx2
import jax.numpy as jnp
import openai
import pytest

import dsv32_jax as ds
from dsv32_jax.serve.connections import Limits
from tests.serve.servers import CAPACITY, ROWS, WAITING, listen, make_server

HELLO = [{"role": "user", "content": "hello"}]
CODE = "def area(r):\n"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


HTTP = httpx2.Client(timeout=120)
"""Waits for a busy machine too."""


@pytest.fixture(scope="module", autouse=True)
def close_connections():
    with HTTP:
        yield


def is_idle(engine) -> bool:
    """Nobody has a place, waits, or uses a page but the tree; after a moment, which is long on a busy machine."""
    for _ in range(3000):
        stats = engine.stats()
        if not any(stats[name] for name in ("running", "reading", "waiting", "pages_of_rows")):
            return True
        time.sleep(0.02)
    return False


CASES = [
    ({"max_tokens": 12}, {}),
    ({"max_tokens": 9, "temperature": 1.2, "seed": 7, "n": 3}, {"temperature": 1.2, "seed": 7}),
    (
        {"max_tokens": 20, "temperature": 0.9, "top_p": 0.8, "seed": 2, "stop": ["ret", "\n\n"]},
        {"temperature": 0.9, "top_p": 0.8, "seed": 2},
    ),
    (
        {"max_tokens": 9, "presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"70": 4}},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {70: 4.0}},
    ),
]


@pytest.mark.parametrize("body, sampling", CASES)
def test_what_generate_makes(client, model, tokenizer, body, sampling):
    """A completion and a message are the tokens of `generate`, with the same seeds."""
    options = {"max_new_tokens": body["max_tokens"], "n": body.get("n", 1), "stop": body.get("stop", ())}
    sampling = ds.Sampling(**sampling)
    for prompt in (ds.chat.prepare(CODE, tokenizer), ds.chat.prepare(HELLO, tokenizer)):
        gen = ds.generate(model, [prompt.ids], sampling=sampling, tokenizer=tokenizer, capacity=CAPACITY, **options)
        if prompt.path == "raw text":
            made = client.completions.create(model="demo", prompt=CODE, **body)
            texts = [choice.text for choice in made.choices]
        else:
            made = client.chat.completions.create(model="demo", messages=HELLO, **body)
            texts = [choice.message.content for choice in made.choices]
        assert texts == gen.text
        assert [choice.finish_reason for choice in made.choices] == gen.finish_reason
        assert made.usage.completion_tokens == gen.stats.new_tokens
        assert made.usage.prompt_tokens == len(prompt.ids)


@pytest.mark.parametrize("body", [case[0] for case in CASES])
def test_a_stream_says_the_same(client, body):
    """Text, finish reasons and usage, of completions and messages."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.completions.create(model="demo", prompt=CODE, **body)
    texts, ends, last = ["" for _ in whole.choices], {}, None
    for event in client.completions.create(model="demo", prompt=CODE, **body, **usage):
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        last = event
    assert texts == [choice.text for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert last.usage.completion_tokens == whole.usage.completion_tokens and not last.choices
    whole = client.chat.completions.create(model="demo", messages=HELLO, **body)
    texts = ["" for _ in whole.choices]
    for event in client.chat.completions.create(model="demo", messages=HELLO, stream=True, **body):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_logprobs(client, model, tokenizer):
    """Those of `generate`, with the most likely tokens, in both forms."""
    gen = ds.generate(model, [ds.chat.prepare(HELLO, tokenizer).ids], max_new_tokens=5, top_logprobs=2)
    made = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2)
    content = made.choices[0].logprobs.content
    assert [bytes(token.bytes) for token in content] == [tokenizer.bytes_of([token]) for token in gen.tokens[0]]
    assert [token.logprob for token in content] == pytest.approx(gen.logprobs[0], abs=1e-4)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in content)
    made = client.completions.create(model="demo", prompt=CODE, max_tokens=5, logprobs=2).choices[0]
    offsets = [*made.logprobs.text_offset, len(made.text)]
    said = [made.text[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    assert said == made.logprobs.tokens and len(made.logprobs.top_logprobs) == 5


def test_an_echo(client, model, tokenizer):
    """The prompt with its log-probabilities, as evaluation harnesses ask for it; no new token need be made."""
    ids = [ds.chat.prepare(text, tokenizer).ids for text in (CODE, "x = é")]
    scores = ds.score(model, ids, top_logprobs=1)
    body = {"model": "demo", "prompt": ids, "echo": True, "logprobs": 1}
    for limit in (0, 3):
        made = client.completions.create(**body, max_tokens=limit)
        streamed = list(client.completions.create(**body, max_tokens=limit, stream=True))
        for choice, prompt, expected in zip(made.choices, ids, scores.logprobs, strict=True):
            logprobs = choice.logprobs.token_logprobs
            assert logprobs[0] is None and len(logprobs) == len(prompt) + limit
            assert logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
            assert choice.text.startswith(tokenizer.decode(prompt)) and choice.finish_reason == "length"
            assert len(choice.logprobs.top_logprobs) == len(logprobs) and not choice.logprobs.top_logprobs[0]
            said = [one for event in streamed for one in event.choices if one.index == choice.index]
            assert "".join(one.text for one in said) == choice.text


def test_prompts_in_every_form(client, tokenizer):
    """Text, ids, and lists of them; the choices of one prompt are next to each other."""
    ids = ds.chat.prepare(CODE, tokenizer).ids
    one = client.completions.create(model="demo", prompt=CODE, max_tokens=4).choices[0].text
    for prompt, count in ((ids, 1), ([CODE, CODE], 2), ([ids, ids, ids], 3)):
        made = client.completions.create(model="demo", prompt=prompt, max_tokens=4, n=2)
        assert [choice.text for choice in made.choices] == [one] * count * 2
        assert made.usage.prompt_tokens == count * len(ids)


def test_thinking_and_parts(client, tokenizer):
    """Content may be a list of texts; a model that thinks begins with reasoning."""
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    told = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], max_tokens=4, extra_body={"thinking": True}
    )
    prompt = ds.chat.prepare([{"role": "user", "content": "hel\nlo"}], tokenizer, thinking=True)
    assert told.usage.prompt_tokens == len(prompt.ids)
    message = told.choices[0].message
    assert message.content == "" and message.reasoning_content


@pytest.mark.parametrize(
    "body, thinking",
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal", "thinking": False}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": None}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ],
)
def test_whether_it_thinks(served, tokenizer, body, thinking):
    """In every client's words, and the model need not be named; the tokens are counted the same way."""
    expected = ds.chat.prepare(HELLO, tokenizer, thinking=thinking).ids
    ask = served.server.reader.read_chat({"messages": HELLO, **body})
    assert (ask.thinking, ask.request.prompts, ask.model) == (thinking, [expected], "demo")
    assert served.server.reader.tokenize({"messages": HELLO, **body})["tokens"] == expected


BAD = [
    ({"foo": 1, "max_tokens": 3}, 400, "foo"),
    ({"temprature": 1}, 400, "temprature"),
    ({"temperature": 9}, 400, None),
    ({"temperature": "hot"}, 400, None),
    ({"max_tokens": CAPACITY}, 400, None),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ({"model": "other"}, 404, "model"),
    ({"model": 3}, 400, "model"),
    ({"n": 0}, 400, None),
    ({"n": ROWS + WAITING + 1}, 400, None),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, 400, None),
    ({"stop": [""]}, 400, None),
    ({"stop": 3}, 400, None),
    ({"seed": -1}, 400, None),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"stream_options": {"sometimes": True}}, 400, "sometimes"),
    ({"tool_choice": "perhaps"}, 400, "tool_choice"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, None),
    ({"messages": [3]}, 400, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "so"}]}, 400, None),
    ({"thinking": "deeply"}, 400, "thinking"),
    ({"reasoning_effort": "deep"}, 400, "reasoning_effort"),
    ({"reasoning_effort": 3}, 400, "reasoning_effort"),
    ({"reasoning_effort": "none", "thinking": True}, 400, None),
    ({"thinking": True, "chat_template_kwargs": {"thinking": False}}, 400, None),
    ({"parallel_tool_calls": False, "store": True}, 400, "store"),
]


@pytest.mark.parametrize("changes, status, param", BAD)
def test_a_bad_request_is_told_why(served, changes, status, param):
    """OpenAI's error object, with the field at fault."""
    answer = HTTP.post(f"{served.url}/v1/chat/completions", json={"model": "demo", "messages": HELLO, **changes})
    error = answer.json()["error"]
    assert answer.status_code == status and error["message"] and "--" not in error["message"]
    assert param is None or error["param"] == param
    assert is_idle(served.engine)


def test_what_says_nothing_is_accepted(client):
    """Fields as clients send them by default."""
    body = {
        "parallel_tool_calls": True,
        "store": False,
        "tools": [],
        "stop": None,
        "user": "me",
        "metadata": {"a": "b"},
    }
    assert client.chat.completions.create(model="demo", messages=HELLO, max_tokens=1, **body).choices


def test_what_is_missing(served, client):
    """A message without content is refused, and an unknown field in place of a needed one names that."""
    with pytest.raises(openai.BadRequestError, match=r"content is missing in 1 message: message 0 \(user\)"):
        client.chat.completions.create(model="demo", messages=[{"role": "user"}], max_tokens=1)
    for path, body, needed in (
        ("/tokenize", {"text": "hi"}, "does not support: text; prompt or messages is missing"),
        ("/detokenize", {"ids": [1]}, "does not support: ids; tokens is missing"),
        ("/v1/completions", {"input": "hi"}, "does not support: input; prompt is missing"),
        ("/v1/chat/completions", {"input": "hi"}, "does not support: input; messages is missing"),
    ):
        answer = HTTP.post(served.url + path, json=body)
        assert answer.status_code == 400 and needed in answer.json()["error"]["message"]


def test_other_paths(served, client):
    """Models, health, metrics, and what is not there."""
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == CAPACITY
    with pytest.raises(openai.NotFoundError, match="'x'"):
        client.models.retrieve("x")
    assert HTTP.get(f"{served.url}/health").json() == {"status": "ok"}
    about = HTTP.get(served.url).json()
    assert (about["name"], about["version"], about["model"]) == ("dsv32_jax", ds.__version__, "demo")
    assert {"GET /health", "POST /v1/chat/completions", "POST /v1/messages"} < {*about["endpoints"]}
    assert 'dsv32_requests_total{status="404"}' in HTTP.get(f"{served.url}/metrics").text
    for path, status in (("/nowhere", 404), ("/v1/completions", 405)):
        answer = HTTP.get(served.url + path)
        assert answer.status_code == status and answer.json()["error"]["type"]


def test_malformed_bodies(served):
    """A thousand: each is refused, and the server goes on."""
    rng, good = random.Random(0), b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'
    with httpx2.Client() as client:
        for _ in range(1000):
            body = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(body))
                body[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
            answer = client.post(f"{served.url}/v1/chat/completions", content=bytes(body))
            assert answer.status_code in (200, 400, 404), (answer.status_code, body)
        for body in (b"", b"[]", b"null", b"[" * 100_000, b'{"a": NaN}', b'{"model": 1, "model": 2}'):
            assert client.post(f"{served.url}/v1/completions", content=body).status_code == 400
        huge = client.post(f"{served.url}/v1/completions", content=b" " * (33 << 20))
        assert huge.status_code == 413
    assert is_idle(served.engine)


def test_as_many_as_may_wait(served):
    """One more is told to come back."""
    body = {"model": "demo", "prompt": CODE, "max_tokens": 400, "n": ROWS + WAITING, "stream": True}
    body["logit_bias"] = {"1": -1000}
    with HTTP.stream("POST", f"{served.url}/v1/completions", json=body):
        refused = HTTP.post(f"{served.url}/v1/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert is_idle(served.engine)


def test_a_model_that_makes_nan(model, tokenizer):
    """An error object, whole and in a stream; the rows are free, and the server goes on."""
    broken = dataclasses.replace(model, head_VD=jnp.full_like(model.head_VD, jnp.nan))
    server = make_server(broken, tokenizer)
    body = {"model": "demo", "prompt": CODE, "max_tokens": 4}
    with listen(server.make_app()) as url:
        for _ in range(2):
            answer = HTTP.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
        streamed = HTTP.post(f"{url}/v1/completions", json={**body, "stream": True})
        assert streamed.status_code == 200 and "not finite" in streamed.text
        assert HTTP.get(f"{url}/health").status_code == 200 and is_idle(server.driver.engine)


def test_keys_time_and_signs_of_life(model, tokenizer):
    """A key is needed everywhere but at /health; an answer may take so long; a stream that waits says so."""
    server = make_server(model, tokenizer, Limits(seconds=0.3, keep_alive=0.001, body=1000))
    body = {"model": "demo", "prompt": CODE, "max_tokens": 900, "logit_bias": {"1": -1000}, "n": ROWS + WAITING}
    with listen(server.make_app(["secret-1", "secret-2"])) as url:
        for headers in ({}, {"authorization": "Bearer secret"}, {"x-api-key": ""}):
            answer = HTTP.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401 and "secret" not in answer.text
        assert HTTP.get(f"{url}/health").status_code == 200
        assert HTTP.get(f"{url}/v1/models", headers={"x-api-key": "secret-1"}).status_code == 200
        with httpx2.Client(headers={"authorization": "Bearer secret-2"}, timeout=30) as client:
            assert client.post(f"{url}/v1/completions", json=body).status_code == 504
            streamed = client.post(f"{url}/v1/completions", json={**body, "stream": True}).text
            assert ": keep-alive\n\n" in streamed and "longer than 0.3 seconds" in streamed
            assert client.post(f"{url}/v1/completions", content=b"x" * 1001).status_code == 413
        assert is_idle(server.driver.engine)
