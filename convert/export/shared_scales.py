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


class Shared(NamedTuple):
    """A weight takes over the tensor scale of `partner`: the new byte of every block scale byte."""

    partner: Weight
    scale_bytes: np.ndarray


def share_scales(
    converted: Converted, weights: Iterable[Weight], share: bool
) -> tuple[dict[str, Shared], Iterator[str]]:
    """The NVFP4 `weights` to rescale, by name: of every pair with different tensor scales either, where that is exact;
    none unless `share`. And notes on these pairs."""
    pairs = [pair for pair in find_pairs(weights) if _scale(converted, pair[0]) != _scale(converted, pair[1])]
    shared: dict[str, Shared] = {}
    apart = []
    for first, second in pairs if share else ():
        for weight, partner in ((second, first), (first, second)):
            scales = (converted.component(weight, "block_scale", leaf) for leaf in range(len(weight.leaves)))
            used = {byte for scale in scales for byte in np.unique(scale.view(np.uint8)).tolist()}
            table = rescale_bytes(used, _scale(converted, weight), _scale(converted, partner))
            if table is not None:
                shared[weight.name] = Shared(partner, table)
                break
        else:
            apart.append(f"{first.name} and {second.name}")
    return shared, _describe(0 if share else len(pairs), len(shared), apart)


def _describe(differing: int, shared: int, apart: list[str]) -> Iterator[str]:
    if differing:
        yield (
            f"different tensor scales in {pluralize(differing, 'pair')} of gate and up, or q_a and kv_a, and loaders "
            f"that fuse them use one for both: {argument('share_scales', True)} gives them one where that is exact"
        )
    if apart:
        kept = f"own tensor scales kept in {pluralize(len(apart), 'pair')}"
        yield f"{kept}: sharing one would change values ({listing(apart, 4)})"
    if shared:
        yield f"rescaled exactly to the tensor scale of the partner: {pluralize(shared, 'weight')}"


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
