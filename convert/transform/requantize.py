"""One weight in the format it shall have: as it is stored, or quantized or dequantized, with what that did to it.

A matrix is quantized whole, before it is cut into leaves: its tensor scale belongs to all of it. FP8 goes to NVFP4 by
way of bfloat16, as ModelOpt does; NVFP4 goes anywhere by way of its exact float32 values.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError
from dsv32_jax.quantization.quantize import FP8_BLOCK, RTN, Scaling, fp8_quantize, largest, nvfp4_quantize

from ..read import weights
from ..read.stored import Stored
from ..read.weights import Read
from . import facts

PIECE = 1 << 17
"""Weights compared together."""


TOGETHER = (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Linears of the same input, which kernels compute at once."""


class Outcome(NamedTuple):
    """What a conversion did to one matrix: its squared error, its squared norm, and the source's odd NVFP4 scales."""

    squared_error: float
    squared_norm: float
    nan_scale_bytes: int = 0
    zero_blocks: int = 0


class Recaster:
    """Loads weights in the formats they shall have, and remembers the Outcome of each that changed, by name.

    `scaling`: how NVFP4 block scales are chosen. `partners`: for weights that share one tensor scale with others, those
    others (they become NVFP4 too).
    """

    def __init__(self, scaling: Scaling = RTN, partners: Mapping[str, tuple[Stored, ...]] | None = None):
        self.outcomes: dict[str, Outcome] = {}
        self._scaling = scaling
        self._partners = partners or {}
        self._largest: dict[str, np.float32] = {}

    def load(self, stored: Stored, read: Read) -> dict[str, np.ndarray]:
        """The components (manifest.COMPONENTS) of the weight in the format `stored.becomes`.

        Raises CheckpointError that names the weight where its values cannot be quantized.
        """
        if stored.wanted is None or stored.is_in(stored.wanted):
            return weights.load(stored, read)
        beside = self._largest_beside(stored, read)
        parts = weights.load(stored, read)
        values = weights.values(stored, parts, read)
        with _blaming(stored):
            result = self._converted(stored, values, beside)
        self.outcomes[stored.name] = _outcome(values, result, facts.scale_facts(parts))
        return result

    def take_outcomes(self) -> dict[str, Outcome]:
        """The outcomes since this was called last."""
        taken, self.outcomes = self.outcomes, {}
        return taken

    def _converted(self, stored: Stored, values: np.ndarray, beside: np.float32) -> dict[str, np.ndarray]:
        match stored.wanted:
            case "nvfp4":
                own = self._largest[stored.name] = largest(values)
                codes, block_scale, tensor_scale = nvfp4_quantize(values, self._scaling, max(own, beside))
                return {"codes": codes, "block_scale": block_scale, "tensor_scale": tensor_scale}
            case "fp8":
                quantized, grid = fp8_quantize(values)
                return {"values": quantized, "block_scale": np.repeat(grid, FP8_BLOCK, axis=0)[: len(quantized)]}
            case _:
                return {"values": values.astype(ml_dtypes.bfloat16, copy=False)}

    def _largest_beside(self, stored: Stored, read: Read) -> np.float32:
        """The largest magnitude of the weight's partners, 0 without any. Each is read for that at most once."""
        partners = self._partners.get(stored.name, ())
        for partner in partners:
            if partner.name not in self._largest:
                values = weights.values(partner, weights.load(partner, read), read)
                with _blaming(partner):
                    self._largest[partner.name] = largest(values)
        return max((self._largest[partner.name] for partner in partners), default=np.float32(0))


@contextlib.contextmanager
def _blaming(stored: Stored) -> Iterator[None]:
    """What quantizing complains about, as a complaint about `stored`."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{stored.name}: {error}. What was written before is kept") from error


def partners(stored: Iterable[Stored]) -> dict[str, tuple[Stored, ...]]:
    """For each of the weights, by name, the others among them that are computed together with it."""
    found = {one.name: one for one in stored}
    result = {}
    for name in found:
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        names = [f"{stem}.{other}.weight" for group in TOGETHER if last in group for other in group if other != last]
        if others := tuple(found[other] for other in names if other in found):
            result[name] = others
    return result


def _outcome(values: np.ndarray, result: dict[str, np.ndarray], odd: dict[str, int]) -> Outcome:
    """How far `result` is from `values` [out, in] or [out]."""
    rows = max(PIECE // max(values[:1].size, 1), 1)
    error = norm = 0.0
    for at in range(0, len(values), rows):
        piece = {name: array if name == "tensor_scale" else array[at : at + rows] for name, array in result.items()}
        want = values[at : at + rows].astype(np.float32)
        off = weights.exact(piece).astype(np.float32)
        off -= want
        off *= off
        want *= want
        error, norm = error + float(off.sum()), norm + float(want.sum())
    return Outcome(error, norm, **odd)
