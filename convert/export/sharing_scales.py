"""One tensor scale for matrices that kernels compute together, where that changes no value.

vLLM and TensorRT-LLM fuse gate and up, q_a and kv_a, and use one tensor scale for both. A matrix can take over the
scale of the other one exactly when each of its block scales, times the ratio of the two, is an E4M3 number again.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..transform.requantize import FUSED
from ..verify.converted import Converted, Weight

SIGN, NAN, LARGEST = 0x80, 0x7F, 0x7E

VALUES = [Fraction(float(v)) for v in np.arange(NAN, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)]
CODES = {value: code for code, value in enumerate(VALUES)}


class Shared(NamedTuple):
    """A weight that takes over the tensor scale of `partner`: the new byte of every block scale byte."""

    partner: str
    table: np.ndarray


class Sharing(NamedTuple):
    """`shared`: by name, weights to rescale. `apart`: pairs whose scales differ and stay so."""

    shared: dict[str, Shared]
    apart: list[tuple[str, str]]


def differing(converted: Converted, weights: Iterable[Weight]) -> list[tuple[Weight, Weight]]:
    """The pairs among `weights` (all NVFP4) that are computed together and have different tensor scales."""
    by_name = {weight.name.removesuffix(".weight"): weight for weight in weights}
    pairs = []
    for name, weight in by_name.items():
        stem, _, last = name.rpartition(".")
        for first, second in FUSED:
            other = by_name.get(f"{stem}.{second}")
            if last == first and other is not None and _scale(converted, weight) != _scale(converted, other):
                pairs.append((weight, other))
    return pairs


def share(converted: Converted, pairs: Iterable[tuple[Weight, Weight]]) -> Sharing:
    """What can be shared exactly of `pairs`."""
    found = Sharing({}, [])
    for first, second in pairs:
        for weight, partner in ((second, first), (first, second)):
            table = rescaled(_used(converted, weight), _scale(converted, weight), _scale(converted, partner))
            if table is not None:
                found.shared[weight.name] = Shared(partner.name, table)
                break
        else:
            found.apart.append((first.name, second.name))
    return found


def rescaled(used: Iterable[int], own: np.float32, other: np.float32) -> np.ndarray | None:
    """For each of the 256 bytes, the one that means the same next to the tensor scale `other` instead of `own`.

    None where a byte in `used` has no such other, or where one of the two is 0. A NaN scale stands for 448.
    """
    if not own or not other or not np.isfinite(other):
        return None
    ratio = Fraction(float(own)) / Fraction(float(other))
    table = np.arange(256, dtype=np.uint8)
    for byte in used:
        magnitude = byte & ~SIGN
        code = CODES.get(VALUES[LARGEST if magnitude == NAN else magnitude] * ratio)
        if code is None:
            return None
        table[byte] = code if magnitude == NAN else code | (byte & SIGN)
    return table


def apply(shared: Mapping[str, Shared], name: str, joined: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The components of the weight `name` with its new block scales; the tensor scale is written by the caller."""
    if name not in shared:
        return joined
    scale = shared[name].table[joined["block_scale"].view(np.uint8)].view(ml_dtypes.float8_e4m3fn)
    return {**joined, "block_scale": scale}


def _scale(converted: Converted, weight: Weight) -> np.float32:
    """The tensor scale of one weight."""
    return converted.component(weight, "tensor_scale").reshape(-1)[0]


def _used(converted: Converted, weight: Weight) -> list[int]:
    """The bytes that occur among its block scales, in any of its leaves."""
    found: set[int] = set()
    for leaf in range(len(weight.leaves)):
        scales = converted.component(weight, "block_scale", leaf)
        found.update(np.flatnonzero(np.bincount(scales.reshape(-1).view(np.uint8), minlength=256)).tolist())
    return sorted(found)
