"""The tensors of a source, compared with what was noted of them when they were converted."""

import hashlib

from dsv32_jax.checkpoint.provenance import SourceTensor

from ..read.safetensors import Tensor
from ..read.source import Source


def difference(source: Source, noted: SourceTensor) -> str | None:
    """In what the tensor of `source` differs from `noted`, None where it does not. Reads all of it."""
    tensor = source.tensors.get(noted.name)
    if tensor is None:
        return f"{noted.name} is not in {source.folder}"
    if (tensor.dtype, tensor.shape) != (noted.dtype, noted.shape):
        return f"{noted.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.file}"
    return None if _sha256(source, tensor) == noted.sha256 else f"{noted.name} has other bytes in {tensor.file}"


def _sha256(source: Source, tensor: Tensor) -> str:
    found = hashlib.sha256()
    for piece in source.read_chunks(tensor):
        found.update(piece.data)
    return found.hexdigest()
