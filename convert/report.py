"""Results of the converter's commands as text for a person.

Tensor and file names come from the checkpoint, so every text passes `printable`: none of them can steer a terminal.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsv32_jax.errors import printable
from dsv32_jax.system.progress import format_count, format_duration, format_size

from .name_folding import format_ranges

if TYPE_CHECKING:
    from .export.export import Exported
    from .inspect.folder_tree import Branch, Inspection
    from .verify.verify import Report

SIZES = frozenset("would_read would_write peak_memory memory_limit memory_free disk_free largest_leaf".split())
SPEEDS = frozenset(("read_speed", "write_speed"))
LABELS = {"complete_already": "already complete; nothing to do", "disk_seconds": "estimated disk time"}
"""Titles of facts whose key in the JSON output does not read well."""

BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""


def summarize_model(config: dict[str, Any], formats: dict[str, int], notes: list[str], ignored: dict[str, int]) -> dict:
    """Facts that a dry run and a finished conversion have in common."""
    layers = f"{config['num_hidden_layers']} + {config.get('num_nextn_predict_layers', 0)} MTP"
    return {"layers": layers, "formats": formats, "notes": notes, "ignored": ignored}


def format_facts(facts: dict[str, Any]) -> str:
    """`facts` one a line, tables and lists indented or repeated."""
    lines = []
    for key, value in facts.items():
        label = LABELS.get(key, key.replace("_", " "))
        if isinstance(value, dict):
            lines += [f"{label}:"] if value else []
            lines += [f"  {item}: {f'{100 * x:.2f} %' if isinstance(x, float) else x}" for item, x in value.items()]
        elif isinstance(value, list):
            lines += [f"{label[:-1]}: {item}" for item in value]
        else:
            lines.append(f"{label}: {_format_fact(key, value)}")
    return printable("\n".join(lines))


def _format_fact(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if key in SIZES:
        return format_size(value)
    if key in SPEEDS:
        return f"{format_size(value)}/s"
    return format_duration(value) if key.endswith("seconds") else str(value)


def format_inspection(found: "Inspection") -> str:
    """The folder's tree, sizes by kind and format, totals and notes."""
    lines = [f"{found.folder} ({found.layout}): {found.title}", ""]
    width = max((len(row.name) for branch in found.tree for row in branch.rows), default=0) + 2
    for branch in found.tree:
        lines += _format_branch(branch, width)
    lines += ["", f"{'kind':20}{'format':16}{'parameters':>12}{'bytes':>12}{'bits':>8}"]
    lines += [_format_size(*size) for size in found.sizes]
    lines.append(_format_size("total", "", found.parameters, found.nbytes))
    lines += [f"note: {note}" for note in found.notes]
    return printable("\n".join(lines))


def _format_branch(branch: "Branch", width: int) -> Iterator[str]:
    indent = ""
    if branch.layers is not None:
        yield f"layers {format_ranges(branch.layers)}" if len(branch.layers) > 1 else f"layer {branch.layers[0]}"
        indent = "  "
    for row in branch.rows:
        count = f"{row.count} x " if row.count > 1 else ""
        name, shape = indent + row.name, f"{count}{list(row.shape)}"
        size = f"{format_count(row.parameters):>10}{format_size(row.nbytes):>12}"
        yield f"{name:{width + 2}}{shape:>26}  {row.format:12}{size}"


def _format_size(kind: str, format: str, parameters: int, nbytes: int) -> str:
    bits = f"{8 * nbytes / parameters:.2f}" if parameters else ""
    return f"{kind:20}{format:16}{format_count(parameters):>12}{format_size(nbytes):>12}{bits:>8}"


def format_tensors(rows: list[dict[str, Any]]) -> str:
    """One tensor a line."""
    name, shape = (max(len(str(row[key])) for row in rows) + 2 for key in ("name", "shape"))
    lines = []
    for row in rows:
        columns = f"{row['name']:{name}}{row['dtype']:16}{row['shape']!s:{shape}}"
        lines.append(f"{columns}{format_size(row['bytes']):>12}  {row['place']}")
    return printable("\n".join(lines))


def format_statistics(row: dict[str, Any]) -> str:
    """The statistics of one weight, histograms as bars."""
    lines = [f"{row['name']}  {row['format']} {row['shape']}  amax {row['amax']:.6g}"]
    for key in ("zeros", "zero_blocks", "nan_scales", "not_finite"):
        if row[key]:
            lines.append(f"  {row[key]} {key.replace('_', ' ')}")
    for title, key in (("values", "codes"), ("scale exponents", "scale_exponents")):
        if row[key]:
            lines += [f"  {title}", *_format_bars(row[key])]
    return printable("\n".join(lines))


def _format_bars(counts: dict[str, int]) -> Iterator[str]:
    total, most = sum(counts.values()), max(counts.values())
    for name, count in counts.items():
        yield f"    {name:>6} {100 * count / total:6.2f} % {'#' * round(BAR_WIDTH * count / most)}"


def format_verification(report: "Report") -> str:
    """A verification that found nothing wrong."""
    lines = [
        f"verified: {report.folder} ({report.level})",
        f"files: {report.files} of the recorded sizes, the small ones unchanged",
        f"arrays: {report.arrays} of the recorded dtypes and shapes",
    ]
    if report.level == "full":
        speed = report.nbytes / max(report.seconds, 1e-9) / 1e9
        pace = f"{report.seconds:.1f} s, {speed:.2f} GB/s"
        lines.append(f"bytes: {format_size(report.nbytes)} match their SHA-256 ({pace})")
        origin = report.against if report.against else "the checksums recorded at conversion"
        verdict = "lossless: proven" if report.lossless else "not lossless"
        lines.append(f"{verdict} ({report.proven} source tensors were reconstructed and match {origin})")
    for change, names in report.changed.items():
        lines += [f"changed: {name}: {change}" for name in names]
    return printable("\n".join([*lines, *(f"ignored: {text}" for text in report.ignored)]))


def format_export(exported: "Exported") -> str:
    """The outcome of an export."""
    size = f"{exported.tensors} tensors, {format_size(exported.nbytes)}, {exported.files} files"
    lines = [f"written: {exported.folder} ({exported.family}): {size}"]
    for why, names in exported.changed.items():
        lines += [f"changed: {name}: {why}" for name in names]
    return printable("\n".join([*lines, *(f"note: {note}" for note in exported.notes)]))
