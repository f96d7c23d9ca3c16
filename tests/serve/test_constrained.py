"""Answers that must have a form: whatever the model would say, JSON of the schema and calls of the tools come out."""

import json

import openai
import pytest

from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.serve import grammar
from tests.serve.servers import listen, make_server

ASKED = [{"role": "user", "content": "go"}]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["dot", "ring"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}
LOOK = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "enum": ["left", "right"]},
        "n": {"$ref": "#/$defs/few"},
        "why": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["at", "n"],
    "additionalProperties": False,
    "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 3}},
}
STRICT = {"type": "function", "function": {"name": "look", "parameters": LOOK, "strict": True}}
LOOSE = {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}}
DRAWN = {"temperature": 1.5, "n": 3}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client, **body):
    return client.chat.completions.create(model="demo", **{"messages": ASKED, "seed": 4, **DRAWN, **body})


def check_point(value) -> None:
    assert value.keys() == POINT["properties"].keys() and 0 <= value["x"] <= 99 and value["kind"] in ("dot", "ring")


def check_look(call) -> None:
    value = json.loads(call.function.arguments)
    assert call.function.name == "look" and {"at", "n"} <= value.keys() <= {"at", "n", "why"}
    assert value["at"] in ("left", "right") and value["n"] in (1, 2, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client, stream):
    """All of the answer, in a stream too."""
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    made = ask(client, response_format=form, stream=stream)
    texts = ["", "", ""]
    if stream:
        for event in made:
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = [choice.message.content for choice in made.choices]
        assert [choice.finish_reason for choice in made.choices] == ["stop"] * 3
    for text in texts:
        check_point(json.loads(text))


def test_any_object(client):
    """`json_object` is an object, or the beginning of one where the limit comes first."""
    for choice in ask(client, response_format={"type": "json_object"}, max_tokens=40).choices:
        assert choice.message.content.lstrip().startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_calls_that_must_come(client):
    """`required` calls a tool at once; a named one is called once; a strict one has arguments of its schema."""
    named = {"type": "function", "function": {"name": "look"}}
    for body in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False, "tools": [STRICT]}):
        for choice in ask(client, **{"tools": [STRICT, LOOSE], **body}).choices:
            (call,) = choice.message.tool_calls
            check_look(call)
            assert choice.finish_reason == "tool_calls" and not choice.message.content


BEGIN, END = f"so{template.LEAD}{grammar.CALLS}", "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
LOOKS, WAITS = '<｜DSML｜invoke name="look">\n', '<｜DSML｜invoke name="wait">\n'


def parameter(name: str, value: str, is_string: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{is_string}">{value}</｜DSML｜parameter>\n'


ACCEPTED = [
    (BEGIN + LOOKS + parameter("at", "left", "true") + parameter("n", "2", "false") + END, True),
    (BEGIN + WAITS + parameter("a", "[1]", "false") + parameter("b", "x\n", "true") + END, True),
    ("only text, with < and </b>", True),
    (BEGIN + LOOKS + parameter("at", "up", "true"), False),
    (BEGIN + LOOKS + parameter("at", "left", "true") + END, False),
    (BEGIN + '<｜DSML｜invoke name="run">', False),
    ("so <｜DSML｜invoke", False),
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("text, is_accepted", ACCEPTED)
def test_what_a_grammar_accepts(served, tokenizer, text, is_accepted, thinking):
    """Text, or calls of the tools as the encoder writes them; after thoughts, which are free."""
    text = f"hm, <｜DSML｜what?{template.THINK_END}" * thinking + text
    written = grammar.write_grammar(
        thinking=thinking, schema=None, tools=[STRICT, LOOSE], must_call=False, most_calls=None
    )
    row = served.server.reader.vocabulary.compile(written)()
    end = served.engine.model.cfg.eos_token_id[0]
    for token in [*tokenizer.encode(text, allow_special=True), end]:
        if not row.allowed()[token]:
            assert not is_accepted, (text, tokenizer.decode([token]))
            return
        row.add(token)
    assert is_accepted


def test_what_the_encoder_writes_is_accepted(served, tokenizer):
    """A call of a strict tool as the encoder writes it."""
    calls = [
        {"type": "function", "function": {"name": "look", "arguments": json.dumps(given)}}
        for given in ({"at": "left", "n": 1}, {"at": "right", "n": 3, "why": None})
    ]
    text = chat.encode([{"role": "assistant", "content": "", "tool_calls": calls}], thinking=False, context=ASKED)
    test_what_a_grammar_accepts(served, tokenizer, text.removesuffix(template.EOS), True, False)


def test_the_model_is_told(served, tokenizer):
    """The schema stands in the prompt, where the format has a place for it."""
    form = {"type": "json_schema", "json_schema": {"schema": POINT}}
    body = {"model": "demo", "response_format": form}
    for head in ([], [{"role": "system", "content": "Be brief."}]):
        request = served.server.reader.read_chat({**body, "messages": [*head, *ASKED]}).request
        content = head[0]["content"] if head else ""
        system = {"role": "system", "content": content, "response_format": POINT}
        assert request.prompts == [chat.prepare([system, *ASKED], tokenizer).ids]


@pytest.mark.parametrize(
    "body, message",
    [
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "shape"}}}}, "not supported"),
        ({"tools": [STRICT], "tool_choice": {"type": "function", "function": {"name": "run"}}}, "no such tool"),
        ({"tool_choice": "required"}, "no such tool"),
        ({"tools": [{"function": {"parameters": {}}}]}, r"tools\[0\]"),
        ({"tools": [{"type": "function", "function": {**LOOSE["function"], "strict": True}}]}, "additionalProperties"),
    ],
)
def test_what_is_refused(client, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **body)


def test_drafts_keep_the_form(client, model, tokenizer):
    """The answers are those of a server that drafts nothing."""
    form = {"type": "json_schema", "json_schema": {"schema": POINT}}
    with listen(make_server(model, tokenizer, draft=1).make_app()) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120) as drafting:
            made = [ask(one, response_format=form) for one in (client, drafting)]
    plain, drafted = ([choice.message.content for choice in one.choices] for one in made)
    assert drafted == plain
    for text in drafted:
        check_point(json.loads(text))


def test_without_the_library(served, client, tokenizer, monkeypatch):
    """Refused, with what to do."""
    form = {"response_format": {"type": "json_object"}}
    monkeypatch.setattr(served.server.reader, "vocabulary", grammar.Vocabulary(tokenizer, [1]))
    monkeypatch.setattr(grammar.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(openai.BadRequestError, match=r"llguidance.*pip install 'dsv32-jax\[serve\]'"):
        ask(client, **form)
