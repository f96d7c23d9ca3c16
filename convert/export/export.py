"""The way back for other software: a converted checkpoint as safetensors under Hugging Face names.

The new folder appears whole: it is written under another name beside it and renamed at the end. Memory is that of
reading weight by weight; every array is checked against its SHA-256 on the way.
"""

import collections
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv32_jax.checkpoint.manifest import sync_folder
from dsv32_jax.errors import FULL, CapacityError, OutputExistsError, UsageError, listing
from dsv32_jax.quantization.quantize import NVFP4_BLOCK
from dsv32_jax.system.files import expand_path
from dsv32_jax.system.progress import Progress, ignore_progress

from ..names import fold_names
from ..plan.limits import require_disk_space
from ..plan.output import LOCK, copy_companions, lock_folder, require_apart
from ..read.source import CONFIG
from ..verify.converted import Converted, Group, Weight, raise_damaged
from . import sharing_scales
from .encode import Encoder
from .quantization import compressed_tensors, modelopt
from .shards import SHARD_BYTES, Shard, ShardsWriter, deal, nbytes, write_index, write_json
from .sharing_scales import Sharing
from .targets import FAMILIES, Target, choose

QUANT_CONFIG = "hf_quant_config.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written. `changed`: weights, folded, that are not what is stored, by why. `notes`: what to know."""

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
    progress: Callable[[Progress], None] = ignore_progress,
) -> Exported:
    """Write the converted checkpoint `folder` to the new folder `out` in the layout `family`, one of FAMILIES.

    `share_scales` gives gate and up (and q_a and kv_a) one tensor scale wherever that changes no value. Raises
    OutputExistsError when `out` is there, VerificationError when an array has changed, CapacityError, StorageError.
    """
    if family not in FAMILIES:
        raise UsageError(f"the format must be one of {', '.join(FAMILIES)}, not {family!r}")
    converted, out = Converted(folder), expand_path(out).absolute()
    require_apart(converted.folder, out)
    _require_new(out)
    work = _Export(converted, family, share_scales)
    shards = deal((target.tensors for target in work.targets.values()), shard_bytes)
    aside = unfinished(out)
    if aside.is_dir() and os.listdir(aside) and not (aside / LOCK).exists():
        raise OutputExistsError(f"{aside} is in the way and not from an export; nothing was touched")
    with lock_folder(aside):
        _empty(aside)
        require_disk_space(aside, sum(nbytes(tensor) for shard in shards for tensor in shard.tensors))
        _write(work, aside, shards, progress)
        _publish(aside, out)
        (out / LOCK).unlink()
    sync_folder(out.parent)
    return work.report(out, shards)


def unfinished(out: Path) -> Path:
    """Where an export to `out` is written before it has its name."""
    return out.parent / f".{out.name}.unfinished"


def _write(work: "_Export", aside: Path, shards: list[Shard], progress: Callable[[Progress], None]) -> None:
    """Write everything. Where the disk is full, what was written is of no use and is removed."""
    try:
        work.write(aside, shards, progress)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _empty(aside)
        raise CapacityError(
            f"{aside} cannot be written: the disk, a quota or the limit of file sizes is full ({error.strerror}). "
            "Nothing of the export was kept; free some space, or export to another disk"
        ) from error


def _require_new(out: Path) -> None:
    if out.is_symlink() or out.is_file() or (out.is_dir() and os.listdir(out)):
        raise OutputExistsError(f"{out} exists; nothing was touched. Export to a new folder")


def _publish(aside: Path, out: Path) -> None:
    """Give the export its name, if nothing has got it meanwhile: the system replaces an empty folder, and no other."""
    try:
        os.rename(aside, out)
    except OSError as error:
        if not os.path.lexists(out):
            raise
        raise OutputExistsError(
            f"{out} was made by something else meanwhile and was not touched. The export stays in {aside} until "
            f"one of the same name is made; export to a new folder ({error.strerror})"
        ) from error


def _empty(aside: Path) -> None:
    """Remove what an export that was killed left in its own folder."""
    for entry in aside.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class _Export:
    """One export: what becomes of each weight, and writing it."""

    def __init__(self, converted: Converted, family: str, share_scales: bool):
        self.converted, self.family = converted, family
        self.weights = {
            weight.name: weight for group in converted.groups for weight in group.weights if not _left_out(weight)
        }
        self.nvfp4 = [w for w in self.weights.values() if family != "bf16" and set(w.formats) == {"nvfp4"}]
        self.pairs = sharing_scales.differing(converted, self.nvfp4)
        self.sharing = sharing_scales.share(converted, self.pairs) if share_scales else Sharing({}, [])
        self.targets = {name: self._target(weight) for name, weight in self.weights.items()}
        self.repeated = self._one_block() if family == "modelopt" else []
        self.encoder = Encoder(converted, self.weights, self.targets, self.sharing)

    def write(self, folder: Path, shards: list[Shard], progress: Callable[[Progress], None]) -> None:
        """Every shard, the index, and the configuration files."""
        groups = [group for group in self.converted.groups if group.weights[0].name in self.targets]
        done, total = 0, sum(map(self._nbytes, groups))
        progress(Progress(done, total, ""))
        with ShardsWriter(folder, shards) as writer:
            for group in groups:
                for weight, parts in self.converted.read(group, raise_damaged):
                    for name, array in self.encoder.tensors(weight, parts).items():
                        writer.add(name, array)
                done += self._nbytes(group)
                progress(Progress(done, total, group.leaves[0].path))
        write_index(folder, shards)
        copy_companions(self.converted.folder, folder)
        self._write_configs(folder)

    def report(self, out: Path, shards: list[Shard]) -> Exported:
        """What was written."""
        changed: dict[str, list[str]] = collections.defaultdict(list)
        for name, target in self.targets.items():
            if target.why:
                changed[target.why].append(name)
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        return Exported(
            folder=str(out),
            family=self.family,
            files=len(shards),
            tensors=len(tensors),
            nbytes=sum(map(nbytes, tensors)),
            changed={why: fold_names(names) for why, names in changed.items()},
            notes=list(self._notes()),
        )

    def _nbytes(self, group: Group) -> int:
        """Bytes that are read for `group`; a copy is read again."""
        return sum(self.converted.expected[key].nbytes for key in self.converted.keys(group))

    def _target(self, weight: Weight) -> Target:
        formats = weight.formats
        dtype = self.converted.dtype(weight) if set(formats) == {"dense"} else ""
        target = choose(weight, self.family, formats, dtype, bool(self.nvfp4))
        return target.renewed(target.block) if weight.name in self.sharing.shared else target

    def _one_block(self) -> list[str]:
        """ModelOpt has one group size for a checkpoint: where there are two, scales of 32 inputs are written twice."""
        blocks = {name: self.targets[name].block for name in (weight.name for weight in self.nvfp4)}
        if len(set(blocks.values())) < 2:
            return []
        wide = [name for name, block in blocks.items() if block > NVFP4_BLOCK]
        self.targets |= {name: self.targets[name].renewed(NVFP4_BLOCK) for name in wide}
        return wide

    def _write_configs(self, folder: Path) -> None:
        modules = {
            name.removesuffix(".weight"): target
            for name, target in self.targets.items()
            if len(self.weights[name].leaves[0].source_shape) == 2
        }
        beside, quantization = None, None
        if self.family == "modelopt":
            quantization, beside = modelopt(modules)
        elif self.family == "compressed-tensors":
            quantization = compressed_tensors(modules)
        config = dict(self.converted.manifest.config)
        if quantization is not None:
            config["quantization_config"] = quantization
        if beside is not None:
            write_json(folder / QUANT_CONFIG, beside)
        write_json(folder / CONFIG, config)

    def _notes(self) -> Iterator[str]:
        for reason, count in self.converted.manifest.report.get("ignored", {}).items():
            yield f"{count} tensors of the source were not converted and are not here ({reason})"
        if apart := self.sharing.apart:
            pairs = listing((f"{first} and {second}" for first, second in apart), 4)
            yield f"{len(apart)} pairs keep tensor scales of their own: sharing one would change values ({pairs})"
        elif self.pairs and not self.sharing.shared:
            yield (
                f"{len(self.pairs)} pairs of gate and up, or q_a and kv_a, have different tensor scales, and loaders "
                "that fuse them use one for both: --share-scales gives them one where that is exact"
            )
        if self.sharing.shared:
            yield f"{len(self.sharing.shared)} weights were rescaled exactly to the tensor scale of their partner"
        if self.repeated:
            yield f"{len(self.repeated)} weights had scales for 32 inputs, which are written twice: group_size is 16"
        yield from self.encoder.notes()


def _left_out(weight: Weight) -> bool:
    """Whether the source left this copy out."""
    entry = weight.entries[0]
    return entry.same_as is not None and entry.passport is not None and not weight.sources
