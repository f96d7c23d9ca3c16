"""Products with stored weights: the XLA reference, faster kernels for CPUs and GPUs, and the choice between them.

The environment variable DSV32_KERNELS is "auto" (a kernel if the platform has one, the default) or "xla" (the reference
everywhere). It is read whenever a program is traced; reading it needs no JAX.
"""

import os

from ..errors import UsageError

VARIABLE = "DSV32_KERNELS"
CHOICES = ("auto", "xla")


def read_choice() -> str:
    """Return the value of DSV32_KERNELS. Raises UsageError if there is no such choice."""
    choice = os.environ.get(VARIABLE) or CHOICES[0]
    if choice not in CHOICES:
        raise UsageError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, not {choice!r}; nothing was run")
    return choice
