"""The command `dsv32`."""

from .app import main as main
