"""What can be wrong with messages, and with the text a model wrote."""

from typing import NamedTuple

from ..errors import DsvError, UsageError


class Fault(NamedTuple):
    """One thing that is wrong: a `code` for programs, the `index` of the message, and words."""

    code: str
    index: int | None
    text: str


class Malformed(Exception):
    """Ends the encoding of one message; `encode` gathers these into one EncodingError."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code = code


class EncodingError(UsageError):
    """Messages that have no encoding.

    `faults` has the first thing that is wrong with each bad message; `code` and `index` are those of the first of
    them. The index counts in the list that was given, and is None where no one message of it is at fault.
    """

    def __init__(self, faults: list[Fault], limit: int = 20):
        self.faults = tuple(faults)
        self.code, self.index, first = faults[0]
        more = f"\n  ... and {len(faults) - limit} more" if len(faults) > limit else ""
        if len(faults) == 1:
            super().__init__(f"the messages cannot be encoded: {first}")
        else:
            lines = "".join(f"\n  {fault.text}" for fault in faults[:limit])
            super().__init__(f"{len(faults)} faults in the messages; nothing was encoded:{lines}{more}")


class ParsingError(DsvError, ValueError):
    """A completion that does not follow the message format. `code` says which rule, `position` the character where."""

    exit_code = 3

    def __init__(self, code: str, position: int, text: str):
        super().__init__(
            f"the completion does not follow the message format at character {position}: {text}; "
            "parse_lenient reads what can be read"
        )
        self.code = code
        self.position = position
