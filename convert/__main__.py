"""python -m convert SRC DST."""

import sys

from . import interrupts


def _too_early(signal_name: str, _: int) -> bytes:
    return f"{signal_name}: stopped; nothing was written\n".encode()


if __name__ == "__main__":
    interrupts.install(_too_early)
    from .command import program

    sys.exit(program())
