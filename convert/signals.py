"""Signals during a command: print how to continue, then exit at once.

Every command survives being killed at any point, so there is nothing to clean up. A handler that raised an exception
instead would have to unwind through JAX's imports, which it breaks, and through worker threads.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

CTRL_C, STOPPED = 130, 75
"""Exit codes after Ctrl-C, and after SIGTERM or SIGHUP (the terminal was closed)."""

EXIT_CODES = {signal.SIGINT: CTRL_C, signal.SIGTERM: STOPPED, signal.SIGHUP: STOPPED}

FinalMessage = Callable[[str, int], bytes]
"""From a signal's name and the exit code to the bytes to write to stderr."""


@contextlib.contextmanager
def exit_on_signal(final_message: FinalMessage) -> Iterator[None]:
    """Inside the `with`, a signal writes its final message and ends the process. Has no effect outside the main
    thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    install_handlers(final_message)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install_handlers(final_message: FinalMessage) -> None:
    """From now on a signal writes its final message and ends the process. Ignored signals (nohup) stay ignored."""

    def handle(number: int, _) -> None:
        code = EXIT_CODES[signal.Signals(number)]
        with contextlib.suppress(OSError):
            os.write(2, final_message(signal.Signals(number).name, code))
        os._exit(code)

    for number in EXIT_CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def ignore_signals() -> None:
    """Ignore signals from now on: the command is done and the process about to end."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
