"""From the body of a request to what the engine is asked: prompts, sampling and limits, all checked."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..chat import Detokenizer, Prompt, Tokenizer, prepare
from ..chat.messages import require_content
from ..generation.constraint import Constraint
from ..generation.engine import Engine
from ..generation.options import Sampling
from ..generation.pages import PAGE
from ..generation.request import Request, validate_for
from ..generation.result import Token
from ..generation.score import score
from . import fields
from .api_error import ApiError
from .fields import get
from .grammar import Vocabulary, write_grammar
from .replay import SampledTurns

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
COMMON = {"model", "stream", "stream_options", "n", "stop", "logprobs", *SAMPLING, *PENALTIES, *fields.LABELS}
PROMPT = {"messages", "tools", "tool_choice", "thinking", "reasoning_effort", "chat_template_kwargs"}
LIMITS = {"max_completion_tokens", "max_tokens"}
CHAT = COMMON | PROMPT | LIMITS | {"top_logprobs", "response_format", "parallel_tool_calls"}
TOKENIZE = PROMPT | {"model", "prompt", "add_special_tokens"}
COMPLETION = COMMON | {"prompt", "max_tokens", "echo"}

DRAWN = {"temperature": 1.0}
"""The sampling of OpenAI's interface, where neither the request nor the checkpoint says otherwise."""

COMPLETION_TOKENS = 16
"""The new tokens of a completion that does not say how many, as OpenAI's."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that was read.

    thinking   whether the model thinks first; None where the prompt is no conversation
    stream     whether tokens are wanted as they come;  usage: and their number at the end
    logprobs   whether log-probabilities are wanted
    echo       the tokens of each prompt if they are wanted before its completions; the first has no log-probability
    """

    model: str
    request: Request
    thinking: bool | None
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    echo: Sequence[Sequence[Token]] = ()


class Reader:
    """Reads requests for one model.

    name      what clients call it
    defaults  sampling parameters where a request gives none
    turns     tool calls that were sampled here
    room      the most tokens of a prompt and its answer
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer, defaults: Mapping[str, Any]):
        self.name, self.engine, self.tokenizer = name, engine, tokenizer
        self.defaults, self.turns = {**DRAWN, **defaults}, SampledTurns(tokenizer)
        self.vocabulary = Vocabulary(tokenizer, engine.model.cfg.eos_token_id)
        self.room = min(engine.capacity, len(engine.core.loop.scheduler.pools[0].users) * PAGE)

    def read_chat(self, body: Mapping[str, Any]) -> Ask:
        """Return what a body of /v1/chat/completions asks for. Raises ApiError and UsageError."""
        fields.require_known(body, CHAT, needs=("messages",))
        schema, thinking = fields.read_format(body), fields.read_thinking(body)
        prompt = self._prepare(body, schema)
        logprobs, top = get(body, "logprobs", bool, False), get(body, "top_logprobs", int, 0)
        if top and not logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        limit = fields.get_alias(body, ("max_completion_tokens", "max_tokens"), int)
        constraint = self._constrain(body, thinking, schema)
        request = self.ask(body, [prompt.ids], limit, top_logprobs=top, constraint=constraint)
        return Ask(self.name, request, thinking, *fields.read_stream(body), logprobs)

    def read_completion(self, body: Mapping[str, Any]) -> Ask:
        """Return what a body of /v1/completions asks for. Raises ApiError and UsageError."""
        fields.require_known(body, COMPLETION, needs=("prompt",))
        top, echo = get(body, "logprobs", int), get(body, "echo", bool, False)
        prompts = [self._read_prompt(one) for one in fields.split_prompts(body.get("prompt"))]
        request = self.ask(body, prompts, get(body, "max_tokens", int, COMPLETION_TOKENS), top_logprobs=top or 0)
        echoed = self._score(prompts, top) if echo else ()
        return Ask(self.name, request, None, *fields.read_stream(body), top is not None, echoed)

    def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tokens of the prompt or the messages in a body; with add_special_tokens: false those of a piece of
        text, in which special tokens are themselves. Raises ApiError and UsageError."""
        fields.require_known(body, TOKENIZE, needs=("prompt", "messages"))
        text = get(body, "prompt", str)
        if text is None:
            ids = self._prepare(body).ids
        elif get(body, "add_special_tokens", bool, True):
            ids = self._read_prompt(text)
        else:
            ids = self.tokenizer.encode(text, allow_special=True)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.room}

    def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text of the tokens in a body. Raises ApiError and UsageError."""
        fields.require_known(body, ("model", "tokens"), needs=("tokens",))
        return {"prompt": self.tokenizer.decode(fields.require(body, "tokens", list))}

    def ask(self, body: Mapping[str, Any], prompts: list[list[int]], limit: int | None, **options: Any) -> Request:
        """Return the request for the engine, with the sampling that the body asks for and up to `limit` new tokens
        (None: as many as the context holds). Raises ApiError and UsageError."""
        if (model := get(body, "model", str, self.name)) != self.name:
            text = f"there is no model {model!r:.100} here; use {self.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        longest = max(map(len, prompts))
        if longest + (1 if limit is None else limit) > self.room:
            wanted = "" if limit is None else f", and {limit} new ones are wanted"
            text = f"the context holds {self.room} tokens; the prompt has {longest}{wanted}"
            raise ApiError(400, text, code="context_length_exceeded")
        limits = [self.room - len(prompt) if limit is None else limit for prompt in prompts]
        given = {name: body[name] for name in (*SAMPLING, *PENALTIES) if body.get(name) is not None}
        if (bias := get(body, "logit_bias", dict)) is not None:
            given["logit_bias"] = {fields.read_id(token): value for token, value in bias.items()}
        sampling = Sampling(**{"seed": secrets.randbits(63), **self.defaults, **given})
        own = {"capacity": self.engine.capacity, "cache_dtype": self.engine.cache_dtype, "draft": self.engine.draft}
        given = {"max_new_tokens": limits, "n": get(body, "n", int, 1), "stop": body.get("stop") or ()}
        return validate_for(self.engine.model, prompts, sampling, tokenizer=self.tokenizer, **given, **options, **own)

    def _prepare(self, body: Mapping[str, Any], schema: Mapping[str, Any] | None = None) -> Prompt:
        """Return the prompt of the messages in a body; the model is told the schema of its answer."""
        messages = [self._read_message(message, i) for i, message in enumerate(fields.require(body, "messages", list))]
        tools = None if body.get("tool_choice") == "none" else fields.read_tools(body)
        if schema and schema != fields.ANY_OBJECT:
            is_first = messages and isinstance(messages[0], dict) and messages[0].get("role") == "system"
            head = messages.pop(0) if is_first else {"role": "system"}
            messages.insert(0, {**head, "response_format": schema})
        require_content(messages)
        return prepare(messages, self.tokenizer, thinking=fields.read_thinking(body), tools=tools)

    def _constrain(
        self, body: Mapping[str, Any], thinking: bool, schema: Mapping[str, Any] | None
    ) -> Callable[[], Constraint] | None:
        """Return what makes the constraints of a conversation: a schema of the answer, and the form of tool calls."""
        tools, choice = fields.read_tools(body), body.get("tool_choice") or "auto"
        if isinstance(choice, dict):
            name = fields.require(fields.require(choice, "function", dict), "name", str)
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            is_forced = True
        elif choice in ("auto", "none", "required"):
            tools, is_forced = [] if choice == "none" else tools, choice == "required"
        else:
            text = "tool_choice must be 'auto', 'none', 'required' or a function"
            raise ApiError(400, f"{text}, not {choice!r:.100}", param="tool_choice")
        if is_forced and not tools:
            raise ApiError(400, "tool_choice asks for a call, but there is no such tool", param="tool_choice")
        most = 1 if isinstance(choice, dict) or body.get("parallel_tool_calls") is False else None
        is_strict = any(tool["function"].get("strict") for tool in tools)
        if schema is None and not is_forced and not is_strict and not (tools and most):
            return None
        return self.vocabulary.compile(
            write_grammar(thinking=thinking, schema=schema, tools=tools, must_call=is_forced, most_calls=most)
        )

    def _score(self, prompts: Sequence[Sequence[int]], top: int | None) -> list[list[Token]]:
        """Return the tokens of prompts, with their log-probabilities unless `top` is None. The engine has most of the
        memory, so prompts are read one after the other."""
        scores: Any = [([0.0] * len(prompt), [()] * len(prompt)) for prompt in prompts]
        if top is not None:
            made = score(self.engine.model, prompts, top_logprobs=top, batch_size=1)
            scores = zip(made.logprobs, made.top_logprobs, strict=True)
        found = []
        for prompt, (logprobs, tops) in zip(prompts, scores, strict=True):
            text = Detokenizer(self.tokenizer)
            said = [text.add([token]) for token in prompt]
            said[-1] += text.end()
            each: Any = zip(prompt, [None, *logprobs], said, [(), *tops], strict=False)
            found.append([Token(token, logprob, None, piece, top) for token, logprob, piece, top in each])
        return found

    def _read_message(self, message: Any, index: int) -> Any:
        if not isinstance(message, dict):
            return message
        content = fields.join_parts(message.get("content"), f"messages[{index}].content")
        return self.turns.restore({**message, "content": content})

    def _read_prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return prepare(prompt, self.tokenizer).ids
        return self.tokenizer.check_ids(prompt, "tokens of the prompt")
