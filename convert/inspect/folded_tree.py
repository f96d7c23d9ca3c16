"""A long list of weights in few lines: experts folded, and consecutive layers that hold the same."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Item(NamedTuple):
    """One weight, or one leaf: its layer and its name within (the number of its expert a star), what it is for, how it
    is stored, logical shape, bytes with all scales. `parameters` is 0 for what is no weight."""

    layer: int | None
    name: str
    kind: str
    format: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Row:
    """Weights of one layer, or of one group of layers, that differ in nothing but the number of their expert."""

    name: str
    format: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Branch:
    """A run of layers that hold the same rows (`layers` is None for what is outside of layers)."""

    layers: list[int] | None
    rows: list[Row]


def tree(items: Iterable[Item]) -> Iterator[Branch]:
    """Rows by layer; consecutive layers of the same rows are one branch, with the sums of all."""
    found: dict[int | None, dict[tuple, Row]] = {}
    for item in items:
        rows, key = found.setdefault(item.layer, {}), (item.name, item.format, item.shape)
        if key not in rows:
            rows[key] = Row(*key, 0, 0, 0)
        _add(rows[key], 1, item.parameters, item.nbytes)
    if outside := found.pop(None, None):
        yield Branch(None, list(outside.values()))
    numbers = sorted(layer for layer in found if layer is not None)
    for _, run in itertools.groupby(numbers, key=lambda layer: {key: row.count for key, row in found[layer].items()}):
        first, *more = run
        for layer in more:
            for key, row in found[layer].items():
                _add(found[first][key], row.count, row.parameters, row.nbytes)
        yield Branch([first, *more], list(found[first].values()))


def _add(row: Row, count: int, parameters: int, nbytes: int) -> None:
    row.count, row.parameters, row.nbytes = row.count + count, row.parameters + parameters, row.nbytes + nbytes


def split(name: str) -> tuple[int | None, str]:
    """The layer of a weight or leaf, and its name within."""
    inner = name.removeprefix("model.")
    if inner.startswith("layers."):
        _, number, *rest = inner.split(".", 2)
        if number.isdecimal() and len(number) < 10 and rest:
            return int(number), rest[0]
    return None, name


def folded(name: str) -> str:
    """`name` with the number of its expert replaced by a star."""
    before, experts, after = name.partition("mlp.experts.")
    number, dot, rest = after.partition(".")
    return f"{before}{experts}*{dot}{rest}" if experts and number.isdecimal() else name
