"""model.safetensors.index.json, which says what each shard holds, and often wrongly: a hint, compared with the headers.

NVIDIA's own NVFP4 checkpoints leave the scale tensors out of it.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv32_jax.errors import listing

NAME = "model.safetensors.index.json"


def weight_map(index: Any) -> tuple[dict[str, str], list[str]]:
    """The shard of each tensor, only plain names of files; and what is wrong with the others."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict):
        return {}, [f"{NAME} has no weight_map"]
    names = {name for name in found.values() if isinstance(name, str)}
    good = {name for name in names if name == os.path.basename(name) and name.isprintable() and "\\" not in name}
    good -= {"", ".", ".."}
    if len(good) == len(names) and set(map(type, found.values())) <= {str}:
        return found, []
    wrong = sorted({ascii(name) for name in found.values() if type(name) is not str or name not in good})
    problem = f"{NAME} names {len(wrong)} shards that are not files of this folder: {listing(wrong)}"
    return {tensor: name for tensor, name in found.items() if type(name) is str and name in good}, [problem]


class Comparison(NamedTuple):
    """What index and headers disagree about: `problems`, and tensors that the index does not list."""

    problems: list[str]
    unlisted: list[str]


def compare(listed: Mapping[str, str], tensors: Mapping[str, Any], folder: Path, read: Collection[Path]) -> Comparison:
    """`listed` is the weight_map, `tensors` are those of the headers, `read` the shards whose headers were read."""
    problems = []
    shards = sorted(set(listed.values()))
    for shard in (shard for shard in shards if not (folder / shard).exists()):
        lacking = [name for name, file in listed.items() if file == shard]
        problems.append(
            f"shard {shard} is missing; the index says it holds {len(lacking)} tensors: {listing(lacking, 4)}"
        )
    if listed.keys() == tensors.keys():
        return Comparison(problems, [])
    unread = {shard for shard in shards if folder / shard not in read}
    gone = [name for name, file in listed.items() if name not in tensors and file not in unread]
    if gone:
        problems.append(f"{len(gone)} tensors of the index are in no shard: {listing(gone)}")
    return Comparison(problems, [name for name in tensors if name not in listed])
