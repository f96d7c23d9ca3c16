"""Ctrl-C: what was made so far is returned, and a command ends, whatever it is in the middle of."""

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

EXIT_CODE = 130
"""Of a command that Ctrl-C ended."""

AGAIN = 0.05
"""Seconds until a signal that came there is sent again."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler: KeyboardInterrupt, raised as soon as it can travel from where the program is."""
    while frame is not None:
        if _swallows(frame.f_code):
            again = threading.Timer(AGAIN, signal.pthread_kill, (threading.main_thread().ident, number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _swallows(code: CodeType) -> bool:
    """Whether what is raised there goes nowhere: in a destructor, a hook of the garbage collector (JAX has one), or an
    import, which would leave modules half made or make an ImportError of it."""
    hooks = [getattr(hook, "__code__", None) for hook in gc.callbacks]
    return code.co_name == "__del__" or code in hooks or code.co_filename.startswith("<frozen importlib")


HANDLERS = (signal.default_int_handler, interrupt)
"""Those that raise KeyboardInterrupt and do nothing else."""


def _is_free() -> bool:
    """Whether nothing else handles SIGINT, and this is the main thread: Python delivers signals to no other."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in HANDLERS


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside the `with`, Ctrl-C raises KeyboardInterrupt in spite of imports and the garbage collector."""
    if not _is_free():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside the `with`, the first Ctrl-C only makes the given function true; a second one raises KeyboardInterrupt.

    In other threads than the main one nothing changes; nor where SIGINT has a handler already.
    """
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            interrupt(number, frame)
        asked = True

    if not _is_free():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
