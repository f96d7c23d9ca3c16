"""What happens when a conversion is told to stop: it says how to go on, and is gone at once.

Nothing has to be tidied up: a conversion survives being killed at any point. So a signal ends the process where it
stands, where an exception would have to find its way through JAX's imports, which it aborts, and through threads.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

CTRL_C, STOPPED = 130, 75
"""Exit codes: after Ctrl-C, and after a request to stop (SIGTERM, or SIGHUP when the terminal is closed)."""

CODES = {signal.SIGINT: CTRL_C, signal.SIGTERM: STOPPED, signal.SIGHUP: STOPPED}


LastWords = Callable[[str, int], bytes]
"""From the name of a signal and the exit code to what is written to stderr."""


@contextlib.contextmanager
def ending(last_words: LastWords) -> Iterator[None]:
    """Inside the `with`, a signal writes its `last_words` and ends the process.

    Only a main thread can do this: in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in CODES}
    install(last_words)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install(last_words: LastWords) -> None:
    """From now on a signal writes its `last_words` and ends the process. Signals that are ignored (nohup) stay so."""

    def end(number: int, _) -> None:
        code = CODES[signal.Signals(number)]
        with contextlib.suppress(OSError):
            os.write(2, last_words(signal.Signals(number).name, code))
        os._exit(code)

    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def ignore() -> None:
    """From now on nothing interrupts this process: it is done, and about to end."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
