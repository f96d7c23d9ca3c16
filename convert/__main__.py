"""python -m convert SRC DST."""

import sys

from . import signals


def _message_before_start(signal_name: str, _: int) -> bytes:
    return f"{signal_name}: stopped; nothing was written\n".encode()


if __name__ == "__main__":
    signals.install_handlers(_message_before_start)
    from .command import program

    sys.exit(program())
