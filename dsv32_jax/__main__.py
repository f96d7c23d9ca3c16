"""`python -m dsv32_jax` is the command `dsv32`."""

import sys

from .cli.app import program

if __name__ == "__main__":
    sys.exit(program())
