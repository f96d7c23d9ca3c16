"""The routes of the server: each request is read, waits for its rows, and is answered whole or as a stream."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..chat import template
from ..errors import COMMAND_LINE, CapacityError, UsageError
from . import fields
from .anthropic_messages import MessagesWriter, count_tokens, read_messages
from .api_error import ApiError, handle, to_api_error
from .choice import Choice
from .connections import KeyCheck, Limits
from .driver import Arrival, Busy, Driver, Job
from .metrics import Metrics
from .openai_objects import ChatWriter, CompletionWriter
from .reading import Ask, Reader
from .request_log import RequestLog

KEEP_ALIVE = ": keep-alive\n\n"
"""A comment of server-sent events, which clients skip."""


class Server:
    """Answers requests with the rows of one engine."""

    def __init__(self, reader: Reader, driver: Driver, limits: Limits):
        self.reader, self.driver, self.limits = reader, driver, limits
        self.metrics, self.started = Metrics(driver.engine), int(time.time())

    def make_app(self, keys: Collection[str] = (), say: Callable[[str], None] = logging.debug) -> ASGIApp:
        """Return the application, which gives `say` a line for each request. Its shutdown ends the engine."""
        routes = [
            Route("/", self.describe),
            Route("/health", self.report_health),
            Route("/metrics", self.report_metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.list_models),
            Route("/v1/chat/completions", self._answer(self.reader.read_chat, ChatWriter), methods=["POST"]),
            Route("/v1/completions", self._answer(self.reader.read_completion, CompletionWriter), methods=["POST"]),
            Route("/v1/messages", self._answer(partial(read_messages, self.reader), MessagesWriter), methods=["POST"]),
            Route("/v1/messages/count_tokens", self._reply(partial(count_tokens, self.reader)), methods=["POST"]),
            Route("/tokenizer_info", self.describe_tokenizer),
            Route("/tokenize", self._reply(self.reader.tokenize), methods=["POST"]),
            Route("/detokenize", self._reply(self.reader.detokenize), methods=["POST"]),
        ]
        known = (ApiError, UsageError, Busy, HTTPException, FloatingPointError, CapacityError)
        handlers: Any = dict.fromkeys((*known, Exception), handle)  # an error that is not known ends the connection

        @contextlib.asynccontextmanager
        async def live(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.driver.close)

        middleware = [Middleware(KeyCheck, keys=keys)]
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=middleware, lifespan=live)
        return RequestLog(app, self.metrics.requests, say)

    async def describe(self, request: Request) -> Response:
        """Say what this is, and what it can be asked."""
        about = {"name": "dsv32_jax", "version": __version__, "model": self.reader.name}
        asked = [f"{max(route.methods - {'HEAD'})} {route.path}" for route in request.app.routes]
        return JSONResponse({**about, "endpoints": asked})

    async def report_health(self, request: Request) -> Response:
        """Say that the server is there."""
        return JSONResponse({"status": "ok"})

    async def report_metrics(self, request: Request) -> Response:
        """Return what was done so far, for Prometheus."""
        return Response(self.metrics.write(), media_type=self.metrics.media_type)

    async def describe_tokenizer(self, request: Request) -> Response:
        """Return the tokens that begin and end a text, as evaluation harnesses ask for them."""
        return JSONResponse({"bos_token": template.BOS, "eos_token": template.EOS})

    async def list_models(self, request: Request) -> Response:
        """Return the one model, in a list unless it is asked for by name."""
        name = self.reader.name
        model = {"id": name, "object": "model", "created": self.started, "owned_by": "dsv32_jax"}
        model["max_model_len"] = self.reader.room
        if (wanted := request.path_params.get("name", name)) != name:
            raise ApiError(404, f"there is no model {wanted!r:.100} here; use {name!r}", code="model_not_found")
        return JSONResponse(model if "name" in request.path_params else {"object": "list", "data": [model]})

    async def read_body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in the body. Raises ApiError where it is too large, too slow, or none."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.body:
                        raise ApiError(413, f"the body is larger than {self.limits.body} bytes")
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.limits.body_seconds:g} seconds") from None
        return await asyncio.to_thread(fields.parse_body, bytes(body))

    def _reply(self, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
        """Return an endpoint that answers a body with `make(body)`."""

        async def reply(request: Request) -> Response:
            COMMAND_LINE.set(False)
            return JSONResponse(await asyncio.to_thread(make, await self.read_body(request)))

        return reply

    def _answer(self, read: Callable[[dict[str, Any]], Ask], make_writer: Any) -> Callable:
        """Return an endpoint that reads a body with `read` and writes with a `make_writer(ask, tokenizer)`."""

        async def answer(request: Request) -> ASGIApp:
            COMMAND_LINE.set(False)
            body = await self.read_body(request)
            ask = await asyncio.to_thread(read, body)
            return Answer(self, ask, make_writer(ask, self.reader.tokenizer), self.driver.submit(ask.request))

        return answer


class Answer:
    """The answer to one request, whose rows are given up when the client goes away."""

    def __init__(self, server: Server, ask: Ask, writer: Any, job: Job):
        self.server, self.ask, self.writer, self.job = server, ask, writer, job
        self.choices = [Choice(row.index, ask.thinking) for row in job.rows]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await run_while_connected(receive, self._send(scope, send))
        finally:
            scope.setdefault("state", {})["tokens"] = sum(len(choice.tokens) for choice in self.choices)
            self.server.driver.leave(self.job)

    async def _send(self, scope: Scope, send: Send) -> None:
        if self.ask.stream:
            headers = {"cache-control": "no-cache"}
            response: Response = StreamingResponse(self._stream(), headers=headers, media_type="text/event-stream")
        else:
            async for _ in self._follow():
                pass
            response = JSONResponse(self.writer.write_whole(self.choices, self.job))
        await response(scope, _wait_forever, send)

    async def _stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream. What fails once it has begun is an event of it."""
        yield self.writer.open(self.choices, self.job)
        try:
            async for events in self._follow():
                yield events
            yield self.writer.close(self.choices, self.job)
        except Exception as error:
            yield self.writer.fail(to_api_error(error))

    async def _follow(self) -> AsyncIterator[str]:
        """Yield events until all rows have ended."""
        limits, left = self.server.limits, len(self.choices)
        deadline = self.job.submitted + limits.seconds
        while left:
            if (seconds := deadline - time.monotonic()) <= 0:
                raise ApiError(504, f"the answer took longer than {limits.seconds:g} seconds")
            news = await self.job.take(min(limits.keep_alive, seconds))
            if news and not any(choice.tokens for choice in self.choices):
                self.server.metrics.first_token.observe(time.monotonic() - self.job.submitted)
            left -= sum(arrival.finish_reason is not None for arrival in news)
            yield "".join(map(self._add, news)) or KEEP_ALIVE

    def _add(self, arrival: Arrival) -> str:
        if arrival.finish_reason == "interrupted":
            raise ApiError(503, "the server is shutting down")
        choice = self.choices[arrival.row]
        pieces = choice.add(arrival)
        if choice.ended:
            self.server.reader.turns.remember(choice, self.ask.request.end_ids)
        return self.writer.add(choice, arrival, pieces) if self.ask.stream else ""


async def _wait_forever() -> Any:
    await asyncio.Event().wait()


async def run_while_connected(receive: Receive, work: Coroutine) -> None:
    """Run `work`, which is cancelled if the client goes away. Raises what it raises."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
