"""The scope of a conversion: the config as the model will have it, the layers, and the tensors that are left out."""

import copy
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsv32_jax.checkpoint.companions import GENERATION, compare_settings, read_end_tokens
from dsv32_jax.config import Config, interpret
from dsv32_jax.config.keys import LAYERS
from dsv32_jax.errors import UsageError, argument, listing, pluralize
from dsv32_jax.layout import split_layer

from ..read.source import CONFIG, Source

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


def interpret_source(source: Source, keys: Any, patterns: Any) -> Source:
    """Return `source` with its config in the usual spelling and without the `keys` to ignore, with the end tokens of
    generation_config.json too, and with the `patterns` of tensors to ignore. Keys and patterns: a string, several, or
    None. Raises ConfigError, CheckpointError, UsageError."""
    name, config = str(source.folder / CONFIG), dict(source.config)
    own = config.get("eos_token_id")
    known = own if isinstance(own, list) else [] if own is None else [own]
    more = [token for token in dict.fromkeys(read_end_tokens(source.folder)) if token not in known]
    if more:
        config["eos_token_id"] = [*known, *more]
        name += f" with the end tokens of {GENERATION}"
    interpreted = copy.copy(source)
    interpreted.ignored_tensors = _list_names(patterns)
    cfg, interpreted.config, notes, interpreted.ignored_config = interpret(config, name, _list_names(keys))
    notes += [f"config.json: ignored {key} as requested" for key in interpreted.ignored_config]
    notes += [f"{GENERATION}: end tokens in addition to those of config.json: {listing(more)}"] if more else []
    interpreted.notes = [*source.notes, *notes, *compare_settings(source.folder, cfg)]
    return interpreted


def _list_names(given: Any) -> list[str]:
    names: list[Any] = [given] if isinstance(given, str) else list(given or ())
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise UsageError(f"a key or pattern to ignore must be text, not {wrong[0]!r:.60}. Nothing was read")
    return names


def select_first_layers(source: Source, layers: str) -> Source:
    """Return `source` as a smaller model: only the first `layers` ("0-3": the first four) and no MTP layer.

    The layers must begin with 0, since each computes on the output of those before it. Raises UsageError.
    """
    cfg = interpret(source.config, str(source.folder / CONFIG)).config
    match, given = re.fullmatch(r"0(?:-(\d{1,9}))?", str(layers).strip()), argument("layers", layers)
    if match is None:
        raise UsageError(f"invalid {given}: write 0-N for the first N + 1 layers. Nothing was written")
    count = int(match[1] or 0) + 1
    if count > cfg.num_hidden_layers:
        raise UsageError(f"{given} is out of range; layers are 0-{cfg.num_hidden_layers - 1}. Nothing was written")
    small = copy.copy(source)
    layer_of = {name: split_layer(name)[0] for name in source.tensors}
    small.tensors = {name: tensor for name, tensor in source.tensors.items() if (layer_of[name] or 0) < count}
    small.config = {
        **{key: value for key, value in source.config.items() if key not in LAYERS},
        "num_hidden_layers": count,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": min(count, cfg.first_k_dense_replace),
    }
    left_out = pluralize(len(source.tensors) - len(small.tensors), "tensor")
    small.notes = [
        *source.notes,
        f"converted only the first {count} of {cfg.num_hidden_layers} layers, without MTP: {left_out} left out",
    ]
    return small


class UnneededTensors:
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
