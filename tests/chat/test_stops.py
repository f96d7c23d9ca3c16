"""Stop strings across the borders of pieces."""

import pytest
from hypothesis import given, strategies as st

from dsv32_jax.chat import Detokenizer, StopStrings
from dsv32_jax.errors import UsageError

letters = st.text("ab<é", max_size=20)
stops_lists = st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first place where a stop string is complete, character by character."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces, stops) -> tuple[str, str | None]:
    """All the text that is given for `pieces`, and the stop string that was hit."""
    cut = StopStrings(stops)
    return "".join([cut.add(piece) for piece in pieces] + [cut.end()]), cut.hit


@given(st.lists(letters, max_size=8), stops_lists)
def test_g11_pieces_do_not_matter(pieces, stops):
    """However the text is cut, it ends before the stop string that is complete first."""
    assert run(pieces, stops) == naive("".join(pieces), stops)


@given(letters, stops_lists)
def test_text_is_held_back_no_longer_than_needed(text, stops):
    """What is held back is the beginning of a stop string."""
    cut = StopStrings(stops)
    given = "".join(cut.add(letter) for letter in text)
    if cut.hit is None:
        held = text[len(given) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_g11_a_stop_string_over_tokens(tokenizer):
    """It is found where it begins and ends inside tokens and its characters are spread over several."""
    text = "One 😀😀\n\nUser: two"
    ids, detokenizer, cut = tokenizer.encode(text), Detokenizer(tokenizer), StopStrings(["😀\n\nUs", "two"])
    shown = [cut.add(detokenizer.add([i])) for i in ids]
    assert "".join(shown) == "One 😀" and cut.hit == "😀\n\nUs"
    assert cut.add("more") == "" and cut.end() == ""


def test_one_string_is_one_stop():
    assert run(["Hello wor", "ld"], "lo w") == ("Hel", "lo w")
    assert run(["Hello"], []) == ("Hello", None)


@pytest.mark.parametrize("stops", ["", ["a", ""], [5], [None], [b"a"]])
def test_g35_what_is_no_stop_string(stops):
    with pytest.raises(UsageError, match="stop string"):
        StopStrings(stops)


THOUGHTS, CALLS = "I think. END\n\nWell</think>", "\n\n<｜DSML｜function_calls>\nEND</｜DSML｜function_calls>"


@pytest.mark.parametrize("pieces", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("opening", "text", "stops", "left"),
    [
        ("<think>", THOUGHTS + "Yes. END no", ["END"], THOUGHTS + "Yes. "),
        ("<think>", THOUGHTS + "Yes." + CALLS, ["END"], None),
        ("<think>", THOUGHTS + "Yes." + CALLS, "\n\n", THOUGHTS + "Yes."),
        ("<think>", THOUGHTS + "Yes.", ["</think>", "END"], THOUGHTS.removesuffix("</think>")),
        ("<think>", "I think. END", ["END"], None),
        ("</think>", "Yes. </think> END" + CALLS, ["END"], "Yes. </think> "),
        ("</think>", "Yes." + CALLS, ["END", "calls>"], None),
        ("</think>", "Yes. END", [], None),
        ("x", THOUGHTS, ["END"], "I think. "),
        ("x", CALLS, ["END"], CALLS.partition("END")[0]),
    ],
)
def test_stop_strings_count_in_the_answer(tokenizer, opening, text, stops, left, pieces):
    """Not in thoughts, nor in the arguments of tool calls; however many tokens come at once, nothing else is lost."""
    special = [tokenizer.specials[opening]] if opening in tokenizer.specials else tokenizer.encode(opening)
    detokenizer = Detokenizer(tokenizer, stops, special)
    ids = tokenizer.encode(text, allow_special=True)
    given = [detokenizer.add(ids[i : i + pieces]) for i in range(0, len(ids), pieces)] + [detokenizer.end()]
    assert "".join(given) == (text if left is None else left)
    assert (detokenizer.hit is not None) == (left is not None)
