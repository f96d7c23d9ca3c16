"""How far a converted checkpoint is from its source: relative RMS error, ||after - before|| / ||before||.

Never the mean of |after - before| / |before|: a correct NVFP4 quantizer has 18 % of that and 9.5 % of this, because
weights that become zero count as 100 %.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

from ..names import fold_expert, split_layer
from .requantize import Outcome

WORST = 5


def summary(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """For each kind of weight, how many were converted and the error over all of them; and the worst weights."""
    kinds: dict[str, list[Outcome]] = {}
    for name, outcome in outcomes.items():
        kinds.setdefault(fold_expert(split_layer(name)[1]).removesuffix(".weight"), []).append(outcome)
    worst = sorted(outcomes, key=lambda name: (-relative_rms([outcomes[name]]), name))[:WORST]
    return {
        "kinds": {
            name: {"weights": len(found), "relative_rms": relative_rms(found)} for name, found in sorted(kinds.items())
        },
        "worst": {name: relative_rms([outcomes[name]]) for name in worst},
    }


def relative_rms(outcomes: list[Outcome]) -> float:
    """The relative RMS error of all these weights together; 0 where they are zero."""
    norm = sum(outcome.squared_norm for outcome in outcomes)
    return math.sqrt(sum(outcome.squared_error for outcome in outcomes) / norm) if norm else 0.0


def odd_scales(outcomes: Mapping[str, Outcome]) -> collections.Counter[str]:
    """How many NaN and zero block scales were dequantized away."""
    counts: collections.Counter[str] = collections.Counter()
    for outcome in outcomes.values():
        counts.update(nan_scale_bytes=outcome.nan_scale_bytes, zero_blocks=outcome.zero_blocks)
    return counts
