"""What `dsv32 inspect`, `verify` and `export` print. Names come from files: none reaches the terminal unescaped."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsv32_jax.errors import printable
from dsv32_jax.system.quantities import amount, size_text

from .names import ranges

if TYPE_CHECKING:
    from .export.export import Exported
    from .inspect.folded_tree import Branch
    from .inspect.inspection import Inspection
    from .verify.verify import Report

BAR = 40
"""Characters of the longest bar of a histogram."""


def inspection(found: "Inspection") -> str:
    """Tree, sizes by kind and format, total and notes."""
    lines = [f"{found.folder} ({found.layout}): {found.title}", ""]
    width = max((len(row.name) for branch in found.tree for row in branch.rows), default=0) + 2
    for branch in found.tree:
        lines += list(_branch(branch, width))
    lines += ["", f"{'kind':20}{'format':16}{'parameters':>12}{'bytes':>12}{'bits':>8}"]
    lines += [_size(*size) for size in found.sizes]
    lines.append(_size("total", "", found.parameters, found.nbytes))
    lines += [f"note: {note}" for note in found.notes]
    return printable("\n".join(lines))


def tensors(rows: list[dict[str, Any]]) -> str:
    """One tensor a line."""
    name, shape = (max(len(str(row[key])) for row in rows) + 2 for key in ("name", "shape"))
    lines = []
    for row in rows:
        what = f"{row['name']:{name}}{row['dtype']:16}{row['shape']!s:{shape}}"
        lines.append(f"{what}{size_text(row['bytes']):>12}  {row['place']}")
    return printable("\n".join(lines))


def statistics(row: dict[str, Any]) -> str:
    """The statistics of one weight, histograms as bars."""
    odd = [
        f"{row[key]} {key.replace('_', ' ')}"
        for key in ("zeros", "zero_blocks", "nan_scales", "not_finite")
        if row[key]
    ]
    lines = [f"{row['name']}  {row['format']} {row['shape']}  amax {row['amax']:.6g}", *(f"  {text}" for text in odd)]
    for title, key in (("values", "codes"), ("scale exponents", "scale_exponents")):
        if row[key]:
            lines += [f"  {title}", *_bars(row[key])]
    return printable("\n".join(lines))


def report(found: "Report") -> str:
    """The outcome of a verification that found nothing wrong."""
    lines = [
        f"verified: {found.folder} ({found.level})",
        f"files: {found.files} of the recorded sizes, the small ones unchanged",
        f"arrays: {found.arrays} of the recorded dtypes and shapes",
    ]
    if found.level == "full":
        speed = found.nbytes / max(found.seconds, 1e-9) / 1e9
        lines.append(
            f"bytes: {size_text(found.nbytes)} have the recorded SHA-256 ({found.seconds:.1f} s, {speed:.2f} GB/s)"
        )
        source = f"the bytes of {found.against}" if found.against else "what was noted when they were read"
        proof = "lossless: proven" if found.lossless else "lossless: no"
        lines.append(f"{proof} ({found.proven} tensors of the source, computed back, equal {source})")
    for what, names in found.changed.items():
        lines += [f"changed: {name}: {what}" for name in names]
    return printable("\n".join([*lines, *(f"ignored: {text}" for text in found.ignored)]))


def exported(found: "Exported") -> str:
    """What an export wrote."""
    what = f"{found.tensors} tensors, {size_text(found.nbytes)}, {found.files} files"
    lines = [f"written: {found.folder} ({found.family}): {what}"]
    for why, names in found.changed.items():
        lines += [f"changed: {name}: {why}" for name in names]
    return printable("\n".join([*lines, *(f"note: {note}" for note in found.notes)]))


def _branch(branch: "Branch", width: int) -> Iterator[str]:
    indent = ""
    if branch.layers is not None:
        yield f"layers {ranges(branch.layers)}" if len(branch.layers) > 1 else f"layer {branch.layers[0]}"
        indent = "  "
    for row in branch.rows:
        count = f"{row.count} x " if row.count > 1 else ""
        name, shape = indent + row.name, f"{count}{list(row.shape)}"
        size = f"{amount(row.parameters):>10}{size_text(row.nbytes):>12}"
        yield f"{name:{width + 2}}{shape:>26}  {row.format:12}{size}"


def _size(kind: str, format: str, parameters: int, nbytes: int) -> str:
    bits = f"{8 * nbytes / parameters:.2f}" if parameters else ""
    return f"{kind:20}{format:16}{amount(parameters):>12}{size_text(nbytes):>12}{bits:>8}"


def _bars(counts: dict[str, int]) -> Iterator[str]:
    total, most = sum(counts.values()), max(counts.values())
    for name, count in counts.items():
        yield f"    {name:>6} {100 * count / total:6.2f} % {'#' * round(BAR * count / most)}"
