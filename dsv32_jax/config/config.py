"""The hyperparameters of a model, under the names of the checkpoint's config.json.

Every key of a config.json is a field of `Config` or is accounted for in keys. Any other key is an error, because
it may change the model; an error lists every problem of the file.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, StorageError, listing, pluralize
from ..system.files import read_json
from ..system.summary import Summarized
from . import keys
from .keys import ASSUMED, REQUIRED

LARGEST = 16 << 20
"""Size limit of a config.json in bytes. The real model's has 2 kB."""

MAX_LAYERS, MAX_EXPERTS = 1_000, 500_000
"""Every weight has a name: with far more of them than any model has, listing them would exhaust time and memory."""

INT_MAX = 2**31 - 1
SMALLEST = 2.0**-126
"""The smallest normal number in float32: processors take smaller ones for zero."""

MAY_BE_ZERO = {"bos_token_id", "first_k_dense_replace", "num_nextn_predict_layers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071) as DeepSeek applies it: at every length, also of short prompts."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


FIXED_IN_YARN = {"attention_factor": 1, "truncate": True, "partial_rotary_factor": 1, "apply_yarn_scaling": True}
"""Keys with the only value that is supported, which follows from the others or is the default."""

YARN_KEYS = {"type", *FIXED_IN_YARN, *(field.name for field in dataclasses.fields(Yarn))}
"""The keys that a normalized `rope_scaling` may have."""

YARN_PATHS = {f"rope_scaling.{key}" for key in YARN_KEYS - FIXED_IN_YARN.keys()}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Config(Summarized):
    """A DeepSeek-V3.2 model. The fields have the names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Yarn | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: tuple[int, ...]

    @property
    def dims(self) -> dict[str, int]:
        """The size that each letter stands for at the end of an array's name. A call chooses B, T and S."""
        return {
            "L": self.num_hidden_layers, "D": self.hidden_size, "A": self.hidden_size, "V": self.vocab_size,
            "H": self.num_attention_heads, "K": self.index_topk, "Q": self.q_lora_rank, "C": self.kv_lora_rank,
            "N": self.qk_nope_head_dim, "R": self.qk_rope_head_dim, "P": self.v_head_dim,
            "I": self.index_n_heads, "J": self.index_head_dim,
            "F": self.intermediate_size, "M": self.moe_intermediate_size,
            "E": self.n_routed_experts, "X": self.num_experts_per_tok, "G": self.n_group, "W": self.topk_group,
        }  # fmt: skip

    @classmethod
    def from_json(cls, path: str | Path) -> "Config":
        """Read a config.json. Raises ConfigError, StorageError."""
        try:
            raw = read_json(Path(path), LARGEST)
        except PermissionError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a config.json: {error}") from error
        return cls.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: Mapping[str, Any], name: str = "config") -> "Config":
        """Return the Config of a parsed config.json, which errors call `name`. Raises ConfigError."""
        return interpret(raw, name).config

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json object that reads back as this Config."""
        values = dataclasses.asdict(self)
        ends = list(self.eos_token_id)
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = {"type": "yarn", **values["rope_scaling"]}
        return {"architectures": ["DeepseekV32ForCausalLM"], **REQUIRED, **values}

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the number of layers, and the sizes of their parts."""
        dense, yarn = self.first_k_dense_replace, self.rope_scaling
        drafting = " and the MTP head" if self.num_nextn_predict_layers else ""
        scaling = f", YaRN {yarn.factor:g} x {yarn.original_max_position_embeddings}" if yarn else ""
        title = f"DeepSeek-V3.2 config: {self.num_hidden_layers} layers ({dense} dense, "
        return f"{title}{self.num_hidden_layers - dense} MoE){drafting}", {
            "hidden size": f"{self.hidden_size}, vocabulary {self.vocab_size}",
            "context": f"{self.max_position_embeddings}, rope theta {self.rope_theta:g}{scaling}",
            "attention": f"{self.num_attention_heads} heads of {self.qk_nope_head_dim} + {self.qk_rope_head_dim}, "
            f"values {self.v_head_dim}, latents {self.q_lora_rank} (query) and {self.kv_lora_rank} (key-value)",
            "indexer": f"{self.index_n_heads} heads of {self.index_head_dim}, top {self.index_topk}",
            "experts": f"{self.n_routed_experts} of width {self.moe_intermediate_size} in {self.n_group} groups, "
            f"{self.num_experts_per_tok} from {self.topk_group} groups a token; dense width {self.intermediate_size}",
        }


class Interpreted(NamedTuple):
    """A config.json as it was understood: the Config; the object in the usual spelling, without what was dropped; a
    note for each key that was dropped; the keys, with their values, that the user ignored."""

    config: Config
    raw: dict[str, Any]
    notes: list[str]
    ignored: dict[str, Any]


def interpret(raw: Any, name: str = "config", ignored: Collection[str] = ()) -> Interpreted:
    """Return what a parsed config.json means, without the keys that the user `ignored`. Errors call it `name`.

    Raises ConfigError that lists every problem, UsageError for a key that cannot be ignored.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{name} must be a JSON object, not a {type(raw).__name__}")
    if wrong := [key for key in raw if not isinstance(key, str)]:
        raise ConfigError(
            f"{name} has {pluralize(len(wrong), 'key')} that must be strings: {listing(map(repr, wrong))}"
        )
    problems: list[str] = []
    fields = {field.name: field for field in dataclasses.fields(Config)}
    known = {*fields, *REQUIRED, *keys.REPEATED}
    raw, dropped = keys.drop_ignored(dict(raw), ignored, {*fields, *REQUIRED, *YARN_PATHS})
    raw = keys.normalize_rope(keys.rename(raw, problems), problems)
    notes = [*keys.drop_neutral(raw, known, "", problems)]
    if isinstance(raw.get("rope_scaling"), dict):
        notes += keys.drop_neutral(raw["rope_scaling"], YARN_KEYS, "rope_scaling.", problems)
    stated = {key: value for key, value in raw.items() if value is not None or key in REQUIRED or key not in ASSUMED}
    config = _parse({**ASSUMED, **stated}, fields, problems)
    if config is not None:
        problems += [*_find_contradictions(config), *keys.find_disagreements(raw, config)]
    if config is None or problems:
        raise ConfigError(
            f"{name} does not describe a supported model; nothing else was read.\n  " + "\n  ".join(problems)
        )
    return Interpreted(config, raw, sorted(notes), dropped)


def _parse(raw: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], problems: list[str]) -> Config | None:
    """Return the Config with the values of `raw`, or None after adding to `problems`."""
    if missing := sorted({*fields, "model_type", "scoring_func"} - set(raw)):
        problems.append(f"missing keys ({len(missing)}): {listing(missing, 40)}")
    for key in sorted(set(raw) & set(REQUIRED)):
        if raw[key] != REQUIRED[key] or isinstance(raw[key], bool) != isinstance(REQUIRED[key], bool):
            problems.append(f"{key} is {raw[key]!r}, but only {REQUIRED[key]!r} is supported")
    values = {key: _parse_field(field, raw[key], problems) for key, field in fields.items() if key in raw}
    return None if problems else Config(**values)


def _parse_field(field: dataclasses.Field, value: Any, problems: list[str]) -> Any:
    if field.name == "rope_scaling":
        return None if value is None else _parse_yarn(value, problems)
    if field.name != "eos_token_id":
        return _parse_number(field.name, field.type, value, 0 if field.name in MAY_BE_ZERO else 1, problems)
    ids = value if isinstance(value, list | tuple) else [value]
    if ids and all(type(token) is int and 0 <= token <= INT_MAX for token in ids):
        return tuple(ids)
    problems.append(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return None


def _parse_yarn(raw: Any, problems: list[str]) -> Yarn | None:
    """Return the Yarn of a normalized `rope_scaling` object, or None after adding to `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"rope_scaling must be an object or null, not {raw!r}")
        return None
    raw = dict(raw)
    if (kind := raw.pop("type", "default")) != "yarn":
        others = listing(map(str, raw)) or "no other keys"
        problems.append(f"rope_scaling has the type {kind!r} (with {others}); only yarn is supported")
        return None
    found = [
        f"rope_scaling.{key} is {raw[key]!r}, but only {value!r} is supported"
        for key, value in FIXED_IN_YARN.items()
        if raw.get(key, value) != value
    ]
    fields = {field.name: field for field in dataclasses.fields(Yarn)}
    if missing := sorted(set(fields) - set(raw)):
        found.append(f"missing keys in rope_scaling ({len(missing)}): {listing(missing)}")
    values = {key: _parse_number(key, field.type, raw[key], 1, found) for key, field in fields.items() if key in raw}
    if not found and values["mscale"] != values["mscale_all_dim"]:
        found.append(
            f"rope_scaling.mscale ({values['mscale']}) and mscale_all_dim ({values['mscale_all_dim']}) differ; "
            "reference implementations disagree on what that means"
        )
    problems += found
    return None if found else Yarn(**values)


def _parse_number(name: str, kind: Any, value: Any, smallest: int, problems: list[str]) -> Any:
    """Return `value` as an int of at least `smallest` if `kind` is int, else as a positive float; or None after adding
    to `problems`."""
    if kind in (int, "int"):
        if type(value) is int and smallest <= value <= INT_MAX:
            return value
        problems.append(f"{name} must be an integer from {smallest} to {INT_MAX}, not {value!r}")
    elif type(value) in (int, float) and SMALLEST <= value <= INT_MAX:
        return float(value)
    else:
        problems.append(f"{name} must be a positive number that is not zero in float32, not {value!r}")
    return None


def _find_contradictions(cfg: Config) -> list[str]:
    """Return the problems that no field has on its own."""
    per_group = cfg.n_routed_experts // cfg.n_group
    experts = cfg.num_hidden_layers * cfg.n_routed_experts
    eligible = cfg.topk_group * per_group
    rules = [
        (experts <= MAX_EXPERTS, f"{experts} experts in all layers exceed the limit of {MAX_EXPERTS}"),
        (cfg.num_hidden_layers <= MAX_LAYERS, f"num_hidden_layers exceeds the limit of {MAX_LAYERS}"),
        (cfg.n_routed_experts % cfg.n_group == 0, "n_routed_experts must be a multiple of n_group"),
        (per_group >= 2, "a group needs at least 2 experts, because its score is the sum of its two best"),
        (cfg.topk_group <= cfg.n_group, "topk_group exceeds n_group"),
        (cfg.num_experts_per_tok <= eligible, "num_experts_per_tok exceeds the experts of topk_group groups"),
        (cfg.first_k_dense_replace <= cfg.num_hidden_layers, "first_k_dense_replace exceeds num_hidden_layers"),
        (cfg.num_nextn_predict_layers <= 1, "num_nextn_predict_layers must be 0 or 1"),
        (cfg.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even"),
        (cfg.qk_rope_head_dim <= cfg.index_head_dim, "qk_rope_head_dim exceeds index_head_dim"),
        (cfg.index_head_dim.bit_count() == 1, "index_head_dim must be a power of two for the Hadamard transform"),
        (cfg.bos_token_id < cfg.vocab_size, "bos_token_id is outside the vocabulary"),
        (max(cfg.eos_token_id) < cfg.vocab_size, "eos_token_id is outside the vocabulary"),
    ]
    return [text for holds, text in rules if not holds]
