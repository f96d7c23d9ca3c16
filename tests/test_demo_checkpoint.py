"""The checkpoint that is shipped: small enough, convertible, and better than noise."""

from pathlib import Path

import numpy as np
import pytest
from dsv32_jax.convert import convert
from safetensors import safe_open

import dsv32_jax as ds
from dsv32_jax import chat

FOLDER = Path(ds.__file__).parent / "demo_checkpoint"
FILE = FOLDER / "model-00001-of-00001.safetensors"
DENSE = ("embed_tokens", "lm_head", "mlp.gate.weight", "weights_proj", "eh_proj")

PASSAGE = ("class BaseProcess(object):", "    def terminate(")
"""Held-out text, from the first to the second. Measured: perplexity 9.09; the passage's own unigrams have 127."""

PERPLEXITY = 10.0


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "converted"
    convert(FOLDER, folder)
    return folder


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


def test_tensors():
    """At most 13 million weights; FP8 but for what DeepSeek's own checkpoint leaves in BF16 and F32."""
    weights = 0
    with safe_open(FILE, "numpy") as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            matrix = len(tensor.get_shape()) == 2
            if name.endswith("_scale_inv"):
                assert tensor.get_dtype() == "F32"
                continue
            weights += int(np.prod(tensor.get_shape()))
            plain = any(part in name for part in DENSE)
            assert tensor.get_dtype() == ("F32" if not matrix else "BF16" if plain else "F8_E4M3"), name
    assert 12_000_000 < weights <= 13_000_000


def test_nvfp4(tmp_path):
    """Every quantized matrix can become NVFP4."""
    manifest = convert(FOLDER, tmp_path / "converted", to="nvfp4", policy="full")
    formats = [entry.format for entry in manifest.leaves.values()]
    assert "fp8_block" not in formats and formats.count("nvfp4") == 90


def test_it_has_learnt_python(converted):
    """A held-out passage that is longer than index_topk, read with the tokenizer that is shipped."""
    model = ds.load(converted)
    tokenizer = chat.Tokenizer.load(converted, model.cfg)
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in PASSAGE)
    ids = [model.cfg.bos_token_id, *tokenizer.encode(text[start:end])]
    assert len(ids) > 3 * model.cfg.index_topk
    logits = np.asarray(ds.forward(model, [ids]).logits[0, :-1], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert np.exp(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean()) < PERPLEXITY
