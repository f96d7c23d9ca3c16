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
from ..errors import COMMAND_LINE, FULL, CapacityError, DsvError, StorageError, explain_exhaustion, printable, refusal
from ..system import interrupts
from ..system.argument_parser import Parser
from . import eval_command, parsers


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

    0 ok, 1 bug, 2 usage, 3 input damaged or unsupported, 4 verification failed, 5 not enough disk, memory or devices,
    6 output exists or is locked, 74 I/O error, 130 Ctrl-C.
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
    spelling = COMMAND_LINE.set(True)
    try:
        with interrupts.raise_on_interrupt():
            if argv[:1] == ["convert"]:
                return _convert(argv[1:])
            arguments = parser().parse_args(argv)
            return arguments.run(arguments)
    except DsvError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(printable(f"error: {refusal(error)}"), file=sys.stderr)
        return (CapacityError if error.errno in FULL else StorageError).exit_code
    except (MemoryError, RuntimeError) as error:
        exhausted = explain_exhaustion(error)
        print(f"error: {exhausted}", file=sys.stderr)
        return exhausted.exit_code
    finally:
        COMMAND_LINE.reset(spelling)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    root = Parser(prog="dsv32", description="DeepSeek-V3.2 in JAX, running from NVFP4 weights.")
    root.add_argument("--version", action="version", version=f"dsv32_jax {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser(
        "convert", help="Hugging Face safetensors -> a checkpoint that `load` reads", add_help=False
    )
    convert.add_argument("rest", nargs=argparse.REMAINDER)
    convert.set_defaults(run=_convert)
    importlib.import_module("dsv32_jax.convert.subcommands").add(commands)
    parsers.add_commands(commands)
    eval_command.add(commands)
    bench.add(commands)
    return root


def _convert(argv: list[str]) -> int:
    """Run `python -m convert`, which has its own command line."""
    from .. import convert

    return convert.program(argv)
