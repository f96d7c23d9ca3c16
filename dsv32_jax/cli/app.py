"""The command `dsv32`. Only what a subcommand needs is imported, so `--help` does not wait for JAX."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..bench import command as bench
from ..errors import FULL, CapacityError, DsvError, StorageError, printable, refusal
from ..system import interrupts
from ..system.argument_parser import Parser
from . import eval_command, subcommands
from .screen import Screen


def program() -> int:
    """`main` as a process of its own. After Ctrl-C it is gone at once: what is torn down in the middle of its work
    would have its say."""
    try:
        return _main(sys.argv[1:])
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(interrupts.EXIT_CODE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0 ok, 1 bug, 2 usage, 3 input damaged or unsupported, 4 verification
    failed, 5 not enough disk, memory or devices, 6 output exists or is locked, 74 I/O error, 130 Ctrl-C."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupts.EXIT_CODE


def _main(argv: list[str]) -> int:
    """Everything but Ctrl-C, which is raised."""
    logging.basicConfig(format="%(message)s")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
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


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = Parser(prog="dsv32", description="DeepSeek-V3.2 in JAX, running from NVFP4 weights.")
    root.add_argument("--version", action="version", version=f"dsv32_jax {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="convert, load and run the small trained model that is shipped: a minute, no download"
    )
    demo.add_argument("--new-tokens", type=int, default=80, metavar="N", help="tokens to generate at most (80)")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser(
        "convert", help="Hugging Face safetensors -> a checkpoint that `load` reads", add_help=False
    )
    convert.add_argument("rest", nargs=argparse.REMAINDER)
    convert.set_defaults(run=_convert)

    importlib.import_module("dsv32_jax.convert.subcommands").add(commands)
    subcommands.add(commands)
    eval_command.add(commands)

    _add_fit(commands)

    bench.add(commands)
    return root


def _add_fit(commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="whether weights, cache and activations fit in memory",
        description="Predict what a model takes on each device, without loading it. Exit code 5 when it does not fit.",
    )
    fit.add_argument("path", metavar="CHECKPOINT", help="a converted checkpoint, or a config.json")
    fit.add_argument("--context", type=int, metavar="N", help="tokens of a row, prompt included (4096, or the most)")
    fit.add_argument("--batch", type=int, default=1, metavar="B", help="rows at once (1)")
    fit.add_argument("--mesh", metavar="AXES", help="for example expert=8,model=2 (one device)")
    fit.add_argument("--cache-dtype", metavar="DTYPE", help="storage of the cache, fp8 too (as --dtype)")
    fit.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="what is computed in, or float32 (bfloat16)")
    fit.add_argument("--draft", type=int, default=0, metavar="K", help="tokens drafted at each step (0)")
    fit.add_argument("--format", choices=("nvfp4", "fp8", "bf16"), help="of a config.json's matrices (nvfp4)")
    fit.add_argument("--device-memory", metavar="SIZE", help="for example 141GB (what is free here)")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(run=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from ..generation.fit import fit, print_fit

    options = {name: value for name, value in vars(arguments).items() if name not in ("path", "json", "run")}
    screen = Screen()
    screen.status("compiling, to see what programs take")
    try:
        found = fit(arguments.path, **options)
    finally:
        screen.status("")
    return print_fit(found, arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    demo.run(arguments.new_tokens)
    return 0


def _convert(argv: list[str]) -> int:
    """`python -m convert`, which has its own command line."""
    from .. import convert

    return convert.program(argv)
