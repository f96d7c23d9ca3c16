"""A converted checkpoint once more, its chunks laid for another mesh. Killed anywhere, a rerun continues.

The content is the same, and so is the manifest's digest. Memory: about twice the largest leaf.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dsv32_jax.checkpoint.arrays import Key
from dsv32_jax.checkpoint.checksums import files
from dsv32_jax.checkpoint.manifest import JOURNAL, Manifest, digest, is_complete
from dsv32_jax.errors import OutputExistsError, VerificationError
from dsv32_jax.layout import leaves
from dsv32_jax.parallel import partition
from dsv32_jax.system.files import expand_path
from dsv32_jax.system.progress import Progress, ignore_progress

from ..plan.limits import require_disk_space
from ..plan.output import copy_companions, lock_folder, require_apart, require_ours
from ..transform import array_facts
from ..verify.converted import Converted, nbytes_of
from ..write.identity import basis_of
from ..write.journal import Journal


def reshard(
    folder: str | Path,
    out: str | Path,
    mesh: str | Mapping[str, int] | None = None,
    *,
    progress: Callable[[Progress], None] = ignore_progress,
) -> Manifest:
    """Write the converted checkpoint `folder` to `out`, with chunks that lie within the pieces of `mesh`'s devices.

    `mesh`: "expert=8,model=2" or the same as a dict; none lays chunks for one device. An `out` that holds a part of the
    same work is continued. Raises CapacityError with a table where the mesh does not divide arrays, before anything is
    read; VerificationError when an array has changed; OutputExistsError, UsageError, StorageError.
    """
    sizes = partition.optional(mesh)
    converted, out = Converted(folder), expand_path(out).absolute()
    table = {leaf.path: leaf for leaf in leaves(converted.config)}
    partition.check(sizes, ((table[path], entry.shape) for (path, _), entry in converted.expected.items()))
    _require_whole(converted)
    require_apart(converted.folder, out)
    require_ours(out)
    plan = digest([converted.manifest.digest, sizes])
    with lock_folder(out):
        return _finished(out, plan) or _run(converted, out, sizes, plan, progress)


def _require_whole(converted: Converted) -> None:
    if damaged := converted.damaged_arrays():
        text = "\n  ".join(damaged)
        raise VerificationError(f"{converted.folder} is damaged; nothing was written:\n  {text}")


def _finished(out: Path, plan: str) -> Manifest | None:
    """The manifest of `out` when the same work is complete there."""
    if not is_complete(out):
        return None
    manifest = Manifest.read(out)
    if manifest.source.get("plan") != plan:
        raise OutputExistsError(f"{out} holds another converted checkpoint; nothing was touched. Write to a new folder")
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


def _run(
    converted: Converted, out: Path, mesh: dict[str, int], plan: str, progress: Callable[[Progress], None]
) -> Manifest:
    from dsv32_jax.checkpoint.store import Writer

    manifest = converted.manifest
    journal = Journal(out, plan, converted.folder.name, {**basis_of(manifest), "mesh": mesh})
    writer = Writer(out, partition.by_mesh(mesh, leaves(converted.config)))
    journal.forget([part for part in journal.leaves if not writer.has(part)])
    writer.keep(journal.leaves)
    parts: dict[str, list[Key]] = {}
    for key in converted.expected:
        parts.setdefault(converted.arrays.stored[key].part, []).append(key)
    sizes = {part: sum(nbytes_of(converted.expected[key]) for key in keys) for part, keys in parts.items()}
    done = sum(size for part, size in sizes.items() if part in journal.leaves)
    require_disk_space(out, converted.nbytes - done)
    progress(Progress(done, converted.nbytes, ""))
    for part in sorted(set(parts) - set(journal.leaves)):
        writer.save(part, {key: _read(converted, key) for key in parts[part]})
        paths = {path for path, _ in parts[part]}
        journal.add(part, {path: dataclasses.replace(manifest.leaves[path], passport=None) for path in paths}, {}, {})
        done += sizes[part]
        progress(Progress(done, converted.nbytes, min(paths)))
    writer.finish()
    storage = {"files": files(out, copy_companions(converted.folder, out)), "mesh": mesh}
    result = dataclasses.replace(manifest, source={**manifest.source, "plan": plan}, storage=storage)
    result.write(out)
    journal.file.unlink()
    return result


def _read(converted: Converted, key: Key) -> np.ndarray:
    """One array. Raises VerificationError when it is not what was written."""
    array = converted.arrays.read(key)
    if array_facts.describe_array(array) != converted.expected[key]:
        raise VerificationError(
            f"{converted.where(key)} has changed. What was written before is kept; `dsv32 verify` lists all damage"
        )
    return array
