"""The command `dsv32`. Each subcommand imports what it needs, so `--help` does not wait for JAX."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..bench import command as bench
from ..errors import UsageError
from ..system import interrupts
from ..system.argument_parser import Parser
from ..system.exit_codes import run_command
from . import eval_command, parsers

DESCRIPTION = "DeepSeek-V3.2 in JAX, running from NVFP4 weights. `dsv32 help COMMAND` lists a command's options."
ACTIVATE = 'eval "$(dsv32 completion bash)"'


def program() -> int:
    """Run `main` as a process of its own. After Ctrl-C skip Python's teardown, which prints spurious errors."""
    try:
        return _run(sys.argv[1:])
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(interrupts.EXIT_CODE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    0 ok, 1 bug, 2 usage, 3 input missing, damaged or unsupported, 4 a converted checkpoint is not as it was written, or
    doctor found problems, 5 not enough disk, memory or devices, 6 output exists or is locked, 74 I/O error, 130 Ctrl-C.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupts.EXIT_CODE


def _run(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")

    def run() -> int:
        arguments = parser().parse_args([*argv[1:], "--help"] if argv[:1] in ([], ["help"]) else argv)
        arguments.argv = argv
        return arguments.run(arguments)

    with interrupts.raise_on_interrupt():
        return run_command(run, "--json" in argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    root = Parser(prog="dsv32", description=DESCRIPTION)
    root.add_argument("--version", action="version", version=f"dsv32_jax {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for module in ("command", "subcommands"):
        importlib.import_module(f"dsv32_jax.convert.{module}").add(commands)
    parsers.add_commands(commands)
    eval_command.add(commands)
    bench.add(commands)
    completion = commands.add_parser("completion", help="print what lets TAB complete commands and options")
    completion.add_argument("shell", choices=("bash", "zsh"), help=f"the shell; activate it with: {ACTIVATE}")
    completion.set_defaults(run=_print_completion)
    return root


def _print_completion(arguments: argparse.Namespace) -> int:
    """Print the completion script of a shell."""
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs shtab: pip install 'dsv32-jax[text]'") from None
    print(shtab.complete(parser(), arguments.shell))
    return 0
