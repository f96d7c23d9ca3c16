"""An empty figure, which shows itself in a notebook; needs the extra [notebook]."""

import io
from typing import Any

import numpy as np

from ..errors import UsageError


class _Missing:
    """What stands for matplotlib's figures where it is not installed."""

    def __init__(self, *_, **__):
        raise UsageError("figures need matplotlib: pip install matplotlib, or '.[notebook]' for the notebooks")


try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = _Missing  # pyright: ignore[reportAssignmentType, reportConstantRedefinition]

DPI = 80


class Picture(Figure):  # pyright: ignore[reportGeneralTypeIssues]
    """A figure that a notebook shows as it is, whatever its backend."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def figure(width: float = 7, height: float = 3, columns: int = 1, **options: Any) -> tuple[Picture, Any]:
    """An empty figure of some inches, and its axes."""
    made = Picture(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = made.subplots(1, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
    return made, axes
