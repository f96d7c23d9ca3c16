"""Text for a terminal, in lines that are not wider than it."""

import shutil
import sys
import textwrap
from typing import TextIO


def wrap_lines(text: str, indent: int = 2, stream: TextIO | None = None) -> str:
    """Return `text` wrapped between words to the terminal of `stream` (stdout), unchanged where that is none."""
    if not (stream or sys.stdout).isatty():
        return text
    wrap = textwrap.TextWrapper(
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        replace_whitespace=False,
        break_on_hyphens=False,
    )
    return "\n".join(piece for line in text.split("\n") for piece in wrap.wrap(line) or [""])
