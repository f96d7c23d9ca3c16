"""The fields of a request's body: checked one by one, and the errors that name them."""

from collections.abc import Collection, Mapping
from typing import Any

from ..chat.messages import describe_type
from ..errors import CheckpointError, listing, pluralize, unknown
from ..system.files import JsonLimits, parse_json

LIMITS = JsonLimits(objects=200_000, lists=200_000, commas=4_000_000)

SAYS_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
NEUTRAL = {"parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "best_of": 1}
"""Values with which a field asks for what is done anyway."""

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""

KINDS = {bool: "true or false", int: "an integer", str: "a string", list: "a list", dict: "an object"}


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


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body."""
    try:
        parsed = parse_json(body, LIMITS)
    except CheckpointError as error:
        raise ApiError(400, f"the body is {error}") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body must be a JSON object, not {describe_type(parsed)}")
    return parsed


def require_known(
    body: Mapping[str, Any], known: Collection[str], place: str = "the request", needs: Collection[str] = ()
) -> None:
    """Raise ApiError that lists the fields that are not known, unless they say nothing, and what is missing where the
    body has none of the fields that it `needs` one of."""
    given = [name for name, value in body.items() if value not in SAYS_NOTHING and value != NEUTRAL.get(name)]
    if wrong := unknown(given, known):
        text = f"{place} has {pluralize(len(wrong), 'field')} that this server does not support: {listing(wrong)}"
        if needs and not any(name in body for name in needs):
            text += f"; {' or '.join(needs)} is missing"
        raise ApiError(400, text, param=wrong[0].split()[0], code="unsupported_parameter")


def get(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return the field `name`, `default` where it is missing or null. Raises ApiError if it has another type."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ApiError(400, f"{name} must be {KINDS[kind]}, not {describe_type(value)}", param=name)
    return value


def require(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return the field `name`. Raises ApiError if it is missing."""
    if (value := get(body, name, kind)) is None:
        raise ApiError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    return value


def get_alias(body: Mapping[str, Any], names: Collection[str], kind: type) -> Any:
    """Return the one value of a field that has several names. Raises ApiError if two differ."""
    found = {name: value for name in names if (value := get(body, name, kind)) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        raise ApiError(400, f"{' and '.join(found)} are one field, and have different values", param=next(iter(found)))
    return next(iter(found.values()), None)


def join_parts(content: Any, param: str) -> Any:
    """Return the text of a list of text parts, line by line; anything else as it is. Raises ApiError for parts that are
    no text."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{param} may hold parts of type 'text', not {part!r:.60}", param=param)
        texts.append(part["text"])
    return "\n".join(texts)
