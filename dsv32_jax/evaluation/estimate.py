"""Means over tokens with their standard errors."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None if there is only one window."""

    mean: float
    standard_error: float | None


def estimate_mean(values: Sequence[np.ndarray]) -> Estimate:
    """Return the mean of all `values`, one array a window.

    Tokens of a window are dependent, so windows are the sample: the error is that of a ratio of two sums over windows
    (Cochran, Sampling Techniques, 6.4).
    """
    total, count = (np.array([measure(each) for each in values], np.float64) for measure in (np.sum, np.size))
    windows, tokens = len(values), count.sum()
    mean = total.sum() / tokens
    if windows < 2:
        return Estimate(float(mean), None)
    residual = total - mean * count
    return Estimate(float(mean), math.sqrt(windows / (windows - 1) * np.sum(residual**2)) / float(tokens))


def exponentiate(nats: Estimate) -> Estimate:
    """Return the perplexity of a mean loss, its error to first order."""
    mean = math.exp(nats.mean)
    return Estimate(mean, None if nats.standard_error is None else mean * nats.standard_error)
