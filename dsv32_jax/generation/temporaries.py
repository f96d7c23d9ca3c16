"""The memory of programs beside weights and caches, by XLA's account of programs compiled for shapes alone.

A deep model is not compiled whole: a dense layer with two MoE layers, and one layer more, are extrapolated to all.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.weight_shapes import WeightShapes
from ..model.model import Model, build
from .prefill_decode import empty_caches, new_state
from .programs import WHOLE, chunk_size


class Setup(NamedTuple):
    """A model of shapes, the compute dtype, the dtype of caches, and tokens drafted a step."""

    shapes: WeightShapes
    compute: np.dtype
    cache_dtype: np.dtype
    draft: int


def measure_prefill(setup: Setup, rows: int, capacity: int) -> int:
    """Return the bytes that prefilling a chunk of every row takes beside weights and caches."""

    def measure(model: Model) -> int:
        caches = partial(empty_caches, model.cfg, rows, capacity, setup.cache_dtype, setup.draft)
        state = jax.eval_shape(lambda: new_state(model, caches(), setup.draft))
        tokens = jax.ShapeDtypeStruct((rows, min(chunk_size(rows), capacity)), jnp.int32)
        count = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return count_temporary(WHOLE.prefill.lower(model, state, tokens, tokens, count, count))

    shallow, deeper = (build_shallow(setup.shapes, setup.compute, more) for more in (0, 1))
    missing = setup.shapes.cfg.num_hidden_layers - len(shallow.layers)
    if not missing:
        return measure(shallow)
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(measure, (shallow, deeper))
    return one + max(0, two - one) * missing


def build_shallow(shapes: WeightShapes, compute: np.dtype, more: int) -> Model:
    """Return a model of shapes: a dense layer, two MoE layers and `more` others, and MTP."""
    cfg, dense = shapes.cfg, shapes.cfg.first_k_dense_replace
    mlps, moes = range(dense), range(dense, cfg.num_hidden_layers)
    layers = sorted([*mlps[:1], *moes[:2], *[*moes[2:], *mlps[1:]][:more]])
    shallow = dataclasses.replace(
        cfg, num_hidden_layers=len(layers), first_k_dense_replace=sum(i < dense for i in layers)
    )

    def get_weight(path: str) -> Any:
        part, _, rest = path.partition(".")
        i, _, name = rest.partition(".")
        return shapes.get_loaded(f"layers.{layers[int(i)]}.{name}" if part == "layers" else path, compute)

    return build(shallow, compute, get_weight)


def count_temporary(lowered: Any) -> int:
    """Return the bytes of a program's temporaries, and of results that do not reuse the memory of an argument."""
    sizes = lowered.compile().memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
