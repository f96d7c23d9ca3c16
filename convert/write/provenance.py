"""Manifest entries of converted parameters: checksums, source tensors, and checks of the values."""

import hashlib

import ml_dtypes
import numpy as np

from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry
from dsv32_jax.checkpoint.provenance import Passport, SourceTensor
from dsv32_jax.errors import CheckpointError, listing, pluralize
from dsv32_jax.quantization.quantize import E2M1, E4M3, E4M3_AS_SCALE, FP8_BLOCK

from ..read.safetensors import DTYPES, Tensor
from ..read.weights import Read, StoredWeight
from ..transform.cut import PlannedLeaf
from ..transform.requantize import count_odd_scales

SCALAR_BYTES = 8
FIRST_BYTES = 1 << 12
"""Enough to see that a tensor is not constant, but for very few."""

PIECE_BYTES = 1 << 20
MAGNITUDE_BYTES = 1 << 24
"""Bytes looked at together."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e4m3fn": 0x7F}
"""The bits that are all ones in NaN and infinity (float8_e4m3fn has NaN alone)."""


class HashingReader:
    """Reads tensors and keeps the SHA-256 of each, and the bytes of scalars. Threads may share it."""

    def __init__(self, read: Read):
        self._read = read
        self._sources: dict[str, SourceTensor] = {}
        self._zero: set[str] = set()
        self._constant: set[str] = set()

    def __call__(self, tensor: Tensor) -> np.ndarray:
        array = self._read(tensor)
        if tensor.name not in self._sources:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            if not raw[:FIRST_BYTES].any() and not raw.any():
                self._zero.add(tensor.name)
            elif (raw[:FIRST_BYTES] == raw[0]).all() and (raw == raw[0]).all():
                self._constant.add(tensor.name)
            sha256 = hashlib.sha256(raw.data).hexdigest()
            bits = raw.tobytes().hex() if tensor.nbytes <= SCALAR_BYTES else ""
            self._sources[tensor.name] = SourceTensor(tensor.name, tensor.dtype, tensor.shape, sha256, bits)
        return array

    def source(self, tensor: Tensor, with_bits: bool) -> SourceTensor:
        """Provenance of a tensor, which is read if it was not; `with_bits` keeps the bytes of a scalar."""
        if tensor.name not in self._sources:
            self(tensor)
        found = self._sources[tensor.name]
        return found if with_bits else found._replace(bits="")

    def require_downloaded(self, planned: PlannedLeaf) -> None:
        """Raise CheckpointError that lists the source matrices of a parameter which are zero throughout.

        A download that reserves its space first leaves such holes. In NVFP4 a matrix of zeros is stored with a tensor
        scale of zero, or with block scales that are all the same.
        """
        holes = []
        for stored in planned.sources:
            if len(stored.shape) == 2 and not self._is_zero_matrix(stored):
                holes += [t for t in (stored.values, stored.scale) if t is not None and t.name in self._zero]
        if holes:
            names = listing(f"{tensor.name} ({tensor.file.name})" for tensor in holes)
            raise CheckpointError(
                f"{len(holes)} tensors of {planned.leaf.path} are zero throughout: {names}. The files have their full "
                "size but were not downloaded completely: download them again. Completed parts are kept"
            )

    def _is_zero_matrix(self, stored: StoredWeight) -> bool:
        if stored.tensor_scale is None or stored.scale is None:
            return False
        return stored.tensor_scale.name in self._zero or stored.scale.name in self._constant


def describe(
    planned: PlannedLeaf, arrays: dict[str, np.ndarray], original: LeafEntry | None, read: HashingReader
) -> tuple[LeafEntry, dict[str, int]]:
    """The manifest entry of a parameter whose components are `arrays`, and the counts of odd scales in it.

    A copy with the bytes of its `original` shares its arrays. Raises CheckpointError on values that cannot be right.
    """
    read.require_downloaded(planned)
    require_finite(planned.leaf.path, arrays)
    form = planned.form.format
    entry = LeafEntry(form, {name: describe_array(array) for name, array in arrays.items()}, planned.same_as)
    if entry == original:
        entry = LeafEntry(form, {}, planned.copy_of)
    scales = count_odd_scales(arrays)
    passport = Passport(
        amax=amax(arrays) if arrays else 0.0,
        nan_scales=scales.get("nan_scale_bytes", 0),
        zero_blocks=scales.get("zero_blocks", 0),
        change=describe_change(planned),
        cut=planned.leaf.cut,
        sources=tuple(
            read.source(tensor, stored.kind == "packed-nvfp4" and tensor is stored.tensor_scale)
            for stored in planned.sources
            for tensor in stored.tensors
        ),
    )
    return LeafEntry(entry.format, entry.arrays, entry.same_as, passport.to_json()), scales


def describe_change(planned: PlannedLeaf) -> str:
    """How the conversion changes the values of a parameter; empty where every bit is kept."""
    form = planned.form
    if form.dequantized is not None:
        return f"dequantized to {form.dtype}: {form.dequantized}"
    formats = sorted({stored.format for stored in planned.sources} - {form.format})
    if formats:
        return f"{' and '.join(formats)} became {form.dtype or form.format}"
    dtypes = {DTYPES[stored.values.dtype].name for stored in planned.sources if stored.format == "dense"}
    if form.format == "dense" and form.dtype != "float32" and dtypes - {form.dtype}:
        return f"{' and '.join(sorted(dtypes - {form.dtype}))} became {form.dtype}"
    return ""


def describe_array(array: np.ndarray) -> ArrayEntry:
    """Return the dtype, shape and SHA-256 of a C-contiguous array."""
    return ArrayEntry(array.dtype.name, array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest())


def require_finite(path: str, components: dict[str, np.ndarray]) -> None:
    """Raise CheckpointError if a float array or FP8 values contain NaN or infinity; NVFP4 block scales may."""
    for name, array in components.items():
        mask = EXPONENTS.get(array.dtype.name)
        if mask is None or (array.dtype.itemsize == 1 and name == "block_scale"):
            continue
        bits = array.reshape(-1).view(UNSIGNED[array.dtype.itemsize])
        pieces = (bits[at : at + PIECE_BYTES] for at in range(0, bits.size, PIECE_BYTES))
        if count := sum(int(np.count_nonzero((piece & mask) == mask)) for piece in pieces):
            raise CheckpointError(
                f"{path}.{name} ({array.dtype.name} {list(array.shape)}) has {pluralize(count, 'value')} that "
                f"{'is' if count == 1 else 'are'} NaN or infinite: the source is damaged. "
                "What was written so far is kept"
            )


def amax(components: dict[str, np.ndarray]) -> float:
    """Return the largest magnitude of a leaf, in the arithmetic of dequantization but without dequantizing."""
    if "codes" in components:
        return _amax_nvfp4(**components)
    if "block_scale" in components:
        return _amax_fp8(**components)
    return _amax_dense(components["values"])


def _amax_dense(values: np.ndarray) -> float:
    """Magnitudes of floats are ordered as their bits are."""
    unsigned = UNSIGNED[values.dtype.itemsize]
    mask, largest = unsigned(np.iinfo(unsigned).max >> 1), unsigned(0)
    bits = values.reshape(-1).view(unsigned)
    step = MAGNITUDE_BYTES // values.dtype.itemsize
    for at in range(0, bits.size, step):
        largest = max(largest, (bits[at : at + step] & mask).max())
    return float(np.array([largest], unsigned).view(values.dtype)[0])


def _amax_nvfp4(codes: np.ndarray, block_scale: np.ndarray, tensor_scale: np.ndarray) -> float:
    """Look only at the blocks of each matrix whose scale is large enough to hold its largest value."""
    matrices = tensor_scale.size
    scales = block_scale.view(np.uint8).reshape(matrices, -1)
    packed = codes.reshape(matrices, scales.shape[1], -1)
    factors = tensor_scale.reshape(-1)
    return float(max(np.float32(_amax_blocks(packed[i], scales[i])) * factors[i] for i in range(matrices)))


def _amax_blocks(packed: np.ndarray, scales: np.ndarray) -> float:
    """Return the largest e2m1 x e4m3 of a matrix: codes [blocks, bytes], scales [blocks] as bytes."""
    magnitude = scales & 0x7F
    best, level = 0.0, int(magnitude.max(initial=0))
    while level and float(E4M3_AS_SCALE[level]) * 6 > best:
        of_level = packed[magnitude == level]
        code = max(int((of_level & 7).max()), int(((of_level >> 4) & 7).max()))
        best = max(best, float(E2M1[code]) * float(E4M3_AS_SCALE[level]))
        magnitude[magnitude == level] = 0
        level = int(magnitude.max())
    return best


def _amax_fp8(values: np.ndarray, block_scale: np.ndarray) -> float:
    """Round to bfloat16, as dequantization does."""
    width = values.shape[-1]
    rows, scales = values.view(np.uint8).reshape(-1, width), block_scale.reshape(-1, block_scale.shape[-1])
    step, best = max(1, MAGNITUDE_BYTES // width), np.float32(0)
    for at in range(0, rows.shape[0], step):
        magnitude = np.maximum.reduceat(rows[at : at + step] & 0x7F, np.arange(0, width, FP8_BLOCK), axis=1)
        best = max(best, (E4M3[magnitude] * np.abs(scales[at : at + step])).max())
    return float(np.asarray(best, np.float32).astype(ml_dtypes.bfloat16))
