"""From a converted checkpoint to a Model. On a CPU its arrays are maps of the files; other devices get copies."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
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
from .reader import Index, Key, Reader, allocate, bound, list_slabs
from .weight_shapes import ABSORBED, STORED, describe

LEVELS = (None, "quick", "full")

AHEAD_BYTES = 256 << 20
"""Host memory for arrays on their way to devices, unless two of them are larger."""


_dequantize = jax.jit(dequantize, static_argnums=1)


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
    devices always get copies; beside them the host needs memory for AHEAD_BYTES, or two of the largest arrays.
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
            weights[path] = _dequantize(weight, dtype) if path.endswith(ABSORBED) else weight
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
        yield jax.make_array_from_callback(reader.entries[key].shape, target, partial(reader.map, key))


def _copy_arrays(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[jax.Array]:
    """Yield the arrays of `targets`, copied. While some are handed to their devices, threads read those that follow."""
    total = sum(reader.entries[key].nbytes for key in targets)
    with ThreadPoolExecutor(host.count_cores()) as pool, show_slow(total) as count:
        before = _Copies(reader, {}, pool, count)
        for group in _divide(reader, targets):
            after = _Copies(reader, group, pool, count)
            yield from before.place()
            before = after
        yield from before.place()


def _divide(reader: Reader, targets: Mapping[Key, Sharding]) -> Iterator[dict[Key, Sharding]]:
    """Yield `targets` in groups of half of AHEAD_BYTES, or of one array that is larger."""
    group, nbytes = dict[Key, Sharding](), 0
    for key, target in targets.items():
        nbytes += reader.entries[key].nbytes
        if group and nbytes > AHEAD_BYTES // 2:
            yield group
            group, nbytes = {}, reader.entries[key].nbytes
        group[key] = target
    yield group


class _Copies:
    """Arrays that threads are reading into host memory: each part that devices of this process hold, once."""

    def __init__(
        self, reader: Reader, targets: Mapping[Key, Sharding], pool: ThreadPoolExecutor, count: Callable[[int], None]
    ):
        self._reader, self._targets = reader, targets
        self._parts: dict[tuple[Key, str], np.ndarray] = {}
        slabs: list[tuple[Key, np.ndarray, Index]] = []
        for key, target in targets.items():
            entry = reader.entries[key]
            for index in target.addressable_devices_indices_map(entry.shape).values():
                if (key, str(index)) not in self._parts:
                    first, *rest = bound(index, entry.shape)
                    part = allocate([side.stop - side.start for side in (first, *rest)], entry.dtype)
                    self._parts[key, str(index)] = part
                    for rows in list_slabs(len(part), part.nbytes):
                        within = slice(first.start + rows.start, first.start + rows.stop)
                        slabs.append((key, part[rows], (within, *rest)))

        def read(start: int) -> None:
            for slab in slabs[start :: host.count_cores()]:
                reader.copy(*slab)
                count(slab[1].nbytes)

        self._reading = [pool.submit(read, start) for start in range(host.count_cores())]

    def place(self) -> list[jax.Array]:
        """Return the arrays when they are on their devices, which on a CPU take the memory as it is."""
        for future in self._reading:
            future.result()
        return jax.block_until_ready([self._place(key, target) for key, target in self._targets.items()])

    def _place(self, key: Key, target: Sharding) -> jax.Array:
        shape = self._reader.entries[key].shape
        return jax.make_array_from_callback(shape, target, lambda index: self._parts[key, str(index)])


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
