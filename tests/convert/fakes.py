"""Tensors without files, files without meaning, and checkpoints that can be changed."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.read.safetensors import DTYPES, Tensor, read_header
from convert.read.source import Source
from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest, seal

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """`arrays` as a header would list them."""
    return {
        name: Tensor(name, Path("no-file"), NAMES[array.dtype], array.shape, 0, array.nbytes)
        for name, array in arrays.items()
    }


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` may be an object or the bytes of one, `length` what it claims to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(file: Path):
    """What the converter makes of `file`."""
    return read_header(file)


def write_shard(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """A valid shard."""
    header, data = {}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    file.write_bytes(file_bytes(header, data))


def load(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    source = Source(folder)
    return {name: source.read(tensor) for name, tensor in source.tensors.items()}


def write_checkpoint(folder: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    """A checkpoint of one shard without an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", arrays)
    return folder


def tokenizer(folder: Path, **more: int) -> str:
    """A tokenizer.json with every id of the vocabulary, as text, and some `more` tokens."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return json.dumps({"model": {"vocab": {f"t{i}": i for i in range(size)} | more}})


def manifest(config: dict, leaves: dict[str, LeafEntry], files: dict[str, list] | None = None) -> Manifest:
    """A manifest of nothing but these weights and files."""
    counts = dict.fromkeys(("nan_scale_bytes", "zero_blocks", "pairs_of_different_tensor_scales"), 0)
    texts = {"formats": {}, "notes": [], "ignored": {}, "conversions": {}, "errors": {"kinds": {}, "worst": {}}}
    source = {"folder": "hf", "files": {}, "recipe": [], "plan": ""}
    storage = {"files": files or {}, "mesh": {}}
    return Manifest(config, leaves, source, {**texts, **counts, "token_ids": None}, {"python": "3.11"}, storage)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON of a manifest and seal it again, as somebody would who wants it to be believed."""
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["sha256"]
    change(raw)
    (folder / "manifest.json").write_bytes(seal(json.dumps(raw, indent=1).removeprefix("{\n").encode()))


def companions(folder: Path) -> dict[str, str]:
    """Write what goes along with a checkpoint; the texts by their names."""
    others = {"tokenizer_config.json": '{"a": 1}', "generation_config.json": '{"b": null}'}
    texts = {"tokenizer.json": tokenizer(folder), **others}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts
