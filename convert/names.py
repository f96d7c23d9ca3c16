"""Many tensor names in few words."""

import re
from collections.abc import Iterable

LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
LEAF = re.compile(r"layers\.(\d{1,9})\.")
BYTES = re.compile(r"\[\d+, \d+\)")


def kind(name: str) -> str:
    """`name` without its layer and the number of its expert."""
    return re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.*.", LAYER.sub("", name))


def grouped(names: Iterable[str]) -> list[str]:
    """`names` with layers and experts folded: "58 x mlp.experts.*.up_proj.weight (layers 3-60)"."""
    return with_detail((name, "") for name in names)


def with_detail(items: Iterable[tuple[str, str]]) -> list[str]:
    """The same for names that each have something to tell: "...: detail"."""
    folded: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name, detail in items:
        match = LAYER.match(name)
        folded.setdefault((kind(name), detail), []).append((name, int(match[1]) if match else None))
    lines = []
    for (pattern, detail), found in folded.items():
        layers = sorted({layer for _, layer in found if layer is not None})
        where = f" (layers {ranges(layers)})" if layers else ""
        text = found[0][0] if len(found) == 1 else f"{len(found)} x {pattern}{where}"
        lines.append(f"{text}: {detail}" if detail else text)
    return lines


def folded(lines: Iterable[str]) -> list[str]:
    """`lines` that begin with a leaf, each once for all layers that it is said of: "58 x layers.*.norm_D is missing
    (layers 3-60)"."""
    found: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        match = LEAF.match(line)
        pattern = BYTES.sub("[...)", f"layers.*.{line[match.end() :]}" if match else line)
        found.setdefault(pattern, []).append((line, int(match[1]) if match else -1))
    return [
        same[0][0] if len(same) == 1 else f"{len(same)} x {pattern} (layers {ranges(sorted({n for _, n in same}))})"
        for pattern, same in found.items()
    ]


def ranges(numbers: list[int]) -> str:
    """3, 4, 5, 7 as "3-5, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
