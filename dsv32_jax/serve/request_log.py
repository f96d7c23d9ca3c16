"""One line for each request: who asked for what, and what became of it."""

import time
from collections.abc import Callable

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import pluralize

MOST_PATH = 200
"""Characters of a path that are written; clients choose its length."""


class RequestLog:
    """Passes requests on to an application, counts answers by their status, and gives `say` a line for each request
    when it is over, refused ones too."""

    def __init__(self, app: ASGIApp, requests: Counter, say: Callable[[str], None]):
        self._app, self._requests, self._say = app, requests, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.monotonic(), "client left"

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                self._requests.labels(status).inc()
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            path = scope["raw_path"].decode("ascii", "backslashreplace")  # still quoted: it cannot break the line
            shown = path if len(path) <= MOST_PATH else f"{path[:MOST_PATH]}..."
            tokens = scope["state"].get("tokens")
            made = "" if tokens is None else f", {pluralize(tokens, 'token')}"
            seconds = time.monotonic() - begun
            when, client = time.strftime("%H:%M:%S"), scope["client"][0]
            self._say(f"{when} {client} {scope['method']} {shown} {status}{made}, {seconds:.1f} s")
