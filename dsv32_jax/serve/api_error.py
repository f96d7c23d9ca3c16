"""Errors as clients see them, in the words of OpenAI's interface or Anthropic's."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from ..errors import CapacityError, UsageError
from .driver import Busy

CLOSE = {"connection": "close"}
"""Said where the rest of a body will not be read."""

HEADERS = {429: {"retry-after": "1"}, 408: CLOSE, 413: CLOSE}
"""Headers of errors."""


class ApiError(Exception):
    """An error that a client sees: the HTTP status, OpenAI's type and code for it, and the field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def type(self) -> str:
        """The kind of error, in the words of both interfaces."""
        names = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
        names |= {503: "overloaded_error", 504: "timeout_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error object."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def to_api_error(error: Exception) -> ApiError:
    """Return the error that a client sees."""
    match error:
        case ApiError():
            return error
        case UsageError():
            return ApiError(400, str(error))
        case Busy():
            return ApiError(429, str(error), code="rate_limit_exceeded")
        case HTTPException():
            return ApiError(error.status_code, error.detail)
        case FloatingPointError() | CapacityError():
            return ApiError(500, str(error))
    return ApiError(500, "an error inside the server; its log says more")


def write_error(scope: Scope, error: ApiError) -> Response:
    """Return the response of an error, in the words of the interface that was asked."""
    written = error.to_anthropic() if scope["path"].startswith("/v1/messages") else error.to_openai()
    body = json.dumps(written)  # in ASCII: a message may quote half a surrogate pair
    return Response(body, error.status, HEADERS.get(error.status), "application/json")


async def handle(request: Request, error: Exception) -> Response:
    """Return the response to a request that failed."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return write_error(request.scope, to_api_error(error))
