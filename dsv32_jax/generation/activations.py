"""What reading and decoding need beside weights and caches, by XLA's own account of the programs that `generate` runs.

The programs are compiled for shapes alone; no weight is allocated. A deep model is not compiled whole: the account of a
dense layer and two of experts, and of one layer more, is continued to all layers.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.arrays import dtype_of
from ..checkpoint.load import ABSORBED, FORMATS
from ..config import Config
from ..model.model import Model, build
from ..quantization.formats import Weight
from .batch import WHOLE
from .inventory import Inventory
from .options import Sampling
from .prefill_decode import Task, blank
from .request import CHUNK
from .sampling_params import knobs


class Shapes(NamedTuple):
    """What a cache is made for: rows, slots a row, the dtype it is stored in, and tokens drafted a step."""

    batch: int
    capacity: int
    dtype: np.dtype
    draft: int


def reading(inventory: Inventory, dtype: np.dtype, shapes: Shapes) -> int:
    """The most bytes that reading a chunk of every row's prompt takes on its way."""
    return _to_all_layers(_reading, inventory, dtype, shapes)


def decoding(inventory: Inventory, dtype: np.dtype, shapes: Shapes) -> int:
    """The most that decoding takes, drafts and choice of tokens included."""
    return _to_all_layers(_decoding, inventory, dtype, shapes)


def _to_all_layers(
    program: Callable[[Model, Shapes], int], inventory: Inventory, dtype: np.dtype, shapes: Shapes
) -> int:
    """The account of the whole model's `program`, on a device that computes all of it."""
    shallow, deeper = (_shallow(inventory, dtype, more) for more in (0, 1))
    missing = inventory.cfg.num_hidden_layers - len(shallow.layers)
    if not missing:
        return program(shallow, shapes)
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda model: program(model, shapes), (shallow, deeper))
    return one + max(0, two - one) * missing


def _shallow(inventory: Inventory, dtype: np.dtype, more: int) -> Model:
    """A dense layer, two of experts and `more` further ones, of shapes alone; with the drafting layer."""
    cfg, first = inventory.cfg, inventory.cfg.first_k_dense_replace
    dense, moe = range(first), range(first, cfg.num_hidden_layers)
    kept = sorted([*dense[:1], *moe[:2], *[*moe[2:], *dense[1:]][:more]])
    count = sum(i < first for i in kept)
    shallow = dataclasses.replace(cfg, num_hidden_layers=len(kept), first_k_dense_replace=count)

    def leaf(path: str) -> Weight:
        room, _, rest = path.partition(".")
        if room != "layers":
            return _weight(inventory, path, dtype)
        i, _, name = rest.partition(".")
        return _weight(inventory, f"layers.{kept[int(i)]}.{name}", dtype)

    return build(shallow, dtype, leaf)


def _weight(inventory: Inventory, path: str, dtype: np.dtype) -> Any:
    """The leaf `path` as `load` holds it, its arrays being shapes."""
    entry = inventory.entries[inventory.entries[path].same_as or path]
    if path.endswith(ABSORBED):
        return jax.ShapeDtypeStruct(inventory.table[path].shape, dtype)
    parts = {name: jax.ShapeDtypeStruct(array.shape, dtype_of(array.dtype)) for name, array in entry.arrays.items()}
    return FORMATS[entry.format](**parts) if entry.format in FORMATS else parts["values"]


def _reading(model: Model, shapes: Shapes) -> int:
    tokens = jax.ShapeDtypeStruct((shapes.batch, min(CHUNK, shapes.capacity)), jnp.int32)
    count = jax.ShapeDtypeStruct((shapes.batch,), jnp.int32)
    return _taken(WHOLE.read.lower(model, _context(model, shapes), tokens, tokens, count))


def _decoding(model: Model, shapes: Shapes) -> int:
    task, vocabulary = _task(model.cfg, shapes.batch), (shapes.batch, model.cfg.vocab_size)
    begin = partial(WHOLE.begin, slots=CHUNK, width=0, drafts=shapes.draft)
    state = jax.eval_shape(begin, model, task, _context(model, shapes), jax.ShapeDtypeStruct(vocabulary, bool))
    program = WHOLE.decode_drafting if shapes.draft else WHOLE.decode
    return _taken(program.lower(model, task, state, jax.ShapeDtypeStruct((), jnp.int32)))


def _context(model: Model, shapes: Shapes) -> Any:
    make = partial(blank, model.cfg, model.dtype, shapes.batch, shapes.capacity, shapes.dtype, shapes.draft)
    return jax.eval_shape(make)


def _task(cfg: Config, batch: int) -> Task:
    one = Task(
        knobs([Sampling()], cfg.vocab_size, cfg.vocab_size),
        jnp.zeros((1, cfg.vocab_size), bool),
        jnp.zeros(1, jnp.int32),
        jnp.zeros(1, jnp.int32),
    )
    return jax.tree.map(lambda row: jax.ShapeDtypeStruct((batch, *row.shape[1:]), row.dtype), one)


def _taken(lowered: Any) -> int:
    """Temporaries, and results that do not take the place of an argument."""
    account = lowered.compile().memory_analysis()
    return account.temp_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
