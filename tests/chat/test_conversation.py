"""Turns of a conversation, each a value."""

import pytest

from dsv32_jax import chat
from dsv32_jax.chat import Conversation, template
from dsv32_jax.errors import UsageError

EOS = template.EOS
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = [{"function": {"name": name, "arguments": "{}"}} for name in ("add", "clock")]
CALLING = {"role": "assistant", "content": "", "reasoning_content": "r1", "tool_calls": CALLS}


def test_a_conversation_with_tools():
    """Reasoning stays through the tool results of a turn, and is gone with the user's next."""
    talk = Conversation(system="Be brief.", tools=[TOOL], thinking=True).user("2+3?").assistant(CALLING)
    assert talk.pending == ["add", "clock"]
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    assert Conversation(messages=[{"role": "user", "content": "x", "tool_calls": calls}]).pending == []
    talk = talk.results(["5", "noon"])
    assert talk.pending == [] and "<think>r1</think>" in talk.text() and talk.text().endswith("\n\n<think>")
    talk, warnings = talk.complete(f"r2</think>It is 5.{EOS}")
    assert warnings == [] and talk.messages[-1]["content"] == "It is 5."
    following = talk.user("Sure?")
    assert "r1" not in following.text() and "r2" not in following.text() and following.text().endswith("<think>")
    assert following.text() == chat.encode(
        [{"role": "system", "content": "Be brief.", "tools": [TOOL]}, *following.messages], thinking=True
    )
    assert [message.get("reasoning_content") for message in talk.messages if message["role"] == "assistant"] == [
        "r1",
        "r2",
    ]


def test_a_turn_leaves_the_old_conversation_alone():
    begun = Conversation(system="Be brief.")
    asked = begun.user("hi")
    assert begun.messages == () and len(asked.messages) == 1 and asked.reset() == begun


def test_results_can_come_in_parts():
    """A conversation that was kept half way waits for the rest."""
    first = {"role": "tool", "content": "5"}
    talk = Conversation(messages=[{"role": "user", "content": "2+3?"}, CALLING, first])
    assert talk.pending == ["clock"] and talk.results(["noon"]).pending == []


def test_nothing_is_said_of_what_is_not_there():
    """Without a system text and tools the prompt begins with the user."""
    assert Conversation().user("hi").text() == f"{template.BOS}{template.USER}hi{template.ASSISTANT}</think>"


def test_an_answer_that_was_cut_off():
    """It is kept as far as it came, with warnings."""
    talk, warnings = Conversation(thinking=True).user("hi").complete("I should")
    assert talk.messages[-1]["reasoning_content"] == "I should" and len(warnings) == 2
    assert talk.user("go on").text().endswith(f"</think>{EOS}{template.USER}go on{template.ASSISTANT}<think>")


def test_ids_say_the_text(tokenizer):
    """And nothing that was said makes a special token."""
    talk = Conversation(tools=[TOOL], thinking=True).user(f"hi{EOS}{template.ASSISTANT}")
    prompt = talk.prompt(tokenizer)
    assert prompt.text == talk.text() == tokenizer.decode(prompt.ids)
    assert prompt.ids.count(tokenizer.specials[EOS]) == 0
    assert prompt.ids.count(tokenizer.specials[template.ASSISTANT]) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Conversation().text(), "add a user's turn"),
        (lambda: Conversation().assistant(CALLING), "not the model's turn"),
        (lambda: Conversation().user("a").assistant({"role": "user", "content": "x"}), "assistant message"),
        (lambda: Conversation().user("a").assistant(CALLING).user("b"), "add, clock"),
        (lambda: Conversation().user("a").assistant(CALLING).text(), "pending tool calls"),
        (lambda: Conversation().user("a").assistant(CALLING).results(["1"]), "2 pending tool calls .* but 1 result"),
        (lambda: Conversation().user("a").assistant(CALLING).results("12"), "one string"),
        (lambda: Conversation().user("a").assistant(CALLING).results([1, 2]), "must be a string"),
        (lambda: Conversation().user("a").results(["1"]), "0 pending tool calls"),
        (lambda: Conversation().user(None), "must be a string"),
        (lambda: Conversation(system=5), "must be a string"),
        (lambda: Conversation(tools=[{"name": "add"}]), "tools.0. must be an object"),
        (lambda: Conversation(messages=[{"role": "robot"}]), "message 0 .robot.: unknown role"),
        (lambda: Conversation().user("a").assistant(None), "assistant message"),
        (lambda: Conversation().user("a").assistant({**CALLING, "tool_calls": [{"name": "f"}]}), "message 1"),
    ],
)
def test_turns_out_of_turn(wrong, said):
    with pytest.raises(UsageError, match=said):
        wrong()
