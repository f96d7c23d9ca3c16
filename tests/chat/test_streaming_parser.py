"""A completion that streams: its parts are those of the whole, and no piece of a tag is ever among them."""

import json

import pytest
from hypothesis import given, strategies as st

from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.chat.streaming_parser import ARGUMENTS, CALL, StreamingParser
from tests.chat.dialogues import answers

CALLS = "\n\n<｜DSML｜function_calls>\n"
INVOKE = '<｜DSML｜invoke name="f">\n'
X = '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
CLOSED = "</｜DSML｜invoke>\n</｜DSML｜function_calls>"


def read(text: str, thinking: bool, cuts=()) -> tuple[list[tuple[str, str]], StreamingParser]:
    """The parts of a text that comes in pieces, those of one part joined."""
    parts, found = StreamingParser(thinking=thinking), []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(places, places[1:], strict=False)]
    for part, piece in [*(one for some in pieces for one in parts.add(some)), *parts.end()]:
        if found and found[-1][0] == part and part != CALL:
            found[-1] = (part, found[-1][1] + piece)
        else:
            found.append((part, piece))
    return found, parts


@pytest.mark.parametrize("thinking", [False, True])
@given(data=st.data(), cuts=st.lists(st.integers(0, 2000), max_size=40))
def test_the_parts_are_those_of_the_message(thinking, data, cuts):
    """Whatever a message says, and however its text is cut: what `parse` returns, without a warning."""
    message = data.draw(answers(thinking))
    context = [{"role": "user", "content": "go"}]
    text = chat.encode([message], thinking=thinking, context=context).removesuffix(template.EOS)
    found, parts = read(text, thinking, cuts)
    assert found == read(text, thinking)[0] and not parts.warnings and parts.is_whole
    expected = chat.parse(text + template.EOS, thinking=thinking)
    functions = [call["function"] for call in expected["tool_calls"]]
    wanted = [("reasoning", expected["reasoning_content"]), ("content", expected["content"])]
    wanted += [pair for one in functions for pair in ((CALL, one["name"]), (ARGUMENTS, one["arguments"]))]
    assert found == [pair for pair in wanted if pair[1]]


@pytest.mark.parametrize(
    "thinking, text, parts",
    [
        (False, "plain", [("content", "plain")]),
        (False, "a <b </think> c", [("content", "a <b </think> c")]),
        (True, "why</think>so", [("reasoning", "why"), ("content", "so")]),
        (True, "</think>so", [("content", "so")]),
        (True, "a </thin", [("reasoning", "a </thin")]),
        (False, "look" + CALLS + "<｜DSML｜invoke", [("content", "look")]),
        (False, CALLS, []),
        (True, "x" + CALLS + "</think>y" + CALLS, [("reasoning", "x" + CALLS), ("content", "y")]),
        (False, "a\n\nb<", [("content", "a\n\nb<")]),
    ],
)
@given(cut=st.integers(1, 50))
def test_parts(thinking, text, parts, cut):
    """However the text is cut; what looks like a call in reasoning is reasoning."""
    assert read(text, thinking, range(0, len(text), cut))[0] == parts


@pytest.mark.parametrize(
    "text, arguments, warning",
    [
        (INVOKE + X + "</｜DSML｜inv", '{"x": 1', "is cut off"),
        (INVOKE + '<｜DSML｜parameter name="x" string="true">a"b<', '{"x": "a\\"b', "is cut off"),
        (INVOKE + X + X + CLOSED, '{"x": 1', "'x' appears twice"),
        (INVOKE + X + "and\n" + CLOSED, '{"x": 1', "text beside its parameters"),
        (INVOKE + "<｜DSML｜parameter x=1>", "", "malformed or misplaced"),
        (INVOKE + INVOKE + X + CLOSED, "", "malformed or misplaced"),
        (INVOKE + X + "</｜DSML｜function_calls>", '{"x": 1', "malformed or misplaced"),
    ],
)
def test_half_a_call_stays_open(text, arguments, warning):
    """Nobody can run it: its arguments are no JSON, and a warning says why."""
    found, parts = read("c" + CALLS + text, False)
    assert [text for part, text in found if part == ARGUMENTS] == [arguments] * bool(arguments)
    assert not parts.is_whole and len(parts.warnings) == 1 and warning in parts.warnings[0]
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_loose_calls():
    """Arguments as one object, values that are no JSON, and text behind the calls, with a warning each."""
    loose = '<｜DSML｜parameter name="y">no JSON</｜DSML｜parameter>\n'
    text = f'{CALLS}{INVOKE}{{"a": [1]}}\n</｜DSML｜invoke>\n{INVOKE}{loose}{CLOSED} so'
    found, parts = read(text, False)
    assert found == [
        (CALL, "f"),
        (ARGUMENTS, '{"a": [1]}'),
        (CALL, "f"),
        (ARGUMENTS, '{"y": "no JSON"}'),
        ("content", " so"),
    ]
    assert len(parts.warnings) == 3 and parts.is_whole


@given(
    st.lists(
        st.sampled_from([*'<>\n"x=/ ', template.DSML, CALLS, INVOKE, X, CLOSED, "</｜DSML｜", "<｜DSML｜"]), max_size=25
    )
)
def test_any_text_is_read(pieces):
    """No tag in any part but values, whatever is written; the same when it comes letter by letter."""
    text = "".join(pieces)
    found, parts = read(text, False)
    assert read(text, False, range(len(text)))[0] == found
    assert not [one for part, one in found if part != ARGUMENTS and f"<{template.DSML}" in one]


def test_every_mark_of_a_call_is_known():
    assert template.CALLS.startswith("<" + template.DSML)
