"""Many clients at once: each gets what `generate` makes for it alone, whoever else is there, and leaves nothing."""

import asyncio

import numpy as np
import openai
import pytest

import dsv32_jax as ds
from tests.serve.servers import CAPACITY, ROWS, listen, make_server
from tests.serve.test_openai import is_idle

CLIENTS, LONGEST = 200, 8


@pytest.fixture(scope="module")
def asks(model):
    """Ragged requests with seeds of their own; some share their beginnings."""
    rng = np.random.default_rng(0)
    shared = rng.integers(100, model.cfg.vocab_size // 2, 40).tolist()
    prompts = [[0, *shared[: rng.integers(4, 40)], *rng.integers(100, 2000, 3).tolist()] for _ in range(CLIENTS)]
    return [(prompt, int(rng.integers(1, LONGEST)), seed) for seed, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(model, tokenizer, asks):
    samplings = [ds.Sampling(temperature=1.0, seed=seed) for *_, seed in asks]
    limits, prompts = [limit for _, limit, _ in asks], [prompt for prompt, *_ in asks]
    return ds.generate(
        model,
        prompts,
        sampling=samplings,
        max_new_tokens=limits,
        tokenizer=tokenizer,
        batch_size=ROWS,
        capacity=CAPACITY,
    )


def test_everybody_is_answered_right(model, tokenizer, asks, expected):
    """Streamed and whole; who is told to come back comes back; some leave in the middle."""

    async def run(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=1000, timeout=300) as client:
            return await asyncio.gather(*(ask(client, i, *one) for i, one in enumerate(asks)))

    async def ask(client, i, prompt, limit, seed):
        body = {"model": "demo", "prompt": prompt, "max_tokens": limit, "temperature": 1.0, "seed": seed}
        if i % 2:
            return (await client.completions.create(**body)).choices[0].text
        stream = await client.completions.create(**body, stream=True)
        if i % 10 == 0:
            await anext(stream)
            return await stream.close()
        return "".join([event.choices[0].text async for event in stream])

    server = make_server(model, tokenizer, waiting=CLIENTS // 2)
    with listen(server.make_app()) as url:
        texts = asyncio.run(run(url))
        assert is_idle(server.driver.engine)
    assert [text for text in texts if text is not None] == [
        text for text, told in zip(expected.text, texts, strict=True) if told is not None
    ]
    assert texts.count(None) == CLIENTS / 10


def test_an_edited_model_is_served(served, model, tokenizer):
    """Its own tokens, beside the server of the model that it was made of."""
    prompt = [0, *range(300, 340)]
    edited = ds.inspect.edit(model, favour={(i, expert): 4.0 for i in (2, 3, 4) for expert in (0, 1, 4, 5)})
    want = [ds.generate(one, [prompt], max_new_tokens=8, tokenizer=tokenizer).text[0] for one in (model, edited)]
    assert want[0] != want[1]
    with listen(make_server(edited, tokenizer).make_app()) as url:
        for text, address in zip(want, (served.url, url), strict=True):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", timeout=300)
            for _ in range(2):
                answer = client.completions.create(model="demo", prompt=prompt, max_tokens=8)
                assert answer.choices[0].text == text
