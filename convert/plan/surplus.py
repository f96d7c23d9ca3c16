"""Tensors of a checkpoint that the model does not need."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError, argument, listing

from ..names import split_layer

SCALE = r"(scales?|scale_inv|scaling_factor|zero_point|amax)"

NOT_NEEDED = (
    (rf".*\.(input|input_global|activation)_{SCALE}", "activation scales: activations are not quantized"),
    (r".*\.input_quantizer\..*", "activation scales: activations are not quantized"),
    (
        rf".*\.self_attn\.(.*\.)?([qkv]|kv|qkv|key|value|prob|output)_((kv_)?cache_)?{SCALE}"
        rf"|.*\.([kv]|kv|key|value)_cache[._](.*[._])?{SCALE}|.*_bmm_quantizer\..*",
        "scales of another implementation's key-value cache",
    ),
    (r"(.*\.)?rotary_emb\.[a-z_]*|(.*\.)?(freqs_cis|inv_freq)", "computed from the configuration"),
    (r"mtp\..*", "an MTP layer under names that are not read"),
)
"""Tensors that a checkpoint may have and the model does not need: pattern, reason."""

UNANNOUNCED = "an MTP layer that config.json does not announce (num_nextn_predict_layers)"


class Surplus:
    """Tells why tensors are not needed: by NOT_NEEDED, or because the user's `patterns` leave them out."""

    def __init__(self, cfg: Config, names: Iterable[str], patterns: Sequence[str]):
        announced = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
        mtp = {split_layer(name)[0] for name in names if ".eh_proj.weight" in name}
        self._mtp_layers = {layer for layer in mtp if layer is not None and layer >= announced}
        self._patterns, self._unused = tuple(patterns), dict.fromkeys(patterns)

    def explain(self, name: str) -> str | None:
        """Return why the tensor `name`, which no parameter is made of, is not needed; None if that is not known."""
        if split_layer(name)[0] in self._mtp_layers:
            return UNANNOUNCED
        for pattern in self._patterns:
            if fnmatch.fnmatchcase(name, pattern):
                self._unused.pop(pattern, None)
                return f"left out by {argument('ignore_tensors', pattern)}"
        return next((reason for pattern, reason in NOT_NEEDED if re.fullmatch(pattern, name)), None)

    def require_effect(self) -> None:
        """Raise UsageError if a pattern of the user left nothing out."""
        if self._unused:
            raise UsageError(
                f"{argument('ignore_tensors')}: no tensor that the model could do without matches "
                f"{listing(map(repr, self._unused))}. Nothing was written"
            )
