"""`dsv32 chat`: a conversation in the terminal."""

import argparse

from ..chat import Conversation
from ..errors import CheckpointError, DsvError, UsageError, refusal
from ..generation.options import Sampling
from ..generation.session import session
from ..system.files import parse_json
from ..system.interrupts import EXIT_CODE
from .chat_session import ChatSession
from .conversation_file import load_conversation
from .open_checkpoint import OpenedCheckpoint
from .parsers import CACHE, CHAT_DEFAULTS, LENGTH, collect_options, collect_sampling
from .prompt_input import read_text
from .slash_commands import COMMANDS, Quit, SlashCommands
from .terminal import Keyboard, Screen, shorten


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code. Everything is checked before weights are read."""
    screen = Screen(quiet=arguments.quiet)
    opened = OpenedCheckpoint.of(arguments.checkpoint)
    assert opened.tokenizer is not None
    if arguments.load is not None and (arguments.system or arguments.tools or arguments.think):
        raise UsageError("--load restores system text, tools and thinking: omit --system, --tools and --think")
    thinking = arguments.think not in (None, "off")
    conversation = Conversation(system=arguments.system, tools=_load_tools(arguments), thinking=thinking)
    sampling = Sampling(**opened.choose_sampling(collect_sampling(arguments), screen))
    options = collect_options(arguments, LENGTH)
    capacity = min(CHAT_DEFAULTS["capacity"], opened.cfg.max_position_embeddings)
    cache = {"capacity": capacity, **collect_options(arguments, CACHE)}
    _check(opened, arguments.dtype, sampling, options, cache)
    if arguments.load is not None:
        load_conversation(arguments.load)
    with screen.show_log():
        model = opened.load(arguments, screen)
        chat = ChatSession(
            screen,
            opened.tokenizer,
            session(model, **cache),
            conversation,
            sampling,
            {"max_new_tokens": CHAT_DEFAULTS["max_new_tokens"], **options},
            hide_reasoning=arguments.think == "hide",
        )
        return _talk(Keyboard(screen), chat, arguments)


def _load_tools(arguments: argparse.Namespace) -> tuple:
    if arguments.tools is None:
        return ()
    try:
        tools = parse_json(read_text(arguments.tools).encode())
    except CheckpointError as error:
        raise CheckpointError(f"{arguments.tools}: {error}") from None
    if not isinstance(tools, list):
        raise UsageError(f'{arguments.tools} must hold a list of tools, [{{"type": "function", "function": ...}}]')
    return tuple(tools)


def _check(opened: OpenedCheckpoint, dtype: str, sampling: Sampling, options: dict, cache: dict) -> None:
    """Raise UsageError where no turn could ever be answered."""
    if options.get("max_new_tokens") == 0:
        raise UsageError("--max-new-tokens 0 leaves no room for an answer; use 1 or more")
    limit = min(options.get("max_new_tokens") or CHAT_DEFAULTS["max_new_tokens"], max(0, cache["capacity"] - 1))
    given = {"tokenizer": opened.tokenizer, **options, **cache, "max_new_tokens": limit}
    opened.validate(dtype, [[opened.cfg.bos_token_id]], sampling, **given)


def _talk(keyboard: Keyboard, chat: ChatSession, arguments: argparse.Namespace) -> int:
    commands, screen = SlashCommands(chat), chat.screen
    if arguments.load is not None:
        commands.load(str(arguments.load))
    if chat.conversation.tools:
        functions = [tool["function"] for tool in chat.conversation.tools]
        names = [function.get("name") if isinstance(function, dict) else function for function in functions]
        screen.note("tools: " + ", ".join(shorten(str(name), 60) for name in names))
    with keyboard.echo_off():
        chat.warm_up()
    if keyboard.interactive:
        screen.note("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    with keyboard.use_history(list(COMMANDS), keep=not arguments.no_history):
        while True:
            try:
                if not _take_turn(keyboard, chat, commands) and not keyboard.interactive:
                    return EXIT_CODE
            except (EOFError, Quit):
                return 0
            except KeyboardInterrupt:
                if not keyboard.interactive:
                    raise
                screen.note("\n(Ctrl-D or /exit leaves)")
            except BrokenPipeError:
                raise
            except (DsvError, OSError, FloatingPointError) as error:
                if not keyboard.interactive:
                    raise
                text = refusal(error) if isinstance(error, OSError) else error
                screen.note(f"error: {text}", important=True)


def _take_turn(keyboard: Keyboard, chat: ChatSession, commands: SlashCommands) -> bool:
    """Read a turn or a command and carry it out. Returns False where Ctrl-C stopped the answer."""
    text = keyboard.read_turn(chat.prompt)
    if not text.strip():
        return True
    with keyboard.echo_off():
        return commands.run(text) if text.startswith("/") else chat.send(text)
