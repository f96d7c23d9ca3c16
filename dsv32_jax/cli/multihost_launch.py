"""A command that runs in several processes at once, one a host: joining them, and ending when one of them is gone."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ..errors import DsvError, StorageError, UsageError, printable

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is gone."""

WATCHED = "DSV32_WATCHED"
"""Set in the process that does the work: JAX's runtime aborts it when another one is gone, and its parent tells so."""

GONE = (
    "another process of this run has ended or cannot be reached, so this one has stopped too; what it had not printed "
    "is lost. See what the others say, and start all of them again"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which processes there are."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command on every host, each with its --process-id; --mesh spans the devices of all. Process 0 "
        "prints. --coordinator auto: JAX finds the others (JAX_COORDINATOR_ADDRESS, Slurm, Open MPI).",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, or auto")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def run(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """`command`, with the other processes where there are any; the exit code."""
    if arguments.coordinator is None and arguments.processes is None and arguments.process_id is None:
        return command(arguments)
    _check(arguments)
    return _work(arguments, command) if WATCHED in os.environ else _watch()


def _check(arguments: argparse.Namespace) -> None:
    given = (arguments.processes, arguments.process_id)
    if arguments.coordinator == "auto":
        if given != (None, None):
            raise UsageError("--coordinator auto finds --processes and --process-id itself; leave them out")
    elif arguments.coordinator is None or None in given:
        raise UsageError("--coordinator HOST:PORT, --processes and --process-id belong together; give all three")
    elif not 0 <= arguments.process_id < arguments.processes:
        raise UsageError(f"--process-id is from 0 to {arguments.processes - 1}, not {arguments.process_id}")
    if arguments.mesh is None:
        raise UsageError("several processes need --mesh, which says how the model is spread over their devices")


def _watch() -> int:
    """Do the work in a process of its own, which ends when this one is terminated. Ctrl-C reaches it by itself."""
    child = subprocess.Popen([sys.executable, "-m", "dsv32_jax", *sys.argv[1:]], env={**os.environ, WATCHED: "1"})
    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: lambda *_: child.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == -signal.SIGABRT:
        print(f"error: {GONE}", file=sys.stderr)
        return StorageError.exit_code
    return code if code >= 0 else 128 - code


def _work(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Join the others and run; where that fails end at once, for JAX would wait for processes that may be waiting.

    XLA's collectives write to file descriptor 1, so that becomes stderr; results go where it went before.
    """
    import jax

    results = os.dup(1)
    os.dup2(2, 1)
    try:
        _join(arguments)
        arguments.quiet |= jax.process_index() > 0
        sys.stdout = open(os.devnull if jax.process_index() else results, "w", encoding=sys.stdout.encoding)
        return command(arguments)
    except DsvError as error:
        _end(error, error.exit_code)
    except jax.errors.JaxRuntimeError as error:
        _end(f"{GONE} ({str(error).splitlines()[0][:200]})", StorageError.exit_code)
    raise AssertionError("unreachable")


def _join(arguments: argparse.Namespace) -> None:
    import jax

    found = arguments.coordinator == "auto"
    jax.distributed.initialize(
        None if found else arguments.coordinator,
        arguments.processes,
        arguments.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _end(error: Any, code: int) -> None:
    print(printable(f"error: {error}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
