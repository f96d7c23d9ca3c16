"""The command lines of dsv32 generate, chat and doctor. Nothing here needs JAX: `--help` does not wait for it."""

import argparse
from pathlib import Path
from typing import Any

from . import arguments, multihost_launch

GENERATE = """The continuation goes to stdout, everything else to stderr. Without PROMPT or --file, or with -, the
prompt is what comes in on stdin. Text is taken as it is, the line break at its end too."""

GENERATE_EPILOG = """A .jsonl file has one request a line, an object with "prompt" (text), "messages" (as in OpenAI's
API) or "ids"; "thinking" and "tools" with messages; "id", which the result repeats; and any sampling option, such as
"temperature". Results are JSON lines, written batch by batch as they are done, with "line" telling whose they are.
The first Ctrl-C prints what was made so far and ends with exit code 130."""

CHAT = "Talk to the model. Type /help when it runs. Lines that are piped in are turns of yours, one each."

DOCTOR = "Say what is installed, which devices and how much room there are, and whether a checkpoint would load."


def add(commands: Any) -> None:
    """Add them to the subparsers `commands`; each sets `run`, which takes the parsed arguments."""
    _add_generate(commands)
    _add_chat(commands)
    _add_doctor(commands)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt, or a file of them",
        usage="dsv32 generate CKPT [PROMPT] [options]",
        description=GENERATE,
        epilog=GENERATE_EPILOG,
    )
    arguments.add_model(generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="text to continue; - for stdin")
    add("--file", type=Path, metavar="FILE", help="a text file: one prompt; a .jsonl file: one request a line")
    add("--chat", action="store_true", help="send text as a user's message instead of continuing it")
    add("--thinking", action="store_true", help="with messages: think before the answer")
    add("--allow-special", action="store_true", help="text of special tokens in prompts and messages makes such tokens")
    add("--ids", action="store_true", help="token ids in and out: no tokenizer is needed")
    add("--stream", action="store_true", help="write each token when it is chosen")
    add("--json", action="store_true", help="write a JSON object for each result (with --stream: for each token)")
    add("--layerwise", action="store_true", help="compile a program for each kind of layer, not for the whole model")
    arguments.add(generate, "how tokens are chosen", arguments.SAMPLING)
    arguments.add(generate, "how much", {**arguments.TURN, **arguments.BATCH, **arguments.CACHE})
    multihost_launch.add(generate)
    generate.set_defaults(run=_generate)
    generate.trailing_positional = "prompt"


def _add_chat(commands: Any) -> None:
    usage = "dsv32 chat CKPT [options]"
    chat = commands.add_parser("chat", help="talk to the model", usage=usage, description=CHAT)
    arguments.add_model(chat)
    add = chat.add_argument
    add("--system", metavar="TEXT", help="the system text")
    add("--tools", type=Path, metavar="FILE", help="JSON list of tools, as in OpenAI's API; you give the results")
    add("--think", choices=("on", "off", "hide"), help="think first, and show it or not (off)")
    add("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    add("--no-history", action="store_true", help="do not keep what is typed for the next time")
    arguments.add(chat, "how tokens are chosen", arguments.SAMPLING)
    arguments.add(chat, "how much", {**arguments.TURN, **arguments.CACHE})
    chat.set_defaults(run=_chat)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="what is there and what would run", description=DOCTOR)
    doctor.add_argument("checkpoint", metavar="CKPT", nargs="?", type=Path, help="a checkpoint to look at")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)


def _generate(arguments: argparse.Namespace) -> int:
    def run(arguments: argparse.Namespace) -> int:
        from .generate_command import run

        return run(arguments)

    return multihost_launch.run(arguments, run)


def _chat(arguments: argparse.Namespace) -> int:
    from .chat_command import run

    return run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import run

    return run(arguments)
