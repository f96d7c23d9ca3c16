"""The fields of a request's body, checked one by one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..chat.messages import describe_type
from ..errors import CheckpointError, listing, pluralize, unknown
from ..system.files import JsonLimits, parse_json
from .api_error import ApiError

LIMITS = JsonLimits(objects=200_000, lists=200_000, commas=4_000_000)

SAYS_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
NEUTRAL = {"parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "best_of": 1}
"""Values with which a field asks for what is done anyway."""

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""

EFFORTS = {"none": False, "minimal": False, **dict.fromkeys(("low", "medium", "high", "xhigh"), True)}
"""Whether the model thinks at OpenAI's levels of effort: it cannot think more or less."""

ANY_OBJECT = {"type": "object"}

KINDS = {bool: "true or false", int: "an integer", str: "a string", list: "a list", dict: "an object"}


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


def split_prompts(given: Any) -> Sequence[Any]:
    """Return the prompts of a completion: a text, a list of texts, token ids or a list of lists of them."""
    if isinstance(given, str) or (isinstance(given, list) and given and all(isinstance(i, int) for i in given)):
        return [given]
    if isinstance(given, list) and given and all(isinstance(one, str | list) and one for one in given):
        return given
    raise ApiError(400, "prompt must be text, token ids, or a list of them, none of them empty", param="prompt")


def read_stream(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether tokens are wanted as they come, and usage after them."""
    options = get(body, "stream_options", dict, {})
    require_known(options, {"include_usage"}, "stream_options")
    return get(body, "stream", bool, False), get(options, "include_usage", bool, False)


def read_id(token: str) -> int:
    """Return a token id, which is text where it is a name in JSON."""
    if not token.isdecimal():
        raise ApiError(400, f"logit_bias must map token ids to numbers, not {token!r:.60}", param="logit_bias")
    return int(token)


def read_thinking(body: Mapping[str, Any]) -> bool:
    """Return whether the model thinks first: `thinking`, a boolean or DeepSeek's object, OpenAI's effort, or vLLM's
    template option. Raises ApiError if they differ."""
    given, effort = body.get("thinking"), get(body, "reasoning_effort", str)
    if isinstance(given, dict) and given.get("type") in ("enabled", "disabled") and len(given) == 1:
        given = given["type"] == "enabled"
    if given is not None and not isinstance(given, bool):
        text = 'thinking must be true, false, {"type": "enabled"} or {"type": "disabled"}'
        raise ApiError(400, text, param="thinking")
    if effort is not None and effort not in EFFORTS:
        text = f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort!r:.60}"
        raise ApiError(400, text, param="reasoning_effort")
    options = get(body, "chat_template_kwargs", dict, {})
    require_known(options, {"thinking", "enable_thinking"}, "chat_template_kwargs")
    said = {f"chat_template_kwargs.{name}": value for name, value in options.items()}
    said |= {"thinking": given, "reasoning_effort": None if effort is None else EFFORTS[effort]}
    return bool(get_alias(said, said, bool))


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a request, which have the names of functions."""
    tools = get(body, "tools", list, [])
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"tools[{i}] must be an object with a 'function' that has a 'name'", param="tools")
    return tools


def read_format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the JSON schema of the answer; None if it is text."""
    given = get(body, "response_format", dict, {"type": "text"})
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            return require(require(given, "json_schema", dict), "schema", dict)
    text = "response_format must have the type 'text', 'json_object' or 'json_schema'"
    raise ApiError(400, f"{text}, not {given!r:.100}", param="response_format")
