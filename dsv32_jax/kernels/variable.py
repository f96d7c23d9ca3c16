"""The environment variable DSV32_KERNELS: which code multiplies by stored weights; no JAX is needed to read it."""

import os

from ..errors import UsageError

VARIABLE = "DSV32_KERNELS"
CHOICES = ("auto", "xla")


def asked() -> str:
    """What the environment asks for. Raises UsageError."""
    name = os.environ.get(VARIABLE) or CHOICES[0]
    if name not in CHOICES:
        raise UsageError(f"{VARIABLE} is one of {', '.join(CHOICES)}, not {name!r}; nothing was run")
    return name
