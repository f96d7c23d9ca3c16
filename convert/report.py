"""Results of the converter's commands as text for a person.

Tensor and file names come from the checkpoint, so every text passes `printable`: none of them can steer a terminal.
"""

import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsv32_jax.errors import pluralize, printable
from dsv32_jax.system.progress import format_count, format_duration, format_size
from dsv32_jax.system.wrapping import wrap_lines

from .name_folding import format_ranges

if TYPE_CHECKING:
    from .export.export import Exported
    from .inspect.folder_tree import Branch, Inspection, Row
    from .verify.verify import Report

BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""

ODD = ("nan_scale_bytes", "zero_blocks", "pairs_of_different_tensor_scales")
"""Counts that are worth a line unless they are 0."""

INDENT = 11
"""Characters of the titles of rows."""


def summarize_model(
    config: dict[str, Any], formats: dict[str, int], notes: Iterable[str], ignored: dict[str, int]
) -> dict[str, Any]:
    """Facts that a dry run and a finished conversion have in common."""
    layers = f"{config['num_hidden_layers']} + {config.get('num_nextn_predict_layers', 0)} MTP"
    return {"layers": layers, "formats": formats, "notes": list(notes), "ignored": ignored}


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a title and a text, which is broken where a terminal ends."""
    return wrap_lines("\n".join(f"{title:<{INDENT}}{printable(text)}" for title, text in rows), INDENT)


def format_conversion(facts: dict[str, Any], verbose: bool = False) -> str:
    """The outcome of a conversion or of a dry run, the summary last; `verbose`: every parameter of a dry run too."""
    if "would_write" not in facts:
        return _format_outcome(facts)
    rows = [("parameter", f"{path}: {text}") for path, text in facts["leaves"].items()] if verbose else []
    rows += _list_model(facts)
    speeds = [f"at {format_size(facts[name])}/s" if facts[name] else "" for name in ("read_speed", "write_speed")]
    saved = f"; {format_size(facts['saved'])} are there already" if facts["saved"] else ""
    needed, reserve, free = (format_size(facts[f"disk_{name}"]) for name in ("needed", "reserve", "free"))
    memory, limit, unused = (format_size(facts[name]) for name in ("peak_memory", "memory_limit", "memory_free"))
    files, workers = pluralize(facts["files"], "file"), pluralize(facts["workers"], "worker")
    time = "unknown: the output cannot be written"
    if facts["seconds"] is not None:
        spent = format_duration(facts["convert_seconds"])
        time = f"about {format_duration(facts['seconds'])}; converting takes {spent}, measured on a sample"
    rows += [
        ("source", f"{facts['source']}: {facts['layers']} layers, {format_count(facts['parameters'])} parameters"),
        ("read", f"{format_size(facts['would_read'])} in {files} {speeds[0]}"),
        ("write", f"{format_size(facts['would_write'])} to {facts['output']} {speeds[1]}{saved}"),
        ("disk", f"need {needed} ({reserve} reserve), {free} free"),
        ("memory", f"need {memory}, allowed {limit}, {unused} free; {workers}"),
        ("time", time),
    ]
    return format_rows(rows)


def _format_outcome(facts: dict[str, Any]) -> str:
    rows = _list_model(facts)
    rows += [("rel. error", f"{name} {100 * error:.2f} %") for name, error in facts["relative_rms_errors"].items()]
    rows += [("largest", f"{name} {100 * error:.2f} %") for name, error in facts["largest_errors"].items()]
    rows += [("odd", f"{facts[name]} {name.replace('_', ' ')}") for name in ODD if facts[name]]
    if not facts["tokenizer"]:
        rows.append(("note", "the source has no tokenizer.json: prompts are token ids"))
    state, end = "written", f" in {_format_time(facts['seconds'])}"
    if facts["already_complete"]:
        state, end = "complete", "; nothing was left to do"
    prompt = "'def area(r):'" if facts["tokenizer"] else "--ids 0,17,42"
    rows += [
        (state, f"{facts['output']}: {facts['layers']} layers, {format_size(facts['bytes'])}{end}"),
        ("digest", facts["digest"]),
        ("next", f"dsv32 generate {shlex.quote(facts['output'])} {prompt}"),
    ]
    return format_rows(rows)


def _format_time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def _list_model(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("note", text) for text in facts["notes"]]
    rows += [("ignored", f"{count} {reason}") for reason, count in facts["ignored"].items()]
    rows.append(("formats", ", ".join(f"{format} {count}" for format, count in facts["formats"].items())))
    rows += [("changes", f"{pluralize(count, 'weight')} {how}") for how, count in facts["conversions"].items()]
    return rows


def format_inspection(found: "Inspection") -> str:
    """The folder's tree, sizes by kind and format, totals and notes."""
    lines = [f"{found.folder} ({found.layout}): {found.title}", ""]
    rows = [row for branch in found.tree for row in branch.rows]
    widths = [max(map(len, column)) for column in zip(*map(_list_columns, rows), strict=True)]
    is_narrow = sys.stdout.isatty() and sum(widths) + 27 > shutil.get_terminal_size().columns
    for branch in found.tree:
        lines += _format_branch(branch, widths, is_narrow)
    lines += ["", f"{'kind':20}{'format':16}{'parameters':>12}{'bytes':>12}{'bits':>8}"]
    lines += [_format_size(*size) for size in found.sizes]
    lines.append(_format_size("total", "", found.parameters, found.nbytes))
    lines += [f"note: {note}" for note in found.notes]
    return wrap_lines(printable("\n".join(lines)), 4)


def _list_columns(row: "Row") -> tuple[str, str, str]:
    return row.name, (f"{row.count} x " if row.count > 1 else "") + str(list(row.shape)), row.format


def _format_branch(branch: "Branch", widths: list[int], is_narrow: bool) -> Iterator[str]:
    """The rows of a part of the tree; a narrow terminal has no room for the numbers of parameters."""
    if branch.layers is not None:
        yield f"layer{'s' if len(branch.layers) > 1 else ''} {format_ranges(branch.layers)}"
    indent = "" if branch.layers is None else "  "
    for row in branch.rows:
        (name, shape, format), (first, second, third) = _list_columns(row), widths
        count = "" if is_narrow else f"{format_count(row.parameters):>11}"
        yield f"{indent + name:{first + 2}}{shape:>{second + 1}}  {format:{third}}{count}{format_size(row.nbytes):>11}"


def _format_size(kind: str, format: str, parameters: int, nbytes: int) -> str:
    bits = f"{8 * nbytes / parameters:.2f}" if parameters else ""
    return f"{kind:20}{format:16}{format_count(parameters):>12}{format_size(nbytes):>12}{bits:>8}"


def format_tensors(rows: list[dict[str, Any]]) -> str:
    """One tensor a line."""
    name, shape = (max(len(str(row[key])) for row in rows) + 2 for key in ("name", "shape"))
    lines = [
        f"{row['name']:{name}}{row['dtype']:16}{row['shape']!s:{shape}}{format_size(row['bytes']):>12}  {row['place']}"
        for row in rows
    ]
    return wrap_lines(printable("\n".join(lines)), 4)


def format_statistics(row: dict[str, Any]) -> str:
    """The statistics of one weight, histograms as bars."""
    lines = [f"{row['name']}  {row['format']} {row['shape']}  amax {row['amax']:.6g}"]
    for key in ("zeros", "zero_blocks", "nan_scales", "not_finite"):
        if row[key]:
            lines.append(f"  {row[key]} {key.replace('_', ' ')}")
    for title, key in (("values", "codes"), ("scale exponents", "scale_exponents")):
        if row[key]:
            lines += [f"  {title}", *_format_bars(row[key])]
    return wrap_lines(printable("\n".join(lines)), 4)


def _format_bars(counts: dict[str, int]) -> Iterator[str]:
    total, most = sum(counts.values()), max(counts.values())
    for name, count in counts.items():
        yield f"    {name:>6} {100 * count / total:6.2f} % {'#' * round(BAR_WIDTH * count / most)}"


def format_verification(report: "Report") -> str:
    """A verification that found nothing wrong, the summary last."""
    rows = [("ignored", text) for text in report.ignored]
    rows += [("changed", f"{name}: {change}") for change, names in report.changed.items() for name in names]
    rows += [
        ("files", f"{report.files} have the recorded sizes, the small ones their SHA-256"),
        ("arrays", f"{report.arrays} have the recorded dtypes and shapes"),
    ]
    if report.level == "full":
        pace = f"{_format_time(report.seconds)}, {format_size(report.nbytes / max(report.seconds, 1e-9))}/s"
        verdict = f"{'' if report.lossless else 'not '}lossless: {pluralize(report.proven, 'source tensor')}"
        origin = report.against or "the checksums recorded at conversion"
        rows.append(("bytes", f"{format_size(report.nbytes)} match their SHA-256 ({pace})"))
        rows.append(("result", f"{verdict} reconstructed, equal to {origin}"))
    return format_rows([*rows, ("verified", f"{report.folder} ({report.level})")])


def format_export(exported: "Exported", dry_run: bool = False) -> str:
    """The outcome of an export or of a dry run, the summary last."""
    rows = [("note", note) for note in exported.notes]
    rows += [("changed", f"{name}: {why}") for why, names in exported.changed.items() for name in names]
    size = f"{exported.tensors} tensors, {format_size(exported.nbytes)}, {pluralize(exported.files, 'file')}"
    return format_rows([*rows, ("planned" if dry_run else "written", f"{exported.folder} ({exported.family}): {size}")])


def format_reshard(facts: dict[str, Any], dry_run: bool = False) -> str:
    """The outcome of a reshard or of a dry run."""
    state = "complete" if facts["already_complete"] else "planned" if dry_run else "written"
    return format_rows([(state, f"{facts['output']}: {format_size(facts['bytes'])}"), ("digest", facts["digest"])])
