"""Clients over plain sockets that are slow or gone: their time is limited, and nobody waits for them."""

import asyncio
import json
import random
import time

import pytest

from dsv32_jax.serve.connections import Limits
from tests.serve.servers import listen, make_server
from tests.serve.test_openai import CODE, is_idle

SLOW, LARGE = 20, 64 << 20
BODY = json.dumps({"model": "demo", "prompt": CODE, "max_tokens": 4}).encode()
LONG = {"model": "demo", "prompt": CODE, "max_tokens": 900, "logit_bias": {"1": -1000}, "stream": True}


@pytest.fixture(scope="module")
def strict(model, tokenizer):
    """A server whose clients have half a second each to send a head and a body."""
    limits = Limits(head_seconds=0.5, body_seconds=0.5)
    server = make_server(model, tokenizer, limits)
    with listen(server.make_app(), limits) as url:
        yield server, int(url.rpartition(":")[2])


def write_head(size: int) -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {size}\r\n\r\n".encode()


async def trickle(port: int, at_once: bytes, slowly: bytes) -> bytes:
    """What a client is told that sends a byte each twentieth of a second, until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(at_once)
    answer = asyncio.ensure_future(read(reader))
    for byte in slowly:
        if answer.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.05)
    told = await asyncio.wait_for(answer, 60)
    writer.close()
    return told


async def read(reader) -> bytes:
    """What comes until the connection is closed, politely or not."""
    told = b""
    try:
        while data := await reader.read(1 << 20):
            told += data
    except ConnectionResetError:
        pass
    return told


async def ask(port: int, body: bytes = BODY) -> bytes:
    """What one is told that is not slow."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(write_head(len(body)).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + body)
    told = await asyncio.wait_for(read(reader), 60)
    writer.close()
    return told


def test_slow_heads_and_bodies(strict):
    """Each is told 408 and let go; the second head of a connection too; others are answered meanwhile."""
    server, port = strict

    async def run():
        slow = [trickle(port, b"", write_head(9)) for _ in range(SLOW)]
        slow += [trickle(port, write_head(len(BODY)), BODY) for _ in range(SLOW)]
        slow += [trickle(port, write_head(len(BODY)) + BODY, write_head(9))]
        return await asyncio.gather(ask(port), *slow)

    begun = time.perf_counter()
    quick, *slow, second = asyncio.run(run())
    assert b"200 OK" in quick and time.perf_counter() - begun < 30
    assert [answer[:12] for answer in slow] == [b"HTTP/1.1 408"] * 2 * SLOW
    assert all(b"the body took longer than 0.5 seconds" in answer for answer in slow[SLOW:])
    assert all(answer.count(b"HTTP/1.1") == 1 for answer in slow)
    assert second.startswith(b"HTTP/1.1 200 OK") and second.count(b"HTTP/1.1 408") == 1
    assert is_idle(server.driver.engine)


async def answer_at_length(scope, receive, send) -> None:
    """An application whose answer is short, large, or endless, by its path."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/endless":
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b"x" * (LARGE if scope["path"] == "/large" else 2)})


def test_who_does_not_read():
    """Does not keep others waiting, and is cut off in the end, while the answer is made and behind it."""
    limits = Limits(head_seconds=0.3, body_seconds=0.3, seconds=0.3)

    async def get(port, path, wait):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n".encode())
        await asyncio.sleep(wait)
        told = await asyncio.wait_for(read(reader), 60)
        writer.close()
        return len(told)

    async def run(port):
        return await asyncio.gather(get(port, "/endless", 3), get(port, "/large", 3), get(port, "/quick", 0))

    with listen(answer_at_length, limits) as url:
        endless, large, quick = asyncio.run(run(int(url.rpartition(":")[2])))
    assert endless and 0 < large < LARGE and 0 < quick < 1000


def test_a_hundred_that_are_killed(served):
    """At any moment: while they send, wait or read. Rows and pages are free afterwards, and others are answered."""
    rng, port = random.Random(0), int(served.url.rpartition(":")[2])

    async def kill():
        body = json.dumps({**LONG, "stream": rng.random() < 0.5, "n": rng.randint(1, 2)}).encode()
        sent = write_head(len(body)) + body
        await asyncio.sleep(rng.random())
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent[: rng.randrange(len(sent)) if rng.random() < 0.3 else None])
        await asyncio.sleep(rng.random())
        writer.transport.abort()

    async def run():
        before = await ask(port)
        await asyncio.gather(*(kill() for _ in range(100)))
        is_free = is_idle(served.engine)
        return is_free, before, await ask(port)

    is_free, before, after = asyncio.run(run())
    texts = [json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] for answer in (before, after)]
    assert is_free and texts[0] == texts[1] and not served.server.driver.rows
