"""Ctrl-C: generation stops and returns what it has, and a command ends, wherever the program is at that moment."""

import contextlib
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

EXIT_CODE = 130
"""The exit code of a command that Ctrl-C ended."""

RETRY_SECONDS = 0.05
"""Seconds before a signal is sent again that arrived where an exception would be lost."""


FINALIZERS = (weakref.finalize, weakref.WeakSet)
SWALLOWING = ("<frozen importlib", *(one.__init__.__code__.co_filename for one in FINALIZERS))
"""The files of imports, and of the callbacks of Python's finalizers and weak collections."""


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, later if it would be swallowed where the program is now."""
    while frame is not None:
        if _swallows_exceptions(frame.f_code):
            retry = threading.Timer(RETRY_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number))
            retry.daemon = True
            retry.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _swallows_exceptions(code: CodeType) -> bool:
    """Return whether an exception is lost in `code`: a destructor, the callback of a weak reference, a hook of the
    garbage collector (JAX has one), or an import, which would leave modules half initialized or turn it into an
    ImportError."""
    hooks = [getattr(hook, "__code__", None) for hook in gc.callbacks]
    return code.co_name == "__del__" or code in hooks or code.co_filename.startswith(SWALLOWING)


DEFAULT_HANDLERS = (signal.default_int_handler, raise_interrupt)
"""Handlers that raise KeyboardInterrupt and do nothing else."""


def _can_handle() -> bool:
    """Return whether this is the main thread, which alone receives signals, and nothing else handles SIGINT."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) in DEFAULT_HANDLERS


@contextlib.contextmanager
def _handle(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raise_on_interrupt() -> Iterator[None]:
    """Inside the `with`, make Ctrl-C raise KeyboardInterrupt reliably, during imports and garbage collection too.

    Changes nothing outside the main thread, or if another handler of SIGINT is installed.
    """
    with _handle(raise_interrupt) if _can_handle() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed inside the `with`; twice raises KeyboardInterrupt.

    Changes nothing outside the main thread, or if another handler of SIGINT is installed.
    """
    interrupted = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise_interrupt(number, frame)
        interrupted = True

    with _handle(on_signal) if _can_handle() else contextlib.nullcontext():
        yield lambda: interrupted
