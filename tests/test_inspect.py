"""Single weights in either layout, their statistics and placement; trees; labelled figures."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import configs
import convert
import dsv32_jax as ds
from dsv32_jax import inspect
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.config import Config
from dsv32_jax.errors import CapacityError, CheckpointError, UsageError, VerificationError, pluralize
from dsv32_jax.inspect.traces import Trace
from dsv32_jax.inspect.weights import StoredWeight
from dsv32_jax.layout import leaves
from dsv32_jax.parallel import sharding
from dsv32_jax.quantization import quantize
from dsv32_jax.quantization.formats import dequantize
from dsv32_jax.system import host
from tests import models

REPOSITORY = Path(__file__).parents[1]

BANK = "layers.1.ffn.w_up_EMD"


@pytest.fixture(scope="module")
def small(tiny):
    return dataclasses.replace(tiny, num_hidden_layers=2)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """An FP8 checkpoint: source, converted unchanged, and converted to NVFP4."""
    root = tmp_path_factory.mktemp("inspect")
    random_checkpoint.write(root / "hf", small, "fp8")
    convert.convert(root / "hf", root / "same")
    convert.convert(root / "hf", root / "nvfp4", to="nvfp4")
    return {name: inspect.Folder(root / name) for name in ("hf", "same", "nvfp4")}


def test_every_weight_is_the_loaded_one(folders, small):
    """Either layout gives, by the model's paths, the values that the model computes with."""
    model = ds.load(folders["same"].folder, dtype=jnp.float32)
    named, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: hasattr(x, "block_scale"))
    loaded = {jax.tree_util.keystr(keys, simple=True, separator="."): weight for keys, weight in named}
    assert set(loaded) == set(folders["hf"].table) == set(folders["same"].table)
    for path, want in loaded.items():
        for name in ("hf", "same"):
            got = folders[name].weight(path)
            assert got.shape == want.shape and got.letters == path.rpartition("_")[2]
            np.testing.assert_array_equal(got.values(), dequantize(want, jnp.float32), err_msg=f"{name} {path}")
    assert folders["hf"].config == folders["same"].config == small


@pytest.mark.parametrize("name", ["hf", "nvfp4"])
def test_one_expert_is_its_part_of_the_bank(folders, name):
    """One expert equals its slice of the bank, in every component."""
    bank = folders[name].weight(BANK)
    for expert in (0, bank.shape[0] - 1):
        one = folders[name].weight(BANK, expert)
        assert one.shape == bank.shape[1:] and one.letters == "MD" and one.path == f"{BANK}[{expert}]"
        np.testing.assert_array_equal(one.values(), bank.values()[expert])


def test_one_expert_is_read_alone(folders, monkeypatch):
    """No byte of the other experts of a converted bank is read."""
    arrays, asked = folders["nvfp4"]._reader._reader, []
    count = len(folders["nvfp4"].weight(BANK).parts)
    read = arrays.read
    monkeypatch.setattr(arrays, "read", lambda key, *rows: asked.append(rows) or read(key, *rows))
    folders["nvfp4"].weight(BANK, 3)
    assert asked == [(3, 4)] * count and count == 3


def test_a_layer(folders, small):
    """All weights of a decoder layer, or of the MTP layer."""
    layer = folders["same"].layer(0)
    assert {f"layers.0.{name}" for name in layer} == {leaf.path for leaf in leaves(small) if "layers.0." in leaf.path}
    assert "block.ffn.w_up_EMD" in folders["same"].layer("mtp")


def test_errors_are_those_of_the_quantizer(folders, small):
    """About 10 % for NVFP4, zero for unchanged weights; one error for each expert."""
    errors = inspect.expert_errors(folders["nvfp4"], folders["hf"])
    assert errors.shape == (1, small.n_routed_experts) and (0.05 < errors).all() and (errors < 0.15).all()
    assert not inspect.expert_errors(folders["same"], folders["hf"], [1]).any()
    a, b = (folders[name].weight(BANK, 2) for name in ("hf", "nvfp4"))
    error = np.linalg.norm(b.values() - a.values()) / np.linalg.norm(a.values())
    assert a.error(b) == pytest.approx(error, rel=1e-5) and a.error(a) == 0
    zero = dataclasses.replace(a, format="dense", parts={"values": np.zeros(a.shape, np.float32)})
    assert zero.error(zero) == 0 and zero.error(a) == np.inf


def stored(w: np.ndarray) -> StoredWeight:
    """`w` in NVFP4."""
    parts = dict(zip(("codes", "block_scale", "tensor_scale"), quantize.nvfp4_quantize(w), strict=True))
    return StoredWeight("w", "nvfp4", "MD", w.shape, parts)


def test_counts():
    """Codes, scales, zero and saturated blocks of a small known matrix."""
    w = np.zeros((2, 32), np.float32)
    w[0, :16] = 6 * 448
    w[1, :2] = (0.5, -6)
    found = inspect.statistics(stored(w))
    assert found.blocks == 4 and found.zero_blocks == 2 and found.saturated_blocks == 1
    assert found.codes[7] == 16 and found.codes[15] == 1 and found.codes[1] == 1 and found.codes.sum() == 64
    assert found.scales.sum() == 4 and found.scales[np.float32(448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)] == 1
    dense = StoredWeight("w", "dense", "MD", w.shape, {"values": w})
    assert inspect.count_clipped(stored(w), dense) == 0
    assert inspect.count_clipped(stored(w), dataclasses.replace(dense, parts={"values": 1.2 * w})) >= 16
    with pytest.raises(UsageError, match="w is dense; only NVFP4"):
        inspect.statistics(dense)


def test_misuse(folders, tmp_path, monkeypatch):
    """Unknown names, experts and layers; empty folders; damage; too little memory."""
    folder = folders["nvfp4"]
    for call, text in (
        (lambda: folder.weight("layers.9.ffn.w_up_EMD"), r"no weight 'layers.9.ffn.w_up_EMD'.*layers.1.ffn.w_up_EMD"),
        (lambda: folder.weight("norm_D", 1), "has no experts"),
        (lambda: folder.weight(BANK, 99), "from 0 to 11, not 99"),
        (lambda: folder.weight(BANK, True), "not True"),
        (lambda: folder.weight(None), "its path, a string, not None"),
        (lambda: inspect.statistics("weight"), "as Folder.weight returns it, not 'weight'"),
        (lambda: inspect.count_clipped(folder.weight(BANK), folder.weight(BANK, 0)), r"is \[.*is \["),
        (lambda: inspect.expert_errors("a", folder), "two inspect.Folder, not 'a'"),
        (lambda: inspect.expert_errors(folder, folder, 1), "a list of layers, not 1"),
        (lambda: inspect.placement(folder.config, BANK, 4), "a mesh must be like"),
        (lambda: inspect.placement(None, BANK, "expert=2"), "model.cfg"),
        (lambda: folder.layer(7), "no layer 7; layers are 0 to 1"),
        (lambda: folder.weight("norm_D").error(folder.weight(BANK, 0)), "shapes must be equal"),
        (lambda: inspect.expert_errors(folder, folder, [0]), "no routed experts in layers 0; 1 to 1 have"),
        (lambda: inspect.tree(folder.config), "a folder, a config.json or a Model, not Config"),
        (lambda: inspect.placement(folder.config, "nothing", "expert=2"), "no weight 'nothing'"),
        (lambda: inspect.placement(folder.config, BANK, "rows=2"), "invalid mesh"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
    assert folder.weight(BANK, np.int32(3)).shape == folder.weight(BANK, 3).shape
    with pytest.raises(CapacityError, match="expert=5 "):
        inspect.placement(folder.config, BANK, "expert=5")
    with pytest.raises(CheckpointError):
        inspect.Folder(tmp_path)
    arrays = folder._reader._reader
    read = arrays.read
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "read", lambda *key: read(*key).copy() * 0)
        with pytest.raises(VerificationError, match="norm_D.values is damaged"):
            folder.weight("norm_D")
    monkeypatch.setattr(host, "get_free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="nothing was read"):
        folder.weight(BANK)


def test_a_tree_of_the_real_model():
    """61 layers, folded to three groups, as text and as HTML."""
    tree = inspect.tree(configs.path("deepseek_v32"))
    text, page = repr(tree), tree._repr_html_()
    assert "layers 3-60" in text and "layers 3-60: 6" in page and page.count("<details>") == 3
    assert "58 x [256, 2048, 7168]" in page and "411.33 GB" in page


def test_trees_agree(folders):
    """A folder and the model loaded from it have the same parameters and sizes; names are escaped in HTML."""
    folder, loaded = inspect.tree(folders["same"].folder), inspect.tree(ds.load(folders["same"].folder))
    rows = [[(row.name, row.shape, row.count) for b in tree.found.tree for row in b.rows] for tree in (folder, loaded)]
    assert sorted(rows[0]) == sorted(rows[1]) and folder.found.parameters == loaded.found.parameters
    folder.found.tree[0].rows[0].name = "<script>\x1b"
    assert "&lt;script&gt;\\x1b" in folder._repr_html_() and "<script" not in folder._repr_html_()


@pytest.mark.parametrize("path", [BANK, "layers.0.mla.w_o_DHP", "norm_D", "layers.0.ffn.w_gate_FD"])
def test_placement_is_that_of_jax(small, path):
    """Placements equal JAX's shardings, device by device and for every rank; sizes add up."""
    cfg = dataclasses.replace(small, num_attention_heads=6)
    placed = inspect.placement(cfg, path, "expert=4,model=2")
    (leaf,) = (leaf for leaf in leaves(cfg) if leaf.path == path)
    mesh = ds.mesh("expert=4,model=2")
    indices = sharding.leaf_sharding(mesh, leaf, leaf.shape).devices_indices_map(leaf.shape)
    for device, part in zip(mesh.devices.flat, placed.shards, strict=True):
        assert part == tuple(s.indices(n)[:2] for s, n in zip(indices[device], leaf.shape, strict=True))
    assert placed.copies * len(set(placed.shards)) == 8
    assert f"{pluralize(len(set(placed.shards)), 'shard')}, " in repr(placed) and len(repr(placed).splitlines()) == 9


def test_attention_mass(small):
    """The share is 1 while everything is selected, then smaller, and never above the best choice."""
    model = models.random_model(dataclasses.replace(small, num_nextn_predict_layers=0))
    long = small.index_topk + 24
    trace = inspect.trace(model, [list(range(5, 5 + long)), [5, 6, 7]], {"mass"})
    kept, best = trace["mass_selected"], trace["mass_best"]
    assert kept.shape == (2, 2, long) and np.isnan(kept[:, 1, 3:]).all()
    np.testing.assert_allclose(kept[:, 0, : small.index_topk], 1, atol=1e-5)
    np.testing.assert_allclose(kept[:, 1, :3], 1, atol=1e-5)
    later = slice(small.index_topk, None)
    for share in (kept, trace["mass_recent"]):
        assert (share[:, 0, later] < best[:, 0, later] + 1e-5).all() and (share[:, 0, later] > 0).all()
    assert (best[:, 0, later] < 1).all()


def made_up_trace(cfg: Config) -> Trace:
    """A trace of two rows with routing and indexer."""
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.integers(3, 99, (2, 30)).astype(np.int32),
        "length": np.array([30, 15], np.int32),
        "expert": rng.integers(0, cfg.n_routed_experts, (1, 2, 30, 2)).astype(np.int32),
        "selected": np.tile(np.arange(20, dtype=np.int32), (2, 2, 30, 1)),
        "index_score": rng.standard_normal((2, 2, 30, 20)).astype(np.float32),
    }
    arrays["expert"][:, 1, 15:] = -1
    return Trace(("routing", "indexer"), arrays, {"config": cfg.to_dict()})


def test_without_matplotlib():
    """The package can be imported, and figures name the missing dependency."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None;"
        "import dsv32_jax as ds; from dsv32_jax.inspect import *; help(ds.inspect); ds.inspect.plots.Picture()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "figures need matplotlib" in done.stderr.splitlines()[-1] and "NAME" in done.stdout


def test_figures(small):
    """Every function returns a figure that can be drawn, with labelled axes."""
    from dsv32_jax.inspect import plots

    made, cfg = made_up_trace(small), small
    assert made.count_experts().sum() == 2 * (30 + 15)
    found = inspect.statistics(stored(np.random.default_rng(0).standard_normal((32, 64), np.float32)))
    shares = np.random.default_rng(0).random((2, 1, 40))
    mass = Trace(("mass",), dict.fromkeys(("mass_selected", "mass_best", "mass_recent"), shares), made.about)
    first = np.zeros((2, 30), bool)
    first[:, :5] = True
    figures = [
        plots.codes(found),
        plots.scales(found),
        plots.bars({"RTN": 9.5, "MSE": 8.1}, "error (%)"),
        plots.heat(np.full((1, 12), 0.09), "expert", "layer", "error (%)", [1]),
        plots.expert_load(made),
        plots.experts_by_kind(made, 1, {"first": first, "others": ~first}),
        plots.attention_mass(mass, 10),
        plots.heat(mass["mass_selected"][:, 0], "position", "layer", "attention mass kept"),
        plots.selection(made, 1),
        plots.needle(np.array([[1, 30, 200], [5, 9, 3]]), 20, ["a", "\n", "$"]),
        plots.sharding(inspect.placement(cfg, BANK, "expert=4,model=2")),
        plots.sharding(inspect.placement(cfg, "layers.0.indexer.w_k_JD", "expert=4,model=2")),
        plots.sharding(inspect.placement(cfg, "norm_D", "expert=4,model=2")),
        plots.stacks({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 2.0}}, "GB", "mesh"),
        plots.lines({"a": [1, 2], "b": [2, 1]}, "step", "tokens"),
        plots.lines({"a": [1, 2]}, "step", "tokens", [4, 16], {"a": [0.1, 0.2]}),
    ]
    for one in figures:
        png, shown = one._repr_png_()
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        assert png.startswith(b"\x89PNG") and (width // 2, height // 2) == (shown["width"], shown["height"])
        assert shown["alt"] == repr(one)
        assert one.axes.get_xlabel() or one.axes.get_xticklabels()
        assert one.axes.get_ylabel()


def test_a_trace_is_read_without_jax(tmp_path, small):
    """Loading a trace needs NumPy and safetensors only."""
    import subprocess
    import sys

    made_up_trace(small).save(tmp_path / "trace")
    assert json.loads(json.dumps(small.to_dict()))
    script = (
        "import sys, dsv32_jax as ds\n"
        f"trace = ds.inspect.Trace.load({str(tmp_path / 'trace')!r})\n"
        "assert trace['expert'].shape == (1, 2, 30, 2) and trace.config.n_routed_experts == 12\n"
        "assert 'jax' not in sys.modules\n"
    )
    made = made_up_trace(small)
    Trace(made.kinds, {**made.arrays, "gate": made["index_score"][:1, :, :, :2].copy()}, made.about).save(
        tmp_path / "trace"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
