"""What the manifest tells about one leaf beyond its bytes: the tensors it was made of, how, and what is in it.

None of it is part of the manifest's digest: two ways to the same arrays give the same digest.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..layout import Cut


class SourceTensor(NamedTuple):
    """One tensor of the source: dtype as safetensors names it, SHA-256 of its bytes.

    `bits`: its bytes in hexadecimal where the stored arrays do not determine them. That is compressed-tensors' global
    scale, whose float32 inverse is stored: two floats can have the same inverse.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    bits: str = ""


@dataclasses.dataclass(frozen=True)
class Passport:
    """One leaf. `amax`: its largest magnitude, dequantized. Of its NVFP4 block scales, how many are NaN or zero.

    `change`: what was done to its values, empty where every bit was kept. `cut`: the part of the sources that the leaf
    takes, None for all of it. `sources`: their tensors, expert by expert; empty where the source left a copy out.
    """

    amax: float
    nan_scales: int
    zero_blocks: int
    change: str
    cut: Cut | None
    sources: tuple[SourceTensor, ...]


def to_json(passport: Passport) -> dict[str, Any]:
    """`passport` as JSON; `from_json` reads it back."""
    sources = [[t.name, t.dtype, list(t.shape), t.sha256, *([t.bits] if t.bits else [])] for t in passport.sources]
    cut = None if passport.cut is None else list(passport.cut)
    return {**_facts(passport), "cut": cut, "sources": sources}


def from_json(raw: dict[str, Any]) -> Passport:
    """The Passport that `to_json` wrote, once `problem` found none."""
    sources = tuple(SourceTensor(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in raw["sources"])
    cut = None if raw["cut"] is None else Cut(*raw["cut"])
    return Passport(raw["amax"], raw["nan_scales"], raw["zero_blocks"], raw["change"], cut, sources)


def problem(raw: Any) -> str | None:
    """What keeps `raw` from being a Passport's JSON."""
    if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list):
        return "the passport is not an object with sources"
    types = {"amax": (int, float), "nan_scales": int, "zero_blocks": int, "change": str}
    if wrong := [key for key, kind in types.items() if not isinstance(raw.get(key), kind)]:
        return f"the passport's {wrong[0]} is {raw.get(wrong[0])!r}"
    if "cut" not in raw or not (raw["cut"] is None or _integers(raw["cut"], 4)):
        return f"the passport's cut is {raw.get('cut')!r}"
    bad = next((row for row in raw["sources"] if not _is_source(row)), None)
    return None if bad is None else f"the passport's source {bad!r} is not name, dtype, shape and sha256"


def _facts(passport: Passport) -> dict[str, Any]:
    return {key: getattr(passport, key) for key in ("amax", "nan_scales", "zero_blocks", "change")}


def _is_source(row: Any) -> bool:
    if not isinstance(row, list) or len(row) not in (4, 5):
        return False
    name, dtype, shape, *texts = row
    return isinstance(name, str) and isinstance(dtype, str) and _integers(shape) and all(type(t) is str for t in texts)


def _integers(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, Sequence) or (count is not None and len(values) != count):
        return False
    return all(type(value) is int and value >= 0 for value in values)
