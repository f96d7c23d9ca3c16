"""A command line that says what an unknown option may mean."""

import argparse

from ..errors import unknown


class Parser(argparse.ArgumentParser):
    """One whose subcommands answer for their own options. `late` names an optional positional that may stand behind
    options, as of Python 3.12 all may."""

    late: str | None = None

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """What was found, and nothing else: what is not known ends the program."""
        found, rest = super().parse_known_args(args, namespace)
        if self.late and rest and getattr(found, self.late) is None and not rest[0].startswith("-"):
            setattr(found, self.late, rest.pop(0))
        if rest:
            self.error(f"unrecognized arguments: {', '.join(unknown(rest, self._option_string_actions))}")
        return found, rest
