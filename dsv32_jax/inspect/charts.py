"""Charts of any numbers, for notebooks; needs matplotlib (extra [notebook]).

Colours are those of Okabe and Ito; colour maps are cividis and, around an equal share, coolwarm: colour-blind readers
can tell them apart.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442".split()
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, "#999999")
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
"""A legend to the right of the axes."""

STYLES = ("-", "--", ":", "-.", (0, (6, 2)))
DPI = 220


class Picture:
    """A matplotlib `figure` with one pair of labelled `axes`, `height` inches high, that a notebook shows whatever its
    backend."""

    def __init__(self, xlabel: str = "", ylabel: str = "", height: float = 3):
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError("figures need matplotlib: pip install matplotlib, or '.[notebook]'") from None
        self.figure = Figure(figsize=(7, height), dpi=DPI, layout="constrained")
        self.axes: Any = self.figure.subplots()
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.set(xlabel=xlabel, ylabel=ylabel)

    def save(self, file: Any, format: str | None = None) -> None:
        """Write the figure to a file, in the format of its suffix."""
        self.figure.savefig(file, format=format)

    def __repr__(self) -> str:
        title, x, y = self.axes.get_title(), self.axes.get_xlabel(), self.axes.get_ylabel()
        return f"Picture{title and f' of {title}'}: {y}{x and f' by {x}'}"

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        """Return the picture, shown at half its pixels, with its text for those who do not see it."""
        file = io.BytesIO()
        self.save(file, "png")
        width, height = self.figure.get_size_inches() * DPI / 2
        return file.getvalue(), {"width": int(width), "height": int(height), "alt": repr(self)}


def bars(values: Mapping[str, float], ylabel: str, digits: int = 1, xlabel: str = "") -> Picture:
    """Plot a labelled bar for each name."""
    picture = Picture(xlabel, ylabel)
    axes = picture.axes
    drawn = axes.bar(range(len(values)), list(values.values()), color=BLUE, width=0.6)
    axes.bar_label(drawn, fmt=f"%.{digits}f", padding=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.margins(y=0.15)
    return picture


def stacks(values: Mapping[str, Mapping[str, float]], ylabel: str, xlabel: str = "") -> Picture:
    """Plot a column of named parts for each name."""
    picture = Picture(xlabel, ylabel, 3.4)
    axes, bottom = picture.axes, np.zeros(len(values))
    for i, part in enumerate(dict.fromkeys(part for column in values.values() for part in column)):
        heights = np.array([column.get(part, 0.0) for column in values.values()])
        axes.bar(range(len(values)), heights, bottom=bottom, width=0.6, color=COLOURS[i % len(COLOURS)], label=part)
        bottom += heights
    axes.set_xticks(range(len(values)), list(values))
    axes.legend(**BESIDE, reverse=True)
    return picture


def groups(values: Mapping[str, Mapping[str, tuple[float, float]]], xlabel: str, ylabel: str) -> Picture:
    """Plot bars side by side at each inner name, one for each outer name: means, and standard errors if any
    is not 0."""
    picture = Picture(xlabel, ylabel)
    axes = picture.axes
    names = list(dict.fromkeys(name for inner in values.values() for name in inner))
    width = 0.8 / len(values)
    for i, (label, inner) in enumerate(values.items()):
        at = np.arange(len(names)) + width * (i - (len(values) - 1) / 2)
        means, errors = zip(*(inner[name] for name in names), strict=True)
        style = {"color": COLOURS[i], "edgecolor": "black", "linewidth": 0.5, "capsize": 3}
        axes.bar(at, means, 0.92 * width, yerr=errors if any(errors) else None, label=label, **style)
    axes.set_xticks(range(len(names)), names)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return picture


def lines(
    values: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    x: Sequence[float] = (),
    errors: Mapping[str, Sequence[float]] = {},
) -> Picture:
    """Plot a line for each name over `x`, its ticks (default: the index), with standard errors where there are some."""
    picture = Picture(xlabel, ylabel)
    for i, (name, heights) in enumerate(values.items()):
        at = x if len(x) else range(len(heights))
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
        picture.axes.errorbar(at, heights, errors.get(name), capsize=3, label=name, **style)
    if len(x):
        picture.axes.set_xticks(x)
    picture.axes.legend(frameon=False)
    return picture


def heat(
    values: np.ndarray,
    xlabel: str,
    ylabel: str,
    label: str,
    rows: Sequence[Any] = (),
    columns: Sequence[Any] = (),
    centre: float | None = None,
) -> Picture:
    """Plot a matrix as colours, its rows and columns named or numbered. Colours diverge equally far from `centre`."""
    picture = Picture(xlabel, ylabel, 1.7 + 0.25 * min(len(values), 10))
    axes = picture.axes
    colours: dict[str, Any] = {"cmap": "cividis"}
    if centre is not None:
        reach = max(np.nanmax(np.abs(values - centre), initial=0), 1e-9)
        colours = {"cmap": "coolwarm", "vmin": centre - reach, "vmax": centre + reach}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
    for names, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        if len(names):
            axis.set_ticks(range(len(names)), list(map(str, names)))
        else:
            axis.get_major_locator().set_params(integer=True)
    bar = picture.figure.colorbar(image, ax=axes, label=label)
    bar.ax.set_ylim(np.nanmin(values) - 1e-9, np.nanmax(values) + 1e-9)
    return picture
