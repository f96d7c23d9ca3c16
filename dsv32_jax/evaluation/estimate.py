"""A mean over tokens, and how far it may be off."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where there is only one window."""

    mean: float
    standard_error: float | None


def over_windows(values: Sequence[np.ndarray]) -> Estimate:
    """The mean of all `values`, one array a window.

    Tokens of a window depend on each other, so windows are what is drawn: the error is that of a ratio of two sums over
    windows (Cochran, Sampling Techniques, 6.4).
    """
    total, count = (np.array([measure(each) for each in values], np.float64) for measure in (np.sum, np.size))
    drawn, tokens = len(values), count.sum()
    mean = total.sum() / tokens
    if drawn < 2:
        return Estimate(float(mean), None)
    residual = total - mean * count
    return Estimate(float(mean), math.sqrt(drawn / (drawn - 1) * np.sum(residual**2)) / float(tokens))


def exponential(nats: Estimate) -> Estimate:
    """The perplexity of a mean loss, with the error to first order."""
    mean = math.exp(nats.mean)
    return Estimate(mean, None if nats.standard_error is None else mean * nats.standard_error)
