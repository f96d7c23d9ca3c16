"""The first layers of a large checkpoint as a small one: real weights for a laptop."""

import copy
import re

from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError

from .source import Source

LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


def first_layers(source: Source, text: str) -> Source:
    """`source` as if it had only the layers `text` ("0-3": the first four), and no MTP layer.

    They must begin with 0: a layer makes sense only on what those before it computed. Raises UsageError.
    """
    cfg = Config.from_dict(source.config, str(source.folder / "config.json"))
    match = re.fullmatch(r"0(?:-(\d{1,9}))?", str(text).strip())
    count = int(match[1] or 0) + 1 if match else 0
    if not 0 < count <= cfg.num_hidden_layers:
        raise UsageError(
            f"the layers {text!r} are not understood: write 0-N for the first N + 1 layers, "
            f"at most 0-{cfg.num_hidden_layers - 1} for {source.folder}. Nothing was written"
        )
    kept = {name: tensor for name, tensor in source.tensors.items() if _layer(name) < count}
    small = copy.copy(source)
    small.tensors = kept
    small.config = {
        **source.config,
        "num_hidden_layers": count,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": min(count, cfg.first_k_dense_replace),
    }
    left_out = f"{len(source.tensors) - len(kept)} tensors of the others and of the MTP layer are left out"
    small.notes = [*source.notes, f"the first {count} of {cfg.num_hidden_layers} layers: {left_out}"]
    return small


def _layer(name: str) -> int:
    """The layer that the tensor `name` belongs to, -1 for none."""
    match = LAYER.match(name)
    return int(match[1]) if match else -1
