"""Completions that must have a form: JSON of a schema, calls of tools with theirs. Masks of tokens are llguidance's.

A grammar (Lark, as llguidance reads it) describes the whole completion, thoughts and tags of tool calls included.
"""

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..chat import Tokenizer, template
from ..chat.template import Mark
from ..errors import UsageError
from ..generation.constraint import Constraint

ANY = "/(?s:.*)/"
CALLS = f"<{template.DSML}function_calls>\n"
CALLS_END = template.CALLS_END.removeprefix(template.LINE)
IN_TEXT = (template.THINK_END, template.DSML)
"""Special tokens that are also text of a completion; others never occur in one."""


class _Matcher:
    """A grammar and how far a row has come in it."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """Return whether each token may come next, bool [V]. Raises UsageError if the grammar is too complex."""
        bias_V = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        if self._matcher.is_error():
            raise UsageError(f"the form that was asked for cannot be kept: {self._matcher.get_error()}")
        return bias_V > 0

    def add(self, token: int) -> None:
        """Take the token that came."""
        self._matcher.consume_token(token)

    def __deepcopy__(self, _: Any) -> "_Matcher":
        return _Matcher(self._matcher.deep_copy())


class Vocabulary:
    """A tokenizer as llguidance knows it."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self.eos_token_id, self.bos_token_id, self._tokenizer = end_ids[0], None, tokenizer
        self.special_token_ids = [i for text, i in tokenizer.specials.items() if text not in IN_TEXT]
        self._end_ids = list(end_ids)

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises TypeError for bytes, which llguidance tries first."""
        pieces = re.split(f"({'|'.join(IN_TEXT)})", text)
        return self._tokenizer.encode_pieces([Mark(piece) if piece in IN_TEXT else piece for piece in pieces])

    @functools.cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each token, none for ids that stand for no token."""
        unused, size = set(self._tokenizer.unused), self._tokenizer.vocab_size
        return [b"" if i in unused else self._tokenizer.bytes_of([i]) for i in range(size)]

    @functools.cached_property
    def _known(self) -> Any:
        try:
            library = importlib.import_module("llguidance")
        except ImportError as error:
            reason = f"JSON schemas, strict tools and required calls need the llguidance library ({error})"
            raise UsageError(f"{reason}: pip install 'dsv32-jax[serve]', or leave them out") from error
        wrapped = library.TokenizerWrapper(self)
        return library, library.LLTokenizer(wrapped, n_vocab=len(self.tokens), eos_token=self._end_ids)

    def compile(self, grammar: str) -> Callable[[], Constraint]:
        """Return what makes a constraint for each row. Raises UsageError for a grammar that llguidance cannot keep."""
        library, tokenizer = self._known
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the form that was asked for is not supported: {matcher.get_error():.400}")
        return lambda: _Matcher(matcher.deep_copy())


def write_grammar(
    *,
    thinking: bool,
    schema: Mapping[str, Any] | None,
    tools: Sequence[Mapping],
    must_call: bool,
    most_calls: int | None,
) -> str:
    """Return the grammar of a completion.

    It begins with thoughts if the model thinks. Then comes text, or JSON of the `schema` if there is one. Text may go
    on with calls of the `tools`, at most `most_calls` (None: any number); if it `must_call` the calls come at once.
    """
    rules = [f"content: %json {json.dumps(schema)}", f"lead: {_quote(template.LEAD + CALLS)}"]
    if schema is None:
        rules[0] = f"content: FREE\nFREE: {ANY} & ~/(?s:.*)<{template.DSML}(?s:.*)/"
    if schema is None and not must_call:
        rules[1] = f"lead[suffix={_quote(CALLS)}]: {ANY}"
    rules += [f"thoughts[suffix={_quote(template.THINK_END)}]: {ANY}"] * thinking
    calls = [_write_call(rules, f"t{i}", tool["function"]) for i, tool in enumerate(tools)]
    answers = [*([] if must_call else ["content"]), *(["lead calls"] if calls else [])]
    if calls:  # a line break of its own behind each call: the lexer never takes back what it has read
        rules.append(f"calls: (call {_quote(template.LINE)}){'' if most_calls == 1 else '+'} {_quote(CALLS_END)}")
        rules.append(f"call: {' | '.join(calls)}")
    return "\n".join([f"start: {'thoughts ' * thinking}answer", f"answer: {' | '.join(answers)}", *rules])


def _write_call(rules: list[str], name: str, function: Mapping[str, Any]) -> str:
    """Add the rules of a call to a function, and return the name of the first."""
    head, end = template.INVOKE + function["name"] + template.INVOKE_NAMED, template.INVOKE_END.removeprefix("\n")
    schema = function.get("parameters") or {}
    if not function.get("strict"):
        rules += [
            f'{name}_key: {_quote(template.PARAMETER)} /[^"\\n]+/',
            f"{name}_string: {_quote(template.PARAMETER_STRING)} {name}_text",
            f"{name}_text[suffix={_quote(template.PARAMETER_END)}]: {ANY}",
            f"{name}_other: {_quote(template.PARAMETER_JSON)} {name}_json {_quote(template.PARAMETER_END)}",
            f"{name}_json: %json {{}}",
            f"{name}_parameter: {name}_key ({name}_string | {name}_other) {_quote(template.LINE)}",
            f"{name}: {_quote(head)} {name}_parameter* {_quote(end)}",
        ]
        return name
    if schema.get("additionalProperties", True) is not False and schema:
        raise UsageError(f"the strict tool {function['name']!r} needs additionalProperties: false")
    parts, required = [], schema.get("required", ())
    for i, (key, value) in enumerate((schema.get("properties") or {}).items()):
        shared = {part: schema[part] for part in ("$defs", "definitions") if part in schema}
        parameter = _write_parameter(rules, f"{name}_{i}", key, value, shared)
        parts.append(f"({parameter} {_quote(template.LINE)})" + ("" if key in required else "?"))
    rules.append(f"{name}: {_quote(head)} {' '.join(parts) or _quote(template.LINE)} {_quote(end)}")
    return name


def _write_parameter(rules: list[str], name: str, key: str, schema: Any, shared: Mapping[str, Any]) -> str:
    """Add the rules of a parameter of a strict tool: plain strings are written as they are, all else as JSON."""
    head, end = template.PARAMETER + key, _quote(template.PARAMETER_END)
    rest = {part for part in schema if part not in ("type", "description", "title", "default", "enum")}
    if schema.get("type") == "string" and not rest and "enum" in schema:
        values = " | ".join(map(_quote, schema["enum"]))
        rules.append(f"{name}: {_quote(head + template.PARAMETER_STRING)} ({values}) {end}")
    elif schema.get("type") == "string" and not rest:
        rules.append(f"{name}: {_quote(head + template.PARAMETER_STRING)} {name}_text")
        rules.append(f"{name}_text[suffix={end}]: {ANY}")
    else:
        value = f"%json {json.dumps({**shared, **schema})}"
        rules.append(f"{name}: {_quote(head + template.PARAMETER_JSON)} {name}_json {end}")
        rules.append(f"{name}_json: {value}")
    return name


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
