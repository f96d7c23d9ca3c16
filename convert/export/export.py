"""A converted checkpoint as safetensors under Hugging Face names, for other software.

The output appears whole: it is written to a folder beside it, .NAME.unfinished, which is renamed at the end. A record
in that folder names the job and its files, so that only files of an export are ever removed, and an export that was
killed after the renaming is recognized as finished. Memory is that of reading weight by weight.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv32_jax.checkpoint.companions import COMPANIONS, copy_companions
from dsv32_jax.checkpoint.manifest import digest
from dsv32_jax.errors import FULL, CapacityError, CheckpointError, OutputExistsError, UsageError, listing
from dsv32_jax.system.files import expand_path, find_mismatches, is_abandoned, read_json, require_apart, sync
from dsv32_jax.system.locks import LOCK, lock_folder, require_unlocked
from dsv32_jax.system.progress import Progress

from ..name_folding import fold_names
from ..plan.limits import find_existing, require_disk_space
from ..read.converted import Converted, raise_damaged
from ..read.source import CONFIG, INDEX, QUANTIZATION
from .encode import Target, choose_targets, encode
from .quantization_config import compressed_tensors_config, modelopt_config
from .shards import SHARD_BYTES, Shards, ShardsWriter, plan_shards, write_json

FAMILIES = ("modelopt", "compressed-tensors", "bf16")
RECORD = ".export.json"
MAX_RECORD_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Exported:
    """The outcome of an export. `changed`: weights, folded, that are not what is stored, by why."""

    folder: str
    family: str
    files: int
    tensors: int
    nbytes: int
    changed: dict[str, list[str]]
    notes: list[str]


def export(
    folder: str | Path,
    out: str | Path,
    family: str,
    *,
    share_scales: bool = False,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Exported:
    """Write the converted checkpoint `folder` to the new folder `out` in the layout `family`, one of FAMILIES.

    `share_scales` gives gate and up (and q_a and kv_a) one tensor scale wherever that changes no value. With `dry_run`
    nothing is written, and what would be is returned. Raises OutputExistsError where `out` exists, VerificationError
    where an array has changed, CapacityError, StorageError.
    """
    if family not in FAMILIES:
        raise UsageError(f"the format must be one of {', '.join(FAMILIES)}, not {family!r}")
    converted, out = Converted(folder), expand_path(out).absolute()
    require_apart(converted.folder, out)
    job = digest([converted.manifest.digest, family, share_scales, shard_bytes])
    is_finished = _read_record(out).get("job") == job
    if not is_finished and (out.is_symlink() or out.is_file() or (out.is_dir() and os.listdir(out))):
        raise OutputExistsError(f"{out} exists; nothing was touched. Export to a new folder")
    targets, notes = choose_targets(converted, family, share_scales)
    shards = plan_shards((target.tensors for target in targets.values()), shard_bytes)
    tensors = [tensor for shard in shards.values() for tensor in shard]
    nbytes, aside = sum(tensor.nbytes for tensor in tensors), unfinished(out)
    if not is_finished:
        require_unlocked(aside)
        freed = sum(file.stat().st_size for file in _list_own(aside))
        require_disk_space(find_existing(aside), nbytes - freed)
    if not is_finished and not dry_run:
        with lock_folder(aside):
            _clear(aside)
            with _clear_if_full(aside):
                files = [*shards, INDEX, *COMPANIONS, QUANTIZATION, CONFIG]
                write_json(aside / RECORD, {"job": job, "files": files})
                _write_shards(converted, aside, targets, shards, progress)
                copy_companions(converted.folder, aside)
                _write_configs(converted, aside, family, targets)
            _publish(aside, out)
    if not dry_run:
        with lock_folder(out):
            (out / LOCK).unlink()
            (out / RECORD).unlink()
    changed: dict[str, list[str]] = {}
    for name, target in targets.items():
        changed.setdefault(target.why, []).append(name)
    changed = {why: fold_names(names) for why, names in changed.items() if why}
    return Exported(str(out), family, len(shards), len(tensors), nbytes, changed, notes)


def unfinished(out: Path) -> Path:
    """The folder that an export to `out` is written to before it gets its name."""
    return out.parent / f".{out.name}.unfinished"


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of an export in `folder`: its job, and the names of its files. Empty where there is none."""
    try:
        record = read_json(folder / RECORD, MAX_RECORD_BYTES)
    except (OSError, CheckpointError):
        return {}
    return {} if find_mismatches(record, {"job": str, "files": [str]}, RECORD) else record


def _list_own(aside: Path) -> list[Path]:
    """The files that a killed export left. Raises OutputExistsError where there is anything else."""
    if aside.is_symlink():
        raise OutputExistsError(f"{aside} is a link; nothing was touched. Remove it")
    names = os.listdir(aside) if aside.is_dir() else []
    files = [RECORD, *_read_record(aside).get("files", [])]
    own = [name for name in names if name in files or any(is_abandoned(name, file) for file in files)]
    if others := sorted(set(names) - {*own, LOCK}):
        raise OutputExistsError(
            f"{aside} is in the way and not from an export ({listing(others)}); nothing was touched"
        )
    return [aside / name for name in sorted(own, key=lambda name: name == RECORD)]


def _clear(aside: Path) -> None:
    """Remove what a killed export left, its record last."""
    for file in _list_own(aside):
        file.unlink()


@contextlib.contextmanager
def _clear_if_full(aside: Path) -> Iterator[None]:
    """Where the disk is full, what was written is of no use and is removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        _clear(aside)
        raise CapacityError(
            f"{aside} cannot be written: the disk or quota is full, or the file is too large ({error.strerror}). "
            "Nothing of the export was kept; free some space, or export to another disk"
        ) from error


def _write_shards(
    converted: Converted,
    aside: Path,
    targets: dict[str, Target],
    shards: Shards,
    progress: Callable[[Progress], None],
) -> None:
    groups = [group for group in converted.groups if group.weights[0].name in targets]
    done, total = 0, sum(map(converted.count_bytes, groups))
    progress(Progress(done, total))
    writer = ShardsWriter(aside, shards)
    for group in groups:
        for weight, parts in converted.read(group, raise_damaged):
            for name, array in encode(targets[weight.name], weight, parts).items():
                writer.add(name, array)
        done += converted.count_bytes(group)
        progress(Progress(done, total, group.leaves[0].path))
    writer.finish()


def _write_configs(converted: Converted, aside: Path, family: str, targets: dict[str, Target]) -> None:
    """Write config.json, with the quantization as the family describes it, and hf_quant_config.json if it has one."""
    matrices = {n.removesuffix(".weight"): target for n, target in targets.items() if len(target.tensors[0].shape) == 2}
    is_modelopt = family == "modelopt"
    quantization, beside = modelopt_config(matrices) if is_modelopt else (compressed_tensors_config(matrices), None)
    if beside is not None:
        write_json(aside / QUANTIZATION, beside)
    quantized = {} if quantization is None else {"quantization_config": quantization}
    write_json(aside / CONFIG, {**converted.manifest.config, **quantized})


def _publish(aside: Path, out: Path) -> None:
    """Give the export its name, unless another has taken it: the system replaces an empty folder, and no other."""
    try:
        os.rename(aside, out)
    except OSError as error:
        if not os.path.lexists(out):
            raise
        raise OutputExistsError(
            f"{out} was made by something else meanwhile and was not touched. The export stays in {aside} until "
            f"one of the same name is made; export to a new folder ({error.strerror})"
        ) from error
    sync(out.parent)
