"""`python -m dsv32_jax` is the command `dsv32`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
