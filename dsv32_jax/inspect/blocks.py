"""What the stored numbers of a weight are like, and how far they are from another checkpoint's."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..errors import UsageError, require
from ..quantization.quantize import E2M1_MAX, E4M3_AS_SCALE
from .converter import converter
from .weights import Folder, StoredWeight

LARGEST_SCALE = 0x7E
"""The byte of 448, the largest E4M3; above it is NaN, which counts as 448."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over the blocks of an NVFP4 weight.

    codes             how often each of the 16 codes occurs (formats.NVFP4: code 0 is 0, 7 is 6, 8..15 are negative)
    scales            how often each byte occurs as a block scale, 256 of them
    blocks            all blocks
    zero_blocks       those whose scale is zero, or all of whose codes are
    saturated_blocks  those whose scale is the largest there is, 448: had they needed more, they could not have it
    """

    codes: np.ndarray
    scales: np.ndarray
    blocks: int
    zero_blocks: int
    saturated_blocks: int


def statistics(weight: StoredWeight) -> Statistics:
    """The statistics of an NVFP4 weight. Raises UsageError on another format."""
    counting = converter("inspect.tensors")
    codes, scale = _blocks(weight)
    magnitude = scale & 0x7F
    silent = ~(codes & 0x77).any(axis=-1)
    return Statistics(
        counting.count_nibbles(counting.count_bytes(codes)),
        counting.count_bytes(scale),
        scale.size,
        int(np.count_nonzero(silent | (magnitude == 0))),
        int(np.count_nonzero(magnitude >= LARGEST_SCALE)),
    )


def clipped(weight: StoredWeight, source: StoredWeight) -> int:
    """How many elements of `source` are larger than the largest that their block of the NVFP4 `weight` can be."""
    codes, scale = _blocks(weight)
    require(source, StoredWeight, "source must be what Folder.weight gives")
    if source.shape != weight.shape:
        raise UsageError(f"{source.path} is {list(source.shape)}, {weight.path} is {list(weight.shape)}")
    largest = E4M3_AS_SCALE[scale].reshape(weight.parts["block_scale"].shape) * weight.parts["tensor_scale"] * E2M1_MAX
    limit = np.repeat(largest, 2 * codes.shape[-1], axis=-1)
    return int(np.count_nonzero(np.abs(source.values()) > limit))


def _blocks(weight: StoredWeight) -> tuple[np.ndarray, np.ndarray]:
    """The packed codes of each block [n, bytes], and the byte of its scale [n]."""
    require(weight, StoredWeight, "weight must be what Folder.weight gives")
    if weight.format != "nvfp4":
        raise UsageError(f"{weight.path} is {weight.format}; only NVFP4 has codes and block scales")
    scale = np.ascontiguousarray(weight.parts["block_scale"]).view(np.uint8).reshape(-1)
    return weight.parts["codes"].reshape(scale.size, -1), scale


def atlas(folder: Folder, source: Folder, layers: Sequence[int] | None = None) -> np.ndarray:
    """The error of every routed expert [layers, experts], ||e|| / ||w|| over its three matrices, `folder` against
    `source`; one expert of each is in memory. `layers`: by default all that have experts."""
    for one in (folder, source):
        require(one, Folder, "an atlas is of two inspect.Folder")
    cfg = source.config
    with_experts = range(cfg.first_k_dense_replace, cfg.num_hidden_layers)
    chosen = with_experts if layers is None else layers
    require(chosen, Sequence, "layers must be a list of layers")
    if wrong := [layer for layer in chosen if layer not in with_experts]:
        raise UsageError(f"layers {wrong} have no routed experts; {with_experts[0]} to {with_experts[-1]} do")
    found = np.zeros((len(chosen), cfg.n_routed_experts))
    for i, layer in enumerate(chosen):
        banks = [
            leaf.path for leaf in source.table.values() if leaf.stacked and leaf.path.startswith(f"layers.{layer}.")
        ]
        for expert in range(cfg.n_routed_experts):
            off = size = 0.0
            for path in banks:
                a, b = (one.weight(path, expert).values().astype(np.float64) for one in (source, folder))
                off, size = off + float(np.sum((b - a) ** 2)), size + float(np.sum(a**2))
            found[i, expert] = np.sqrt(off / size) if size else 0.0
    return found
