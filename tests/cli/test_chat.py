"""dsv32 chat: turns and commands with answers from a script, a real model through pipes, and a pseudo-terminal."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv32_jax.chat import Conversation, Tokenizer, template
from dsv32_jax.cli import app, conversation_file
from dsv32_jax.cli.answer_view import describe_stats
from dsv32_jax.cli.chat_session import ChatSession, format_call
from dsv32_jax.cli.open_checkpoint import OpenedCheckpoint
from dsv32_jax.cli.slash_commands import COMMANDS, FIELDS, Quit, SlashCommands
from dsv32_jax.cli.terminal import Keyboard, Screen
from dsv32_jax.errors import CheckpointError, OutputExistsError, StorageError, UsageError
from dsv32_jax.generation.options import Sampling
from dsv32_jax.generation.request import validate
from dsv32_jax.generation.result import Generation, Stats
from dsv32_jax.generation.row import Row
from dsv32_jax.generation.session import session
from dsv32_jax.model.model import Origin
from tests import models
from tests.cli.conftest import Terminal

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = """\n\n<｜DSML｜function_calls>
<｜DSML｜invoke name="add">
<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="mul\x1b[2J">
<｜DSML｜parameter name="b" string="true">two
lines</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>"""


class Model:
    """As much of a model as a chat looks at."""

    def __init__(self, cfg):
        self.cfg, self.origin = cfg, Origin()


class Script:
    """A session whose answers are written down; those that end with EOS end by themselves."""

    draft, cache_dtype = 0, np.dtype(np.float32)

    def __init__(self, tokenizer, cfg, answers, capacity=2000):
        self.model, self.capacity = Model(cfg), capacity
        self._tokenizer, self._answers = tokenizer, iter(answers)
        self.prompts, self.options = [], []

    def stream(self, ids, *, sampling, tokenizer, max_new_tokens, progress=lambda *_: None, **options):
        self.prompts.append(tokenizer.decode(ids))
        self.options.append({"sampling": sampling, "max_new_tokens": max_new_tokens, **options})
        given = {"max_new_tokens": max_new_tokens, "tokenizer": tokenizer, "stop": options.get("stop", ())}
        row = Row(validate(self.model.cfg, [ids], dtype="float32", **given))
        return ScriptStream(self._tokens(row, ids, progress), row, len(ids))

    def _tokens(self, row, ids, progress):
        answer = next(self._answers)
        for read in range(0, len(ids), 512):
            progress(min(read + 512, len(ids)), len(ids))
        for token in self._tokenizer.encode(answer, allow_special=True):
            yield row.add(token, 0.0, ())
            if row.finish_reason:
                return
            if answer.endswith("^C"):
                os.kill(os.getpid(), signal.SIGINT)


class ScriptStream:
    """The tokens of an answer that is written down."""

    def __init__(self, tokens, row, prompt_tokens):
        self._tokens, self._row, self._prompt_tokens = tokens, row, prompt_tokens
        self.close = tokens.close

    def __iter__(self):
        return self._tokens

    def result(self) -> Generation:
        if self._row.finish_reason is None:
            self._row.interrupt()
        made = len(self._row.tokens)
        stats = Stats(1, 0.0, 0, 0, 0.5, 0.5, self._prompt_tokens, made, 2000, made, 0, 0)
        return Generation([self._row.tokens], [self._row.logprobs], [self._row.finish_reason], stats, [self._row.text])


@pytest.fixture
def talk(checkpoint, tiny):
    """Makes a ChatSession whose answers are written down."""
    tokenizer = Tokenizer.load(checkpoint, tiny)

    def opened(*answers, capacity=2000, hides=False, options=(), **conversation):
        said = [answer if answer.endswith("^C") else answer + template.EOS for answer in answers]
        script = Script(tokenizer, tiny, said, capacity)
        return ChatSession(
            Screen(), tokenizer, script, Conversation(**conversation), Sampling(), dict(options), hide_reasoning=hides
        )

    return opened


def test_turns(talk, capsys):
    """Each answer is shown and remembered, and the next prompt holds it."""
    chat = talk("Hello.", "Bye.", system="Be brief.")
    assert chat.send("Hi") and chat.send("And now?")
    assert chat.session.prompts[1] == chat.conversation.reset().user("Hi").text() + (
        f"Hello.{template.EOS}{template.USER}And now?{template.ASSISTANT}{template.THINK_END}"
    )
    out, err = capsys.readouterr()
    assert out == "Hello.\nBye.\n" and re.search(
        r"\[read \d+ prompt tokens at [\d.]+ tokens/s, generated 5 tokens at 10.0 tokens/s; context \d+/2000\]", err
    )


def test_calls_are_shown_and_results_asked_for(talk, capsys):
    """One result each, in order; nothing in a name or a value steers the terminal."""
    chat = talk("Look." + CALL, "It is 3.", tools=[TOOL])
    chat.send("1+2?")
    out, err = capsys.readouterr()
    assert out == "Look.\n" and "calls add(a=1)\n" in err and 'calls mul\\x1b[2J(b="two\\nlines")' in err
    assert chat.prompt == "result of add> "
    assert chat.send("3") and chat.prompt == "result of mul\\x1b[2J> " and len(chat.session.prompts) == 1
    assert chat.send("4") and chat.prompt == "> " and capsys.readouterr().out == "It is 3.\n"
    assert "<result>3</result>\n<result>4</result>" in chat.session.prompts[1]


def test_a_call_as_text():
    function = {"name": "f", "arguments": json.dumps({"a": [1, None], "b\n": "\u202e"})}
    assert format_call(function) == 'f(a=[1, null], b\\n="\\u202e")'


@pytest.mark.parametrize(
    ("seconds", "loads", "said"),
    [
        (1.9, 3, "generated 4 tokens at 8.0 tokens/s"),
        (2.1, 3, "; loading compiled programs took 2.1 s"),
        (0.9, 2, "; compiling took 0.9 s"),
    ],
)
def test_programs_from_the_cache_are_not_called_compiled(seconds, loads, said):
    """And are mentioned only where loading them was slow."""
    assert describe_stats(Stats(1, seconds, 3, loads, 0.5, 0.5, 6, 4, 64, 4, 0, 0)).endswith(said)


def test_thinking(talk, capsys):
    """Shown before the answer, or hidden and shown when asked; it goes to stderr, the answer to stdout."""
    chat = talk("because</think>Yes.", "hidden</think>No.", "never closed^C", thinking=True)
    chat.send("Is it?")
    out, err = capsys.readouterr()
    assert out == "Yes.\n" and err.startswith("because\n\n")
    chat.hide_reasoning = True
    chat.send("Really?")
    out, err = capsys.readouterr()
    assert out == "No.\n" and "hidden" not in err and "(thought for" in err
    commands = SlashCommands(chat)
    commands.run("/think show")
    assert capsys.readouterr().err == "hidden\n"
    commands.run("/think off")
    assert not chat.conversation.thinking and capsys.readouterr().err == "answers at once\n"
    for word, hides in (("hide", True), ("on", False)):
        commands.run(f"/think {word}")
        assert chat.conversation.thinking and chat.hide_reasoning is hides
    with pytest.raises(UsageError, match="on, off, hide or show"):
        commands.run("/think maybe")


def test_ctrl_c_stops_the_answer(talk, capsys):
    """What was said so far stays in the conversation, and can be taken back."""
    chat = talk("One two three^C", "Again.")
    assert chat.send("Count.") is False
    assert chat.conversation.messages[-1]["content"] == "On"
    assert "stopped; the answer so far stays" in capsys.readouterr().err
    SlashCommands(chat).run("/undo")
    assert chat.conversation.messages == () and "removed: Count." in capsys.readouterr().err
    assert chat.send("Count.") is True


def test_ctrl_c_while_the_prompt_is_read(talk, capsys, monkeypatch):
    """No token, no turn."""
    chat = talk("Never said.")
    stream = chat.session.stream

    def interrupted(ids, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return stream(ids, **options)

    monkeypatch.setattr(chat.session, "stream", interrupted)
    assert chat.send("Hi") is False
    assert chat.conversation.messages == () and "your turn was taken back" in capsys.readouterr().err


def test_the_context_has_an_end(talk, capsys):
    """An answer ends where it is full, and says so; a turn that does not fit is not taken."""
    chat = talk("a" * 100, capacity=40, options={"max_new_tokens": 1000})
    chat.send("Hi")
    assert "the context of 40 tokens is full" in capsys.readouterr().err
    before = chat.conversation
    with pytest.raises(UsageError, match="44 tokens, but the context holds 40.*not taken"):
        chat.send("")
    assert chat.conversation is before
    short = talk("a" * 100, options={"max_new_tokens": 3})
    short.send("Hi")
    assert "cut after 3 tokens by max_new_tokens: see /set" in capsys.readouterr().err


def test_what_is_forgiven_is_told(talk, capsys):
    chat = talk("Look.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=")
    chat.send("Hi")
    assert "(the tool calls are not closed)" in capsys.readouterr().err and not chat.conversation.pending


def test_commands(talk, capsys, tmp_path):
    """What each of them changes."""
    chat = talk("Hello.", "Read.")
    commands = SlashCommands(chat)
    chat.send("Hi")
    commands.run("/system Be kind.")
    assert chat.conversation.system == "Be kind." and len(chat.conversation.messages) == 2
    commands.run("/system")
    assert "system text: Be kind." in capsys.readouterr().err
    commands.run("/system -")
    assert chat.conversation.system is None
    commands.run("/clear")
    assert chat.conversation == Conversation()
    commands.run("/set temperature 0.5")
    commands.run("/set")
    said = capsys.readouterr().err
    assert chat.sampling == Sampling(temperature=0.5) and re.search("^temperature +0.5$", said, re.MULTILINE)
    assert all(re.search(f"^{field} ", said, re.MULTILINE) for field in FIELDS)
    for line in ("/set max_new_tokens 7", "/set stop \n\n", "/set stop .", "/set max_new_tokens"):
        commands.run(line)
    assert (chat.options["max_new_tokens"], chat.options["stop"]) == (7, ".")
    assert capsys.readouterr().err.endswith("max_new_tokens       7\n")
    commands.run("/set max_new_tokens all")
    assert re.search("^max_new_tokens +all$", capsys.readouterr().err, re.MULTILINE)
    commands.run('/set logit_bias {"42": -1.5}')
    assert chat.sampling == Sampling(temperature=0.5, logit_bias={42: -1.5})
    (tmp_path / "long.txt").write_text("from a file\n", encoding="utf-8")
    assert commands.run(f"/file {tmp_path / 'long.txt'}") is True
    assert chat.session.options[-1]["sampling"].temperature == 0.5
    assert chat.conversation.messages[0]["content"] == "from a file\n"
    for leave in ("/exit", "/quit", "/bye"):
        with pytest.raises(Quit):
            commands.run(leave)


def test_retry(talk):
    """Another answer in place of the last one, with the next seed; not where it would be the same."""
    chat = talk("One.", "Two.", "Three^C")
    commands = SlashCommands(chat)
    chat.send("Count.")
    with pytest.raises(UsageError, match="temperature above 0"):
        commands.run("/retry")
    assert chat.conversation.messages[-1]["content"] == "One."
    commands.run("/set temperature 1")
    assert commands.run("/retry") is True
    assert [message["content"] for message in chat.conversation.messages] == ["Count.", "Two."]
    assert chat.session.prompts[0] == chat.session.prompts[1]
    assert [options["sampling"].seed for options in chat.session.options] == [0, 1]
    assert commands.run("/retry") is False and chat.conversation.messages[-1]["content"] == "Th"


@pytest.mark.parametrize(
    "line, error, why",
    [
        ("/nonsense\x1b", UsageError, r"unknown command /nonsense\\x1b"),
        ("/undo", UsageError, "no turn of yours yet"),
        ("/retry", UsageError, "no turn of yours yet"),
        ("/retry now", UsageError, "takes no arguments"),
        ("/undo now", UsageError, "takes no arguments, but 'now' follows; nothing was done"),
        ("/set warmth 3", UsageError, "no such setting: warmth"),
        ("/set temprature 1", UsageError, r"no such setting: temprature .do you mean temperature"),
        ("/set max_new_tokens 0", UsageError, "^max_new_tokens must be an integer, 1 or more"),
        ('/set stop [""]', UsageError, "stop"),
        ("/clera", UsageError, "do you mean /clear"),
        ("/set top_k many", UsageError, "needs a number or a list"),
        ("/set top_p 7", UsageError, "top_p must be"),
        ("/set top_k " + "[" * 5000, UsageError, "needs a number or a list"),
        ('/set logit_bias {"9999999": 1}', UsageError, "outside the vocabulary"),
        ("/set allowed_ids [1, true]", UsageError, "outside the vocabulary"),
        ("/save ~nobody-of-that-name/x", UsageError, "invalid path"),
        ("/load .", UsageError, "not the name of a file"),
        ("/file a\0b", UsageError, "null byte"),
        ("/save", UsageError, "which file"),
        ("/load", UsageError, "which file"),
        ("/load nowhere", FileNotFoundError, "nowhere.json"),
        ("/file nowhere.txt", FileNotFoundError, "nowhere.txt"),
    ],
)
def test_commands_refuse(talk, line, error, why):
    chat = talk()
    with pytest.raises(error, match=why):
        SlashCommands(chat).run(line)
    assert chat.conversation == Conversation() and chat.sampling == Sampling()


def test_help_lists_every_command(talk, capsys):
    SlashCommands(talk()).run("/help")
    listed = capsys.readouterr().err
    assert all(name in listed for name in [*COMMANDS, '"""', "Ctrl-C", "Ctrl-D"])
    assert max(map(len, listed.splitlines())) < 80 and set(FIELDS) == {f.name for f in dataclasses.fields(Sampling)}


def test_help_in_a_narrow_terminal(talk, monkeypatch):
    """Its lines are broken between words."""
    for name, value in {"COLUMNS": "40", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    SlashCommands(talk()).run("/help")
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 40 and "start a new conversation" in " ".join(terminal.getvalue().split())


def test_a_loaded_call_waits_for_its_result(talk, capsys, tmp_path, monkeypatch):
    """It is shown again: who gives the result has to see what was asked."""
    chat = talk("Look." + CALL, "It is 3.", tools=[TOOL])
    chat.send("1+2?")
    capsys.readouterr()
    monkeypatch.setattr(conversation_file, "load", lambda *_: (chat.conversation, chat.session, ""))
    SlashCommands(chat).run(f"/load {tmp_path / 'talk'}")
    assert "1 turn; the last: 1+2?\ncalls add(a=1)\ncalls mul" in capsys.readouterr().err
    assert chat.prompt == "result of add> "


BAD_CONVERSATIONS = {
    "not json": "not valid JSON",
    "[]": "not a conversation",
    '{"kind": "other"}': "not a conversation",
    json.dumps({"kind": conversation_file.KIND, "system": 3, "tools": [], "thinking": False, "messages": []}): "system",
    json.dumps(
        {"kind": conversation_file.KIND, "system": "", "tools": [], "thinking": False, "messages": [{"role": "x"}]}
    ): "'x'",
    json.dumps(
        {"kind": conversation_file.KIND, "system": "", "tools": [], "thinking": False, "messages": [], "more": 1}
    ): "unknown or of another type: more",
}


@pytest.mark.parametrize("text", BAD_CONVERSATIONS)
def test_a_conversation_that_is_damaged(talk, tmp_path, text):
    (tmp_path / "talk.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=BAD_CONVERSATIONS[text]):
        conversation_file.load(tmp_path / "talk", talk().session)


FEW = ("--max-new-tokens", "6", "--capacity", "32", "--dtype", "float32")


def test_piped_turns(dsv32, checkpoint, tmp_path, monkeypatch):
    """Answers go to stdout, what is saved is loaded, and only what is new is read."""
    monkeypatch.chdir(tmp_path)
    code, out, err = dsv32("chat", checkpoint, *FEW, piped="Hi\n/save talk\n/clear\n\n/load talk\n")
    assert code == 0 and out.endswith("\n") and "read 5 prompt tokens" in err and "1 turn; the last: Hi" in err
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "user", "content": "Hi"}
    assert (tmp_path / "talk.json").stat().st_mode == (tmp_path / "talk.safetensors").stat().st_mode

    code, again, err = dsv32("chat", checkpoint, *FEW, "--load", "talk", piped="/undo\nHi\n/save talk.json\n")
    assert code == 0 and again == out and "read 1 prompt token" in err and "read again" not in err


def test_saving(checkpoint, tmp_path):
    """Nothing is written over; what cannot be continued is read again, and it is said why."""
    model = models.abstract(OpenedCheckpoint.of(checkpoint).cfg)
    talked = Conversation(system="Be brief.", tools=[TOOL], thinking=True).user("Hi")
    written = conversation_file.save(tmp_path / "a.b", talked, session(model, capacity=32), replace=False)
    assert [file.name for file in written] == ["a.b.json", "a.b.safetensors"]
    found, continued, why = conversation_file.load(tmp_path / "a.b.json", session(model, capacity=32))
    assert (found, continued.capacity, why) == (talked, 32, "")
    with pytest.raises(OutputExistsError, match="a.b.json exists already and was not touched"):
        conversation_file.save(tmp_path / "a.b", talked, session(model), replace=False)
    found, other, why = conversation_file.load(tmp_path / "a.b", session(model, capacity=64, cache_dtype="fp8"))
    assert found == talked and (other.capacity, other.cache_dtype.name) == (64, "float8_e4m3fn")
    assert "was saved with capacity 32, cache_dtype float32, not capacity 64, cache_dtype float8_e4m3fn" in why
    with pytest.raises(StorageError, match="no/a.safetensors cannot be written"):
        conversation_file.save(tmp_path / "no" / "a", talked, session(model), replace=False)
    written[1].write_bytes(b"damaged")
    assert "is not a session" in conversation_file.load(tmp_path / "a.b", session(model))[2]
    written[1].unlink()
    assert "there is no a.b.safetensors" in conversation_file.load(tmp_path / "a.b", session(model))[2]


MISUSE = {
    "g35 an empty stop string": (("--stop", ""), 2, "at least one character"),
    "g25 stop ids": (("--stop-token-ids", "999"), 2, "--stop-token-ids"),
    "no room for an answer": (("--max-new-tokens", "0"), 2, "leaves no room for an answer"),
    "a capacity that is none": (("--capacity", "0"), 2, "--capacity must be"),
    "too large a capacity": (("--capacity", "5000"), 2, "--capacity must be"),
    "temperature": (("--temperature", "9"), 2, "--temperature must be"),
    "tools that are not there": (("--tools", "nowhere.json"), 3, "error: nowhere.json: No such file or directory\n"),
    "tools that are no list": (("--tools", "object.json"), 2, "must hold a list of tools"),
    "tools that are none": (("--tools", "list.json"), 2, "tools[0] must be an object"),
    "tools that are no json": (("--tools", "text.json"), 3, "text.json: not valid JSON"),
    "a conversation that is not there": (("--load", "nowhere"), 3, "nowhere.json: No such file or directory\n"),
    "a conversation that is none": (("--load", "object"), 3, "is not a conversation"),
    "two ways to begin": (("--load", "x", "--system", "y"), 2, "--load restores"),
}


@pytest.mark.parametrize("mistake", MISUSE)
def test_misuse(dsv32, checkpoint, monkeypatch, tmp_path, mistake):
    """Before weights are read."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("object", "{}"), ("list", "[3]"), ("text", "tools")):
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    argv, wanted, why = MISUSE[mistake]
    code, out, err = dsv32("chat", checkpoint, *argv)
    assert (code, out) == (wanted, "") and why in err and "loaded" not in err


def test_piped_errors_end_it(dsv32, checkpoint):
    """A script does not go on as if nothing had happened."""
    for piped, why in (("/nonsense\nHi\n", "unknown command /nonsense"), (b"\xff\n", "is not utf-8")):
        code, out, err = dsv32("chat", checkpoint, *FEW, piped=piped)
        assert code == 2 and out == "" and why in err


@pytest.mark.parametrize(
    ("typed", "turn"),
    [
        ('"""\na\n\n b\n"""\n', "a\n\n b"),
        ('"""a\nb"""\n', "a\nb"),
        ('"""a"""\n', "a"),
        ('"""\n"""\n', ""),
        ("a\\\n", "a\\"),
    ],
)
def test_several_lines(monkeypatch, typed, turn):
    """Between the marks, whose own lines do not count; a backslash means nothing where nobody types."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert Keyboard(Screen()).read_turn("> ") == turn


def test_typed_bytes_that_are_no_text(monkeypatch):
    """A terminal, and a pipe in the C locale, give them as half surrogate pairs."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), "utf-8", errors="surrogateescape"))
    with pytest.raises(UsageError, match="not UTF-8: character 1 is the byte 0xff"):
        Keyboard(Screen()).read_turn("> ")


TAKE_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "dsv32_jax", *sys.argv[1:]])
"""


class Pseudoterminal:
    """The command `dsv32` where it believes that a person is there, and what it writes."""

    def __init__(self, *argv, **environment):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", TAKE_THE_TERMINAL, *map(str, argv)]
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", **environment}
        self._process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        os.close(slave)
        self._written = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the program waits for a key again: CPython misses a signal that comes just before it waits."""
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What is written up to `text`."""
        end = time.monotonic() + seconds
        while text not in self._written:
            assert time.monotonic() < end, f"{text!r} did not come: {self._written!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self._written += os.read(self._master, 4096).decode("utf-8", "replace")
        before, _, self._written = self._written.partition(text)
        return before

    def ends(self) -> int:
        """The exit code."""
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            os.close(self._master)


def test_a_terminal(checkpoint, tmp_path):
    """Ready, stopped by Ctrl-C in an answer and still there, several lines, completion, history, Ctrl-D."""
    folders = {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    terminal = Pseudoterminal("chat", checkpoint, "--dtype", "float32", **folders)
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("Hi there\n")
    terminal.wait_for("Hi there\r\n")
    terminal.wait_for("reading")
    terminal.wait_for("\x1b[2K")
    terminal.type("typed ahead\x03")
    assert "typed" not in terminal.wait_for("stopped; the answer so far stays")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt()
    terminal.wait_for("(Ctrl-D or /exit leaves)")
    terminal.wait_for("> ")
    terminal.type("\x1b[200~/system two\nlines\x1b[201~\n")
    terminal.wait_for("is read again with it")
    terminal.type("/sys\t\n")
    terminal.wait_for("system text: two\r\nlines")
    terminal.wait_for("> ")
    terminal.type('"""\n/system a\nthree\n"""\n')
    terminal.wait_for("is read again with it")
    terminal.wait_for("> ")
    terminal.type("\x1b[A")
    terminal.wait_for("/system a")
    terminal.wait_for("three")
    terminal.type("\n")
    terminal.wait_for("is read again with it")
    terminal.wait_for("> ")
    terminal.type('"""\n/undo\nnot sent')
    terminal.wait_for("... not sent")
    terminal.interrupt()
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.ends() == 0
    assert "Hi there\n" in (tmp_path / "dsv32_jax" / "chat_history").read_text(encoding="utf-8")


def test_help_shows_the_defaults_of_a_chat(capsys):
    """They differ from those of the library."""
    with pytest.raises(SystemExit):
        app.parser().parse_args(["chat", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "maximum new tokens; all: as many as the context holds (default: 4096)" in said
    assert "prompt included (default: 16384)" in said and "0 is greedy" in said and "(default: 0)" in said
