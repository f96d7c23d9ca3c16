"""What the model is: hyperparameters under the checkpoint's own names, read strictly.

Every key of a config.json is a field of `Config`, a required value, or ignored for a reason that stands
here. Anything else is an error that names all offenders: a key this code does not know may change the model.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .errors import ConfigError, listing
from .system.files import parse_json

LARGEST = 2**31 - 1

REQUIRED = {
    "model_type": "deepseek_v32",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_interleave": True,
    "indexer_rope_interleave": False,
}

IGNORED = {
    "architectures": "the class name of another implementation",
    "attention_dropout": "training only",
    "auto_map": "names code, and no code of a checkpoint is run",
    "aux_loss_alpha": "training only",
    "dtype": "every tensor carries its own dtype",
    "ep_size": "how another implementation was launched",
    "head_dim": "repeats qk_rope_head_dim",
    "initializer_range": "training only",
    "num_key_value_heads": "nominal: all heads share one latent",
    "pad_token_id": "rows are ragged, never padded with a token",
    "pretraining_tp": "training only",
    "qk_head_dim": "the sum of qk_nope_head_dim and qk_rope_head_dim",
    "quantization_config": "formats are read from the tensors themselves",
    "seq_aux": "training only",
    "torch_dtype": "every tensor carries its own dtype",
    "transformers_version": "the tool that wrote the file",
    "use_cache": "the caller decides",
    "_name_or_path": "where another tool found the model",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071) as DeepSeek applies it, at every length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A DeepSeek-V3.2 model: field names are those of the checkpoint's config.json."""

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
        """The glossary: one letter, one size, everywhere (B, T and S are bound by the call)."""
        return {
            "L": self.num_hidden_layers, "D": self.hidden_size, "A": self.hidden_size, "V": self.vocab_size,
            "H": self.num_attention_heads, "K": self.index_topk, "Q": self.q_lora_rank, "C": self.kv_lora_rank,
            "N": self.qk_nope_head_dim, "R": self.qk_rope_head_dim, "P": self.v_head_dim,
            "I": self.index_n_heads, "J": self.index_head_dim,
            "F": self.intermediate_size, "M": self.moe_intermediate_size,
            "E": self.n_routed_experts, "X": self.num_experts_per_tok, "G": self.n_group, "W": self.topk_group,
        }  # fmt: skip

    @property
    def softmax_scale(self) -> float:
        """(N + R)^-1/2, times YaRN's mscale squared where YaRN is used."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        yarn = self.rope_scaling
        if yarn is None or yarn.factor <= 1:
            return scale
        return scale * (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a config.json. Raises ConfigError that lists everything that is wrong with it."""
        try:
            raw = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a model's config.json: {error}") from error
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], name: str = "config") -> Self:
        """A Config from the parsed config.json `raw`; `name` is what errors call it."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{name} must hold one JSON object, but holds a {type(raw).__name__}")
        if wrong := [key for key in raw if not isinstance(key, str)]:
            raise ConfigError(f"{name} has {len(wrong)} keys that are no strings: {listing(map(repr, wrong))}")
        problems: list[str] = []
        raw = {"num_nextn_predict_layers": 0, **one_spelling(dict(raw), problems)}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - set(fields) - set(REQUIRED) - set(IGNORED)):
            problems.append(f"unknown keys ({len(unknown)}): {listing(unknown, 20)}")
        if missing := sorted(set(fields) - set(raw)):
            problems.append(f"missing keys ({len(missing)}): {listing(missing, 40)}")
        for key in sorted(set(raw) & set(REQUIRED)):
            if raw[key] != REQUIRED[key] or isinstance(raw[key], bool) != isinstance(REQUIRED[key], bool):
                problems.append(f"{key} is {raw[key]!r}, only {REQUIRED[key]!r} is computed here")
        values = {key: _value(field, raw[key], problems) for key, field in fields.items() if key in raw}
        if not problems:
            config = cls(**values)
            problems = _contradictions(config)
            if not problems:
                return config
        raise ConfigError(
            f"{name} does not describe a model this code computes; nothing was read beyond it.\n  "
            + "\n  ".join(problems)
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json object that reads back as this Config."""
        values = {key: value for key, value in dataclasses.asdict(self).items()}
        ends = list(self.eos_token_id)
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = {"type": "yarn", **values["rope_scaling"]}
        return {"architectures": ["DeepseekV32ForCausalLM"], **REQUIRED, **values}


def _value(field: dataclasses.Field, value: Any, problems: list[str]) -> Any:
    """`value` as the type of `field`; what is wrong with it is added to `problems`."""
    if field.name == "rope_scaling":
        return None if value is None else parse_yarn(value, problems)
    if field.name != "eos_token_id":
        return number(field.name, field.type, value, 0 if field.name in MAY_BE_ZERO else 1, problems)
    ids = value if isinstance(value, list | tuple) else [value]
    if ids and all(type(token) is int and 0 <= token <= LARGEST for token in ids):
        return tuple(ids)
    problems.append(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return None


MOST_LAYERS, MOST_EXPERTS = 1_000, 500_000
"""Every weight has a name: more of them than any model has would take memory and time before anything is refused."""

MAY_BE_ZERO = {"bos_token_id", "first_k_dense_replace", "num_nextn_predict_layers"}


def _contradictions(cfg: Config) -> list[str]:
    """What no single field shows."""
    per_group = cfg.n_routed_experts // cfg.n_group
    experts = cfg.num_hidden_layers * cfg.n_routed_experts
    rules = [
        (experts <= MOST_EXPERTS, f"{experts} experts in all layers are too many: at most {MOST_EXPERTS} are read"),
        (cfg.num_hidden_layers <= MOST_LAYERS, f"num_hidden_layers is larger than {MOST_LAYERS}"),
        (cfg.n_routed_experts % cfg.n_group == 0, "n_routed_experts must be a multiple of n_group"),
        (per_group >= 2, "a group needs at least 2 experts: its score is the sum of its two best"),
        (cfg.topk_group <= cfg.n_group, "topk_group is larger than n_group"),
        (
            cfg.num_experts_per_tok <= cfg.topk_group * per_group,
            "num_experts_per_tok exceeds the experts of the kept groups",
        ),
        (cfg.first_k_dense_replace <= cfg.num_hidden_layers, "first_k_dense_replace is larger than num_hidden_layers"),
        (cfg.num_nextn_predict_layers <= 1, "num_nextn_predict_layers must be 0 or 1"),
        (cfg.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even"),
        (cfg.qk_rope_head_dim <= cfg.index_head_dim, "qk_rope_head_dim is larger than index_head_dim"),
        (cfg.index_head_dim.bit_count() == 1, "index_head_dim must be a power of two for the Hadamard transform"),
        (cfg.bos_token_id < cfg.vocab_size, "bos_token_id is outside the vocabulary"),
        (max(cfg.eos_token_id) < cfg.vocab_size, "eos_token_id is outside the vocabulary"),
    ]
    return [text for holds, text in rules if not holds]


def one_spelling(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`raw` with `rope_parameters` (transformers 5) as `rope_scaling` and `rope_theta`; no scaling is None.

    Where both spellings are there and disagree, that is added to `problems`.
    """
    parameters = raw.pop("rope_parameters", None)
    if isinstance(parameters, Mapping):
        scaling = dict(parameters)
        theta = scaling.pop("rope_theta", raw.get("rope_theta"))
        if theta is not None and raw.setdefault("rope_theta", theta) != theta:
            problems.append(f"rope_theta is {raw['rope_theta']!r}, but rope_parameters says {theta!r}")
        if _normal(raw.setdefault("rope_scaling", scaling)) != _normal(scaling):
            problems.append(f"rope_scaling ({raw['rope_scaling']!r}) and rope_parameters ({scaling!r}) disagree")
    elif parameters is not None:
        problems.append(f"rope_parameters must be an object, not {parameters!r}")
    return {**raw, "rope_scaling": _normal(raw.get("rope_scaling"))}


def _normal(scaling: Any) -> Any:
    """`scaling` with its kind under `type` alone and without nulls; the kind `default` with nothing else is None."""
    if not isinstance(scaling, Mapping):
        return scaling
    values = {key: value for key, value in scaling.items() if value is not None}
    kinds = [values.pop(key) for key in ("type", "rope_type") if key in values]
    kind = kinds[0] if kinds and kinds == kinds[:1] * len(kinds) else kinds or "default"
    return None if kind == "default" and not values else {"type": kind, **values}


def parse_yarn(raw: Any, problems: list[str]) -> Yarn | None:
    """The Yarn of a `rope_scaling` object; None where something is wrong, which is added to `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"rope_scaling must be an object or null, not {raw!r}")
        return None
    raw = dict(raw)
    if (kind := raw.pop("type", "default")) != "yarn":
        problems.append(
            f"rope_scaling is of type {kind!r} (with {listing(map(str, raw)) or 'nothing else'}); only yarn is known"
        )
        return None
    if raw.pop("truncate", True) is not True:
        problems.append("rope_scaling.truncate must be true")
    fields = {field.name: field for field in dataclasses.fields(Yarn)}
    if unknown := sorted(set(raw) - set(fields)):
        problems.append(f"unknown keys in rope_scaling ({len(unknown)}): {listing(unknown)}")
    if missing := sorted(set(fields) - set(raw)):
        problems.append(f"missing keys in rope_scaling ({len(missing)}): {listing(missing)}")
    before = len(problems)
    values = {key: number(key, field.type, raw[key], 1, problems) for key, field in fields.items() if key in raw}
    if missing:
        return None
    if len(problems) == before and values["mscale"] != values["mscale_all_dim"]:
        problems.append(
            f"rope_scaling.mscale ({values['mscale']}) and mscale_all_dim ({values['mscale_all_dim']}) differ; "
            "the references disagree about what that means"
        )
    return Yarn(**values) if len(problems) == before else None


def number(name: str, kind: Any, value: Any, smallest: int, problems: list[str]) -> Any:
    """`value` as a whole number (`kind` int) from `smallest`, or as a positive float; else a problem with its name."""
    if kind in (int, "int"):
        if type(value) is int and smallest <= value <= LARGEST:
            return value
        problems.append(f"{name} must be a whole number from {smallest} to {LARGEST}, not {value!r}")
    elif type(value) in (int, float) and 0 < value <= LARGEST:
        return float(value)
    else:
        problems.append(f"{name} must be a positive number, not {value!r}")
    return None
