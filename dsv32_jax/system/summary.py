"""Short representations, as text and as HTML: sizes instead of arrays."""

import dataclasses
import html
from typing import Any

from ..errors import printable


class Summarized:
    """A mixin whose `repr`, as text and as HTML, is a title and some named values."""

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the title and the named values; by default the shapes of the fields of a dataclass."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self).__name__, {field.name: describe(getattr(self, field.name)) for field in fields}

    def __repr__(self) -> str:
        title, values = self.summary()
        width = max(map(len, values), default=0)
        return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in values.items())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        title, values = self.summary()
        return f"<div>{escape(title)}</div>{format_table(list(values.items()))}"


def format_table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Return rows of text as an HTML table, with a row of column names if there is a `head`."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} {STYLE}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(head, 'th') if head else ''}{''.join(row(cells, 'td') for cells in rows)}</table>"


def escape(text: str) -> str:
    """Return text as it is written in HTML, without characters that could steer a terminal."""
    return html.escape(printable(text))


STYLE = 'style="text-align:left;padding:0 1em 0 0;white-space:nowrap"'
"""Colours are those of the notebook, light or dark."""


def describe(value: Any) -> str:
    """Return the dtype and shape of an array, the title of what has a summary, the number of things in a tuple."""
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"{len(value)} x {type(value[0]).__name__}" if value else "none"
    return value.summary()[0] if isinstance(value, Summarized) else repr(value)
