"""Memory: predicted from the plan, kept to while it works, refused when it cannot do."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.conversion import prepare
from convert.plan import limits
from convert.read.weights import detect
from convert.transform import cut
from convert.transform.cut import PlannedLeaf
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.errors import CapacityError
from dsv32_jax.layout import leaves
from dsv32_jax.quantization.quantize import fp8_quantize, nvfp4_quantize
from dsv32_jax.system.progress import parse_size

from . import fakes

REPOSITORY = Path(__file__).parents[2]

MEASURED = r"""
import json, os, re, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import convert
src, dst, options = sys.argv[1:]
convert.convert(src, dst, **json.loads(options))
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""
"""The kernel's own high-water mark: ru_maxrss would start with that of the process which forked this one."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny):
    """Leaves of 25 MB in NVFP4 and 50 MB in FP8."""
    cfg = dataclasses.replace(
        tiny, hidden_size=1024, moe_intermediate_size=2048, n_routed_experts=24, num_hidden_layers=2, vocab_size=512
    )
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0, first_k_dense_replace=1)
    root = tmp_path_factory.mktemp("wide")
    random_checkpoint.write(root / "hf", cfg, "fp8")
    return root / "hf"


def test_systems_without_affinity_have_cores(monkeypatch):
    """macOS has no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert limits.make_budget("8GiB", None).workers == os.cpu_count()


def test_the_smallest_limit_that_works_is_told_and_works(wide, tmp_path):
    with pytest.raises(CapacityError, match=r"layers.1.ffn.w_gate_EMD .*max_memory=\"\d+MB\"") as caught:
        prepare(wide, tmp_path / "out", {"max_memory": "150MB"})
    smallest = str(caught.value).split('"')[-2]
    plan, budget, _ = prepare(wide, tmp_path / "out", {"max_memory": smallest})
    assert limits.peak_memory(plan.leaves, budget) <= parse_size(smallest)
    with pytest.raises(CapacityError):
        prepare(wide, tmp_path / "out", {"max_memory": parse_size(smallest) - 10**6})


def test_workers_and_overlap_are_given_up_for_memory(wide, tmp_path):
    def peak(**options):
        plan, budget, _ = prepare(wide, tmp_path / "out", options)
        return limits.peak_memory(plan.leaves, budget)

    roomy, tight = peak(max_memory="8GiB", workers=64), peak(max_memory="380MiB", workers=64)
    assert tight <= 380 << 20 < roomy < 8 << 30
    assert peak(max_memory="8GiB", workers=1) < roomy


@pytest.mark.parametrize("options", [{"max_memory": "380MiB"}, {"max_memory": "8GiB", "to": "nvfp4"}])
def test_what_is_taken_is_what_was_predicted(options, wide, tmp_path):
    plan, budget, _ = prepare(wide, tmp_path / "out", {**options, "workers": 2})
    predicted = limits.peak_memory(plan.leaves, budget)
    command = [sys.executable, "-c", MEASURED, str(wide), str(tmp_path / "out"), json.dumps({**options, "workers": 2})]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    taken = int(done.stdout)
    assert predicted * 0.4 < taken <= predicted <= budget.limit, f"{taken / 1e6:.0f} of {predicted / 1e6:.0f} MB"


@pytest.mark.parametrize("most, one", [("nvfp4", "bf16"), ("fp8", "bf16"), ("nvfp4", "fp8"), ("fp8", "nvfp4")])
def test_experts_of_mixed_formats_take_what_dequantizing_takes(most, one, tiny):
    """One expert is stored otherwise, so all become bfloat16: their values in between are counted."""
    cfg = dataclasses.replace(tiny, hidden_size=2048, moe_intermediate_size=1024, n_routed_experts=6)
    leaf = next(leaf for leaf in leaves(cfg) if leaf.path == "layers.1.ffn.w_up_EMD")
    w = np.random.default_rng(0).standard_normal(leaf.source_shape, np.float32).astype(ml_dtypes.bfloat16)
    (codes, scale, scalar), (values, grid) = nvfp4_quantize(w), fp8_quantize(w)
    kinds = {
        "bf16": {"": w},
        "fp8": {"": values, "_scale_inv": grid},
        "nvfp4": {"": codes, "_scale": scale, "_scale_2": scalar.reshape(())},
    }
    experts = {name: kinds[one if expert == 3 else most] for expert, name in enumerate(leaf.sources)}
    arrays = {name + suffix: array for name, parts in experts.items() for suffix, array in parts.items()}
    found = tuple(detect(name, fakes.tensors(arrays)) for name in experts)
    form = cut.choose_format(leaf, found)
    planned = PlannedLeaf(leaf, found, form, cut.list_arrays(leaf, form))
    predicted = limits.peak_memory([planned], limits.Budget(8 << 30, 1, fixed=0))
    tracemalloc.start()
    cut.build(leaf, found, form, lambda tensor: arrays[tensor.name].copy())
    _, taken = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert form.dequantized and 0.8 < taken / predicted < 1.06, f"{taken / 1e6:.1f} of {predicted / 1e6:.1f} MB"
