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
        (lambda: Conversation(messages=[{"role": "user", "content": "x", "tool_calls": CALLS}]), "'tool_calls'"),
        (lambda: Conversation().user("a").assistant({**CALLING, "tool_calls": [{"name": "f"}]}), "message 1"),
    ],
)
def test_turns_out_of_turn(wrong, said):
    with pytest.raises(UsageError, match=said):
        wrong()


def results(*messages) -> list:
    """Messages after two calls with ids."""
    calls = [{"id": f"c{i}", **call} for i, call in enumerate(CALLS)]
    return [{"role": "user", "content": "x"}, {**CALLING, "tool_calls": calls}, *messages]


def result(content: str, **more) -> dict:
    return {"role": "tool", "content": content, **more}


def test_results_are_paired_by_their_ids():
    """In whatever order they come; without ids by position; and one that came first has its name checked."""
    ordered = chat.encode(results(result("5"), result("noon")), thinking=True)
    swapped = results(result("noon", tool_call_id="c1"), result("5", tool_call_id="c0", name="add"))
    assert chat.encode(swapped, thinking=True) == ordered
    assert chat.encode(swapped[2:][::-1], thinking=True, context=swapped[:2]) in ordered
    mixed = results(result("5"), result("noon", tool_call_id="c1"))
    assert chat.encode(mixed, thinking=True) == ordered


@pytest.mark.parametrize(
    ("messages", "index", "said"),
    [
        (results(result("5", tool_call_id="c7"), result("noon")), 2, "'c7' is that of no call"),
        (results(result("5", tool_call_id="c0"), result("6", tool_call_id="c0")), 3, "another result"),
        (results(result("noon", tool_call_id="c1")), 2, "before it are missing"),
        (results(result("noon", name="clock"), result("5")), 2, "result of 'clock', but"),
        (results(result("5"), result("x", tool_call_id="c0")), 3, "another result"),
    ],
)
def test_results_that_contradict_their_calls(messages, index, said):
    """Whichever way they come in."""
    for encode in (lambda: chat.encode(messages, thinking=True), lambda: Conversation(messages=messages)):
        with pytest.raises(chat.EncodingError, match=said) as caught:
            encode()
        assert caught.value.code == "results_contradict_calls"
    assert caught.value.index == index


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": "x", "prefix": True}, "'prefix'"),
        ({"role": "assistant", "content": "x", "prefix": True}, "'prefix'.* not supported"),
        ({"role": "user", "content": "x", "tools": [TOOL]}, "'tools'"),
        ({"role": "user", "content": "x", "contents": "y"}, "'contents'"),
        ({"role": "user", "content": "x", "reasoning": "y"}, "'reasoning"),
        ({"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}, "'reasoning'"),
        ({"role": "assistant", "content": "x", "tool_call_id": "c"}, "'tool_call_id'"),
        ({"role": "system", "tools": [{**TOOL, "strict": True}]}, r"'strict'; tools\[0\] may have type, function"),
        ({"role": "system", "tools": [{**TOOL, "type": "web"}]}, "must be 'function', not 'web'"),
        ({"role": "assistant", "tool_calls": [{**CALLS[0], "args": 5}]}, r"'args'; tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{"function": {**CALLS[0]["function"], "x": 5}}]}, r"\.function may have"),
        ({"role": "user", "content": "x", 5: "y"}, "5"),
    ],
)
def test_unknown_and_misplaced_fields(message, said):
    with pytest.raises(chat.EncodingError, match=said) as caught:
        chat.encode([{"role": "user", "content": "x"}, message], thinking=False)
    assert (caught.value.code, caught.value.index) == ("unknown_key", 1)


def test_fields_that_say_nothing_and_the_names_of_clients():
    """What clients send along, and their names for the reasoning."""
    more = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "prefix": False, "tools": []}
    plain = {"role": "assistant", "content": "y", "reasoning_content": "r"}
    user = {"role": "user", "content": "x"}
    wanted = chat.encode([user, plain], thinking=True)
    for message in (
        plain | more,
        plain | {"reasoning": "r"},
        {"role": "assistant", "content": "y", "reasoning": "r"},
        {"role": "assistant", "content": "y", "thinking": "r", "reasoning_content": None},
    ):
        assert chat.encode([user, message], thinking=True) == wanted


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "not the model's turn"),
        ([{"role": "system", "content": "x"}], "not the model's turn"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "not the model's turn"),
        (results(result("5")), "pending tool calls first: clock"),
        (results(), "pending tool calls first: add, clock"),
    ],
)
def test_whose_turn_it_is_is_asked_of_messages_too(tokenizer, messages, said):
    with pytest.raises(UsageError, match=said):
        chat.prepare(messages, tokenizer)
    if len(messages) > 1:
        with pytest.raises(UsageError, match=said):
            chat.prepare(messages[-1:], tokenizer, context=messages[:-1])
