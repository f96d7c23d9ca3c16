"""One tensor scale for matrices that kernels compute together, where that is exact.

vLLM and TensorRT-LLM fuse gate and up, q_a and kv_a, and use one tensor scale for both. A matrix can take over the
scale of the other one exactly if each of its block scales, times the ratio of the two, is an E4M3 number again.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dsv32_jax.errors import argument, listing, pluralize
from dsv32_jax.quantization.quantize import E4M3, E4M3_AS_SCALE

from ..read.converted import Converted, Weight
from ..transform.requantize import find_pairs

Pair = tuple[Weight, Weight]


class Shared(NamedTuple):
    """A weight that takes over the tensor scale of `partner`: the new byte of every block scale byte."""

    partner: str
    scale_bytes: np.ndarray


class Sharing(NamedTuple):
    """`shared`: weights to rescale, by name; `apart`: pairs that keep different scales."""

    shared: dict[str, Shared]
    apart: list[Pair]

    def notes(self, pairs: list[Pair]) -> Iterator[str]:
        """Notes on the `pairs` of different scales."""
        if self.apart:
            names = listing((f"{first.name} and {second.name}" for first, second in self.apart), 4)
            count = pluralize(len(self.apart), "pair")
            yield f"own tensor scales kept in {count}: sharing one would change values ({names})"
        elif pairs and not self.shared:
            count = pluralize(len(pairs), "pair")
            yield (
                f"different tensor scales in {count} of gate and up, or q_a and kv_a, and loaders that fuse them use "
                f"one for both: {argument('share_scales', True)} gives them one where that is exact"
            )
        if self.shared:
            yield f"rescaled exactly to the tensor scale of the partner: {pluralize(len(self.shared), 'weight')}"


def find_differing_pairs(converted: Converted, weights: Iterable[Weight]) -> list[Pair]:
    """The pairs among `weights` (all NVFP4) that are computed together and have different tensor scales."""
    return [pair for pair in find_pairs(weights) if _scale(converted, pair[0]) != _scale(converted, pair[1])]


def share_scales(converted: Converted, pairs: Iterable[Pair]) -> Sharing:
    """Share one tensor scale in every pair where that is exact, either's."""
    found = Sharing({}, [])
    for first, second in pairs:
        for weight, partner in ((second, first), (first, second)):
            used = {
                byte
                for leaf in range(len(weight.leaves))
                for byte in np.unique(converted.component(weight, "block_scale", leaf).view(np.uint8)).tolist()
            }
            table = rescale_bytes(used, _scale(converted, weight), _scale(converted, partner))
            if table is not None:
                found.shared[weight.name] = Shared(partner.name, table)
                break
        else:
            found.apart.append((first, second))
    return found


def rescale_bytes(used: Iterable[int], own: np.float32, other: np.float32) -> np.ndarray | None:
    """For each of the 256 block scale bytes, the byte with the same meaning beside the tensor scale `other`.

    None if a byte in `used` has none, or if one of the tensor scales is 0. Products of E4M3 and float32 are exact in
    float64.
    """
    if not own or not other or not np.isfinite(other):
        return None
    before = np.array(sorted(used), np.uint8)
    wanted = np.abs(E4M3_AS_SCALE[before]).astype(np.float64) * np.float64(own)
    possible = E4M3[:127].astype(np.float64) * np.float64(other)
    codes = np.minimum(np.searchsorted(possible, wanted), len(possible) - 1)
    if (possible[codes] != wanted).any():
        return None
    table = np.arange(256, dtype=np.uint8)
    table[before] = codes | np.where(np.isnan(E4M3[before]), 0, before & 0x80)
    return table


def _scale(converted: Converted, weight: Weight) -> np.float32:
    return converted.component(weight, "tensor_scale").reshape(-1)[0]
