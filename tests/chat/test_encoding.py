"""What the vectors do not show: every fault, tools, context, and content that is not text."""

import pytest
from hypothesis import given, strategies as st

from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.errors import DsvError, UsageError
from tests.chat.dialogues import answers, forgeries

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}
USER = {"role": "user", "content": "2+3?"}


def call(arguments='{"a": 2}', **function) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments, **function}}]}


def result(content="5") -> dict:
    return {"role": "tool", "content": content}


def fault(messages, **options) -> chat.EncodingError:
    """The error with which `messages` are refused."""
    with pytest.raises(chat.EncodingError) as caught:
        chat.encode(messages, **{"thinking": False, **options})
    assert isinstance(caught.value, UsageError | DsvError) and caught.value.exit_code == 2
    return caught.value


DEEP = "[" * 100_000

MALFORMED = [
    ("unknown_role", 1, [USER, {"role": "robot", "content": "x"}], ["message 1", "'robot'", "assistant"]),
    ("unknown_role", 0, [{"content": "x"}], ["None"]),
    ("unknown_role", 0, [{"role": ["user"]}], ["['user']"]),
    ("message_not_object", 1, [USER, "hello"], ["messages[1] is a string"]),
    ("message_not_object", 0, [None], ["null"]),
    ("tool_without_assistant", 1, [USER, result()], ["message 1 (tool)"]),
    ("tool_without_calls", 0, [result(), call()], ["result 1", "0 tool calls"]),
    ("tool_without_calls", 2, [USER, {"role": "assistant", "content": "b"}, result()], ["0 tool calls"]),
    ("tool_without_calls", 3, [USER, call(), result(), result()], ["result 2", "1 tool call"]),
    ("arguments_not_json", 1, [USER, call("{'a': 2}")], ["'add'", "not JSON"]),
    ("arguments_not_json", 1, [USER, call("")], ["not JSON"]),
    ("arguments_not_json", 1, [USER, call(DEEP)], ["not JSON"]),
    ("arguments_not_json", 1, [USER, call('{"a": ' + "1" * 5000 + "}")], ["not JSON"]),
    ("arguments_not_object", 1, [USER, call("[2]")], ["not a list"]),
    ("arguments_not_object", 1, [USER, call("null")], ["not null"]),
    ("arguments_not_string", 1, [USER, call({"a": 2})], ["json.dumps"]),
    ("name_not_string", 1, [USER, call(name=5)], ["name is a number"]),
    ("missing_key", 1, [USER, {"role": "assistant", "tool_calls": [{"name": "add"}]}], ["tool_calls[0]"]),
    ("missing_key", 1, [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], ["no name and no arguments"]),
    ("missing_key", 0, [{"role": "system", "tools": [{"name": "add"}]}], ["tools[0]", "'function'"]),
    ("not_a_list", 0, [{"role": "system", "tools": {"add": TOOL}}], ["tools must be a list, not an object"]),
    ("not_a_list", 1, [USER, {"role": "assistant", "tool_calls": "add"}], ["not a string"]),
    ("not_json", 0, [{"role": "system", "response_format": {"a": {1, 2}}}], ["no JSON"]),
    ("developer_empty_content", 0, [{"role": "developer", "content": ""}], ["message 0 (developer)"]),
    ("content_not_text", 0, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], ["list", "join"]),
    ("content_not_text", 0, [{"role": "user", "content": b"hi"}], ["bytes"]),
    ("content_not_text", 2, [USER, call(), result({"sum": 5})], ["message 2 (tool)", "object"]),
    ("content_not_text", 0, [{"role": "system", "content": ["x"]}], ["list"]),
]


@pytest.mark.parametrize(("code", "index", "messages", "said"), MALFORMED)
def test_g27_malformed_messages(code, index, messages, said):
    """A typed error that names the message."""
    error = fault(messages)
    assert (error.code, error.index) == (code, index)
    assert all(part in str(error) for part in said), str(error)


def test_a_bad_call_is_one_fault():
    """The results that follow it are none."""
    bad = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    assert [(found.code, found.index) for found in fault([USER, bad, result()]).faults] == [("missing_key", 1)]


def test_an_error_stays_short():
    """However long what is wrong is."""
    long = "x" * 100_000
    for messages in ([{"role": long}], [USER, call("{", name=long)], [{"role": "user", "content": [long]}]):
        assert len(str(fault(messages))) < 500
    assert len(str(fault([{"role": long}, USER], thinking=True))) < 500


def test_every_bad_message_is_listed():
    """Once each, with its index, and the first is the error's."""
    error = fault([{"role": "robot"}, USER, call("{"), result(), result(), USER])
    assert [(found.code, found.index) for found in error.faults] == [
        ("unknown_role", 0),
        ("arguments_not_json", 2),
        ("tool_without_calls", 4),
    ]
    assert (error.code, error.index) == ("unknown_role", 0)
    assert "3 faults" in str(error) and all(f"message {i}" in str(error) for i in (0, 2, 4))
    assert "and 80 more" in str(fault([{"role": "robot"}] * 100))


@pytest.mark.parametrize("thinking", ["thinking", "Thinking", 1, None])
def test_the_mode_is_true_or_false(thinking):
    assert fault([USER], thinking=thinking).code == "invalid_thinking_mode"


@pytest.mark.parametrize(
    ("messages", "said"), [("hello", "raw text"), (USER, "object"), (5, "number"), (b"x", "bytes")]
)
def test_g02_what_is_not_a_list_of_messages(messages, said):
    """Raw text is not taken for a message."""
    with pytest.raises(UsageError, match=said):
        chat.encode(messages, thinking=False)
    with pytest.raises(UsageError, match="context"):
        chat.encode([], thinking=False, context=messages)


def test_a_developer_before_another_turn():
    """The format forgets it with old reasoning, and the reference then runs off the end."""
    messages = [{"role": "developer", "content": "find it"}, {"role": "assistant", "content": "x"}, USER]
    error = fault(messages, thinking=True)
    assert (error.code, error.index) == ("index_out_of_range", 0) and "drop_thinking=False" in str(error)
    text = chat.encode(messages, thinking=True, drop_thinking=False)
    assert text.startswith(
        f"{template.BOS}{template.USER}\n\n# The user's message is: find it{template.ASSISTANT}</think>x"
    )
    assert chat.encode(messages, thinking=False).endswith("</think>")
    error = fault(messages[1:], thinking=True, context=messages[:1])
    assert (error.code, error.index) == ("index_out_of_range", None) and "context message 0" in str(error)
    error = fault([{"role": "robot"}, USER], thinking=True)
    assert error.code == "index_out_of_range" and "robot" in str(error)


def test_tools_go_to_the_first_message():
    """To a system or developer message, else before a message that cannot hold them; a context has them already."""
    system = {"role": "system", "content": "Be brief."}
    for first in (system, {"role": "developer", "content": "find it"}):
        wanted = chat.encode([{**first, "tools": [TOOL]}, USER], thinking=False)
        assert chat.encode([first, USER], thinking=False, tools=[TOOL]) == wanted
    empty = chat.encode([{"role": "system", "tools": [TOOL]}, USER], thinking=False)
    assert chat.encode([USER], thinking=False, tools=[TOOL]) == empty
    whole = chat.encode([system, USER, call()], thinking=False, tools=[TOOL])
    begun = chat.encode([system, USER], thinking=False, tools=[TOOL])
    assert begun + chat.encode([call()], context=[system, USER], thinking=False, tools=[TOOL]) == whole
    assert chat.encode([call()], context=[USER], thinking=False, tools=[TOOL]) == chat.encode(
        [call()], context=[USER], thinking=False
    )
    with pytest.raises(UsageError, match="once"):
        chat.encode([{**system, "tools": [TOOL]}], thinking=False, tools=[TOOL])
    assert fault([USER], tools=[{"name": "add"}]).code == "missing_key"
    assert fault([USER], tools=[{"name": "add"}]).index is None


def test_nothing_given():
    """No messages are the beginning of a sentence, and after a context nothing."""
    assert chat.encode([], thinking=False) == template.BOS
    assert chat.encode([], thinking=True, bos=False) == ""
    assert chat.encode([], thinking=True, context=[USER]) == ""


@pytest.mark.parametrize(("content", "written"), [(None, "None"), (5, "5"), (2.5, "2.5"), (True, "True"), ("", "")])
def test_content_that_is_not_text(content, written):
    """A user's and a tool's is written in Python's words, as in the reference; elsewhere none is nothing."""
    assert chat.encode([{"role": "user", "content": content}], thinking=False) == chat.encode(
        [{"role": "user", "content": written}], thinking=False
    )
    assert f"<result>{written}</result>" in chat.encode([USER, call(), result(content)], thinking=False)
    assert chat.encode([{"role": "system", "content": None}], thinking=False, bos=False) == ""
    assert "None" in chat.encode([{"role": "user"}], thinking=False)


def test_a_system_message_before_an_answer():
    """Nobody opens the thinking, which is how the reference writes it."""
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "reasoning_content": "r", "content": "a"}]
    assert chat.encode(messages, thinking=True, bos=False) == f"sr</think>a{template.EOS}"


def test_messages_are_left_alone():
    """Nothing that is given is changed."""
    system = {"role": "system", "content": "s"}
    chat.encode([system, USER], thinking=True, tools=[TOOL])
    assert system == {"role": "system", "content": "s"}


turns = st.lists(
    st.one_of(
        st.builds(lambda text: [{"role": "user", "content": text}], forgeries),
        st.builds(lambda text: [{"role": "system", "content": text, "tools": [TOOL]}], forgeries),
        answers(thinking=True).map(
            lambda message: [message, *({"role": "tool", "content": "r"} for _ in message["tool_calls"])]
        ),
    ),
    max_size=5,
).map(lambda groups: [message for group in groups for message in group])


@given(turns, st.integers(0, 20))
def test_what_follows_can_be_encoded_alone(messages, cut):
    """In chat mode always, and in thinking mode where what follows begins no new turn of the user."""
    before, after = messages[:cut], messages[cut:]
    for thinking in (False, True):
        if thinking and any(message["role"] == "user" for message in after):
            continue
        whole = chat.encode(messages, thinking=thinking)
        alone = chat.encode(after, thinking=thinking, context=before)
        assert chat.encode(before, thinking=thinking) + alone == whole if before else alone == whole


@given(turns)
def test_old_reasoning_is_dropped(messages):
    """Without reasoning and without `drop_thinking` the prompt of the user's next turn is the same."""
    bare = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
    wanted = chat.encode([*messages, USER], thinking=True)
    assert chat.encode([*bare, USER], thinking=True) == wanted
    assert chat.encode([*messages, USER], thinking=True, drop_thinking=False) == wanted
