"""The end of a conversion: the manifest, which makes a folder a converted checkpoint."""

import collections
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from dsv32_jax.checkpoint.checksums import files
from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest

from ..plan.output import copy_companions
from ..plan.plan import Plan
from ..plan.prepare import Prepared
from ..transform.requantize import find_partners, sum_odd_scales, summarize_errors
from .journal import Journal


def complete(prepared: Prepared, journal: Journal) -> Manifest:
    """Write the manifest of everything that `journal` says is on disk."""
    planned, source, dst = prepared.plan, prepared.source, prepared.dst
    written = {path: entry for part in journal.leaves.values() for path, entry in part.items()}
    leaves = {leaf.leaf.path: written[leaf.leaf.path] for leaf in planned.leaves}
    counts: collections.Counter[str] = collections.Counter({"nan_scale_bytes": 0, "zero_blocks": 0})
    for part in (*journal.facts.values(), sum_odd_scales(journal.outcomes)):
        counts.update(part)
    companions = copy_companions(source.folder, dst)
    report = {
        "formats": planned.formats,
        "notes": list(planned.notes),
        "ignored": planned.ignored,
        "conversions": planned.conversions,
        "errors": summarize_errors(journal.outcomes),
        "dequantized": {p.leaf.path: p.form.dequantized for p in planned.leaves if p.form.dequantized},
        "pairs_of_different_tensor_scales": _apart(planned, written),
        "companions": companions,
        **counts,
    }
    storage = {"files": files(dst, companions), "mesh": prepared.mesh}
    manifest = Manifest(planned.config, leaves, _origin(prepared), report, _versions(), storage)
    manifest.write(dst)
    journal.file.unlink()
    return manifest


def _apart(planned: Plan, written: Mapping[str, LeafEntry]) -> int:
    """How many pairs of gate and up, or q_a and kv_a, have different tensor scales in the source."""
    noted = {t.name: t.sha256 for leaf in written.values() if leaf.passport for t in leaf.passport.sources}
    stored = {s.name: s for leaf in planned.leaves for s in leaf.sources if s.tensor_scale is not None}
    scales = {name: noted[s.tensor_scale.name] for name, s in stored.items() if s.tensor_scale is not None}
    pairs = {frozenset((name, s.name)) for name, others in find_partners(stored.values()).items() for s in others}
    return sum(len({scales[name] for name in pair}) > 1 for pair in pairs)


def _origin(prepared: Prepared) -> dict[str, Any]:
    """What the checkpoint was made from."""
    weights = {s.values.name: s.kind for leaf in prepared.plan.leaves for s in leaf.sources}
    return {
        "folder": prepared.source.folder.name,
        "files": prepared.basis["files"],
        "quantization_config": prepared.source.config.get("quantization_config"),
        "stored": dict(sorted(collections.Counter(weights.values()).items())),
        "recipe": prepared.basis["recipe"],
        "plan": prepared.digest,
    }


def _versions() -> dict[str, str]:
    """The versions of everything that had a hand in the bytes."""
    versions = {"python": platform.python_version()}
    for package in ("dsv32-jax", "numpy", "ml_dtypes", "orbax-checkpoint"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
