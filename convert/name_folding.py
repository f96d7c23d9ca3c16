"""Many tensor names in few words: layers and experts folded."""

import itertools
from collections.abc import Iterable

from dsv32_jax.layout import fold_expert, split_layer


def fold_names(names: Iterable[str]) -> list[str]:
    """Return `names` with layers and experts folded: "58 x mlp.experts.*.up_proj.weight (layers 3-60)"."""
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
    """Return ascending numbers 3, 4, 5, 7 as "3-5, 7"."""
    by_offset = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in by_offset]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
