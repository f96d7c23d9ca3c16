"""Connections to clients, and which of them are let in. Uvicorn lets them send the head of a request, and take its
answer, as slowly as they like; here both have a limit."""

import asyncio
import dataclasses
import hashlib
import hmac
import math
import os
import signal
from collections.abc import Callable, Collection
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import pluralize
from ..system import interrupts
from .api_error import ApiError, write_error

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a client may use: seconds to send the head of a request, bytes of a body, seconds to send that, and
    seconds for an answer; and the seconds after which a stream without news says that it is alive."""

    head_seconds: float = 10
    body: int = 32 << 20
    body_seconds: float = 60
    seconds: float = 3600
    keep_alive: float = 15


class KeyCheck:
    """Lets only requests in that hold one of the keys; any may ask /health. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Collection[str]):
        self.app, self._hashes = app, [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] != "/health" and self._hashes:
            headers = Request(scope).headers
            given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
            if not sum(hmac.compare_digest(_hash(given), known) for known in self._hashes):
                refused = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                return await write_error(scope, refused)(scope, receive, send)
        await self.app(scope, receive, send)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Connection(H11Protocol):
    """One connection, which is closed where the head of a request takes more than `head_seconds`."""

    def __init__(self, *args: Any, head_seconds: float, app_state: dict[str, Any], **options: Any):
        super().__init__(*args, app_state={**app_state, "connection": self}, **options)
        self._head_seconds, self._timer = head_seconds, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait for the head of the first request."""
        super().connection_made(transport)
        self._socket = transport
        self.wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self.stop_waiting()
        super().connection_lost(exc)

    def wait_for_head(self) -> None:
        """Wait for the head of the next request."""
        self._timer = asyncio.get_running_loop().call_later(self._head_seconds, self._refuse)

    def stop_waiting(self) -> None:
        """The head is there, or nobody is."""
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """Close the connection without sending what the client has not taken."""
        self._socket.abort()

    def _refuse(self) -> None:
        if self._socket.is_closing() or self._socket.get_write_buffer_size():
            self.abort()  # the client has not even taken its last answer
        else:
            self._socket.write(TOO_SLOW)
            self._socket.close()


class TimeLimit:
    """Lets an application have `seconds` for a request, then aborts its connection."""

    def __init__(self, app: ASGIApp, seconds: float):
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        connection: Connection = scope["state"]["connection"]
        connection.stop_waiting()
        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            connection.abort()
        finally:
            connection.wait_for_head()


class DrainingServer(uvicorn.Server):
    """A server that says, with `say`, what Ctrl-C waits for; a second Ctrl-C ends the process at once, since a program
    that compiles can be stopped in no other way. `count` returns how many answers are not finished."""

    def __init__(self, config: uvicorn.Config, count: Callable[[], int], say: Callable[[str], None]):
        super().__init__(config)
        self._count, self._say = count, say

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: finish what is begun, or end the process."""
        if sig == signal.SIGINT and self.should_exit:
            os.write(2, b"interrupted\n")
            os._exit(interrupts.EXIT_CODE)
        super().handle_exit(sig, frame)
        if left := self._count():
            again = "Ctrl-C again" if sig == signal.SIGINT else "Ctrl-C"
            self._say(f"finishing {pluralize(left, 'answer')}; {again} cuts {'it' if left == 1 else 'them'} off")


def configure(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Return the configuration of a server whose clients keep these limits. To take the end of its answer, one has as
    long as to send a body."""
    seconds = limits.body_seconds + limits.seconds + limits.body_seconds
    http: Any = partial(Connection, head_seconds=limits.head_seconds)
    return uvicorn.Config(
        TimeLimit(app, seconds),
        http=http,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(seconds),
    )
