"""The golden cases: checkpoints in Hugging Face layout with tensors that the reference implementations made of them.

A case in tests/data and the same case in the whole sets (`--shared`) go through the same code: every golden tensor that
is present is compared, and `Case.expect` fails where one that must be present is not.
"""

import functools
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import dsv32_jax as ds
from dsv32_jax.config import Config
from dsv32_jax.model.cache import empty_layer
from dsv32_jax.model.ops import hadamard, rms_norm, rotation
from dsv32_jax.quantization.formats import NVFP4, Fp8Block, dequantize

DTYPES = {
    "BOOL": np.bool_,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}

figures: dict[str, dict[str, float]] = {}
"""The largest difference seen for each case and quantity; printed at the end of a run."""


def header(file: Path) -> dict:
    """What a safetensors file says it holds."""
    with open(file, "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        found = json.loads(stream.read(size))
    found.pop("__metadata__", None)
    return {name: {**entry, "start": 8 + size} for name, entry in found.items()}


def read(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    raw = Path(file).read_bytes()

    def tensor(entry):
        first, last = (entry["start"] + offset for offset in entry["data_offsets"])
        return np.frombuffer(raw[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])

    return {name: tensor(entry) for name, entry in header(file).items()}


def cases(root: Path) -> list[Path]:
    """The folders of `root` that hold a golden checkpoint."""
    return sorted(file.parent for file in root.glob("golden*/*/golden.safetensors"))


def having(tensor: str):
    """Marks a test for the cases whose golden.safetensors holds a tensor whose name starts with `tensor`."""

    def mark(test):
        test.needs = lambda folder: any(name.startswith(tensor) for name in header(folder / "golden.safetensors"))
        return test

    return mark


@functools.cache
def case(folder: Path, scratch: Path) -> "Case":
    """The case in `folder`; one object a session, so that conversion and programs are shared."""
    return Case(folder, scratch, read(folder / "golden.safetensors"))


class Case:
    """A golden checkpoint: `tensors` made by the reference, and what this code makes of the same weights, on demand."""

    def __init__(self, folder: Path, scratch: Path, tensors: dict[str, np.ndarray]):
        self.folder, self.scratch, self.tensors, self.name = folder, scratch, tensors, folder.name
        readme = folder / "README.json"
        self.readme = json.loads(readme.read_text()) if readme.exists() else {}

    def __getitem__(self, name: str) -> np.ndarray:
        assert name in self.tensors, f"{self.folder / 'golden.safetensors'} must hold {name}"
        return self.tensors[name]

    def layers(self, name: str) -> dict[int, np.ndarray]:
        """The tensors `name` with {} standing for the layer, by layer; there must be one."""
        first, _, last = name.partition("{}")
        found = {
            int(key[len(first) : -len(last) or None]): value
            for key, value in self.tensors.items()
            if key.startswith(first) and key.endswith(last) and key[len(first) : -len(last) or None].isdigit()
        }
        assert found, f"{self.folder / 'golden.safetensors'} must hold {name} for some layer"
        return found

    def record(self, what: str, value: float) -> float:
        """`value`, noted for the summary."""
        row = figures.setdefault(self.name, {})
        row[what] = max(row.get(what, 0.0), float(value))
        return value

    def close(self, what: str, got, want: np.ndarray, tolerance: float) -> None:
        """Assert that `got` is within `tolerance` of `want` everywhere, and note how close it is."""
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert got.shape == want.shape, f"{self.name} {what}: {got.shape} instead of {want.shape}"
        off = float(np.abs(got - want).max())
        assert self.record(what, off) <= tolerance, f"{self.name} {what}: off by {off}, {tolerance} is allowed"

    @functools.cached_property
    def stored(self) -> dict[str, np.ndarray]:
        """Every tensor of the checkpoint, as it lies in the shards."""
        shards = sorted(self.folder.glob("model*.safetensors"))
        return {name: array for file in shards for name, array in read(file).items()}

    @functools.cached_property
    def converted(self) -> Path:
        """The Orbax checkpoint that the converter makes of the folder."""
        import convert

        target = self.scratch / f"converted-{self.name}"
        convert.convert(self.folder, target)
        return target

    @functools.cached_property
    def model(self) -> ds.Model:
        """The loaded model, computing in float32."""
        return ds.load(self.converted, dtype=jnp.float32)

    @property
    def cfg(self) -> Config:
        return self.model.cfg

    @property
    def ids(self) -> np.ndarray:
        return self["input_ids"]

    @functools.cached_property
    def prefill(self) -> ds.Output:
        """The whole prompt in one forward, with room for the continuation."""
        return ds.forward(self.model, self.ids, capacity=self.ids.shape[1] + 16, seen=True)

    @functools.cached_property
    def steps(self) -> list[ds.Output]:
        """One forward for each token of the golden continuation but the last, over the cache of `prefill`."""
        cache, outputs = self.prefill.cache, []
        for token_B in self["decode.gen_ids"].T[:-1]:
            outputs.append(ds.forward(self.model, token_B[:, None], cache=cache, seen=True))
            cache = outputs[-1].cache
        return outputs

    @functools.cached_property
    def drafts(self):
        """The MTP layer over slots 0 .. S+14: logits and what was seen, from this code's own hidden vectors."""
        hidden = jnp.concatenate([out.hidden for out in (self.prefill, *self.steps)], axis=1)
        return hidden, *draft(self.model, hidden, jnp.asarray(self["mtp.next_ids"]))

    @functools.cached_property
    def index_inputs(self) -> list[tuple[jax.Array, jax.Array]]:
        """Queries (before Hadamard) and head weights of each layer's indexer over the prompt."""
        position = jnp.broadcast_to(jnp.arange(self.ids.shape[1], dtype=jnp.int32), self.ids.shape)
        return [
            _index_inputs(layer, seen.x_BTD, position)
            for layer, seen in zip(self.model.layers, self.prefill.seen, strict=True)
        ]


@jax.jit
def draft(model: ds.Model, hidden, next_ids):
    """Logits of the MTP layer over all slots from the first, and what was seen."""
    batch, slots = next_ids.shape
    position = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    h, _, seen = model.mtp.observe(hidden, next_ids, empty_layer(model.cfg, batch, slots, model.dtype), position)
    return model.mtp.logits(h), seen


@jax.jit
def _index_inputs(layer, x, position):
    cfg = layer.cfg
    h = rms_norm(x, layer.attn_norm_D, cfg.rms_norm_eps)
    q = layer.indexer.queries(layer.mla.latent_query(h), *rotation(position, cfg))
    return hadamard(q), layer.indexer.head_weights(h)


def sets(positions) -> list[frozenset]:
    """The selections of [..., k] positions, -1 meaning none, as sets."""
    positions = np.asarray(positions)
    return [frozenset(row[row >= 0].tolist()) for row in positions.reshape(-1, positions.shape[-1])]


def routed(routing) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and gate weights in the golden's order, which is that of the ids."""
    ids, weights = np.asarray(routing.expert_BTX), np.asarray(routing.gate_BTX)
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def is_weight(x) -> bool:
    """Whether `x` is a weight in some format."""
    return isinstance(x, NVFP4 | Fp8Block)


def rounded(model: ds.Model) -> ds.Model:
    """`model` with every matrix rounded to bfloat16, and stored so."""

    def leaf(w):
        if is_weight(w) or w.ndim >= 2:
            return dequantize(w, jnp.float32).astype(jnp.bfloat16)
        return w

    return jax.tree.map(leaf, model, is_leaf=is_weight)
