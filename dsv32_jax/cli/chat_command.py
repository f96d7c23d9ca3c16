"""`dsv32 chat`: a conversation in the terminal."""

import argparse

from ..chat import Conversation
from ..errors import DsvError, UsageError, refusal
from ..generation.batch import WHOLE
from ..generation.options import Sampling
from ..generation.run import Run
from ..generation.session import session
from ..system.interrupts import EXIT_CODE
from . import conversation_file
from .arguments import CACHE, SAMPLING, TURN, given
from .chat_session import Talk
from .commands import TABLE, Commands, Leave
from .keyboard import Keyboard
from .open_checkpoint import Opened
from .screen import Screen, one_line

CAPACITY = 16384
"""Tokens of a conversation, unless it is said otherwise: a cache of one size, so that nothing is compiled again."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = Opened.of(arguments.checkpoint)
    assert opened.tokenizer is not None
    if arguments.load is not None and (arguments.system or arguments.tools or arguments.think):
        raise UsageError(
            "--load brings system text, tools and thinking with it: leave out --system, --tools and --think"
        )
    thinking = arguments.think not in (None, "off")
    conversation = Conversation(system=arguments.system, tools=_tools(arguments), thinking=thinking)
    sampling, turn = Sampling(**given(arguments, SAMPLING)), given(arguments, TURN)
    cache = {"capacity": min(CAPACITY, opened.cfg.max_position_embeddings), **given(arguments, CACHE)}
    _check(opened, arguments.dtype, sampling, turn, cache)
    if arguments.load is not None:
        conversation_file.conversation_in(arguments.load)
    with screen.listening():
        model = opened.load(arguments, screen)
        talk = Talk(
            screen,
            opened.tokenizer,
            session(model, **cache),
            conversation,
            sampling,
            turn,
            hides=arguments.think == "hide",
        )
        return _talk(Keyboard(screen), talk, arguments)


def _tools(arguments: argparse.Namespace) -> tuple:
    if arguments.tools is None:
        return ()
    tools = conversation_file.read_json(arguments.tools)
    if not isinstance(tools, list):
        raise UsageError(f'{arguments.tools} must hold a list of tools, [{{"type": "function", "function": ...}}]')
    return tuple(tools)


def _check(opened: Opened, dtype: str, sampling: Sampling, turn: dict, cache: dict) -> None:
    """Raise UsageError where no turn could ever be taken."""
    outline = opened.outline(dtype)
    if turn.get("max_new_tokens") == 0:
        raise UsageError("--max-new-tokens 0 leaves no answer; a chat needs 1 or more")
    session(outline, **cache)
    how = {"tokenizer": opened.tokenizer, "max_new_tokens": 1, **turn, **cache}
    Run(WHOLE, outline, [[opened.cfg.bos_token_id]], sampling, **how)


def _talk(keyboard: Keyboard, talk: Talk, arguments: argparse.Namespace) -> int:
    commands, screen = Commands(talk), talk.screen
    if arguments.load is not None:
        commands.load(str(arguments.load))
    if talk.conversation.tools:
        functions = [tool["function"] for tool in talk.conversation.tools]
        names = [function.get("name") if isinstance(function, dict) else function for function in functions]
        screen.note("tools: " + ", ".join(one_line(str(name), 60) for name in names))
    with keyboard.hushed():
        talk.get_ready()
    if keyboard.interactive:
        screen.note("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    with keyboard.remembering([*TABLE, "/file"], keep=not arguments.no_history):
        while True:
            try:
                if not _turn(keyboard, talk, commands) and not keyboard.interactive:
                    return EXIT_CODE
            except (EOFError, Leave):
                return 0
            except KeyboardInterrupt:
                if not keyboard.interactive:
                    raise
                screen.note("\n(Ctrl-D or /quit leaves)")
            except BrokenPipeError:
                raise
            except (DsvError, OSError, FloatingPointError) as error:
                if not keyboard.interactive:
                    raise
                screen.strong(f"error: {refusal(error) if isinstance(error, OSError) else error}")


def _turn(keyboard: Keyboard, talk: Talk, commands: Commands) -> bool:
    """Read a turn or a command and do it; False where Ctrl-C stopped the answer."""
    text = keyboard.read(talk.prompt)
    if not text.strip():
        return True
    with keyboard.hushed():
        return commands.do(text) if text.startswith("/") else talk.say(text)
