"""A conversion from start to finish. Killed at any point, the same command continues where it stopped."""

import collections
import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from dsv32_jax.checkpoint.companions import check_tokenizer, copy_companions
from dsv32_jax.checkpoint.folder import FILE, JOURNAL, WEIGHTS
from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest, is_complete
from dsv32_jax.checkpoint.writer import Writer, list_files
from dsv32_jax.config import Config
from dsv32_jax.errors import (
    CheckpointError,
    DsvError,
    UsageError,
    argument,
    listing,
    unknown,
    writing_failed,
)
from dsv32_jax.parallel import partition
from dsv32_jax.system.files import expand_path, require_apart
from dsv32_jax.system.locks import lock_folder, require_unlocked
from dsv32_jax.system.progress import ByteMeter, Progress

from .plan import limits
from .plan.limits import Budget, size_of
from .plan.plan import Plan, make_plan
from .plan.policy import make_recipe
from .plan.scope import interpret_source, select_first_layers
from .read.provenance import HashingReader, list_sources
from .read.source import Source
from .read.source_file import require_downloaded, verify_downloads
from .read.weights import read_tensor_scale
from .transform.cut import PlannedLeaf
from .transform.requantize import find_pairs, sum_odd_scales, summarize_errors
from .write.differences import read_finished
from .write.journal import Journal, require_ours, require_same_bytes
from .write.pipeline import Pipeline
from .write.saved_matrices import FOLDER as MATRICES, SavingRequantizer


class Options(TypedDict, total=False):
    """How to convert; all options have defaults."""

    to: str | None  # "nvfp4", "fp8" or "bf16"; by default weights keep their format
    policy: str | Path | None  # the weights to convert: a preset or a file (policy.py)
    scales: str  # how NVFP4 block scales are chosen: "rtn", "mse" or "four-over-six"
    tensor_scales: str  # each matrix's "own", or "shared" by gate and up and by q_a and kv_a
    layers: str | None  # "0-3": only the first layers, as a model of its own without the MTP layer
    mesh: str | Mapping[str, int] | None  # "expert=8,model=2" or a dict: a device can read its own bytes
    max_memory: str | int | None  # bytes, or "8GB"; by default 80 % of free memory
    workers: int | None  # threads that read and convert; by default one per core
    strict_index: bool  # refuse a source whose index does not list every tensor of its shards
    ignore_config: Sequence[str]  # keys of config.json that could change the model, and do not by the user's word
    ignore_tensors: Sequence[str]  # patterns of tensors that the model can do without, by the user's word
    verify_source: bool  # first compare every shard with the SHA-256 that `hf download` recorded
    group_bytes: int  # small leaves are saved together, about so many bytes at a time


def prepare(src: str | Path, dst: str | Path, options: Options) -> tuple[Plan, Budget, Path]:
    """Check the options and plan the conversion: return the plan, the limits, and the absolute path of `dst`.

    Only headers are read and nothing is written. Raises UsageError, ConfigError, CheckpointError, or CapacityError if
    the memory or the mesh does not suffice.
    """
    if not options.keys() <= Options.__annotations__.keys():
        wrong = unknown(options, Options.__annotations__)
        raise UsageError(f"unknown {'option' if len(wrong) == 1 else 'options'}: {listing(wrong)}. Nothing was read")
    source_folder, dst = expand_path(src).absolute(), expand_path(dst).absolute()
    to, policy = options.get("to"), options.get("policy")
    scales, tensor_scales = options.get("scales", "rtn"), options.get("tensor_scales", "own")
    if (scales, tensor_scales) != ("rtn", "own") and to != "nvfp4" and policy is None:
        raise UsageError(
            f"{argument('scales')} and {argument('tensor_scales')} apply to weights that become NVFP4, and none does: "
            f"add {argument('to', 'nvfp4')}. Nothing was read"
        )
    recipe = make_recipe(to, policy, scales, tensor_scales)
    budget = limits.make_budget(options.get("max_memory"), options.get("workers"), options.get("group_bytes"))
    mesh = partition.parse_optional_mesh(options.get("mesh"))
    require_apart(source_folder, dst)
    require_downloaded(src, source_folder)
    source = interpret_source(Source(source_folder), options.get("ignore_config"), options.get("ignore_tensors"))
    if options.get("strict_index"):
        source.require_complete_index()
    if (layers := options.get("layers")) is not None:
        source = select_first_layers(source, layers)
    plan = make_plan(source, recipe, mesh)
    partition.check_divisible(mesh, [(leaf.leaf, shape) for leaf in plan.leaves for _, shape in leaf.arrays.values()])
    budget = budget._replace(fixed=limits.fixed_bytes(plan.leaves))
    limits.require_limit(plan.leaves, budget)
    return plan, budget, dst


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Callable[[Progress], None] = lambda progress: None,
    **options: Unpack[Options],
) -> Manifest:
    """Convert the Hugging Face checkpoint `src` into the folder `dst`, and return the manifest of what was written.

    An unfinished `dst` of the same conversion is continued, a finished one is left as it is. `src` is never modified;
    nothing is deleted in `dst` but parts that this conversion began. Raises CheckpointError, ConfigError, UsageError,
    OutputExistsError, CapacityError or StorageError.
    """
    plan, budget, dst = prepare(src, dst, options)
    stamps, found = read_stamps(dst), judge(plan, budget, dst)
    if isinstance(found, Journal):
        if options.get("verify_source"):
            verify_downloads(plan.source.files, budget.workers, progress)
        _require_tensor_scales(plan.source, list_missing(plan, found))
    with lock_folder(dst):
        found = found if stamps == read_stamps(dst) else judge(plan, budget, dst)
        if isinstance(found, Manifest):
            (dst / JOURNAL).unlink(missing_ok=True)
            return found
        try:
            _write_parts(plan, dst, budget, found, progress)
            return _finish(plan, dst, found)
        except OSError as error:
            raise error if isinstance(error, DsvError) else writing_failed(dst, error) from error


def judge(plan: Plan, budget: Budget, dst: Path) -> Manifest | Journal:
    """Return the manifest of a finished output, or the journal of one to begin or to continue; nothing is changed.

    Raises OutputExistsError where `dst` holds anything else or is being written, VerificationError where it is damaged,
    and CapacityError if memory or disk do not suffice for what is missing.
    """
    require_ours(dst)
    require_unlocked(dst)
    if is_complete(dst):
        manifest = read_finished(dst, plan.digest, plan.basis)
        require_same_bytes(plan.source, manifest.leaves.values())
        return manifest
    limits.require_free_memory(limits.peak_memory(plan.leaves, budget))
    journal = _resume(plan, dst)
    needed = size_of(list_missing(plan, journal)) - journal.count_unfinished_bytes()
    limits.require_disk_space(limits.find_existing(dst), max(0, needed))
    return journal


def list_missing(plan: Plan, journal: Journal) -> list[PlannedLeaf]:
    """Return the leaves that are not on disk yet."""
    done = journal.entries
    return [leaf for leaf in plan.leaves if leaf.leaf.path not in done]


def read_stamps(dst: Path) -> list[tuple[int, int] | None]:
    """Return size and time of the manifest and the journal: they change when another process writes to `dst`."""
    stamps = []
    for file in (dst / FILE, dst / JOURNAL):
        status = file.lstat() if file.is_file() else None
        stamps.append(status and (status.st_size, status.st_mtime_ns))
    return stamps


def _resume(plan: Plan, dst: Path) -> Journal:
    """The journal of the output, once its parts are known to come from the source as it is now."""
    source = plan.source
    journal = Journal(dst, plan.digest, source.folder.name, plan.basis, source.stamps)
    touched = [name for name, stamp in source.stamps.items() if journal.stamps.get(name) != stamp]
    require_same_bytes(source, journal.entries.values(), touched)
    journal.reconcile(dst / WEIGHTS)
    return journal


def _write_parts(plan: Plan, dst: Path, budget: Budget, journal: Journal, progress: Callable[[Progress], None]) -> None:
    """Write every parameter that is not on disk yet: read, cut, hash, save, and note each part in the journal."""
    done, missing = journal.entries, list_missing(plan, journal)
    known, wanted = ({stored.name for leaf in some for stored in leaf.sources} for some in (plan.leaves, missing))
    matrices = SavingRequantizer(dst / MATRICES, known, wanted, *plan.scaling)
    meter = ByteMeter(progress, plan.nbytes, plan.nbytes - size_of(missing) + matrices.nbytes)
    meter.report()
    journal.start()

    def count(path: str, nbytes: int) -> None:
        done, saved = matrices.count(nbytes)
        meter.add_done(path, done)
        meter.add_saved(saved)

    writer = Writer(dst, partition.make_shard_shape(plan.mesh, [leaf.leaf for leaf in plan.leaves]))
    read = HashingReader(plan.source.read)
    pipeline = Pipeline(read, matrices, writer, budget, done.get, count)
    groups = zip(limits.group_leaves(missing, budget), journal.begin_new(), strict=False)
    with contextlib.closing(pipeline.run(groups)) as parts:
        for part, nbytes in parts:
            journal.add(part)
            done |= part.entries
            meter.add_saved(nbytes - matrices.remove(part.outcomes))
    matrices.close()


def _require_tensor_scales(source: Source, leaves: list[PlannedLeaf]) -> None:
    """Raise CheckpointError that lists every invalid tensor scale, before hours of work."""
    stored = {s.values.name: s for leaf in leaves for s in leaf.sources if s.tensor_scale is not None}
    problems = []
    for weight in stored.values():
        try:
            read_tensor_scale(weight, source.read)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"{source.folder} has {len(problems)} unusable tensor scales; nothing new was written: {listing(problems)}"
        )


def _finish(plan: Plan, dst: Path, journal: Journal) -> Manifest:
    """Read back what was written, then write the manifest, which makes the folder a converted checkpoint."""
    written = journal.entries
    entries = {leaf.leaf.path: written[leaf.leaf.path] for leaf in plan.leaves}
    companions = copy_companions(plan.source.folder, dst)
    config = Config.from_dict(plan.config, f"the config of {dst.name}")
    manifest = Manifest(
        config=plan.config,
        leaves=entries,
        source=_describe_source(plan),
        report=_report(plan, journal, entries, companions) | {"token_ids": check_tokenizer(dst, config)},
        versions=_versions(),
        storage={"files": list_files(dst, companions, entries), "mesh": plan.mesh},
    )
    journal.complete(manifest)
    return manifest


def _report(plan: Plan, journal: Journal, entries: Mapping[str, LeafEntry], companions: list[str]) -> dict[str, Any]:
    outcomes = {name: outcome for part in journal.parts.values() for name, outcome in part.outcomes.items()}
    counts: collections.Counter[str] = collections.Counter({"nan_scale_bytes": 0, "zero_blocks": 0})
    for found in (*(part.counts for part in journal.parts.values()), sum_odd_scales(outcomes)):
        counts.update(found)
    return {
        "formats": plan.formats,
        "notes": list(plan.notes),
        "ignored": plan.ignored,
        "conversions": plan.conversions,
        "errors": summarize_errors(outcomes),
        "dequantized": {p.leaf.path: p.form.dequantized for p in plan.leaves if p.form.dequantized},
        "pairs_of_different_tensor_scales": _count_differing_pairs(plan, entries),
        "companions": companions,
        **counts,
    }


def _count_differing_pairs(plan: Plan, entries: Mapping[str, LeafEntry]) -> int:
    """How many pairs of gate and up, or q_a and kv_a, have different tensor scales in the source."""
    sources = list_sources(entries.values())
    stored = {s.name: s for leaf in plan.leaves for s in leaf.sources if s.tensor_scale is not None}
    scales = {name: sources[s.tensor_scale.name].sha256 for name, s in stored.items() if s.tensor_scale is not None}
    return sum(scales[first.name] != scales[second.name] for first, second in find_pairs(stored.values()))


def _describe_source(plan: Plan) -> dict[str, Any]:
    kinds = {s.values.name: s.kind for leaf in plan.leaves for s in leaf.sources}
    return {
        "folder": plan.source.folder.name,
        "files": plan.basis["files"],
        "quantization_config": plan.source.config.get("quantization_config"),
        "stored": dict(sorted(collections.Counter(kinds.values()).items())),
        "recipe": plan.basis["recipe"],
        "ignored_config": plan.source.ignored_config,
        "ignored_tensors": plan.source.ignored_tensors,
        "plan": plan.digest,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("dsv32-jax", "numpy", "ml_dtypes", "orbax-checkpoint"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
