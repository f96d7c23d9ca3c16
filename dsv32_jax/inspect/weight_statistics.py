"""Statistics of the blocks of an NVFP4 weight, and the errors of experts against their source."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..errors import UsageError, listing, require
from ..quantization.quantize import E2M1_MAX, E4M3_AS_SCALE
from .weights import Folder, StoredWeight, converter, require_one_shape

LARGEST_SCALE = 0x7E
"""The byte of 448, the largest E4M3. The byte above it is NaN and counts as 448."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over the blocks of an NVFP4 weight.

    codes             occurrences of each of the 16 codes (formats.NVFP4: code 0 is 0, 7 is 6, 8..15 are negative)
    scales            occurrences of each of the 256 bytes as a block scale
    blocks            all blocks
    zero_blocks       blocks whose scale or whose codes are all zero
    saturated_blocks  blocks with the largest scale, 448, which may have needed a larger one
    """

    codes: np.ndarray
    scales: np.ndarray
    blocks: int
    zero_blocks: int
    saturated_blocks: int


def statistics(weight: StoredWeight) -> Statistics:
    """Return the statistics of an NVFP4 weight. Raises UsageError for another format."""
    tensors = converter("inspect.tensors")
    codes, scale = _blocks(weight)
    magnitude = scale & 0x7F
    no_codes = ~(codes & 0x77).any(axis=-1)
    return Statistics(
        tensors.count_nibbles(tensors.count_bytes(codes)),
        tensors.count_bytes(scale),
        scale.size,
        int(np.count_nonzero(no_codes | (magnitude == 0))),
        int(np.count_nonzero(magnitude >= LARGEST_SCALE)),
    )


def count_clipped(weight: StoredWeight, source: StoredWeight) -> int:
    """Count the elements of `source` that exceed the largest value of their block in the NVFP4 `weight`."""
    codes, scale = _blocks(weight)
    require(source, StoredWeight, "source must be a weight, as Folder.weight returns it")
    require_one_shape(source, weight)
    largest = E4M3_AS_SCALE[scale].reshape(weight.parts["block_scale"].shape) * weight.parts["tensor_scale"] * E2M1_MAX
    limit = np.repeat(largest, 2 * codes.shape[-1], axis=-1)
    return int(np.count_nonzero(np.abs(source.values()) > limit))


def _blocks(weight: StoredWeight) -> tuple[np.ndarray, np.ndarray]:
    """Return the packed codes of each block [n, bytes] and the byte of its scale [n]."""
    require(weight, StoredWeight, "weight must be a weight, as Folder.weight returns it")
    if weight.format != "nvfp4":
        raise UsageError(f"{weight.path} is {weight.format}; only NVFP4 has codes and block scales")
    scale = np.ascontiguousarray(weight.parts["block_scale"]).view(np.uint8).reshape(-1)
    return weight.parts["codes"].reshape(scale.size, -1), scale


def expert_errors(folder: Folder, source: Folder, layers: Sequence[int] | None = None) -> np.ndarray:
    """Return the error ||e|| / ||w|| of every routed expert's three matrices, `folder` against `source`, as an array
    [layers, experts]. `layers` defaults to all layers with experts; one expert of each folder is in memory."""
    for one in (folder, source):
        require(one, Folder, "expert_errors compares two inspect.Folder")
    cfg = source.config
    with_experts = range(cfg.first_k_dense_replace, cfg.num_hidden_layers)
    layers = with_experts if layers is None else layers
    require(layers, Sequence, "layers must be a list of layers")
    if wrong := [layer for layer in layers if layer not in with_experts]:
        raise UsageError(f"no routed experts in layers {listing(wrong)}; {with_experts[0]} to {with_experts[-1]} have")
    errors = np.zeros((len(layers), cfg.n_routed_experts))
    for i, layer in enumerate(layers):
        banks = [path for path, leaf in source.table.items() if leaf.stacked and path.startswith(f"layers.{layer}.")]
        for expert in range(cfg.n_routed_experts):
            error = size = 0.0
            for path in banks:
                a, b = (one.weight(path, expert).values().astype(np.float64) for one in (source, folder))
                error, size = error + float(np.sum((b - a) ** 2)), size + float(np.sum(a**2))
            errors[i, expert] = np.sqrt(error / size) if size else 0.0
    return errors
