"""Which weight becomes what: presets, files, and what cannot be asked for."""

import collections
import dataclasses
import json
import types
from pathlib import Path

import pytest

from convert.plan.plan import make_plan
from convert.plan.policy import DEFAULTS, LINEARS, PRESETS, FormatChooser, Policy, make_policy, make_recipe
from convert.read.safetensors import Tensor
from convert.read.weights import StoredWeight
from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError
from dsv32_jax.layout import leaves


def tensor(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name, Path("no-file"), dtype, shape, 0, 0)


def stored(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (32, 64)) -> StoredWeight:
    if dtype == "F8_E4M3":
        grid = tensor(name + "_scale_inv", "F32", 1, 1)
        return StoredWeight("deepseek-fp8", "fp8_block", shape, 128, tensor(name, dtype, *shape), grid)
    return StoredWeight("dense", "dense", shape, 1, tensor(name, dtype, *shape))


def as_shipped(cfg: Config) -> types.SimpleNamespace:
    """The headers of a checkpoint of `cfg` as DeepSeek ships it: FP8 with grids of scales, the rest in bfloat16."""
    tensors = {}
    for leaf in leaves(cfg):
        for name in leaf.sources:
            quantized = name.split(".")[-2] in LINEARS
            tensors[name] = tensor(name, "F8_E4M3" if quantized else "BF16", *leaf.source_shape)
            if quantized:
                grid = (-(-size // 128) for size in leaf.source_shape)
                tensors[name + "_scale_inv"] = tensor(name + "_scale_inv", "F32", *grid)
    folder = Path("deepseek")
    return types.SimpleNamespace(
        config=cfg.to_dict(),
        tensors=tensors,
        notes=[],
        folder=folder,
        identity=[],
        quantization=None,
        ignored_tensors=[],
    )


@pytest.fixture(scope="module")
def shipped(real):
    return as_shipped(real)


MLP_AND_O_PROJ = 58 * 3 * 257 + 3 * 3 + 61

PUBLISHED = {"full": (45_932, 0, 391.2), "nvidia": (MLP_AND_O_PROJ, 45_932 - MLP_AND_O_PROJ, 415.0)}
"""Weights that become NVFP4 and bfloat16, and 10**9 bytes: eousphoros' checkpoint and NVIDIA's recipe."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_give_the_checkpoints_that_are_published(preset, shipped):
    quantized, dequantized, size = PUBLISHED[preset]
    whole = make_plan(shipped, recipe=make_recipe("nvfp4", preset, "rtn", "own"))
    assert whole.conversions["fp8 -> nvfp4"] == quantized
    assert whole.conversions.get("fp8 -> bf16", 0) == dequantized
    assert whole.nbytes / 1e9 == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize("preset, count", [("default", MLP_AND_O_PROJ), ("experts-only", 58 * 3 * 256)])
def test_other_presets_keep_what_they_do_not_quantize(preset, count, shipped, real):
    chooser = FormatChooser(make_policy("nvfp4", preset), real.num_hidden_layers)
    linears = [name for name in shipped.tensors if name.split(".")[-2] in LINEARS and name.endswith(".weight")]
    wanted = {name: chooser.choose(stored(name, "F8_E4M3")).wanted for name in linears}
    assert collections.Counter(wanted.values()) == {"nvfp4": count, None: len(linears) - count}
    quantized = {name.split(".")[-2] for name, format in wanted.items() if format}
    expected = {"gate_proj", "up_proj", "down_proj"} | ({"o_proj"} if preset == "default" else set())
    assert quantized == expected and not any("layers.61." in name for name, format in wanted.items() if format)


def test_the_default_depends_on_the_format():
    assert make_policy() == Policy() and make_policy().otherwise == "keep"
    for to, preset in DEFAULTS.items():
        assert make_policy(to) == make_policy(to, preset)
    assert make_policy("fp8").rules == make_policy("bf16").rules == ()


@pytest.fixture
def written(tmp_path):
    def write(text: str | dict, name: str = "policy.json") -> Path:
        file = tmp_path / name
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        return file

    return write


TOML = """
[formats]
"model.layers.{mtp}.*" = "keep"
"*.kv_b_proj.weight" = "fp8"
"*.mlp.experts.*" = "nvfp4"
"""


@pytest.mark.parametrize("form", ["toml", "json"])
def test_the_first_pattern_decides(form, written):
    rules = {"model.layers.{mtp}.*": "keep", "*.kv_b_proj.weight": "fp8", "*.mlp.experts.*": "nvfp4"}
    file = written(TOML, "p.toml") if form == "toml" else written({"formats": rules})
    for to in (None, "bf16"):
        found = make_policy(to, file)
        assert found == Policy(tuple(rules.items()), to or "keep", file)
        chooser = FormatChooser(found, mtp_layer=3)
        names = {
            "model.layers.3.mlp.experts.7.up_proj.weight": None,
            "model.layers.2.mlp.experts.7.up_proj.weight": "nvfp4",
            "model.layers.2.self_attn.kv_b_proj.weight": None,
            "model.layers.2.self_attn.o_proj.weight": to,
        }
        assert {name: chooser.choose(stored(name, "F8_E4M3")).wanted for name in names} == names
    assert chooser.choose(stored("model.layers.2.self_attn.kv_b_proj.weight")).wanted == "fp8"
    assert len(chooser.list_notes()) == 1 and not chooser.impossible


PROTECTED = ["lm_head.weight", "model.layers.2.mlp.gate.weight", "model.layers.3.eh_proj.weight",
             "model.layers.2.self_attn.indexer.weights_proj.weight"]  # fmt: skip


@pytest.mark.parametrize("name", PROTECTED)
def test_other_matrices_are_quantized_only_when_they_are_named(name):
    def becomes(pattern: str, dtype: str = "BF16", to: str = "nvfp4"):
        return FormatChooser(Policy(((pattern, to),), to), 3).choose(stored(name, dtype)).wanted

    last = ".".join(name.split(".")[-2:])
    for pattern in ("*", "*.weight", name.rpartition(".")[0] + ".*", name.rpartition(".")[0] + "*weight"):
        assert becomes(pattern) is None
    assert becomes("*" + last if last == name else "*." + last) == ("nvfp4" if last != name else None)
    assert becomes(name) == "nvfp4" and becomes(name, to="fp8") == "fp8"
    assert becomes("*", "F32", "bf16") is None and becomes(name, "F32", "bf16") == "bf16"
    assert becomes("*", "F8_E4M3", "bf16") == "bf16"


IMPOSSIBLE = [
    ("model.embed_tokens.weight", (320, 96), "nvfp4", "its rows are looked up"),
    ("model.layers.3.embed_tokens.weight", (320, 96), "fp8", "its rows are looked up"),
    ("model.norm.weight", (96,), "fp8", "is not a matrix"),
    ("model.layers.0.mlp.up_proj.weight", (160, 24), "nvfp4", "its 24 inputs are not a multiple of 16"),
]


@pytest.mark.parametrize("name, shape, format, reason", IMPOSSIBLE)
def test_what_cannot_be_is_collected_with_its_reason(name, shape, format, reason):
    chooser = FormatChooser(Policy(((name, format),)), 3)
    assert chooser.choose(stored(name, shape=shape)).wanted is None
    ((found, why),) = chooser.impossible
    assert found == name and reason in why
    assert chooser.choose(stored(name, shape=shape)).wanted is None
    assert FormatChooser(Policy(((name, "bf16"),)), 3).choose(stored(name, "F32", shape)).wanted == "bf16"


def test_all_impossible_weights_are_listed_before_anything_is_written(tiny):
    odd = dataclasses.replace(tiny, moe_intermediate_size=40, q_lora_rank=24)
    with pytest.raises(UsageError, match="nothing was written") as caught:
        make_plan(as_shipped(odd), recipe=make_recipe("nvfp4", "full", "rtn", "own"))
    text = str(caught.value)
    assert f"{3 * 13 + 4 * 2} weights cannot be stored as the policy says" in text
    assert "36 x mlp.experts.*.down_proj.weight (layers 1-3): its 40 inputs are not a multiple of 16" in text
    assert "4 x self_attn.indexer.wq_b.weight (layers 0-3): its 24 inputs are not a multiple of 16" in text


BAD = {
    '{"formats": {"*": "int4", "a": "fp8", "b": 3}, "scales": "mse"}': ["3 problems", "unknown key 'scales'",
                                                                       "'int4' of '*'", "3 of 'b'"],
    '{"*": "fp8"}': ["1 problem:", "no table `formats`"],
    "[1]": ["no table `formats`"],
    '{"formats": {"*": "fp8", "*": "keep"}}': ["duplicate keys: '*'"],
    "{": ["not valid JSON"],
    "\xff": ["not valid JSON"],
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_told_with_everything_that_is_wrong(text, written):
    with pytest.raises(UsageError) as caught:
        make_policy("nvfp4", written(text))
    assert "policy.json" in str(caught.value) and "Nothing was converted" in str(caught.value)
    assert all(part in str(caught.value) for part in BAD[text])


def test_bad_toml_is_told(written):
    with pytest.raises(UsageError, match="cannot read the policy .*p.toml"):
        make_policy("nvfp4", written("[formats", "p.toml"))


def test_wrong_words_are_told_with_the_right_ones(tmp_path):
    with pytest.raises(UsageError, match='invalid to="int4": choose one of nvfp4, fp8, bf16'):
        make_policy("int4")
    with pytest.raises(UsageError, match="add to with one of nvfp4, fp8, bf16"):
        make_policy(None, "nvidia")
    with pytest.raises(UsageError, match="neither a preset .default, nvidia, full, experts-only. nor a file"):
        make_policy("nvfp4", tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot read"):
        make_policy("nvfp4", tmp_path)
    with pytest.raises(UsageError, match='invalid scales="best": choose one of rtn, mse, four-over-six'):
        make_recipe("nvfp4", None, "best", "own")
    with pytest.raises(UsageError, match='invalid tensor_scales="one": choose one of own, shared'):
        make_recipe("nvfp4", None, "rtn", "one")


def test_patterns_of_no_use_are_noted_for_files_only(tiny, written):
    """Those that match nothing, those that come too late, and those that mean no weight that is quantized."""
    patterns = {"*.experts.*": "keep", "*.typo_proj.weight": "nvfp4", "*.experts.1.*": "nvfp4", "*.gate.*": "fp8"}
    file = written({"formats": patterns})
    whole = make_plan(as_shipped(tiny), recipe=make_recipe("nvfp4", file, "rtn", "own"))
    notes = [note for note in whole.notes if "policy.json" in note]
    assert [note.split(":")[1].split(" has no effect")[0] for note in notes] == [
        " no weight matches *.typo_proj.weight",
        " *.experts.1.*",
        " *.gate.*",
        " its patterns come first",
    ]
    assert notes[-1].endswith('to="nvfp4" is for weights that match none')
    alone = make_plan(as_shipped(tiny), recipe=make_recipe(None, file, "rtn", "own"))
    assert not [note for note in alone.notes if "come first" in note]
    for other in ({"*.o_prj.weight": "nvfp4"}, {"*.gate.*": "fp8", "re:.*": "nvfp4"}):
        with pytest.raises(UsageError, match="no pattern of the policy .*json has an effect: "):
            make_plan(as_shipped(tiny), recipe=make_recipe(None, written({"formats": other}), "rtn", "own"))
    without_mtp = dataclasses.replace(tiny, num_nextn_predict_layers=0)
    assert not make_plan(as_shipped(without_mtp), recipe=make_recipe("nvfp4", "default", "rtn", "own")).notes


def test_the_digest_covers_what_the_recipe_does(tiny, written):
    source = as_shipped(tiny)

    def digest(*words: str | Path | None) -> str:
        return make_plan(source, recipe=make_recipe(*words)).digest

    usual = digest("nvfp4", None, "rtn", "own")
    others = [
        digest(None, None, "rtn", "own"),
        digest("nvfp4", "full", "rtn", "own"),
        digest("nvfp4", None, "mse", "own"),
        digest("nvfp4", None, "rtn", "shared"),
        digest("fp8", "nvidia", "rtn", "own"),
        digest("bf16", None, "rtn", "own"),
    ]
    assert len({usual, *others}) == 7
    same = written({"formats": {"model.layers.3.*": "keep", "*.o_proj.weight": "nvfp4", "*.self_attn.*": "keep"}})
    assert digest("nvfp4", same, "rtn", "own") == usual
    assert digest("bf16", None, "mse", "own") == digest("bf16", None, "rtn", "shared") == others[-1]
    assert digest(None, None, "mse", "own") == digest("fp8", None, "mse", "own") == others[0]


def test_presets_name_only_known_formats():
    assert {format for rules in PRESETS.values() for _, format in rules} == {"keep", "to", "bf16"}
