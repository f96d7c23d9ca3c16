"""The errors of layers, against those of whole models computed in NumPy."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.checkpoint import load
from dsv32_jax.cli.eval_command import format_layers
from dsv32_jax.errors import UsageError
from dsv32_jax.evaluation import Variant, layers
from dsv32_jax.quantization import quantize
from dsv32_jax.quantization.formats import NVFP4
from tests import oracle
from tests.evaluation.conftest import Bytes

IDS = [0, *np.random.default_rng(0).integers(3, 320, 19).tolist()]
EXACT = 1e-6
"""Two programs for the same numbers may differ by a rounding."""


@pytest.fixture(scope="module")
def found(folders):
    return list(layers(folders / "bf16", folders / "nvfp4", [IDS]))


@pytest.fixture(scope="module")
def whole(folders):
    """Both models, every weight a plain array."""
    loaded = [ds.load(folders / name, dtype=np.float32) for name in ("bf16", "nvfp4")]
    return [jax.tree.map(plain, model, is_leaf=lambda node: isinstance(node, NVFP4)) for model in loaded]


def plain(w) -> np.ndarray:
    if isinstance(w, NVFP4):
        return quantize.nvfp4_dequantize(*map(np.asarray, (w.codes, w.block_scale, w.tensor_scale)))
    return np.asarray(w, np.float32)


@pytest.fixture(scope="module")
def activations(whole):
    """Inputs of attention and of feed-forward in every layer of the first model."""
    model, cfg = whole[0], whole[0].cfg
    x, found = np.float64(model.embed_VD[IDS]), []
    for layer in model.layers:
        read = oracle.rms(x, layer.attn_norm_D, cfg)
        x = x + oracle.attention(layer.mla, layer.indexer, read, cfg)
        h = oracle.rms(x, layer.ffn_norm_D, cfg)
        x = x + feed_forward(layer.ffn, h, cfg)
        found.append(SimpleNamespace(read=read, h=h))
    return found


def feed_forward(ffn, h, cfg):
    return oracle.moe(ffn, h, cfg) if hasattr(ffn, "router_ED") else oracle.mlp(h, *oracle.matrices(ffn))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(b - a) / np.linalg.norm(a)) if np.any(a) else 0.0


def test_parts(found):
    """All parts of the model, in order, with experts in MoE layers."""
    assert [error.part for error in found] == ["embedding", "layer 0", "layer 1", "head", "mtp"]
    assert [len(error.expert_weights) for error in found] == [0, 0, 12, 0, 12]


def test_weights(found, whole):
    """Each parameter is compared once; quantized ones have the error of NVFP4, others none."""
    a, b = whole
    parts = {"layer 0": (a.layers[0], b.layers[0]), "layer 1": (a.layers[1], b.layers[1]), "mtp": (a.mtp, b.mtp)}
    for error in found:
        if error.part in parts:
            leaves = zip(*(jax.tree_util.tree_flatten_with_path(part)[0] for part in parts[error.part]), strict=True)
            expected = {
                jax.tree_util.keystr(path, simple=True, separator="."): relative(one, other)
                for (path, one), (_, other) in leaves
            }
            assert error.weights == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found[1].weights["mla.w_o_DHP"] > 0.05 and found[1].weights["attn_norm_D"] == 0
    assert found[0].weights == {"embed_VD": 0} and found[3].weights == {"norm_D": 0, "head_VD": 0}


def test_weights_of_experts(found, whole):
    """The three matrices of an expert together."""
    ffn = [model.layers[1].ffn for model in whole]
    expected = [
        relative(*(np.concatenate([np.ravel(w[e]) for w in (f.w_gate_EMD, f.w_up_EMD, f.w_down_EDM)]) for f in ffn))
        for e in range(12)
    ]
    assert found[2].expert_weights == pytest.approx(expected, rel=1e-4)


def test_outputs(found, whole, activations):
    """Errors of attention and feed-forward, computed from the first model's activations."""
    for i, (error, given) in enumerate(zip(found[1:3], activations, strict=True)):
        blocks, cfg = [model.layers[i] for model in whole], whole[0].cfg
        attended = [oracle.attention(block.mla, block.indexer, given.read, cfg) for block in blocks]
        fed = [feed_forward(block.ffn, given.h, cfg) for block in blocks]
        expected = {"attention": relative(*attended), "feed-forward": relative(*fed)}
        assert error.outputs == pytest.approx(expected, rel=1e-3)
        assert min(error.outputs.values()) > 0.01
    assert found[0].outputs == {"embedding": 0} and found[3].outputs["logits"] < EXACT


def test_outputs_of_experts(found, whole, activations):
    """The error of each expert on the tokens routed to it; None without tokens."""
    h, ffn = activations[1].h, [model.layers[1].ffn for model in whole]
    sent = np.asarray(ffn[0].route(np.float32(h)[None]).expert_BTX)[0]
    for e, error in enumerate(found[2].expert_outputs):
        tokens = h[(sent == e).any(axis=1)]
        made = [oracle.mlp(tokens, *map(oracle.array, (f.w_gate_EMD[e], f.w_up_EMD[e], f.w_down_EDM[e]))) for f in ffn]
        assert error == (pytest.approx(relative(*made), rel=1e-3) if len(tokens) else None)


def test_one_layer_at_a_time(folders, monkeypatch):
    """One result reads the parameters of one part from both checkpoints."""
    asked = []
    original = load.Checkpoint.weights

    def weights(self, paths, *rest):
        asked.append({".".join(path.split(".")[:2]) if "layers" in path else path.split(".")[0] for path in paths})
        return original(self, paths, *rest)

    monkeypatch.setattr(load.Checkpoint, "weights", weights)
    streamed = layers(folders / "bf16", folders / "nvfp4", [IDS])
    assert not asked
    for expected in ("embed_VD", "layers.0", "layers.1"):
        next(streamed)
        assert asked == [{expected}] * 2
        asked.clear()


def test_misuse(folders):
    """Different models, models in memory and sizes out of range are refused at once."""
    a, b = folders / "bf16", folders / "nvfp4"
    with pytest.raises(UsageError, match="differ in 2 values, nothing was read: vocab_size: 320 and 321, index_topk: "):
        layers(a, folders / "other", [IDS])
    with pytest.raises(UsageError, match="folder of a checkpoint, not from dict"):
        layers(a, {}, [IDS])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="tokens must be an integer from 2 to 64"):
        layers(a, b, [IDS], tokens=65)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        layers(a, b, [[0, 320]])
    with pytest.raises(UsageError, match="text needs a tokenizer"):
        layers(a, b)


def test_command_line(folders, found, tmp_path, monkeypatch, capsys):
    """dsv32 eval layers --json: another text, the same weights."""
    monkeypatch.setattr(Variant, "tokenizer", lambda self: Bytes())
    (tmp_path / "text.txt").write_text("import os, sys\n" * 4)
    words = [str(folders / "bf16"), str(folders / "nvfp4"), str(tmp_path / "text.txt"), "--tokens", str(len(IDS))]
    assert cli.main(["eval", "layers", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["part"], row["weights"], row["expert_weights"]) for row in rows] == [
        (error.part, error.weights, error.expert_weights) for error in found
    ]
    assert rows[1]["outputs"]["attention"] != found[1].outputs["attention"]


def test_shown(found):
    """A line for each part, with the worst parameter and the worst expert."""
    heading, _, *lines = format_layers(found)
    assert heading.startswith("relative errors in %")
    assert len(lines) == len(found) and lines[2].startswith("layer 1")
    worst = max(found[2].expert_weights)
    assert f"({100 * worst:.2f}: {found[2].expert_weights.index(worst)})" in lines[2]
    assert f"attention {100 * found[2].outputs['attention']:.2f}," in lines[2]
