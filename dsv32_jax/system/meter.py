"""How far a job is, in bytes: what it tells whoever watches."""

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """Bytes done, of all, and the leaf they belong to. A leaf that is read but not yet on disk is done by half."""

    done: int
    total: int
    leaf: str


def no_progress(progress: Progress) -> None:
    """For callers who do not watch."""


class Meter:
    """Adds up what is done, and tells it."""

    def __init__(self, tell: Callable[[Progress], None], total: int, ready: int):
        self._tell, self._total = tell, total
        self._built = self._written = ready
        self._leaf = ""

    def built(self, leaf: str, nbytes: int) -> None:
        """`nbytes` of `leaf` are read."""
        self._leaf = leaf
        self._built = min(self._built + nbytes, self._total)
        self.report()

    def written(self, nbytes: int) -> None:
        """`nbytes` are safely on disk."""
        self._written += nbytes
        self._built = max(self._built, self._written)
        self.report()

    def report(self) -> None:
        """Tell how far it is."""
        self._tell(Progress((self._built + self._written) // 2, self._total, self._leaf))
