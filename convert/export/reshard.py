"""Write a converted checkpoint again, laid out for another mesh. Killed at any point, the same command continues.

The content stays the same, and so does the manifest's digest. Memory: about twice the largest parameter.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dsv32_jax.checkpoint.companions import copy_companions
from dsv32_jax.checkpoint.folder import JOURNAL, WEIGHTS
from dsv32_jax.checkpoint.manifest import Manifest, digest, is_complete
from dsv32_jax.checkpoint.reader import Key
from dsv32_jax.checkpoint.writer import Writer, list_files
from dsv32_jax.errors import VerificationError
from dsv32_jax.layout import leaves
from dsv32_jax.parallel import partition
from dsv32_jax.system.files import expand_path, require_apart
from dsv32_jax.system.locks import lock_folder, require_unlocked
from dsv32_jax.system.progress import Progress

from ..plan.limits import find_existing, require_disk_space
from ..read.converted import Converted
from ..write.differences import manifest_basis, read_finished
from ..write.journal import Journal, Part, require_ours
from ..write.pipeline import describe_array


def reshard(
    folder: str | Path,
    out: str | Path,
    mesh: str | Mapping[str, int] | None = None,
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Write the converted checkpoint `folder` to `out`, so that each device of `mesh` reads its own bytes.

    `mesh` is "expert=8,model=2", the same as a dict, or None for one device. An unfinished `out` of the same job is
    continued. With `dry_run` nothing is written, and the manifest of `folder` is returned. Raises CapacityError with a
    table where the mesh does not divide arrays, before anything is read; VerificationError where an array has changed;
    OutputExistsError, UsageError, StorageError.
    """
    sizes = partition.parse_optional_mesh(mesh)
    converted, out = Converted(folder), expand_path(out).absolute()
    table = {leaf.path: leaf for leaf in leaves(converted.config)}
    partition.check_divisible(sizes, ((table[path], entry.shape) for (path, _), entry in converted.expected.items()))
    converted.arrays.require_files("nothing was written")
    require_apart(converted.folder, out)
    require_ours(out)
    plan = digest([converted.manifest.digest, sizes])
    basis = {**manifest_basis(converted.manifest), "mesh": sizes}
    if dry_run:
        require_unlocked(out)
        if is_complete(out):
            return read_finished(out, plan, basis)
        written = sum(file.stat().st_size for file in (out / WEIGHTS).rglob("*") if file.is_file())
        require_disk_space(find_existing(out), converted.nbytes - written)
        return converted.manifest
    with lock_folder(out):
        if is_complete(out):
            manifest = read_finished(out, plan, basis)
            (out / JOURNAL).unlink(missing_ok=True)
            return manifest
        journal = Journal(out, plan, converted.folder.name, basis)
        journal.reconcile(out / WEIGHTS)
        _write_parts(converted, out, sizes, journal, progress)
        written = journal.entries
        entries = {
            path: dataclasses.replace(entry, arrays=written[path].arrays) if path in written else entry
            for path, entry in converted.manifest.leaves.items()
        }
        companions = copy_companions(converted.folder, out)
        storage = {"files": list_files(out, companions, entries), "mesh": sizes}
        source = {**converted.manifest.source, "plan": plan}
        manifest = dataclasses.replace(converted.manifest, leaves=entries, source=source, storage=storage)
        journal.complete(manifest)
        return manifest


def _write_parts(
    converted: Converted, out: Path, mesh: dict[str, int], journal: Journal, progress: Callable[[Progress], None]
) -> None:
    parts: dict[str, list[Key]] = {}
    for key, entry in converted.expected.items():
        parts.setdefault(entry.part, []).append(key)
    sizes = {part: sum(converted.expected[key].nbytes for key in keys) for part, keys in parts.items()}
    done = sum(size for part, size in sizes.items() if part in journal.parts)
    require_disk_space(out, converted.nbytes - done)
    progress(Progress(done, converted.nbytes, saved=done))
    journal.start()
    writer = Writer(out, partition.make_shard_shape(mesh, leaves(converted.config)))
    for part in sorted(parts.keys() - journal.parts.keys()):
        journal.begin(part)
        places = writer.save(part, {key: _read(converted, key) for key in parts[part]})
        entries = {path: converted.manifest.leaves[path].at(path, places) for path, _ in parts[part]}
        journal.add(Part(part, {path: dataclasses.replace(e, provenance=None) for path, e in entries.items()}, {}, {}))
        done += sizes[part]
        progress(Progress(done, converted.nbytes, min(entries), saved=done))


def _read(converted: Converted, key: Key) -> np.ndarray:
    array = converted.arrays.read(key)
    if describe_array(array) != converted.expected[key]:
        raise VerificationError(
            f"{converted.arrays.where(key)} has changed. Completed parts are kept; `dsv32 verify` lists all damage"
        )
    return array
