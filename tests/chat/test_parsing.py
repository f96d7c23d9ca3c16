"""A message comes back from its encoding; text with mistakes is read as far as it can be, and never silently."""

import json

import pytest
from hypothesis import example, given, strategies as st

from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.errors import DsvError, UsageError
from tests.chat.dialogues import answers, decoded, texts

USER = [{"role": "user", "content": "go"}]
BOS, EOS = template.BOS, template.EOS
OPEN, CLOSE = "\n\n<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"
HEAD, TAIL = '<｜DSML｜invoke name="f">\n', "\n</｜DSML｜invoke>"
X = '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>'
Y = '<｜DSML｜parameter name="y" string="true">a\nb</｜DSML｜parameter>'
F = ("f", {"x": 1})
WHOLE = f"r</think>c{OPEN}{HEAD}{X}\n{Y}{TAIL}\n{HEAD}{X}{TAIL}{CLOSE}{EOS}"


@pytest.mark.parametrize("thinking", [False, True])
@given(st.data())
def test_a_message_comes_back(thinking, data):
    """Reasoning, content, names and arguments, escapes and all; and there are no warnings."""
    message = data.draw(answers(thinking))
    text = chat.encode([message], thinking=thinking, context=USER)
    found = chat.parse(text, thinking=thinking)
    assert decoded(found) == decoded(message)
    assert chat.parse_lenient(text, thinking=thinking) == (found, [])


def test_the_arguments_are_exact():
    """Big whole numbers stay whole, and the JSON text keeps the format's spaces."""
    function = {"name": "f", "arguments": '{"a":123456789012345678901234567890,"b":[1,"é"],"c":1e-7}'}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    found = chat.parse(chat.encode([message], thinking=False, context=USER), thinking=False)
    arguments = found["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"a": 123456789012345678901234567890, "b": [1, "é"], "c": 1e-07}'


@pytest.mark.parametrize(
    ("text", "code", "position"),
    [
        ("Hello", "invalid_summary", 5),
        (f"</think>hi{EOS}", "special_token_in_content", 0),
        (f"hi <｜DSML｜x{EOS}", "special_token_in_content", 4),
        (f"c{OPEN}{HEAD}{X}{TAIL}{CLOSE}{EOS}{EOS}", "content_at_end", None),
        (f"c{OPEN}<｜DSML｜invoke name=f>\n{TAIL}", "tool_name_format", None),
        (f"c{OPEN}oops", "tool_call_format", None),
        (f"c{OPEN}", "missing_special_token", None),
    ],
)
def test_what_the_strict_parser_refuses(text, code, position):
    """With a code, and where it was."""
    with pytest.raises(chat.ParsingError, match="parse_lenient") as caught:
        chat.parse(text, thinking=False)
    assert isinstance(caught.value, DsvError) and caught.value.exit_code == 3
    assert caught.value.code == code and position in (None, caught.value.position)


def test_line_breaks_that_the_reference_overlooks():
    """One before the end of a tag's name or of a parameter's tag is not part of what they hold."""
    text = f"{OPEN}{HEAD}\n{X.replace('1</', '1<' + chr(10) + '/')}{TAIL}{CLOSE}{EOS}"
    assert functions(chat.parse(text, thinking=False)) == [F]


@pytest.mark.parametrize("parse", [chat.parse, chat.parse_lenient])
def test_what_is_no_completion(parse):
    """Bytes, token ids, and a mode by its name."""
    for text, thinking in ((b"x", True), ([1, 2], True), (None, True), ("x", "thinking")):
        with pytest.raises(UsageError):
            parse(text, thinking=thinking)


def functions(message: dict) -> list:
    return decoded(message)["tool_calls"]


LOOSE = [
    ("r</think>c", "r", "c", [], ["without the end-of-sentence"]),
    ("r", "r", "", [], ["not closed: there is no answer"]),
    (f"r{EOS}", "r", "", [], ["not closed: there is no answer"]),
    (f"<think>r</think>c{EOS}", "r", "c", [], ["second <think>"]),
    (f"r</think>c{EOS}xyz", "r", "c", [], ["3 characters after"]),
    (f"r</think>a</think>b{EOS}", "r", "a</think>b", [], ["holds </think>"]),
    (f"r{OPEN}{HEAD}{X}{TAIL}{CLOSE}{EOS}", "r", "", [F], ["not closed before the tool calls"]),
    (f"q{OPEN}{HEAD}{X}{TAIL}{CLOSE}</think>c{EOS}", f"q{OPEN}{HEAD}{X}{TAIL}{CLOSE}", "c", [], ["holds ｜DSML｜"]),
    (f"r</think>c{OPEN}{HEAD}{X}{TAIL}{CLOSE}", "r", "c", [F], ["without the end-of-sentence"]),
    (f"r</think>c{OPEN}{HEAD}{X}{TAIL}{EOS}", "r", "c", [F], ["calls are not closed"]),
    (f"r</think>c{OPEN}{HEAD}{X}{TAIL}\n{HEAD}{X}", "r", "c", [F], ["dropped tool call 1: it is cut off"]),
    (f"r</think>c{OPEN}{HEAD}{X}\n{Y[:-20]}", "r", "c", [], ["dropped tool call 0: it is cut off"]),
    (f"r</think>c{OPEN}{HEAD}{X}{TAIL}{CLOSE} done{EOS}", "r", "c done", [F], ["appended to the content"]),
    (f"r</think>c{OPEN[1:]}{HEAD}{X}{TAIL}{CLOSE}{EOS}", "r", "c", [F], ["opening tag of the tool calls is malformed"]),
    (f"r</think>c\n\n{HEAD}{X}{TAIL}{EOS}", "r", "c", [F], ["malformed", "are not closed"]),
    (f"r</think>c{OPEN}  {HEAD} {X} {TAIL} {CLOSE}{EOS}", "r", "c", [F], ["spacing"]),
    (f'r</think>c{OPEN}{HEAD}{{"x": 1}}{TAIL}{CLOSE}{EOS}', "r", "c", [F], ["as a JSON object"]),
    (f"r</think>c{OPEN}{HEAD}oops{TAIL}{CLOSE}{EOS}", "r", "c", [], ["neither parameters nor"]),
    (f"r</think>c{OPEN}{HEAD}[1]{TAIL}{CLOSE}{EOS}", "r", "c", [], ["neither parameters nor"]),
    (f"r</think>c{OPEN}<｜DSML｜invoke>\n{X}{TAIL}{CLOSE}{EOS}", "r", "c", [], ["has no name"]),
    (f"r</think>c{OPEN}{HEAD}{X}\n{X}{TAIL}{CLOSE}{EOS}", "r", "c", [], ["'x' appears twice"]),
    (f"r</think>c{OPEN}{HEAD}{X} and{TAIL}{CLOSE}{EOS}", "r", "c", [], ["text outside its parameters"]),
    (f"r</think>c{OPEN}{HEAD}so {X}{TAIL}{CLOSE}{EOS}", "r", "c", [], ["text outside its parameters"]),
    (f"r</think>c{OPEN}{HEAD}{X.replace('1', 'one')}{TAIL}{CLOSE}{EOS}", "r", "c", [("f", {"x": "one"})], ["not JSON"]),
    (f"r</think>c{OPEN}{HEAD}{X.replace('false', 'no')}{TAIL}{CLOSE}{EOS}", "r", "c", [F], ["'x' is not marked"]),
    (
        f"r</think>c{OPEN}{HEAD}{X.replace(' name=', ' id=')}{TAIL}{CLOSE}{EOS}",
        "r",
        "c",
        [],
        ["a parameter has no name"],
    ),
    (f"r</think>c{OPEN}{HEAD}{X.removesuffix('</｜DSML｜parameter>')}{TAIL}{CLOSE}{EOS}", "r", "c", [], ["not closed"]),
]


@pytest.mark.parametrize(("text", "reasoning", "content", "calls", "said"), LOOSE)
def test_warnings(text, reasoning, content, calls, said):
    """What a model gets wrong, what is made of it, and the words for it."""
    message, warnings = chat.parse_lenient(text, thinking=True)
    assert (message["reasoning_content"], message["content"], functions(message)) == (reasoning, content, calls)
    assert all(any(part in words for words in warnings) for part in said), warnings


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "said"),
    [
        (f"</think>c{EOS}", "", "c", "second </think>"),
        (f"<think>r</think>c{EOS}", "r", "c", "reasoning in chat mode"),
        (f"use <｜DSML｜function_calls> so{EOS}", "", "use <｜DSML｜function_calls> so", "holds ｜DSML｜"),
        ("", "", "", "without the end-of-sentence"),
    ],
)
def test_warnings_in_chat_mode(text, reasoning, content, said):
    message, warnings = chat.parse_lenient(text, thinking=False)
    assert (message["reasoning_content"], message["content"], message["tool_calls"]) == (reasoning, content, [])
    assert said in "; ".join(warnings)


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_text_that_ends_by_length(length):
    """Cut anywhere, it gives only whole calls, and says that it was cut."""
    message, warnings = chat.parse_lenient(WHOLE[:length], thinking=True)
    whole = [("f", {"x": 1, "y": "a\nb"}), F]
    assert functions(message) == whole[: WHOLE[:length].count("</｜DSML｜invoke")]
    assert warnings and message["reasoning_content"][:1] == "r"[:length]


P_END, I_END = "</｜DSML｜parameter>", "</｜DSML｜invoke>"
HOLDING = [
    f'END = "{P_END}"\nprint(END)',
    f"{P_END}",
    f"a{P_END}b{P_END}c",
    f"{P_END}\nx{I_END}",
    f"{HEAD}{X}{TAIL}{CLOSE}",
    f"quoted: '{OPEN}{HEAD}{X}\n{Y}{TAIL}{CLOSE}' and more",
    f"print('{P_END}{TAIL}{CLOSE}') and {OPEN}{HEAD}",
    f"{P_END}{TAIL}{CLOSE} done",
]
"""Values that hold the tag which closes them, as prompts, parsers and their tests do."""


@pytest.mark.parametrize("value", HOLDING)
@pytest.mark.parametrize("more", ["", "\n" + X, f"\n{X}{TAIL}\n{HEAD}{Y}"])
def test_a_value_that_holds_its_closing_tag(value, more):
    """The reading counts in which everything closes: nothing of the value is lost."""
    held = f'<｜DSML｜parameter name="text" string="true">{value}{P_END}'
    text = f"r</think>c{OPEN}{HEAD.replace('f', 'write')}{held}{more}{TAIL}{CLOSE}{EOS}"
    message, _ = chat.parse_lenient(text, thinking=True)
    (name, arguments), *others = functions(message)
    assert (name, arguments) == ("write", {"text": value, **({"x": 1} if more else {})})
    assert message["content"] == "c" and len(others) == more.count("invoke name")
    cut, warnings = chat.parse_lenient(text.replace(CLOSE + EOS, ""), thinking=True)
    assert all(call in functions(message) for call in functions(cut)) and warnings
    assert not functions(chat.parse_lenient(text.replace(P_END, ""), thinking=True).message)


UNSAYABLE = ['["\\ud83d"]', "NaN", "-Infinity", '{"a": [1e999]}', "-1e999", '{"a": 1, "a": 2}', '{"\\udc00": 1}']


@pytest.mark.parametrize("value", UNSAYABLE)
def test_values_that_could_not_be_said_again(value):
    """They are no JSON: read as strings with a warning, or not at all, and refused where messages are encoded."""
    whole = f"r</think>c{OPEN}{HEAD}{X.replace('1', value)}{TAIL}{CLOSE}{EOS}"
    message, warnings = chat.parse_lenient(whole, thinking=True)
    assert functions(message) == [("f", {"x": value})] and warnings == [
        "the value of 'x' is not JSON; read as a string"
    ]
    assert value in chat.encode([message], thinking=True, context=USER)
    bare = f'r</think>c{OPEN}{HEAD}{{"x": {value}}}{TAIL}{CLOSE}{EOS}'
    message, warnings = chat.parse_lenient(bare, thinking=True)
    assert functions(message) == [] and "neither parameters nor" in warnings[0]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"x": {value}}}'}}]}
    with pytest.raises(chat.EncodingError, match="arguments of the call to 'f' are not JSON"):
        chat.encode([*USER, call], thinking=False)


def test_a_value_that_is_cut_off_behind_a_quoted_end_is_not_run():
    """All that is seen is a whole call with text behind it."""
    held = f'<｜DSML｜parameter name="text" string="true">END = \'{P_END}{TAIL}{CLOSE}\' and mo'
    message, warnings = chat.parse_lenient(f"c{OPEN}{HEAD}{held}", thinking=False)
    assert functions(message) == [] and "dropped the call to f" in "; ".join(warnings)


def test_half_a_surrogate_pair_is_no_text():
    """Tokens cannot say it: it is refused where it comes in, as a completion and as a message."""
    for parse in (chat.parse, chat.parse_lenient):
        with pytest.raises(UsageError, match="surrogate"):
            parse(f"r</think>\ud83d{EOS}", thinking=True)
    with pytest.raises(chat.EncodingError, match="message 0 .user.: .*surrogate"):
        chat.encode([{"role": "user", "content": "\ud83d"}], thinking=True)


WRONG = [f"{X} and", f"{X}\n{X}", f"so {X}", f"{X}\n{Y[:-9]}", f"{X}\n</think>", f"{HEAD}{X}", f"{X}\n{HEAD}"]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("before", ["", f"{HEAD}{X}{TAIL}\n"])
def test_a_call_of_which_anything_was_thrown_away_is_not_run(wrong, before):
    """Whole calls before it are."""
    message, warnings = chat.parse_lenient(f"c{OPEN}{before}{HEAD}{wrong}{TAIL}{CLOSE}{EOS}", thinking=False)
    assert functions(message) == [F] * bool(before) and "dropped tool call" in "; ".join(warnings)


QUOTED = f'<｜DSML｜parameter name="text" string="true">{HEAD}{{}}{TAIL}{CLOSE}</｜DSML｜parameter>'
"""A value that quotes a whole call and the end of all."""


@pytest.mark.parametrize(
    ("more", "end", "said"),
    [("", "", "without the end-of-sentence"), ("\n" + X.replace("1", "one"), EOS, "not JSON"), ("", EOS, None)],
)
def test_a_value_that_quotes_a_call_is_a_value(more, end, said):
    """Nothing in it is run, and nothing of it is lost, however the text around it ends."""
    whole = f"r</think>c{OPEN}{HEAD.replace('f', 'write')}{QUOTED}{more}{TAIL}{CLOSE}"
    message, warnings = chat.parse_lenient(whole + end, thinking=True)
    ((name, arguments),) = functions(message)
    assert (name, arguments["text"], message["content"]) == ("write", f"{HEAD}{{}}{TAIL}{CLOSE}", "c")
    assert said in "; ".join(warnings) if said else not warnings


def test_a_call_in_an_unclosed_value_is_not_run():
    """What follows a value that is not closed may be a part of it."""
    whole = f"r</think>c{OPEN}{HEAD}{QUOTED}{TAIL}{CLOSE}"
    for cut in (whole[: -len(CLOSE)], whole[: -len(CLOSE + TAIL)], whole.replace(f"{CLOSE}</｜DSML｜parameter>", "")):
        message, warnings = chat.parse_lenient(cut, thinking=True)
        assert functions(message) == [] and "dropped tool call" in "; ".join(warnings)
    two = f"r</think>c{OPEN}{HEAD}{X.removesuffix('</｜DSML｜parameter>')}{TAIL}\n{HEAD}{X}{TAIL}{CLOSE}{EOS}"
    message, warnings = chat.parse_lenient(two, thinking=True)
    assert functions(message) == [] and "unclosed parameter" in "; ".join(warnings)


def test_ignored_text_is_reported():
    _, warnings = chat.parse_lenient(f'{OPEN}{HEAD}{{"x": 1}}{TAIL} so it is', thinking=False)
    assert "text outside" in "; ".join(warnings)
    assert chat.parse_lenient(f"{BOS}hi{EOS}", thinking=False).warnings == [
        "ignored a second beginning-of-sentence token"
    ]


fragments = st.sampled_from(
    [
        EOS,
        "</think>",
        "<think>",
        OPEN,
        CLOSE,
        HEAD,
        TAIL,
        X,
        Y,
        "｜DSML｜",
        "<｜DSML｜invoke",
        "</｜DSML｜parameter>",
        "\n",
    ]
)


@given(st.lists(st.one_of(fragments, texts), max_size=12).map("".join), st.booleans())
@example(WHOLE.replace("1", "one"), True)
def test_any_text_can_be_read(text, thinking):
    """All arguments are JSON objects, and where there are no warnings it is what the strict parser reads."""
    message, warnings = chat.parse_lenient(text, thinking=thinking)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in message["tool_calls"])
    if not warnings:
        assert chat.parse(text, thinking=thinking) == message


@pytest.mark.parametrize(
    "part",
    ["<", "\n", " ", '"', EOS, OPEN, HEAD, X, '<｜DSML｜parameter name="', '" string="true">', "</｜DSML｜invoke>"],
)
@pytest.mark.parametrize("start", ["", OPEN + HEAD, OPEN + HEAD + '<｜DSML｜parameter name="'])
def test_long_text_is_read_once(part, start):
    """Both parsers come to an end: no text makes them search it again and again, which takes hours here."""
    text = start + part * (2_000_000 // len(part))
    assert chat.parse_lenient(text, thinking=False).warnings
