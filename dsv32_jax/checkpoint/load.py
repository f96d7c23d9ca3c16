"""From a converted checkpoint to a Model. On a CPU its arrays are maps of the files; other devices get copies."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from ..config import Config
from ..errors import CheckpointError, UsageError, listing
from ..kernels import host_experts, read_choice
from ..layout import Leaf, leaves
from ..model.model import Model, Origin, build
from ..parallel import sharding
from ..quantization.formats import Weight, dequantize
from ..quantization.host_weight import HostWeight, divide_matrices
from ..system import compilation, host
from ..system.files import expand_path
from ..system.reporter import show_slow
from . import checksums, host_split
from .companions import TOKENIZER, check_tokenizer
from .manifest import LeafEntry, Manifest
from .reader import Index, Key, Reader, allocate, list_slabs
from .weight_shapes import ABSORBED, STORED, describe

LEVELS = (None, "quick", "full")

AHEAD_BYTES = 256 << 20
"""Arrays of so many bytes are read ahead of their devices, or one that is larger."""


def load(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.bfloat16,
    verify: str | None = None,
    mapped: bool = True,
    experts: str = "device",
) -> Model:
    """Return the model in a folder that `dsv32 convert` wrote.

    `dtype` is the compute dtype, bfloat16 or float32; weights stay in the formats they are stored in,
    but for w_uk and w_uv, which become this dtype. With a `mesh` (axes among data, model, expert) each device gets its
    own part.
    On a CPU the weights are maps of the files, which must stay as they are while the model is used: memory is taken as
    they are, shared with other processes, and given back when others need it. `mapped=False` copies them. Other
    devices always get copies; beside them the host needs memory for AHEAD_BYTES and two of the largest arrays.
    `experts="host"` leaves routed experts in host memory, as maps, and computes with them there: of as few layers as
    the devices cannot hold, on a CPU of all; "host:N" those of the first N MoE layers. What devices cannot hold is
    refused before a weight is read.
    `verify`: "quick" first compares the files with the manifest, "full" also every array with its SHA-256.
    Raises CheckpointError where the folder does not hold a finished conversion of the model its config describes, or
    a tokenizer.json with other token ids; VerificationError that names what is damaged; CapacityError that names
    the layers whose experts need not be on the devices.
    """
    compilation.initialize()
    read_choice()
    if (compute := _dtype_name(dtype)) not in ("bfloat16", "float32"):
        raise UsageError(f"dtype must be bfloat16 or float32, not {compute}; weights keep their own formats")
    if verify not in LEVELS:
        raise UsageError(f"verify must be one of {listing(LEVELS)}, not {verify!r}")
    stored = Checkpoint.open(folder, verify)
    origin = Origin(stored.manifest.digest, stored.count_tokens())
    if mesh is not None:
        sharding.check_mesh(mesh, [(stored.table[path], a.shape) for (path, _), a in stored.reader.entries.items()])
    own = [path for path, entry in stored.manifest.leaves.items() if entry.same_as is None]
    on_host = []
    if experts != "device" or compilation.get_device_memory() is not None:
        shapes = describe(stored.cfg, stored.table, stored.manifest)
        sizes = shapes.count_device_bytes({} if mesh is None else dict(mesh.shape), dtype)
        host_layers = host_split.choose(stored.cfg, stored.table, sizes, experts, mesh)
        on_host = host_split.list_experts(stored.cfg, stored.table, 0, host_layers)
    weights: dict[str, Any] = {**stored.keep_on_host(on_host, mesh)}
    weights |= stored.weights([path for path in own if path not in weights], dtype, mesh, mapped)
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
        cfg = Config.from_dict(manifest.config, f"the config in {folder.name}'s manifest")
        table = {leaf.path: leaf for leaf in leaves(cfg)}
        _require_leaves(folder, table, manifest.leaves)
        checkpoint = cls(folder, manifest, cfg, table)
        if verify is None:
            checkpoint.reader.require_files()
        else:
            checksums.require_intact(folder, manifest, verify)
        return checkpoint

    @cached_property
    def reader(self) -> Reader:
        """The reader of its arrays."""
        return Reader(self.folder, self.manifest.leaves)

    def count_tokens(self) -> int | None:
        """Return what `check_tokenizer` does. The conversion recorded it for the tokenizer that it copied."""
        recorded = self.manifest.storage["files"].get(TOKENIZER)
        count = self.manifest.report["token_ids"]
        if recorded and count is not None and (self.folder / TOKENIZER).is_file():
            if self.reader.measure_file(TOKENIZER) == recorded:
                return count
        return check_tokenizer(self.folder, self.cfg)

    def home(self, path: str) -> str:
        """Return the weight that holds the arrays of `path`: itself, or the one it is a copy of."""
        return self.manifest.leaves[path].same_as or path

    def weights(
        self, paths: Collection[str], dtype, mesh: Mesh | None = None, mapped: bool = True
    ) -> dict[str, Weight]:
        """Load the weights `paths`, none of which is a copy of another, for a model that computes in `dtype`."""
        entries = {path: self.manifest.leaves[path] for path in paths}
        device = SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            (path, name): device if mesh is None else sharding.leaf_sharding(mesh, self.table[path], array.shape)
            for path, entry in entries.items()
            for name, array in entry.arrays.items()
        }
        on_cpu = {device.platform for target in targets.values() for device in target.device_set} == {"cpu"}
        arrays = (_map_arrays if on_cpu and mapped else _copy_arrays)(self.reader, targets)
        weights: dict[str, Weight] = {}
        for path, entry in entries.items():
            parts = {name: next(arrays) for name in entry.arrays}
            weight = STORED[entry.format](**parts) if entry.format in STORED else parts["values"]
            weights[path] = dequantize(weight, dtype) if path.endswith(ABSORBED) else weight
        return weights

    def keep_on_host(self, paths: Collection[str], mesh: Mesh | None = None) -> dict[str, HostWeight]:
        """Map the stacked weights `paths` and make them known to the kernels, without a copy."""
        found: dict[str, HostWeight] = {}
        for path in paths:
            entry, leaf = self.manifest.leaves[path], self.table[path]
            parts = {name: self.reader.map((path, name)) for name in entry.arrays}
            weight = STORED[entry.format](**parts) if entry.format in STORED else parts["values"]
            found[path] = place_on_host(weight, leaf, mesh)
        return found


def place_on_host(weight: Any, leaf: Leaf, mesh: Mesh | None) -> HostWeight:
    """Return a weight of NumPy arrays as one that stays in host memory, for a model on the devices of `mesh`."""
    arrays, first = host_experts.keep(weight)
    parts = 1 if mesh is None else mesh.shape.get("model", 1)
    matrix = divide_matrices(first, leaf.shape[0], leaf.letters, parts)
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = device if mesh is None else sharding.leaf_sharding(mesh, leaf, matrix.shape)
    return HostWeight(jax.device_put(matrix, target), arrays)


def _map_arrays(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[jax.Array]:
    """Yield the arrays of `targets` as maps of their files. What spans several files is copied, and so is, by JAX, what
    does not lie together in a file or does not begin at a multiple of ALIGNMENT."""
    for key, target in targets.items():
        shape = reader.entries[key].shape
        parts = [(reader.map(key, index), devices) for index, devices in _split(target, shape)]
        shards = [jax.device_put(part, device) for part, devices in parts for device in devices]
        yield jax.make_array_from_single_device_arrays(shape, target, shards)


def _copy_arrays(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[jax.Array]:
    """Yield the arrays of `targets`, copied. While one is handed to its devices, threads read those that follow."""
    total = sum(reader.entries[key].nbytes for key in targets)
    with ThreadPoolExecutor(host.count_cores()) as pool, show_slow(total) as count:
        ahead, nbytes = collections.deque[_Copy](), 0
        for key, target in targets.items():
            ahead.append(_Copy(reader, key, target, pool, count))
            nbytes += ahead[-1].nbytes
            while len(ahead) > 1 and nbytes > AHEAD_BYTES:
                nbytes -= ahead[0].nbytes
                yield ahead.popleft().result()
        for copy in ahead:
            yield copy.result()


class _Copy:
    """An array that threads are reading into `nbytes` of host memory: each part that devices of this process hold,
    once."""

    def __init__(
        self, reader: Reader, key: Key, target: Sharding, pool: ThreadPoolExecutor, count: Callable[[int], None]
    ):
        entry = reader.entries[key]
        self._shape, self._target = entry.shape, target
        self._shards: list[tuple[np.ndarray, list[Any]]] = []
        self._reading: list[Future[None]] = []
        self.nbytes = 0

        def read(memory: np.ndarray, index: Index) -> None:
            reader.copy(key, memory, index)
            count(memory.nbytes)

        for index, devices in _split(target, entry.shape):
            memory = allocate([part.stop - part.start for part in index], entry.dtype)
            self._shards.append((memory, devices))
            self.nbytes += memory.nbytes
            for rows in list_slabs(len(memory), memory.nbytes):
                within = slice(index[0].start + rows.start, index[0].start + rows.stop)
                self._reading.append(pool.submit(read, memory[rows], (within, *index[1:])))

    def result(self) -> jax.Array:
        """Return the array when it is on its devices, which on a CPU take the memory as it is."""
        for future in self._reading:
            future.result()
        shards = [jax.device_put(memory, device) for memory, devices in self._shards for device in devices]
        return jax.block_until_ready(jax.make_array_from_single_device_arrays(self._shape, self._target, shards))


@lru_cache(maxsize=1024)
def _split(target: Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[Any]]]:
    """Return the parts of an array of `shape` that devices of this process hold, each once, and which devices."""
    found: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    for device, index in target.addressable_devices_indices_map(shape).items():
        parts = (part.indices(size) for part, size in zip(index or (), shape, strict=True))
        found.setdefault(tuple(parts), []).append(device)
    return [(tuple(slice(*part[:2]) for part in parts), devices) for parts, devices in found.items()]


def _dtype_name(dtype) -> str:
    """Return the name of `dtype`, or how it was written where there is no such dtype."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _require_leaves(folder: Path, table: dict[str, Leaf], entries: dict[str, LeafEntry]) -> None:
    """Raise CheckpointError unless the manifest has exactly the weights of the config, each of the right shape."""
    problems = [f"{path} is missing" for path in table.keys() - entries.keys()]
    problems += [f"{path} is unknown" for path in entries.keys() - table.keys()]
    for path in table.keys() & entries.keys():
        if (shape := entries[path].shape) not in (None, table[path].shape):
            problems.append(f"{path} is {shape}, not {table[path].shape}")
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights of its config; nothing was read: {listing(sorted(problems), 20)}"
        )
