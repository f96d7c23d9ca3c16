"""The keys of a config.json beside the hyperparameters: fixed values, other spellings, repetitions, keys of tools.

Tools add keys when they save a config. One that repeats something known must agree with it; one whose value is neutral
(null, false, empty, a class's default) is dropped with a note; any other may change the model and is a problem, unless
the user takes it on himself to ignore it.
"""

import fnmatch
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ..errors import UsageError, argument, listing

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
"""Keys with the only value that is supported."""

ASSUMED = {
    key: REQUIRED[key]
    for key in (
        *("hidden_act", "topk_method", "norm_topk_prob", "n_shared_experts", "moe_layer_freq"),
        *("tie_word_embeddings", "attention_bias"),
    )
} | {"num_nextn_predict_layers": 0, "rope_scaling": None, "bos_token_id": 0}
"""Values of keys that may be absent, as in transformers' implementation, where they are the defaults or the only ones.

`model_type` and `scoring_func` must be there: DeepSeek's inference code scores experts with softmax by default. No
published config.json of this model has `rope_interleave` and `indexer_rope_interleave`.
"""

IGNORED = {
    key: why
    for why, keys in {
        "a class or a launch option of another implementation": "architectures ep_size max_batch_size max_seq_len",
        "code of a checkpoint is never run": "auto_map",
        "every tensor has its own dtype": "dtype torch_dtype",
        "formats are read from the tensors": "compression_config quantization quantization_config scale_fmt",
        "labels of a classifier": "id2label label2id",
        "rows are ragged, never padded with a token": "pad_token_id",
        "the caller decides": "kv_cache_scheme output_router_logits use_cache",
        "the tokenizer is read from tokenizer.json": "tokenizer_class",
        "training only": "attention_dropout aux_loss_alpha initializer_range pretraining_tp seq_aux router_*_loss_coef",
        "what tools say of themselves": "transformers_version unsloth_* _*",
    }.items()
    for key in keys.split()
}
"""Keys, or patterns of them, that do not change the model, and why."""

DEFAULTS = {
    **{"return_dict": True, "is_causal": True, "chunk_size_feed_forward": 0, "max_length": 20, "min_length": 0},
    **{"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0, "temperature": 1},
    **{"top_k": 50, "top_p": 1, "typical_p": 1, "repetition_penalty": 1, "length_penalty": 1, "index_topk_freq": 1},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0},
}
"""Values that classes of transformers write although nobody chose them."""

_RENAMED = (
    "dim=hidden_size inter_dim=intermediate_size moe_inter_dim=moe_intermediate_size n_layers=num_hidden_layers "
    "n_dense_layers=first_k_dense_replace n_heads=num_attention_heads n_activated_experts=num_experts_per_tok "
    "n_expert_groups=n_group n_limited_groups=topk_group num_experts=n_routed_experts norm_eps=rms_norm_eps "
    "num_local_experts=n_routed_experts num_shared_experts=n_shared_experts route_scale=routed_scaling_factor "
    "num_mtp_layers=num_nextn_predict_layers n_mtp_layers=num_nextn_predict_layers score_func=scoring_func "
    "rope_factor=rope_scaling.factor original_seq_len=rope_scaling.original_max_position_embeddings "
    "beta_fast=rope_scaling.beta_fast beta_slow=rope_scaling.beta_slow mscale=rope_scaling.mscale"
)

RENAMED = {name: target for name, _, target in (pair.partition("=") for pair in _RENAMED.split())}
"""Names that DeepSeek's inference code and others give to the same numbers."""

LAYERS = ("layer_types", "mlp_layer_types", "indexer_types")
"""Keys with an entry for each layer."""


def _each_layer(*kinds: str) -> Callable[[Any], list[Any]]:
    """Return the lists that say one of `kinds` of every layer, or "dense" of dense layers and "sparse" of others; the
    MTP layer may be among them."""

    def list_allowed(cfg: Any) -> list[Any]:
        first = {"sparse": ["dense"] * cfg.first_k_dense_replace}
        lengths = {cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers}
        return [(first.get(kind, []) + [kind] * length)[:length] for kind in kinds for length in sorted(lengths)]

    return list_allowed


REPEATED: dict[str, tuple[str, Callable[[Any], list[Any]]]] = {
    "head_dim": (
        "qk_rope_head_dim, or qk_nope_head_dim + qk_rope_head_dim",
        lambda cfg: [cfg.qk_rope_head_dim, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim],
    ),
    "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", lambda cfg: [cfg.qk_nope_head_dim + cfg.qk_rope_head_dim]),
    "num_key_value_heads": ("num_attention_heads", lambda cfg: [cfg.num_attention_heads]),
    "n_kv_heads": ("num_attention_heads", lambda cfg: [cfg.num_attention_heads]),
    "layer_types": ("the attention of this model", _each_layer("indexed_attention", "deepseek_sparse_attention")),
    "indexer_types": ("the indexer in every layer", _each_layer("full")),
    "mlp_layer_types": ("first_k_dense_replace and num_hidden_layers", _each_layer("sparse")),
    "partial_rotary_factor": (
        "the share of a head that is rotated",
        lambda cfg: [1, cfg.qk_rope_head_dim / (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)],
    ),
    "original_max_position_embeddings": (
        "rope_scaling",
        lambda cfg: [cfg.rope_scaling and cfg.rope_scaling.original_max_position_embeddings],
    ),
}
"""Keys that follow from others: what they repeat, and the values they may have."""


def drop_ignored(raw: dict[str, Any], ignored: Collection[str], known: Collection[str]) -> tuple[dict, dict[str, Any]]:
    """Return the object without the keys that the user `ignored`, and these with their values.

    "rope_scaling.KEY" is a key of rope_scaling or rope_parameters. Raises UsageError for keys that are not there, and
    for `known` ones, which the model needs.
    """
    dropped: dict[str, Any] = {}
    for path in ignored:
        parent, _, key = path.rpartition(".")
        names = [name for name in ({parent, "rope_parameters"} if parent else {""}) if key in _inner(raw, name)]
        if path in known or not names:
            why = "the model needs it" if path in known else "config.json has no such key"
            raise UsageError(f"{argument('ignore_config', path)}: {why}. Nothing was read")
        for name in names:
            inner = dict(_inner(raw, name))
            dropped[path] = inner.pop(key)
            raw = {**raw, name: inner} if name else inner
    return raw, dropped


def _inner(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name) if name else raw
    return found if isinstance(found, dict) else {}


def rename(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the object with the names of config.json in place of RENAMED ones; adds those that disagree."""
    raw, given = dict(raw), {name: raw[name] for name in RENAMED if raw.get(name) is not None}
    for name, value in given.items():
        target = RENAMED[name]
        parent, _, key = target.rpartition(".")
        if parent and not isinstance(raw.get(parent) or {}, dict):
            continue
        inner: dict[str, Any] = dict(raw.get(parent) or {"type": "yarn"}) if parent else raw
        if inner.setdefault(key, value) != value:
            problems.append(f"{name} is {value!r}, but {target} is {inner[key]!r}{_suggest_ignoring(name)}")
        if parent:
            inner.setdefault("mscale_all_dim", inner.get("mscale", 1.0))
            raw[parent] = inner
    return {name: value for name, value in raw.items() if name not in RENAMED}


def normalize_rope(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return a config.json's object with `rope_theta` and, if it says anything of it, `rope_scaling`, which is None
    without scaling.

    transformers 5 writes both as `rope_parameters`, and some tools put `rope_theta` into `rope_scaling`. If two
    spellings disagree, that is added to `problems`.
    """
    raw, spellings = dict(raw), [name for name in ("rope_scaling", "rope_parameters") if raw.get(name) is not None]
    if "rope_parameters" in raw and not isinstance(raw["rope_parameters"], Mapping | None):
        problems.append(f"rope_parameters must be an object, not {raw['rope_parameters']!r}")
        spellings.remove("rope_parameters")
    found = []
    for name in spellings:
        scaling = raw[name]
        if isinstance(scaling, Mapping):
            scaling = dict(scaling)
            theta = scaling.pop("rope_theta", None)
            if theta is not None and raw.setdefault("rope_theta", theta) != theta:
                problems.append(f"rope_theta is {raw['rope_theta']!r}, but {theta!r} in {name}")
        found.append(_normalize_scaling(scaling))
    if len(found) == 2 and found[0] != found[1]:
        problems.append(f"rope_scaling ({found[0]!r}) and rope_parameters ({found[1]!r}) disagree")
    stated = raw.pop("rope_parameters", None) is not None or "rope_scaling" in raw
    return {**raw, "rope_scaling": found[0] if found else None} if stated else raw


def _normalize_scaling(scaling: Any) -> Any:
    """Name the type `type`, drop nulls, and return None if nothing but the type "default" is left."""
    if not isinstance(scaling, Mapping):
        return scaling
    values = {key: value for key, value in scaling.items() if value is not None}
    types = [values.pop(key) for key in ("type", "rope_type") if key in values]
    types = ["yarn" if kind == "deepseek_yarn" else kind for kind in types]
    kind = types[0] if types and types == types[:1] * len(types) else types or "default"
    return None if kind == "default" and not values else {"type": kind, **values}


def drop_neutral(raw: dict[str, Any], known: Collection[str], prefix: str, problems: list[str]) -> Iterator[str]:
    """Remove the keys of `raw` that are not `known` and have neutral values, and yield a note for each.

    Those with other values are added to `problems`, under `prefix` + their names.
    """
    unknown = [key for key in raw if key not in known and not any(fnmatch.fnmatchcase(key, name) for name in IGNORED)]
    changing = sorted(key for key in unknown if not is_neutral(key, raw[key]))
    for key in set(unknown) - set(changing):
        yield f"config.json: ignored {prefix}{key}, which is {json.dumps(raw.pop(key))}"
    if changing:
        where = f" in {prefix[:-1]}" if prefix else ""
        problems.append(
            f"unknown keys{where} ({len(changing)}), which may change the model: {listing(changing, 20)}"
            + _suggest_ignoring(prefix + changing[0])
        )


def is_neutral(key: str, value: Any) -> bool:
    """Return whether `value` of an unknown key says nothing: null, false, empty, or the default of a class."""
    return value in (None, "", [], {}) or value is False or (key in DEFAULTS and value == DEFAULTS[key])


def find_disagreements(raw: dict[str, Any], cfg: Any) -> Iterator[str]:
    """Yield a problem for each key of REPEATED that does not agree with `cfg`."""
    for key, (what, allowed) in REPEATED.items():
        if raw.get(key) is not None and raw[key] not in allowed(cfg):
            values = " or ".join(map(repr, allowed(cfg)))
            yield f"{key} is {raw[key]!r:.200}, but {what} says {values:.300}{_suggest_ignoring(key)}"


def _suggest_ignoring(key: str) -> str:
    return f" (if the model does not depend on it, convert with {argument('ignore_config', key)})"


def find_assumptions(raw: dict[str, Any]) -> list[str]:
    """Return a note for every key that a config.json does not have and for which a value is assumed."""
    spelled = {**raw, "rope_scaling": None} if "rope_parameters" in raw else raw
    return [
        f"config.json does not state {key}; assumed to be {json.dumps(value)}"
        for key, value in ASSUMED.items()
        if key not in spelled or (spelled[key] is None and value is not None)
    ]
