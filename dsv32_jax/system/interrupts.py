"""Ctrl-C: generation stops and returns what it has, and a command ends, wherever the program is at that moment."""

import contextlib
import gc
import os
import select
import signal
import sys
import termios
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any

EXIT_CODE = 130
"""The exit code of a command that Ctrl-C ended."""

RETRY_SECONDS = 0.05
"""Seconds before a signal is sent again that arrived where an exception would be lost."""

PATIENCE = 0.5
"""Seconds after which a Ctrl-C that has not stopped anything yet is acknowledged."""

STOPPING = "stopping after the step that is being compiled or run; Ctrl-C again ends at once, and loses what was made"
SHOW_CURSOR = b"\x1b[?25h"

HANDLED = b"\0"
"""The byte that follows that of a signal in the pipe of `acknowledge_interrupt` once it was handled."""

_PIPE: ContextVar[int | None] = ContextVar("_PIPE", default=None)
"""The end of that pipe to write to."""

FINALIZERS = (weakref.finalize, weakref.WeakSet)
SWALLOWING = ("<frozen importlib", *(one.__init__.__code__.co_filename for one in FINALIZERS))
"""The files of imports, and of the callbacks of Python's finalizers and weak collections."""


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, later if it would be swallowed where the program is now."""
    _report_handled()
    while frame is not None:
        if _swallows_exceptions(frame.f_code):
            retry = threading.Timer(RETRY_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number))
            retry.daemon = True
            retry.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _report_handled() -> None:
    """Tell `acknowledge_interrupt` that there is nothing to acknowledge."""
    if (pipe := _PIPE.get()) is not None:
        os.write(pipe, HANDLED)


def _swallows_exceptions(code: CodeType) -> bool:
    """Return whether an exception is lost in `code`: a destructor, the callback of a weak reference, a hook of the
    garbage collector (JAX has one), or an import, which would leave modules half done or raise an ImportError."""
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
        try:
            yield lambda: interrupted
        finally:
            if interrupted:
                _report_handled()


@contextlib.contextmanager
def acknowledge_interrupt() -> Iterator[None]:
    """Inside the `with`, say on stderr that Ctrl-C was noticed where it stops nothing within half a second: Python's
    handlers run after a compilation, which cannot be left. After that another Ctrl-C ends the process.

    Changes nothing outside the main thread, or while another handler of SIGINT is installed.
    """
    if threading.current_thread() is not threading.main_thread() or not _is_ours():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    terminal = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    before, token = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), _PIPE.set(writer)
    threading.Thread(target=_watch, args=(reader, terminal), daemon=True).start()
    try:
        yield
    finally:
        _PIPE.reset(token)
        signal.set_wakeup_fd(before)
        os.close(writer)


def _is_ours() -> bool:
    """Return whether a function of this file handles SIGINT."""
    return getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__


def _watch(reader: int, terminal: list[Any] | None) -> None:
    """Acknowledge signals from a pipe until it is closed. `terminal`: the settings that it has at the end."""
    is_pending = is_acknowledged = False
    with open(reader, "rb", buffering=0) as signals:
        while True:
            if is_pending and not select.select([signals], [], [], PATIENCE)[0]:
                if is_acknowledged:
                    if terminal is not None:
                        termios.tcsetattr(sys.stdin, termios.TCSANOW, terminal)
                    os.write(2, SHOW_CURSOR * sys.stderr.isatty() + b"interrupted\n")
                    os._exit(EXIT_CODE)
                print(STOPPING, file=sys.stderr, flush=True)
                is_pending, is_acknowledged = False, True
            if not (byte := signals.read(1)):
                return
            if byte == HANDLED:
                is_pending = is_acknowledged = False
            elif byte[0] == signal.SIGINT and _is_ours():
                is_pending = True
