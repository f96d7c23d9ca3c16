"""From a converted checkpoint to a Model. On a CPU its arrays are maps of the files; other devices get copies."""

import dataclasses
import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from ..config import Config
from ..errors import CheckpointError, UsageError, listing
from ..kernels import variable
from ..layout import Leaf, leaves
from ..model.model import Model, Origin, build
from ..parallel import sharding
from ..quantization.formats import NVFP4, Fp8Block, Weight, dequantize
from ..system import host
from ..system.compilation import initialize
from ..system.files import expand_path
from . import checksums, vocabulary
from .manifest import ITEM_BYTES, LeafEntry, Manifest
from .reader import SLAB_BYTES, Index, Key, Reader, dtype_of

LEVELS = (None, "quick", "full")
FORMATS = {"nvfp4": NVFP4, "fp8_block": Fp8Block}

STAGING_BYTES = 256 << 20
"""Arrays are copied in batches of so many bytes, a larger one alone. Two batches are on the host at a time."""

ALIGNMENT = 64
"""JAX takes memory on a CPU as it is where it begins at a multiple of this, and copies it elsewhere."""

HUGE_PAGE = 2 << 20

ABSORBED = ("w_uk_HNC", "w_uv_HPC")
"""W^UK and W^UV are used by rows as well as by columns: they are dequantized once, here, to the compute dtype."""


def load(
    folder: str | Path, *, mesh: Mesh | None = None, dtype=jnp.bfloat16, verify: str | None = None, mapped: bool = True
) -> Model:
    """Return the model in a folder that `dsv32 convert` wrote.

    `dtype` is the compute dtype, bfloat16 or float32; weights stay in the formats they are stored in. With a `mesh`
    (axes among data, model, expert) each device gets its own part.
    On a CPU the weights are maps of the files, which must stay as they are while the model is used: memory is taken as
    they are, shared with other processes, and given back when others need it. `mapped=False` copies them. Other
    devices always get copies, by way of at most twice the larger of STAGING_BYTES and the largest array on the host.
    `verify`: "quick" first compares the files with the manifest, "full" also every array with its SHA-256.
    Raises CheckpointError where the folder does not hold a finished conversion of the model its config describes, or
    a tokenizer.json with other token ids; VerificationError that names what is damaged.
    """
    initialize()
    variable.asked()
    if (compute := _dtype_name(dtype)) not in ("bfloat16", "float32"):
        raise UsageError(f"dtype must be bfloat16 or float32, not {compute}; weights keep their own formats")
    if verify not in LEVELS:
        raise UsageError(f"verify must be one of {listing(LEVELS)}, not {verify!r}")
    stored = Checkpoint.open(folder, verify)
    origin = Origin(stored.manifest.digest, vocabulary.check(stored.folder, stored.cfg))
    if mesh is not None:
        sharding.check(mesh, stored.shapes())
    own = [path for path, entry in stored.manifest.leaves.items() if entry.same_as is None]
    weights = stored.weights(own, dtype, mesh, mapped)
    return build(stored.cfg, dtype, lambda path: weights[stored.home(path)], origin, mesh)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint whose manifest has the weights of its config, and whose files are there."""

    folder: Path
    manifest: Manifest
    cfg: Config
    table: dict[str, Leaf]

    @classmethod
    def open(cls, folder: str | Path, verify: str | None = None) -> "Checkpoint":
        """Read the manifest and compare the files with it, as `load` does. No weight is read, unless to verify it."""
        folder = expand_path(folder).resolve()
        manifest = Manifest.read(folder)
        if verify is not None:
            checksums.require_intact(folder, manifest, verify)
        cfg = Config.from_dict(manifest.config, f"the config in {folder.name}'s manifest")
        table = {leaf.path: leaf for leaf in leaves(cfg)}
        _require_leaves(folder, table, manifest.leaves)
        checkpoint = cls(folder, manifest, cfg, table)
        checkpoint.reader.require_files()
        return checkpoint

    @cached_property
    def reader(self) -> Reader:
        """The reader of its arrays."""
        return Reader(self.folder, self.manifest.leaves)

    def home(self, path: str) -> str:
        """Return the weight that holds the arrays of `path`: itself, or the one it is a copy of."""
        return self.manifest.leaves[path].same_as or path

    def shapes(self) -> list[tuple[Leaf, tuple[int, ...]]]:
        """Return the weight and the shape of every stored array."""
        return [(self.table[path], entry.shape) for (path, _), entry in self.reader.entries.items()]

    def weights(
        self, paths: Collection[str], dtype, mesh: Mesh | None = None, mapped: bool = True
    ) -> dict[str, Weight]:
        """Load the weights `paths`, none of which is a copy of another, for a model that computes in `dtype`."""
        entries = {path: self.manifest.leaves[path] for path in paths}
        targets = {
            (path, name): self._target(mesh, path, array.shape)
            for path, entry in entries.items()
            for name, array in entry.arrays.items()
        }
        on_cpu = {device.platform for target in targets.values() for device in target.device_set} == {"cpu"}
        arrays = _map_arrays(self.reader, targets) if on_cpu and mapped else _copy_arrays(self.reader, targets, on_cpu)
        weights: dict[str, Weight] = {}
        for path, entry in entries.items():
            parts = {name: next(arrays) for name in entry.arrays}
            weight = FORMATS[entry.format](**parts) if entry.format in FORMATS else parts["values"]
            weights[path] = dequantize(weight, dtype) if path.endswith(ABSORBED) else weight
        return weights

    def _target(self, mesh: Mesh | None, path: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return sharding.of_leaf(mesh, self.table[path], shape)


class _Shard(NamedTuple):
    """A part of an array that devices of this process hold, in host memory that threads are reading it into."""

    devices: list[Any]
    memory: np.ndarray
    reading: list[Future[None]]


def _map_arrays(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[jax.Array]:
    """Yield the arrays of `targets` as maps of their files. Copied is a shard that does not lie in one piece of a file,
    or not at a multiple of ALIGNMENT."""
    for key, target in targets.items():
        entry, maps = reader.entries[key], reader.map(key)
        shards = []
        for index, devices in _shards(target, entry.shape):
            if len(maps) == 1:
                shard = maps[0][index]
            else:
                shard = np.empty([part.stop - part.start for part in index], dtype_of(entry.dtype))
                reader.copy(key, shard, index)
            shards += [jax.device_put(shard, device) for device in devices]
        yield jax.make_array_from_single_device_arrays(entry.shape, target, shards)


def _copy_arrays(reader: Reader, targets: Mapping[Key, Sharding], on_cpu: bool) -> Iterator[jax.Array]:
    """Yield the arrays of `targets`, each batch handed to its devices while threads read the next one.

    On a CPU the memory that was read into is the array's; otherwise two buffers take turns.
    """
    batches = list(_batches(reader, targets))
    largest = max((sum(_host_bytes(reader, key, targets[key]) for key in batch) for batch in batches), default=0)
    buffers = None if on_cpu else [_allocate(largest) for _ in batches[:2]]
    placed = iter(())
    with ThreadPoolExecutor(host.count_cores()) as pool:
        for number, batch in enumerate(batches):
            take = _allocate if buffers is None else _divide(buffers[number % 2])
            reading = {key: list(_read_shards(reader, key, targets[key], pool, take)) for key in batch}
            yield from placed
            placed = _place(reader, targets, reading, wait=not on_cpu)
        yield from placed


def _batches(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[list[Key]]:
    """Yield the keys of `targets` in runs of at most STAGING_BYTES; a larger array alone."""
    batch: list[Key] = []
    size = 0
    for key, target in targets.items():
        nbytes = _host_bytes(reader, key, target)
        if batch and size + nbytes > STAGING_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(key)
        size += nbytes
    yield batch


def _host_bytes(reader: Reader, key: Key, target: Sharding) -> int:
    """Return the bytes that the shards of an array take on this host, each begun at a multiple of ALIGNMENT."""
    entry = reader.entries[key]
    return sum(_aligned(_nbytes(index, entry.dtype)) for index, _ in _shards(target, entry.shape))


def _read_shards(
    reader: Reader, key: Key, target: Sharding, pool: ThreadPoolExecutor, take: Callable[[int], np.ndarray]
) -> Iterator[_Shard]:
    """Begin to read every part of an array that devices of this process hold, once, into memory from `take`."""
    entry = reader.entries[key]
    for index, devices in _shards(target, entry.shape):
        nbytes = _nbytes(index, entry.dtype)
        memory = take(nbytes)[:nbytes].view(dtype_of(entry.dtype)).reshape([part.stop - part.start for part in index])
        rows = max(1, SLAB_BYTES * len(memory) // max(1, nbytes))
        reading = []
        for start in range(0, len(memory), rows):
            some = slice(index[0].start + start, min(index[0].start + start + rows, index[0].stop))
            reading.append(pool.submit(reader.copy, key, memory[start : start + rows], (some, *index[1:])))
        yield _Shard(devices, memory, reading)


def _place(
    reader: Reader, targets: Mapping[Key, Sharding], reading: Mapping[Key, Sequence[_Shard]], wait: bool
) -> Iterator[jax.Array]:
    """Yield the arrays of a batch as soon as they are read; with `wait`, the last one when all are on their devices."""
    arrays = []
    for key, shards in reading.items():
        pieces = []
        for shard in shards:
            for future in shard.reading:
                future.result()
            pieces += [jax.device_put(shard.memory, device) for device in shard.devices]
        arrays.append(jax.make_array_from_single_device_arrays(reader.entries[key].shape, targets[key], pieces))
    yield from jax.block_until_ready(arrays) if wait else arrays


def _shards(target: Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[Any]]]:
    """Return the parts of an array of `shape` that devices of this process hold, each once, and which devices."""
    found: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    for device, index in target.addressable_devices_indices_map(shape).items():
        parts = (part.indices(size) for part, size in zip(index or (), shape, strict=True))
        found.setdefault(tuple(parts), []).append(device)
    return [(tuple(slice(*part[:2]) for part in parts), devices) for parts, devices in found.items()]


def _nbytes(index: Index, dtype: str) -> int:
    return math.prod(part.stop - part.start for part in index) * ITEM_BYTES[dtype]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _allocate(nbytes: int) -> np.ndarray:
    """Return fresh memory at a multiple of ALIGNMENT, uint8; of huge pages where it is large and the system has them,
    which are three times as fast to fill."""
    if nbytes < HUGE_PAGE:
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        return memory[-memory.ctypes.data % ALIGNMENT :][:nbytes]
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _divide(buffer: np.ndarray) -> Callable[[int], np.ndarray]:
    """Return a function that takes memory from `buffer`, from its beginning on."""
    offset = 0

    def take(nbytes: int) -> np.ndarray:
        nonlocal offset
        offset += _aligned(nbytes)
        return buffer[offset - _aligned(nbytes) : offset]

    return take


def _dtype_name(dtype) -> str:
    """Return the name of `dtype`, or how it was written where there is no such dtype."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _require_leaves(folder: Path, table: dict[str, Leaf], entries: dict[str, LeafEntry]) -> None:
    """Raise CheckpointError unless the manifest has exactly the weights of the config, each of the right shape."""
    problems = []
    if missing := sorted(set(table) - set(entries)):
        problems.append(f"missing ({len(missing)}): {listing(missing)}")
    if unknown := sorted(set(entries) - set(table)):
        problems.append(f"unknown ({len(unknown)}): {listing(unknown)}")
    wrong = []
    for path in sorted(set(table) & set(entries)):
        entry = entries[path]
        if entry.same_as is None and (shape := _logical_shape(entry)) != table[path].shape:
            wrong.append(f"{path} is {shape}, not {table[path].shape}")
    if wrong:
        problems.append(f"of another shape ({len(wrong)}): {listing(wrong)}")
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights its config describes; nothing was read.\n  " + "\n  ".join(problems)
        )


def _logical_shape(entry: LeafEntry) -> tuple[int, ...]:
    if entry.format == "nvfp4":
        *out, packed = entry.arrays["codes"].shape
        return (*out, 2 * packed)
    return tuple(entry.arrays["values"].shape)
