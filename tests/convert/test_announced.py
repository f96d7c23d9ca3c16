"""What a checkpoint announces about its quantization is compared with what it holds, and the tensors win."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from convert.plan.plan import compare_declared, make_plan
from convert.read.source import Source
from convert.read.weights import detect

from . import fakes

DATA = Path(__file__).parents[1] / "data"
GROUPS = {"config_groups": {"group_0": {"weights": {"group_size": 16}, "input_activations": {"group_size": 99}}}}


def notes(folder: Path) -> list[str]:
    return [note for note in make_plan(Source(folder)).notes if "declared" in note]


@pytest.mark.parametrize("folder", sorted(DATA.glob("golden_nvfp4/v*")), ids=lambda folder: folder.name)
def test_what_the_real_tools_announce_is_what_they_write(folder):
    assert notes(folder) == []


@pytest.mark.parametrize(
    "config, beside, said",
    [
        ({}, None, None),
        ({"quant_algo": "NVFP4", "group_size": 32}, None, None),
        ({"quant_algo": "NVFP4", "group_size": 16}, None, "3 weights with a scale per 32 inputs.*group_size is 16"),
        (GROUPS, None, "the declared group_size is 16: the scales decide"),
        ({}, {"quantization": {"group_size": 16}}, "group_size is 16"),
        ({"quantized_layers": {"a": {"group_size": 32}, "b": {"group_size": 16}}}, None, None),
        ({"group_size": True, "config_groups": [1], "quantized_layers": {"a": 3}}, [], None),
    ],
)
def test_blocks_of_another_size_are_noted(config, beside, said, checkpoints):
    tensors = Source(checkpoints["nvfp4"]).tensors
    names = [name for name in tensors if name.endswith("gate_proj.weight")][:3]
    stored = [dataclasses.replace(detect(name, tensors), block=32) for name in names]
    found = list(compare_declared({"quantization_config": config}, beside, stored))
    assert (found == []) == (said is None) and (said is None or re.search(said, found[0]))


def test_a_format_that_is_not_there_is_noted(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["bf16"], tmp_path / "hf")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert notes(folder) == ["the declared quant_algo is NVFP4, but no weight is NVFP4: the tensors decide"]


def test_a_damaged_announcement_is_told(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["bf16"], tmp_path / "hf")
    (folder / "hf_quant_config.json").write_bytes(fakes.file_bytes({}))
    with pytest.raises(ValueError, match="cannot read .*hf_quant_config.json"):
        Source(folder)
