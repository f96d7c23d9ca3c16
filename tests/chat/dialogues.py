"""Messages that people and models could have written, and texts that nobody should have."""

import json

from hypothesis import strategies as st

from dsv32_jax.chat import template

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
"""Any text that UTF-8 can hold."""

tricky = st.one_of(
    texts,
    st.sampled_from(
        ["<", "</", "think>", 'x" string="true">', "\n\n", "\\u2028\n", "é世界😀", "</b>", "｜", "<result>"]
    ),
)
"""Text with pieces of tags, and with what JSON escapes."""

forgeries = st.lists(st.one_of(texts, st.sampled_from(template.SPECIAL), st.just(template.DSML)), max_size=5).map(
    "".join
)
"""Text that tries to be special."""


def unscreened(text: str) -> bool:
    """Whether a message may hold `text` and still be told apart from the tags around it."""
    return not any(mark in text for mark in (*template.SCREENED, template.READ_CALLS))


said = st.lists(tricky, max_size=3).map("".join).filter(unscreened)

names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), said),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(said, inner, max_size=3)),
    max_leaves=6,
)

calls = st.builds(
    lambda name, given: {"type": "function", "function": {"name": name, "arguments": json.dumps(given)}},
    names,
    st.dictionaries(names, values, max_size=3),
)


@st.composite
def answers(draw, thinking: bool):
    """An assistant message as `parse` gives it."""
    found = draw(st.lists(calls, max_size=3))
    reasoning = draw(said.filter(bool) if not found else said) if thinking else ""
    return {"role": "assistant", "content": draw(said), "reasoning_content": reasoning, "tool_calls": found}


def decoded(message: dict) -> dict:
    """The same message with the values of its arguments, not their text."""
    functions = [call["function"] for call in message["tool_calls"]]
    return {**message, "tool_calls": [(function["name"], json.loads(function["arguments"])) for function in functions]}
