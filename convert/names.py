"""Many tensor names in few words: layers and experts folded."""

import re
from collections.abc import Iterable

LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def split_layer(name: str) -> tuple[int | None, str]:
    """The layer of a tensor or parameter (None outside the layers), and its name within the layer."""
    match = LAYER.match(name)
    return (int(match[1]), name[match.end() :]) if match else (None, name)


def fold_expert(name: str) -> str:
    """`name` with a star in place of the expert's number."""
    return EXPERT.sub(r"\1experts.*.", name)


def fold_names(names: Iterable[str]) -> list[str]:
    """`names` with layers and experts folded: "58 x mlp.experts.*.up_proj.weight (layers 3-60)"."""
    return fold_details((name, "") for name in names)


def fold_details(items: Iterable[tuple[str, str]]) -> list[str]:
    """Fold pairs of name and detail in the same way: "58 x mlp.experts.*.up_proj.weight (layers 3-60): detail"."""
    groups: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name, detail in items:
        layer, rest = split_layer(name)
        groups.setdefault((fold_expert(rest), detail), []).append((name, layer))
    lines = []
    for (pattern, detail), found in groups.items():
        layers = sorted({layer for _, layer in found if layer is not None})
        where = f" (layers {format_ranges(layers)})" if layers else ""
        text = found[0][0] if len(found) == 1 else f"{len(found)} x {pattern}{where}"
        lines.append(f"{text}: {detail}" if detail else text)
    return lines


def format_ranges(numbers: list[int]) -> str:
    """Ascending numbers 3, 4, 5, 7 as "3-5, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
