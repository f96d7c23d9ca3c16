"""Reads that wait for the disk, and word of those that wait long: a network disk may say nothing for minutes.

Nothing can be done about such a read: it cannot be called back, and trying it again would wait too. But whoever looks
at a bar that stands still is told which file it stands for.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE = 60.0
"""Seconds without an answer before it is told, and told again after twice as long."""

_underway: dict[int, tuple[str, float]] = {}
"""By thread, what it is reading, and since when."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside the `with`, this thread waits for the disk to answer about `what`."""
    _underway[threading.get_ident()] = what, time.monotonic()
    try:
        yield
    finally:
        del _underway[threading.get_ident()]


@contextlib.contextmanager
def told(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with`, `tell` hears of every read of this process that waits longer than PATIENCE."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(tell, done), name="stalled reads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(tell: Callable[[str], None], done: threading.Event) -> None:
    said: dict[tuple[int, float], float] = {}
    while not done.wait(PATIENCE / 20):
        underway = {(thread, since): what for thread, (what, since) in list(_underway.items())}
        said = {read: limit for read, limit in said.items() if read in underway}
        for read, what in underway.items():
            waited, limit = time.monotonic() - read[1], said.get(read, PATIENCE)
            if waited >= limit:
                said[read] = 2 * limit
                tell(f"no bytes of {what} for {waited:.0f} s: the disk does not answer. Still waiting for it")
