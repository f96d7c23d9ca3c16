"""From master weights to the shipped checkpoint: DeepSeek's FP8, in Hugging Face layout.

    PYTHONPATH=. python tests/demo_training/ship.py WEIGHTS WORK FOLDER

WEIGHTS is what train.py wrote, WORK what corpus.py wrote; FOLDER holds the config.json and gets the rest.
"""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from train import restore

from dsv32_jax import Config
from dsv32_jax.layout import COPIES, Leaf, leaves
from dsv32_jax.quantization.quantize import fp8_quantize

NOT_QUANTIZED = ("embed_tokens", "lm_head", "mlp.gate.", "weights_proj", "eh_proj")
"""The matrices that DeepSeek's FP8 checkpoint keeps in BF16. Gains and biases stay F32."""

TOKENIZER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<｜begin▁of▁sentence｜>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<｜end▁of▁sentence｜>",
    "model_max_length": 2048,
    "pad_token": "<｜end▁of▁sentence｜>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def main(weights: Path, work: Path, folder: Path) -> None:
    cfg = Config.from_json(folder / "config.json")
    trained = {path: np.asarray(w) for path, w in restore(weights, cfg)[1].items()}
    tensors: dict[str, np.ndarray] = {}
    for name, array in sources(cfg, trained).items():
        if array.ndim == 1:
            tensors[name] = array
        elif any(part in name for part in NOT_QUANTIZED):
            tensors[name] = array.astype(ml_dtypes.bfloat16)
        else:
            tensors[name], tensors[name + "_scale_inv"] = fp8_quantize(array)
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2, ensure_ascii=False) + "\n")
    for name in ("tokenizer.json", "heldout.txt"):
        shutil.copyfile(work / name, folder / name)


def sources(cfg: Config, trained: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint, by name: leaves that were cut from one are put together again."""
    tensors: dict[str, np.ndarray] = {}
    for leaf in leaves(cfg):
        if leaf.path not in COPIES:
            for i, name in enumerate(leaf.sources):
                part = trained[leaf.path][i] if leaf.stacked else trained[leaf.path]
                _put(tensors.setdefault(name, np.zeros(leaf.source_shape, np.float32)), leaf, part)
    return tensors


def _put(tensor: np.ndarray, leaf: Leaf, part: np.ndarray) -> None:
    """Write what `leaf` holds of `tensor` to its place."""
    if leaf.cut is None:
        tensor[...] = part.reshape(tensor.shape)
        return
    axis, size, start, stop = leaf.cut
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    runs = tensor.reshape(*before, -1, size, *after)
    runs[(*[slice(None)] * (axis + 1), slice(start, stop))] = part.reshape(*before, -1, stop - start, *after)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
