"""An argument parser that suggests the command or option a user may have meant."""

import argparse
import re
import sys
from typing import NoReturn

from ..errors import UsageError, unknown


class ShortUsage(argparse.HelpFormatter):
    """Help whose first line names the arguments that are required alone."""

    def add_usage(self, usage, actions, groups, prefix=None):
        """Add the usage of the positional and the required ones among `actions`."""
        given = list(actions)
        needed = [action for action in given if not action.option_strings or action.required]
        if len(needed) < len(given):
            needed.append(argparse.Action([], "options", nargs="?", metavar="options"))
        super().add_usage(usage, needed, (), prefix)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with short usage and without abbreviated options. Subcommands report unknown ones themselves.

    `trailing_positional` names an optional positional that may follow options; argparse allows that since Python 3.12.
    """

    trailing_positional: str | None = None

    def __init__(self, **options):
        super().__init__(formatter_class=ShortUsage, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse. Raises UsageError if anything is left over."""
        found, rest = super().parse_known_args(args, namespace)
        name = self.trailing_positional
        if name and rest and getattr(found, name) is None and not rest[0].startswith("-"):
            setattr(found, name, rest.pop(0))
        if rest:
            self.error(f"unrecognized arguments: {', '.join(unknown(rest, self._option_string_actions))}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the usage and raise UsageError with the message, and with a hint for a name that is no choice."""
        if match := re.fullmatch(r"(.*invalid choice: )'([^']*)' \(choose from (.*)\)", message):
            choices = re.split(r", ", match[3].replace("'", ""))
            (hint,) = unknown([match[2]], choices)
            message = f"{match[1]}{hint}; choose from {', '.join(choices)}"
        self.print_usage(sys.stderr)
        raise UsageError(message)
