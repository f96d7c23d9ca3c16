"""python -m convert SRC DST."""

import sys

from . import signals

if __name__ == "__main__":
    signals.install_handlers(lambda name, _: f"{name}: stopped; nothing was written\n".encode())
    from .command import program

    sys.exit(program())
