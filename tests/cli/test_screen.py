"""What reaches a terminal: nothing that steers it, whole words, and answers in their parts."""

import io
import json
import re
import sys
import time
import unicodedata

import pytest
from hypothesis import given, strategies as st

from dsv32_jax.cli.terminal import Screen, format_json, shorten
from dsv32_jax.errors import printable
from tests.cli.conftest import Terminal

HOSTILE = "\x1b]0;owned\x07\x9b31m\r\x08\x7f\u202e\u2066\x00"
"""Sets the title, colours, goes back, turns the direction of writing."""

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from([*HOSTILE, "\n", "\t", "`", " "]))


@pytest.fixture
def terminal(monkeypatch):
    """Makes a Screen whose stdout and stderr are one terminal, and the stream that says what was written."""

    def opened(**environment: str) -> tuple[Screen, Terminal]:
        stream = Terminal()
        with monkeypatch.context() as patch:
            for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            return Screen(), stream

    return opened


@given(texts)
def test_no_character_steers(text):
    """Controls and formats are escaped; what is escaped is safe to escape again; JSON says the same."""
    safe = printable(text)
    assert not {char for char in safe if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")} - set(
        "\n\t\u200c\u200d"
    )
    assert printable(safe) == safe and "\n" not in shorten(text)
    assert json.loads(format_json([text])) == [text] and format_json([text]).isprintable()


def test_text_of_all_scripts_stays():
    for text in ("你好，　世界", "می\u200cخواهم", "👨\u200d👩", "naïve\u00a0x", "a\tb\nc"):
        assert printable(text) == text


STYLES = re.compile(r"\x1b\[\??[0-9;]*[mhlAK]|\r")
"""The codes of rich: styles, the cursor hidden and shown, and the status erased."""


def test_the_terminal_is_not_steered(terminal):
    """Neither by results nor by notes, errors and the status."""
    screen, stream = terminal()
    for write in (screen.result, screen.note, lambda text: screen.note(text, important=True), screen.aside):
        write(HOSTILE)
    screen.result("\n")
    screen.status(HOSTILE)
    wait_for(stream, "owned\\x07")
    screen.status("")
    written = STYLES.sub("", stream.getvalue())
    assert written.count("\\x1b]0;owned\\x07") >= 5 and printable(written) == written


def wait_for(stream: Terminal, text: str) -> None:
    """Until `text` is there: a thread writes it."""
    end = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.02)


def test_the_status_goes_away(terminal):
    """Before anything else is written, and notes do not stand in the middle of a result's line."""
    screen, stream = terminal()
    screen.status("busy")
    wait_for(stream, "busy")
    screen.result("half")
    before, _, rest = stream.getvalue().partition("half")
    assert before.endswith("\x1b[?25h\r\x1b[1A\x1b[2K") and rest == ""
    screen.note("aside")
    assert stream.getvalue().endswith("half\n\x1b[2maside\x1b[0m\n")


def test_no_status_in_the_middle_of_a_line(terminal):
    """The rest of the line would stand below it."""
    screen, stream = terminal()
    screen.result("half")
    screen.status("busy")
    screen.result(" and half\n")
    assert stream.getvalue() == "half and half\n"
    screen.status("busy")
    wait_for(stream, "busy")
    screen.status("")


def test_notes_are_broken_between_words(terminal):
    """On a terminal."""
    screen, stream = terminal(COLUMNS="10")
    screen.note("one two three")
    screen.note("four five seven fits", important=True)
    lines = STYLES.sub("", stream.getvalue()).splitlines()
    assert [line.rstrip() for line in lines] == ["one two", "three", "four five", "seven fits"]
    assert "\x1b[2mone two" in stream.getvalue() and "\x1b[1mfour five" in stream.getvalue()


def test_no_styles_where_they_are_not_wanted(terminal):
    """NO_COLOR turns them off."""
    screen, stream = terminal(NO_COLOR="1")
    screen.note("aside")
    screen.aside("reasoning")
    assert stream.getvalue() == "aside\nreasoning"


def test_plain_where_it_is_no_terminal(capsys, monkeypatch):
    """A pipe gets results verbatim, and no status; a narrow encoding escapes; notes are not broken."""
    screen = Screen(quiet=True)
    screen.status("busy")
    screen.note("aside")
    screen.result("a\x1b[0m\ub4e4\n")
    assert capsys.readouterr() == ("a\x1b[0m\ub4e4\n", "")
    Screen().note("word " * 40)
    assert capsys.readouterr() == ("", "word " * 40 + "\n")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Screen().result("\ub4e4\n")
    assert raw.getvalue() == b"\\ub4e4\n"
