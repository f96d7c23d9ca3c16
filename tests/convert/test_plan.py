"""The plan: everything that is missing, unknown or of another shape, before anything is read."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.name_folding import fold_names
from convert.plan import limits
from convert.plan.plan import make_plan
from convert.plan.scope import UNANNOUNCED, interpret_source
from convert.read.source import Source
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, ConfigError, UsageError
from dsv32_jax.layout import leaves

from . import fakes


@pytest.fixture(scope="module")
def original(checkpoints):
    """The config and the tensors of a checkpoint in NVFP4."""
    folder = checkpoints["nvfp4"]
    return json.loads((folder / "config.json").read_text()), fakes.load(folder)


def planned(folder, config, arrays):
    return make_plan(Source(fakes.write_checkpoint(folder, config, arrays)))


def refused(folder, config, arrays) -> str:
    with pytest.raises(CheckpointError) as caught:
        planned(folder, config, arrays)
    assert "nothing was written" in str(caught.value)
    return str(caught.value)


def without(arrays, *parts):
    return {name: array for name, array in arrays.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize("storage, format", [("bf16", "dense"), ("fp8", "fp8_block"), ("nvfp4", "nvfp4")])
def test_every_leaf_is_planned_in_its_own_format(storage, format, checkpoints, tiny):
    whole = make_plan(Source(checkpoints[storage]))
    assert [leaf.leaf.path for leaf in whole.leaves] == [leaf.path for leaf in leaves(tiny)]
    assert {leaf.form.format for leaf in whole.leaves} == {"dense", format}
    assert all(leaf.arrays and leaf.same_as is None for leaf in whole.leaves)
    assert not whole.ignored


def test_a_value_that_config_json_does_not_state_is_noted(original, tmp_path):
    config, arrays = original
    (note,) = planned(tmp_path / "a", without(config, "norm_topk_prob"), arrays).notes
    assert note == "config.json does not state norm_topk_prob; assumed to be true"


def test_missing_tensors_are_all_listed_and_folded(original, tmp_path):
    config, arrays = original
    text = refused(tmp_path / "a", config, without(arrays, ".up_proj.weight_scale_2", "layers.1.input_layernorm"))
    assert "missing 41 tensors" in text
    assert "36 x mlp.experts.*.up_proj.weight_scale_2 (layers 1-3)" in text
    assert "3 x mlp.shared_experts.up_proj.weight_scale_2 (layers 1-3)" in text
    assert "model.layers.1.input_layernorm.weight" in text and "unknown" not in text


def test_unknown_tensors_are_an_error(original, tmp_path):
    config, arrays = original
    extra = {f"model.layers.{i}.self_attn.magic.weight": np.zeros(3, np.float32) for i in (0, 2)}
    extra["model.embed_tokens.weight_scale"] = np.zeros(3, np.float32)
    text = refused(tmp_path / "a", config, arrays | extra)
    assert "3 unknown tensors" in text
    assert "2 x self_attn.magic.weight (layers 0, 2)" in text and "model.embed_tokens.weight_scale" in text


def test_shapes_are_compared_with_the_config(original, tmp_path):
    config, arrays = original
    text = refused(tmp_path / "a", config | {"q_lora_rank": 128}, arrays)
    assert "self_attn.q_a_layernorm.weight (layers 0-3): found [64], config.json says [128]" in text
    assert "4 x self_attn.q_b_proj.weight (layers 0-3): found [160, 64], config.json says [160, 128]" in text


def test_storage_that_is_not_read_is_listed(original, tmp_path):
    config, arrays = original
    name = "model.layers.0.self_attn.q_a_proj"
    wrong = {f"{name}.qweight": np.zeros(96, ml_dtypes.bfloat16)}
    assert f"{name}.qweight" in refused(tmp_path / "a", config, arrays | wrong)


def test_all_kinds_of_problems_come_together(original, tmp_path):
    config, arrays = original
    broken = without(arrays, "lm_head") | {
        "what": np.zeros(1, np.float32),
        "model.norm.weight": np.zeros(1, np.float32),
    }
    text = refused(tmp_path / "a", config, broken)
    assert "missing 1 tensor: lm_head.weight" in text
    assert "model.norm.weight: found [1], config.json says [96]" in text
    assert "1 unknown tensor, which may change the model: what" in text


def test_tensors_the_model_does_not_need_are_counted(original, tmp_path):
    config, arrays = original
    scales = {
        f"model.layers.0.self_attn.{n}": np.ones((), np.float32) for n in ("k_proj.k_scale", "o_proj.input_scale")
    }
    whole = planned(tmp_path / "a", config, arrays | scales)
    assert sorted(whole.ignored.values()) == [1, 1]


CACHE_SCALES = (
    *("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "attn.k_scale", "attn_mqa.v_scale", "kv_scale"),
    *("kv_cache_scale", "k_cache_scale", "kv_cache_scaling_factor", "k_proj.output_scale", "v_zero_point", "q_scale"),
    *("kv_a_proj_with_mqa.output_scale", "k_bmm_quantizer._amax", "k_cache.scale", "qkv_proj.k_scale", "prob_scale"),
)


def test_tensors_of_other_implementations_are_counted(original, tmp_path):
    """Scales of a cache under every spelling, tables of positions: they do not change the model."""
    config, arrays = original
    names = [f"model.layers.0.self_attn.{name}" for name in CACHE_SCALES]
    tables = ["model.layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached", "freqs_cis", "model.inv_freq"]
    whole = planned(tmp_path / "a", config, arrays | dict.fromkeys([*names, *tables], np.ones((), np.float32)))
    assert whole.ignored == {
        "scales of another implementation's key-value cache": len(names),
        "computed from the configuration": len(tables),
    }


def test_an_mtp_layer_that_is_not_announced_is_ignored(original, tmp_path, tiny: Config):
    config, arrays = original
    layer = f"layers.{tiny.num_hidden_layers}."
    whole = planned(tmp_path / "a", without(config, "num_nextn"), arrays)
    assert whole.ignored == {UNANNOUNCED: sum(layer in name for name in arrays)}
    more = {
        name.replace(layer, f"layers.{tiny.num_hidden_layers + 1}."): arrays[name] for name in arrays if layer in name
    }
    assert planned(tmp_path / "b", config, arrays | more).ignored == {UNANNOUNCED: len(more)}
    main = {name.replace("layers.0.", "layers.7."): arrays[name] for name in arrays if "layers.0." in name}
    assert f"{len(main)} unknown tensors" in refused(tmp_path / "c", config, arrays | main)


def test_adapters_are_ignored_at_the_users_word_only(original, tmp_path):
    config, arrays = original
    adapters = {f"model.layers.0.self_attn.o_proj.lora_{x}.weight": np.ones((4, 4), np.float32) for x in "AB"}
    source = Source(fakes.write_checkpoint(tmp_path / "a", config, arrays | adapters))
    with pytest.raises(CheckpointError, match="2 unknown tensors.*ignore_tensors=.PATTERN"):
        make_plan(source)
    whole = make_plan(interpret_source(source, None, "*.lora_?.weight"))
    assert list(whole.ignored.values()) == [2] and "lora_" in next(iter(whole.ignored))
    assert whole.digest == make_plan(interpret_source(source, None, ["*lora*"])).digest
    for pattern in ("*.norm.weight", "nothing*"):
        with pytest.raises(UsageError, match="could do without"):
            make_plan(interpret_source(source, None, ["*lora*", pattern]))


@pytest.mark.parametrize("storage", ["fp8", "nvfp4", "compressed-tensors"])
def test_embeddings_that_are_stored_quantized_are_dequantized(storage, checkpoints, tmp_path, tiny: Config):
    """Their rows are looked up. Those of the MTP layer too; the head may stay as it is."""
    folder = checkpoints[storage]
    config, arrays = json.loads((folder / "config.json").read_text()), fakes.load(folder)
    stem = next(name for name in arrays if "layers.0.mlp.up_proj" in name and name.endswith(("weight", "packed")))
    stem = stem.removesuffix("_packed").removesuffix(".weight")
    for name in ("model.embed_tokens", f"model.layers.{tiny.num_hidden_layers}.embed_tokens"):
        del arrays[f"{name}.weight"]
        if storage == "fp8":
            arrays[f"{name}.weight"] = np.ones((tiny.vocab_size, tiny.hidden_size), ml_dtypes.float8_e4m3fn)
            arrays[f"{name}.weight_scale_inv"] = np.ones((-(-tiny.vocab_size // 128), 1), np.float32)
            continue
        packed = "_packed" if storage == "compressed-tensors" else ""
        codes = np.full((tiny.vocab_size, tiny.hidden_size // 2), 0x21, np.uint8)
        arrays[f"{name}.weight{packed}"] = codes
        arrays[f"{name}.weight_scale"] = np.ones((tiny.vocab_size, tiny.hidden_size // 16), ml_dtypes.float8_e4m3fn)
        arrays[f"{name}.weight{'_global_scale' if packed else '_scale_2'}"] = np.ones(1, np.float32)
    whole = planned(tmp_path / "a", config, arrays)
    for path in ("embed_VD", "mtp.embed_VD"):
        (leaf,) = (leaf for leaf in whole.leaves if leaf.leaf.path == path)
        assert leaf.form.format == "dense"
        assert f"{path} is dequantized to bfloat16: its rows are looked up" in whole.notes
    manifest = convert.convert(tmp_path / "a", tmp_path / "b")
    assert manifest.leaves["embed_VD"].format == "dense" and manifest.leaves["mtp.embed_VD"].format == "dense"


def test_an_announced_mtp_layer_may_be_absent(original, tmp_path, tiny: Config):
    config, arrays = original
    whole = planned(tmp_path / "a", config, without(arrays, f"layers.{tiny.num_hidden_layers}."))
    assert whole.config["num_nextn_predict_layers"] == 0
    assert any("converted without MTP" in note for note in whole.notes)
    assert not any(leaf.leaf.path.startswith("mtp") for leaf in whole.leaves)


def test_assumed_values_of_the_config_are_noted(original, tmp_path):
    config, arrays = original
    stated = {key: value for key, value in config.items() if key != "norm_topk_prob"}
    whole = planned(tmp_path / "a", stated, arrays)
    assert "config.json does not state norm_topk_prob; assumed to be true" in whole.notes


def test_copies_that_are_left_out_are_shared(original, tmp_path):
    config, arrays = original
    whole = planned(tmp_path / "a", config, without(arrays, "layers.3.embed_tokens", "layers.3.shared_head.head"))
    shared = {leaf.leaf.path: leaf.same_as for leaf in whole.leaves if leaf.same_as}
    assert shared == {"mtp.embed_VD": "embed_VD", "mtp.head_VD": "head_VD"}


def test_a_wrong_config_is_told_before_the_tensors(original, tmp_path):
    config, arrays = original
    with pytest.raises(ConfigError, match="model_type"):
        planned(tmp_path / "a", config | {"model_type": "deepseek_v3"}, arrays)


def test_groups_are_runs_of_leaves_of_limited_size(checkpoints):
    whole = make_plan(Source(checkpoints["bf16"])).leaves
    cut = list(limits.group_leaves(whole, limits.Budget(1 << 40, 1, 50_000)))
    assert tuple(leaf for group in cut for leaf in group) == whole
    assert len(cut) > 5
    assert all(len(group) == 1 or sum(leaf.nbytes for leaf in group) <= 50_000 for group in cut)


def test_the_digest_depends_on_the_files_and_not_on_where_they_lie(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["bf16"], tmp_path / "a")
    before = make_plan(Source(checkpoints["bf16"])).digest
    os.utime(folder / "model-00002-of-00003.safetensors", (1, 1))
    assert make_plan(Source(folder)).digest == before
    (folder / "model-00002-of-00003.safetensors").rename(folder / "model-00004-of-00003.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert make_plan(Source(folder)).digest != before


def test_names_are_folded_by_layer_and_expert():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (3, 4, 7) for e in range(2)]
    assert fold_names([*names, "lm_head.weight"]) == [
        "6 x mlp.experts.*.up_proj.weight (layers 3-4, 7)",
        "lm_head.weight",
    ]
