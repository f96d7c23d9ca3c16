"""What reaches a terminal: no commands of its own, whole words, and answers in their parts."""

import io
import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv32_jax.chat import template
from dsv32_jax.cli.answer_parts import Parts
from dsv32_jax.cli.screen import Screen, json_line, one_line, shown
from dsv32_jax.cli.wrapping import Wrapping, columns_of

HOSTILE = "\x1b]0;owned\x07\x9b31m\r\x08\x7f\u202e\u2066\x00"
"""Sets the title, colours, goes back, turns the direction of writing."""

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from([*HOSTILE, "\n", "\t", "`", " "]))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes a Screen whose stdout and stderr are one terminal, and the stream that says what was written."""

    def opened() -> tuple[Screen, Terminal]:
        stream = Terminal()
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            return Screen(), stream

    return opened


@given(texts)
def test_no_character_steers(text):
    """Controls and formats are escaped; what is escaped is safe to escape again; JSON says the same."""
    safe = shown(text)
    assert not {char for char in safe if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")} - set(
        "\n\t\u200c\u200d"
    )
    assert shown(safe) == safe and "\n" not in one_line(text)
    assert json.loads(json_line([text])) == [text] and json_line([text]).isprintable()


def test_text_of_all_scripts_stays():
    for text in ("你好，　世界", "می\u200cخواهم", "👨\u200d👩", "naïve\u00a0x", "a\tb\nc"):
        assert shown(text) == text


def test_the_terminal_is_not_steered(terminal):
    """Neither by results nor by notes, errors and the status."""
    screen, stream = terminal()
    for write in (screen.result, screen.note, screen.strong, screen.status, screen.alongside):
        write(HOSTILE)
    written = stream.getvalue()
    for own in ("\x1b[2m", "\x1b[22m", "\x1b[1m", "\r\x1b[K"):
        written = written.replace(own, "")
    assert written.count("\\x1b]0;owned\\x07") == 5 and shown(written) == written


def test_the_status_goes_away(terminal):
    """Before anything else is written, and notes do not stand in the middle of a result's line."""
    screen, stream = terminal()
    screen.status("busy")
    screen.result("half")
    screen.note("aside")
    assert stream.getvalue() == "\r\x1b[K\x1b[2mbusy\x1b[22m\r\x1b[Khalf\n\x1b[2maside\n\x1b[22m"


def test_no_status_in_the_middle_of_a_line(terminal):
    """The rest of the line would stand below it."""
    screen, stream = terminal()
    screen.result("half")
    screen.status("busy")
    screen.result(" and half\n")
    screen.status("busy")
    assert stream.getvalue() == "half and half\n\r\x1b[K\x1b[2mbusy\x1b[22m"


def test_notes_are_broken_between_words(terminal, monkeypatch):
    """On a terminal; its status is one line."""
    screen, stream = terminal()
    monkeypatch.setenv("COLUMNS", "10")
    screen.note("one two three")
    screen.strong("four five seven fits")
    assert stream.getvalue() == "\x1b[2mone two \nthree\n\x1b[22m\x1b[1mfour five \nseven \nfits\x1b[22m\n"
    assert screen.width == 9, "a word of the whole width would have its space on the next line"


def test_plain_where_it_is_no_terminal(capsys, monkeypatch):
    """A pipe gets results as they are, and no status; NO_COLOR no styles; a narrow encoding escapes."""
    screen = Screen(quiet=True)
    screen.status("busy")
    screen.note("aside")
    screen.result("a\x1b[0m\ub4e4\n")
    assert capsys.readouterr() == ("a\x1b[0m\ub4e4\n", "")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Screen().result("\ub4e4\n")
    assert raw.getvalue() == b"\\ub4e4\n"


@given(st.text(st.sampled_from("ab 你\n`")), st.integers(1, 12), st.data())
def test_wrapping(text, width, data):
    """In any pieces the same; only line breaks are added; no line is too wide but for a word alone, or in a fence."""
    whole = Wrapping(width)
    wrapped = whole.add(text) + whole.end()
    pieces, wrapping, rest = "", Wrapping(width), text
    while rest:
        size = data.draw(st.integers(1, 4))
        pieces += wrapping.add(rest[:size])
        rest = rest[size:]
    assert pieces + wrapping.end() == wrapped
    kept = iter(wrapped)
    assert all(char in kept for char in text) and wrapped.replace("\n", "") == text.replace("\n", "")
    for line in wrapped.split("\n") if "`" not in text else ():
        assert sum(map(columns_of, line.rstrip(" "))) <= width or " " not in line.strip(" ")


def test_code_is_not_wrapped():
    code = "```python\nf(aaaa, bbbb, cccc)\n```\n"
    wrapping = Wrapping(8)
    assert wrapping.add(code + "one two three") + wrapping.end() == code + "one two \nthree"


CALLS = "\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke"


@pytest.mark.parametrize(
    "thinking, text, parts",
    [
        (False, "plain", [("answer", "plain")]),
        (False, "a <b </think> c", [("answer", "a <b </think> c")]),
        (True, "why</think>so", [("thinking", "why"), ("answer", "so")]),
        (True, "</think>so", [("answer", "so")]),
        (True, "a </thin", [("thinking", "a </thin")]),
        (False, "look" + CALLS, [("answer", "look")]),
        (False, CALLS, []),
        (True, "x" + CALLS + "</think>y" + CALLS, [("thinking", "x" + CALLS), ("answer", "y")]),
        (False, "a\n\nb<", [("answer", "a\n\nb<")]),
    ],
)
@given(cut=st.integers(1, 50))
def test_parts(thinking, text, parts, cut):
    """However the text is cut; what looks like a call in thinking is thinking."""
    found: dict[str, str] = {}
    answer = Parts(thinking=thinking)
    for start in range(0, len(text), cut):
        for part, piece in answer.add(text[start : start + cut]):
            found[part] = found.get(part, "") + piece
    for part, piece in answer.end():
        found[part] = found.get(part, "") + piece
    assert list(found.items()) == parts


def test_every_mark_of_a_call_is_known():
    assert template.CALLS.startswith("<" + template.DSML)
