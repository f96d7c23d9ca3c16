"""Config: read strictly, so that no key that changes the model is passed over."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from configs import path
from dsv32_jax.config import Config, interpret
from dsv32_jax.config.keys import ASSUMED, IGNORED, RENAMED, REPEATED, REQUIRED, find_assumptions
from dsv32_jax.errors import ConfigError, UsageError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def raw():
    """The real model's config.json."""
    return json.loads(path("deepseek_v32").read_text())


def refusal(raw) -> str:
    """The message with which `raw` is refused."""
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    assert isinstance(caught.value, ValueError) and caught.value.exit_code == 3
    return str(caught.value)


def test_the_real_model(real):
    """Every number of the published config.json."""
    assert dataclasses.asdict(real) == {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "bos_token_id": 0,
        "eos_token_id": (1,),
    }


@pytest.mark.parametrize("name", ["deepseek_v32", "tiny"])
def test_round_trip(name):
    """What a Config writes reads back as itself, also through JSON."""
    config = Config.from_json(path(name))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    several = dataclasses.replace(config, eos_token_id=(1, 2), rope_scaling=None)
    assert Config.from_dict(json.loads(json.dumps(several.to_dict()))) == several


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ({"rms_norm_eps": 1e-39, "rope_theta": 1e-320}, ["rms_norm_eps", "rope_theta", "zero in float32"]),
        ({"n_routed_experts": 1_000_000}, ["61000000 experts in all layers exceed the limit"]),
        ({1: 2, "zz": 3}, ["1 key that must be strings"]),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, ["missing keys in rope_scaling (5)", "factor must be"]),
    ],
)
def test_odd_values_are_refused(raw, wrong, said):
    message = refusal(raw | wrong)
    assert all(part in message for part in said), message


def test_it_is_frozen_and_hashable(tiny):
    """A Config is a key of compiled programs."""
    assert hash(tiny) == hash(dataclasses.replace(tiny)) and tiny == dataclasses.replace(tiny)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.hidden_size = 1


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(raw, real, key):
    """transformers 4 and 5 name it differently; neither changes the model."""
    other = {name: value for name, value in raw.items() if name != "torch_dtype"} | {key: "float16"}
    assert Config.from_dict(other) == real


def test_rope_parameters(raw, real):
    """transformers 5 writes `rope_parameters` in place of `rope_scaling` and `rope_theta`."""
    other = copy.deepcopy(raw)
    parameters = other.pop("rope_scaling")
    parameters = {"rope_theta": other.pop("rope_theta"), "rope_type": parameters.pop("type"), **parameters}
    assert Config.from_dict(other | {"rope_parameters": parameters}) == real
    plain = Config.from_dict(other | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}})
    assert plain == dataclasses.replace(real, rope_scaling=None)
    assert Config.from_dict(raw | {"rope_parameters": parameters}) == real


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_theta": 5000, "rope_type": "default"}, ["rope_theta", "5000", "10000"]),
        ({"rope_theta": 10000, "rope_type": "yarn", "factor": 2}, ["disagree"]),
        ({"rope_theta": 10000, "rope_type": "default"}, ["disagree"]),
        ([1], ["rope_parameters", "[1]"]),
    ],
)
def test_rope_parameters_that_contradict(raw, parameters, said):
    """Two spellings that disagree are refused, not chosen between."""
    message = refusal(raw | {"rope_parameters": parameters})
    assert all(word in message for word in said), message


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_theta": 10000, "factor": 40}, ["factor"]),
        ({"rope_theta": 10000, "rope_type": "default", "factor": 40}, ["factor"]),
        ({"rope_theta": 10000, "rope_type": "llama3", "factor": 40}, ["llama3"]),
        ({"rope_theta": 10000, "rope_type": ["yarn"]}, ["rope_scaling", "yarn"]),
        ({"rope_theta": "10000", "rope_type": "default"}, ["rope_theta", "'10000'"]),
    ],
    ids=str,
)
def test_wrong_rope_parameters(raw, parameters, said):
    """Nothing in `rope_parameters` is dropped in silence."""
    message = refusal(_without(raw, "rope_scaling", "rope_theta") | {"rope_parameters": parameters})
    assert all(word in message for word in said), message


def test_yarn_under_its_old_name_in_rope_parameters(raw, real):
    """`type` in place of `rope_type` still means YaRN."""
    parameters = {"rope_theta": 10000, **raw["rope_scaling"]}
    assert Config.from_dict(_without(raw, "rope_scaling", "rope_theta") | {"rope_parameters": parameters}) == real


@pytest.mark.parametrize("scaling", ["yarn", [1], 7], ids=repr)
def test_two_spellings_of_which_one_is_no_object(raw, scaling):
    """It is refused by name, not stumbled over."""
    parameters = {"rope_theta": 10000, "rope_type": "yarn", "factor": 40}
    assert "rope_scaling" in refusal(raw | {"rope_scaling": scaling, "rope_parameters": parameters})


def test_absent_and_null_rope_scaling(raw, real):
    """Without YaRN the plain frequencies are meant."""
    plain = dataclasses.replace(real, rope_scaling=None)
    assert Config.from_dict(raw | {"rope_scaling": None}) == plain
    assert Config.from_dict({key: value for key, value in raw.items() if key != "rope_scaling"}) == plain


def test_both_names_of_the_rope_type(raw, real):
    """`type` and `rope_type` mean the same and may both be there."""
    scaling = raw["rope_scaling"]
    renamed = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    for spelling in (renamed, scaling | renamed):
        assert Config.from_dict(raw | {"rope_scaling": spelling}) == real


@pytest.mark.parametrize("ids", [1, [1], [1, 128]])
def test_end_tokens(raw, ids):
    """One id or a list of them."""
    assert Config.from_dict(raw | {"eos_token_id": ids}).eos_token_id == tuple(ids if isinstance(ids, list) else [ids])


def test_without_mtp(raw):
    """A config that says nothing of next-token layers has none."""
    assert Config.from_dict(_without(raw, "num_nextn_predict_layers")).num_nextn_predict_layers == 0


def test_every_unknown_key_is_named(raw):
    """All of them at once, counted."""
    message = refusal(raw | {"sliding_window": 4096, "attention_sinks": True, "model_file": "modeling.py"})
    assert "unknown keys (3)" in message
    assert all(key in message for key in ("sliding_window", "attention_sinks", "model_file"))


def test_every_missing_key_is_named(raw):
    """All of them at once, counted; a key that has a default is not among them."""
    keys = [field.name for field in dataclasses.fields(Config) if field.name in raw]
    message = refusal({key: value for key, value in raw.items() if key not in keys})
    assumed = set(keys) & set(ASSUMED)
    assert len(assumed) == 3 and f"missing keys ({len(keys) - 3})" in message
    assert all(key in message for key in keys if key not in assumed)


def test_every_kind_of_offence_is_in_one_message(raw):
    """Unknown, missing, unsupported and nonsensical keys are listed together."""
    message = refusal(_without(raw, "v_head_dim") | {"new": 1, "scoring_func": "softmax", "hidden_size": -7})
    assert all(word in message for word in ("new", "v_head_dim", "scoring_func", "'softmax'", "hidden_size", "-7"))


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_required_values(raw, key):
    """Another value of these means another model; the message has both."""
    for value in ("something else", None, 17):
        message = refusal(raw | {key: value})
        assert key in message and repr(value) in message and repr(REQUIRED[key]) in message


@pytest.mark.parametrize(
    ("key", "value"), [("norm_topk_prob", 1), ("n_shared_experts", True), ("tie_word_embeddings", 0)]
)
def test_required_values_are_not_confused_with_numbers(raw, key, value):
    """1 is not true."""
    assert key in refusal(raw | {key: value})


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_fixed_value_that_is_not_stated(raw, real, key):
    """It is assumed with a note where the reference implementation assumes it too, and an error where it does not."""
    absent = _without(raw, key)
    if key in ("model_type", "scoring_func"):
        assert f"missing keys (1): {key}" in refusal(absent)
        return
    assert Config.from_dict(absent) == real
    note = f"config.json does not state {key}; assumed to be {json.dumps(REQUIRED[key])}"
    assert find_assumptions(absent) == ([note] if key in raw else [])
    assert find_assumptions(raw) == []


ABSENT = [("num_nextn_predict_layers", "0"), ("rope_scaling", "null"), ("bos_token_id", "0")]


@pytest.mark.parametrize(("key", "value"), ABSENT)
def test_a_field_that_is_not_stated(raw, key, value):
    """The same for fields that have a default, also where they are null."""
    if key != "rope_scaling":
        assert find_assumptions(raw | {key: None}) == find_assumptions(_without(raw, key))
    assert find_assumptions(_without(raw, key)) == [f"config.json does not state {key}; assumed to be {value}"]
    assert find_assumptions(_without(raw, "rope_scaling") | {"rope_parameters": {}}) == []


def test_repr_is_a_summary(real, tiny):
    """A few lines with the sizes that tell models apart."""
    for config in (real, tiny):
        assert repr(config) == str(config) and len(repr(config).splitlines()) < 8
        assert "<table>" in config._repr_html_() and "indexer" in config._repr_html_()
    for word in ("61 layers (3 dense, 58 MoE)", "7168", "129280", "163840", "256", "YaRN"):
        assert word in repr(real)


@pytest.mark.parametrize("key", sorted(IGNORED))
def test_ignored_keys(raw, real, key):
    """They may say anything, and have a reason each."""
    assert Config.from_dict(raw | {key: {"AutoModel": "evil.py"}}) == real
    assert len(IGNORED[key]) > 10


def test_code_of_a_checkpoint_is_not_imported(raw, real, tmp_path, monkeypatch):
    """`auto_map` names a module that is there, and nobody touches it."""
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    assert Config.from_json(tmp_path / "config.json") == real
    assert "modeling_evil" not in sys.modules


NUMBERS = [field.name for field in dataclasses.fields(Config) if field.type in (int, "int", float, "float")]


@pytest.mark.parametrize("value", [10**30, 2**31, -1, True, "7", 1.5, [7], None, float("nan"), float("inf")], ids=repr)
def test_wrong_numbers(raw, value):
    """Huge, negative, of another type or not a number: every field that holds one is named with its value."""
    integers = [name for name in NUMBERS if name not in ("routed_scaling_factor", "rms_norm_eps", "rope_theta")]
    wrong = NUMBERS if value != 1.5 else integers
    if value is None:
        wrong = [name for name in wrong if name not in ASSUMED]
    message = refusal(raw | dict.fromkeys(NUMBERS, value))
    for name in wrong:
        assert f"{name} must be" in message, name
    assert repr(value) in message


@pytest.mark.parametrize("name", NUMBERS)
def test_zero(raw, name):
    """Zero is a count only where nothing of something makes sense."""
    if name in ("bos_token_id", "first_k_dense_replace", "num_nextn_predict_layers"):
        assert getattr(Config.from_dict(raw | {name: 0}), name) == 0
    else:
        assert name in refusal(raw | {name: 0})


@pytest.mark.parametrize("ids", [[], [-1], ["1"], [True], 1.0, None, [1, 10**30], {"a": 1}], ids=repr)
def test_wrong_end_tokens(raw, ids):
    """No id at all, or something that is none."""
    message = refusal(raw | {"eos_token_id": ids})
    assert "eos_token_id" in message and repr(ids) in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "linear"}, ["linear", "yarn"]),
        ({"rope_type": "llama3"}, ["llama3", "yarn"]),
        ({"type": None}, ["yarn"]),
        ({"type": ["yarn"]}, ["yarn"]),
        ({"factor": -40}, ["factor", "-40"]),
        ({"factor": "40"}, ["factor", "'40'"]),
        ({"factor": float("inf")}, ["factor", "inf"]),
        ({"mscale": 0.5}, ["mscale", "0.5", "1.0"]),
        ({"truncate": False}, ["truncate"]),
        ({"attention_factor": 2.0}, ["attention_factor"]),
        ({"beta_fast": None}, ["beta_fast"]),
        ({"original_max_position_embeddings": 0}, ["original_max_position_embeddings", "0"]),
    ],
    ids=str,
)
def test_wrong_yarn(raw, change, said):
    """Every key of rope_scaling is a field, and of the type it must have."""
    message = refusal(raw | {"rope_scaling": raw["rope_scaling"] | change})
    assert all(word in message for word in said), message


@pytest.mark.parametrize("scaling", ["yarn", 40, [1]], ids=repr)
def test_yarn_that_is_no_object(raw, scaling):
    """It is named, with what it is."""
    assert repr(scaling) in refusal(raw | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_routed_experts": 255}, "multiple of n_group"),
        ({"n_group": 256, "topk_group": 8}, "at least 2 experts"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"qk_rope_head_dim": 130}, "index_head_dim"),
        ({"index_head_dim": 96}, "power of two"),
        ({"bos_token_id": 129280}, "bos_token_id"),
        ({"eos_token_id": [1, 129280]}, "eos_token_id"),
    ],
    ids=str,
)
def test_contradictions(raw, change, said):
    """What no single field shows."""
    assert said in refusal(raw | change)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", '"text"', "{", '{"hidden_size": NaN}', '{"hidden_size": Infinity}', "[" * 100_000, "\xff"],
    ids=lambda text: repr(text[:24]),
)
def test_files_that_are_no_config(tmp_path, text):
    """Each is one ConfigError that names the file."""
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="config.json"):
        Config.from_json(file)


def test_a_file_that_is_not_there(tmp_path):
    """The message has its name."""
    with pytest.raises(ConfigError, match="nowhere.json"):
        Config.from_json(tmp_path / "nowhere.json")


def test_a_key_given_twice(raw, tmp_path):
    """Which of two values is meant nobody knows."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw)[:-1] + ', "index_topk": 64}')
    with pytest.raises(ConfigError, match="index_topk"):
        Config.from_json(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from([*NUMBERS, *REQUIRED, *IGNORED, *REPEATED, *RENAMED, "rope_scaling", "rope_parameters", "x"]),
        JSON,
    )
)
def test_any_json_is_a_config_or_one_error(change):
    """Nothing but ConfigError comes out of a config, whatever it holds."""
    raw = json.loads(path("deepseek_v32").read_text()) | change
    try:
        config = Config.from_dict(raw)
    except ConfigError:
        return
    assert Config.from_dict(config.to_dict()) == config


def test_a_config_that_transformers_saved():
    """Keys that repeat what is known agree with it; those that are off, or defaults, are dropped with a note."""
    raw = json.loads((DATA / "config_saved_by_transformers_5.json").read_text())
    found = interpret(raw)
    assert found.config.num_hidden_layers == 5 and found.config.rope_scaling.factor == 4
    assert found.notes == ["config.json: ignored mlp_bias, which is false"]
    assert interpret(found.raw) == found._replace(notes=[]) and "mlp_bias" not in found.raw


NEUTRAL = {
    **{"mlp_bias": False, "sliding_window": None, "pruned_heads": {}, "suffix": "", "return_dict": True, "top_k": 50},
    **{"cross_attention_hidden_size": None, "output_attentions": False, "is_decoder": False, "num_beams": 1},
    **{"max_length": 20, "length_penalty": 1.0, "problem_type": None, "chunk_size_feed_forward": 0, "bad": []},
}
HARMLESS = {
    **{"unsloth_fixed": True, "unsloth_version": "2025.9", "kv_cache_scheme": {"num_bits": 8}, "_commit_hash": "ab"},
    **{"compression_config": {"format": "x"}, "output_router_logits": True, "id2label": {"0": "LABEL_0"}},
}


def test_keys_of_tools(raw, real):
    """Neutral values are dropped, each with a note; what tools say of themselves stays, and nobody minds."""
    found = interpret(raw | NEUTRAL | HARMLESS | {"kv_cache_scheme": None})
    assert found.config == real and found.raw == raw | HARMLESS | {"kv_cache_scheme": None}
    assert len(found.notes) == len(NEUTRAL) and all(any(f"ignored {key}," in n for n in found.notes) for key in NEUTRAL)


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_keys_of_tools_that_are_not_neutral(raw, real, key):
    """The message names the way on, and on the user's word the key is left out and recorded."""
    value = 7 if key in ("top_k", "num_beams", "max_length") else ["x"]
    message = refusal(raw | {key: value})
    assert "unknown keys (1), which may change the model" in message and f'ignore_config="{key}"' in message
    found = interpret(raw | {key: value}, ignored=[key])
    assert (found.config, found.ignored, found.raw) == (real, {key: value}, raw)


@pytest.mark.parametrize(
    "path", ["hidden_size", "attention_bias", "rope_scaling.factor", "nothing", "rope_scaling.x", ""]
)
def test_what_cannot_be_ignored(raw, path):
    """What the model needs, and what is not there."""
    with pytest.raises(UsageError, match="the model needs it|no such key"):
        interpret(raw, ignored=[path])


REPETITIONS = {
    "head_dim": ([64, 192], 56),
    "qk_head_dim": ([192], 128),
    "num_key_value_heads": ([128], 1),
    "n_kv_heads": ([128], 8),
    "layer_types": ([["indexed_attention"] * 61, ["deepseek_sparse_attention"] * 62], ["sliding_attention"] * 61),
    "indexer_types": ([["full"] * 61], ["shared"] * 61),
    "mlp_layer_types": ([["dense"] * 3 + ["sparse"] * 58, ["dense"] * 3 + ["sparse"] * 59], ["sparse"] * 61),
    "partial_rotary_factor": ([1.0, 1 / 3], 0.5),
    "original_max_position_embeddings": ([4096], 8192),
}


@pytest.mark.parametrize("key", sorted(REPEATED))
def test_keys_that_repeat_others(raw, real, key):
    """They agree, or both are named; null says nothing."""
    right, wrong = REPETITIONS[key]
    for value in (*right, None):
        assert Config.from_dict(raw | {key: value}) == real
    message = refusal(raw | {key: wrong})
    assert f"{key} is {str(wrong)[:60]}" in message and " says " in message and f'ignore_config="{key}"' in message
    assert interpret(raw | {key: wrong}, ignored=[key]).config == real


DEEPSEEK = {
    **{"dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3, "n_heads": 128},
    **{"n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5},
    **{"score_func": "sigmoid", "rope_factor": 40, "original_seq_len": 4096, "beta_fast": 32, "beta_slow": 1},
    **{"mscale": 1.0},
}


def test_the_names_of_deepseeks_inference_code(raw, real):
    """Beside the others they must agree; alone they are enough."""
    assert Config.from_dict(raw | DEEPSEEK) == real
    for key, value in DEEPSEEK.items():
        message = refusal(raw | {key: "other" if isinstance(value, str) else value + 1})
        assert f"{key} is " in message and RENAMED[key] in message and f'ignore_config="{key}"' in message
    alone = _without(raw, "rope_scaling", *(RENAMED[key] for key in DEEPSEEK))
    found = interpret(alone | DEEPSEEK)
    assert found.config == real and found.raw == {**found.raw, **raw} and not set(DEEPSEEK) & set(found.raw)


def test_what_tools_add_to_rope_scaling(raw, real):
    """rope_theta moves there, YaRN is renamed, defaults are written out; a change is refused with the way on."""
    scaling = {**raw["rope_scaling"], "type": "deepseek_yarn", "attention_factor": 1.0, "rope_theta": 10000}
    found = interpret(_without(raw, "rope_theta") | {"rope_scaling": scaling | {"finetuned": False, "x": None}})
    assert found.config == real and found.notes == ["config.json: ignored rope_scaling.finetuned, which is false"]
    assert "rope_theta is 10000, but 5000 in rope_scaling" in refusal(
        raw | {"rope_scaling": scaling | {"rope_theta": 5000}}
    )
    message = refusal(raw | {"rope_scaling": scaling | {"long_factor": [1, 2]}})
    assert "unknown keys in rope_scaling (1)" in message and 'ignore_config="rope_scaling.long_factor"' in message
    changed = raw | {"rope_scaling": scaling | {"long_factor": [1, 2]}}
    found = interpret(changed, ignored=["rope_scaling.long_factor"])
    assert found.config == real and found.ignored == {"rope_scaling.long_factor": [1, 2]}


def test_presets_are_listed():
    """A preset that is not there is an error that names those which are."""
    with pytest.raises(FileNotFoundError, match="deepseek_v32, tiny"):
        path("nothing")


def _without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}
