"""The tensors of a source, compared with what was noted of them when they were converted."""

import hashlib

from dsv32_jax.storage.arrays import raw
from dsv32_jax.storage.passport import SourceTensor

from ..read.header import Tensor
from ..read.source import Source

SLAB_BYTES = 64 << 20
"""Bytes of a tensor that are read together."""


def difference(source: Source, noted: SourceTensor) -> str | None:
    """In what the tensor of `source` differs from `noted`, None where it does not. Reads all of it."""
    tensor = source.tensors.get(noted.name)
    if tensor is None:
        return f"{noted.name} is not in {source.folder}"
    if (tensor.dtype, tensor.shape) != (noted.dtype, noted.shape):
        return f"{noted.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.file}"
    return None if _sha256(source, tensor) == noted.sha256 else f"{noted.name} has other bytes in {tensor.file}"


def _sha256(source: Source, tensor: Tensor) -> str:
    if tensor.nbytes <= SLAB_BYTES:
        return hashlib.sha256(raw(source.read(tensor))).hexdigest()
    found, rows = hashlib.sha256(), tensor.shape[0]
    step = max(1, SLAB_BYTES * rows // tensor.nbytes)
    for start in range(0, rows, step):
        found.update(raw(source.read_rows(tensor, start, min(start + step, rows))))
    return found.hexdigest()
