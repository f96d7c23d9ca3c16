"""One command in several processes, one a host: join them, and stop when another one is gone."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import DsvError, StorageError, UsageError, printable

HEARTBEAT_SECONDS = 20
"""Silence after which a process counts as gone."""

GONE = (
    "another process of this run has ended or cannot be reached, so this one has stopped too; output not yet printed "
    "is lost. See what the others say, and start all of them again"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe the processes."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command on every host, each with its --process-id; --mesh spans the devices of all. Process 0 "
        "prints. --coordinator auto: JAX finds the others (JAX_COORDINATOR_ADDRESS, Slurm, Open MPI).",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, or auto")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def run(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Run `command`, together with the other processes if there are any, and return the exit code.

    JAX aborts a process when another one is gone. So the work is done in a child, and this process reports the abort.
    """
    if arguments.coordinator is None and arguments.processes is None and arguments.process_id is None:
        return command(arguments)
    _check(arguments)
    child = os.fork()
    if child == 0:
        return _run_joined(arguments, command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        raise StorageError(GONE)
    return code if code >= 0 else 128 - code


def _check(arguments: argparse.Namespace) -> None:
    given = (arguments.processes, arguments.process_id)
    if arguments.coordinator == "auto":
        if given != (None, None):
            raise UsageError("--coordinator auto finds --processes and --process-id itself; omit them")
    elif arguments.coordinator is None or None in given:
        raise UsageError("--coordinator HOST:PORT, --processes and --process-id belong together; give all three")
    elif not 0 <= arguments.process_id < arguments.processes:
        raise UsageError(f"--process-id must be from 0 to {arguments.processes - 1}, not {arguments.process_id}")
    if arguments.mesh is None:
        raise UsageError("several processes need --mesh, which spreads the model over their devices")


def _run_joined(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Join the other processes and run `command`. After an error exit at once: JAX's shutdown would wait for them.

    XLA's collectives write to file descriptor 1, so that becomes stderr; results go where it went before.
    """
    import jax

    results = os.dup(1)
    os.dup2(2, 1)
    try:
        jax.distributed.initialize(
            None if arguments.coordinator == "auto" else arguments.coordinator,
            arguments.processes,
            arguments.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        arguments.quiet |= jax.process_index() > 0
        sys.stdout = open(os.devnull if jax.process_index() else results, "w", encoding=sys.stdout.encoding)
        return command(arguments)
    except DsvError as error:
        _exit(error, error.exit_code)
    except jax.errors.JaxRuntimeError as error:
        _exit(f"{GONE} ({str(error).splitlines()[0][:200]})", StorageError.exit_code)


def _exit(error: Any, code: int) -> NoReturn:
    print(printable(f"error: {error}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
