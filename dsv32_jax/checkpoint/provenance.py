"""The provenance of one weight: the tensors it was made of, and how it was made of them.

None of it is part of the manifest's digest: two ways to the same arrays give the same digest.
"""

import dataclasses
from typing import Any, NamedTuple, Self

from ..errors import CheckpointError
from ..layout import Cut


class SourceTensor(NamedTuple):
    """One tensor of the source: dtype as safetensors names it, SHA-256 of its bytes.

    `bits` are its bytes in hexadecimal where the stored arrays do not determine them. That is compressed-tensors'
    global scale, whose float32 inverse is stored: two floats can have the same inverse.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    bits: str = ""


@dataclasses.dataclass(frozen=True)
class Passport:
    """Where a weight came from. `change` says what was done to its values, empty where every bit was kept.

    `cut` is the part of its sources that it takes, None for all of it; `sources` are their tensors, expert by expert,
    none where the source left a copy out.
    """

    change: str
    cut: Cut | None
    sources: tuple[SourceTensor, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that `from_json` reads back."""
        sources = [[t.name, t.dtype, list(t.shape), t.sha256, *([t.bits] if t.bits else [])] for t in self.sources]
        cut = None if self.cut is None else list(self.cut)
        return {"change": self.change, "cut": cut, "sources": sources}

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Return the passport that `to_json` wrote. Raises CheckpointError that says what else it is."""
        if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list):
            raise CheckpointError("the passport of a weight is not an object with sources")
        if not isinstance(raw.get("change"), str):
            raise CheckpointError(f"change of a weight's passport is {raw.get('change')!r:.200}")
        cut = raw.get("cut", "missing")
        if cut is not None and not (_are_sizes(cut) and len(cut) == 4):
            raise CheckpointError(f"the cut of a weight's passport is {cut!r:.200}")
        sources = tuple(map(_parse_source, raw["sources"]))
        return cls(raw["change"], None if cut is None else Cut(*cut), sources)


def _parse_source(row: Any) -> SourceTensor:
    if isinstance(row, list) and len(row) in (4, 5) and _are_sizes(row[2]):
        name, dtype, shape, *texts = row
        if all(type(text) is str for text in (name, dtype, *texts)):
            return SourceTensor(name, dtype, tuple(shape), *texts)
    raise CheckpointError(f"the source {row!r:.200} of a weight's passport is not name, dtype, shape and SHA-256")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
