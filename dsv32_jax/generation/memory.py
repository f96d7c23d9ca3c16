"""Memory of rows: the bytes of one, the bytes that are free, the rows that fit. Nothing is allocated here."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..errors import CapacityError, argument, pluralize
from ..kernels import host_experts
from ..model import cache
from ..parallel import multihost
from ..quantization.host_weight import find_host_weights
from ..system import compilation, host
from .pages import PAGE, count_pages

CACHE_SHARE = 0.8
"""The share of free memory that caches may take; temporaries of prefill and decode steps need the rest."""

VOCABULARY_BYTES = 4 * 6
"""Bytes of a row for each token of the vocabulary: bias, counts, end tokens, logits."""


def compute_row_bytes(cfg: Config, capacity: int, dtype: np.dtype, drafts: int) -> int:
    """Return the bytes of one row: its caches, and its arrays over the vocabulary."""
    layer = jax.eval_shape(lambda: cache.empty_layer(cfg, 1, capacity, dtype))
    layer_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(layer))
    return layer_bytes * (cfg.num_hidden_layers + (drafts > 0)) + cfg.vocab_size * VOCABULARY_BYTES


def compute_page_bytes(cfg: Config, dtype: np.dtype, drafts: int) -> int:
    """Return the bytes of one page in all layers."""
    return compute_row_bytes(cfg, PAGE, dtype, drafts) - cfg.vocab_size * VOCABULARY_BYTES


def get_free_memory(devices: int = 1) -> int:
    """Return the bytes each of `devices` can still allocate. CPU devices share the memory of the host."""
    compilation.require_device()
    free = compilation.get_device_memory()
    return host.get_free_memory() // devices if free is None else free


def round_up_rows(rows: int) -> int:
    """Return the batch size that `rows` are computed in: the next power of two."""
    return 1 << (rows - 1).bit_length()


def count_local_rows(batch: int, data: int) -> int:
    """Return the rows on one device. The mesh axis "data" splits a batch if its size divides it."""
    return batch if batch % data else batch // data


def plan_batch(
    cfg: Config,
    rows: int,
    smallest: int,
    capacity: int,
    dtype: np.dtype,
    drafts: int,
    mesh: Mesh | None = None,
    extra: int = 0,
) -> int:
    """Return how many of `rows` fit in memory at once, if each takes `extra` bytes beside its caches.

    Raises CapacityError if not even `smallest` rows do.
    """
    data, devices = (1, 1) if mesh is None else (mesh.shape.get("data", 1), mesh.size)
    row_bytes = compute_row_bytes(cfg, capacity, dtype, drafts) + extra
    free = multihost.agree_on_minimum(mesh, get_free_memory(devices))
    batches = [1 << power for power in range((smallest - 1).bit_length(), (rows - 1).bit_length() + 1)]
    fitting = [batch for batch in batches if count_local_rows(batch, data) * row_bytes <= free * CACHE_SHARE]
    if not fitting:
        smaller = "" if dtype.itemsize == 1 else f", or {argument('cache_dtype', 'fp8')}"
        where = "" if devices == 1 else f" on each of {devices} devices"
        raise CapacityError(
            f"the cache of {pluralize(smallest, 'row')} of {pluralize(capacity, 'token')} needs "
            f"{smallest * row_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free{where}; nothing was run. "
            f"Use a smaller {argument('capacity')} or fewer new tokens{smaller}"
        )
    return min(rows, max(fitting))


def plan_pages(
    cfg: Config,
    rows: int,
    capacity: int,
    pages: int | None,
    dtype: np.dtype,
    drafts: int,
    mesh: Mesh | None = None,
) -> int:
    """Return how many pages an engine of `rows` rows of `capacity` tokens has: those wanted, or a power of two that
    fits in memory, at most what all rows need. Raises CapacityError if they do not fit."""
    data, devices = (1, 1) if mesh is None else (mesh.shape.get("data", 1), mesh.size)
    vocabulary = cfg.vocab_size * VOCABULARY_BYTES
    page_bytes = compute_page_bytes(cfg, dtype, drafts)
    free = multihost.agree_on_minimum(mesh, get_free_memory(devices))
    fitting = data * max(0, int(free * CACHE_SHARE - vocabulary * -(-rows // data)) // page_bytes)
    wanted = pages or min(rows * count_pages(capacity), 1 << (max(1, fitting).bit_length() - 1))
    if wanted > fitting:
        raise CapacityError(
            f"{pluralize(wanted, 'page')} of {PAGE} tokens need {wanted / data * page_bytes / 1e9:.2f} GB on a device, "
            f"but {free / 1e9:.2f} GB are free; nothing was run. Use fewer {argument('pages')} or rows, or "
            f"{argument('cache_dtype', 'fp8')}"
        )
    return wanted


def explain_exhaustion(model: Any, cache_bytes: int, error: Exception) -> Exception:
    """Return a CapacityError in place of `error` if the device or the host ran out of memory, else `error` itself."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    cause = f"({str(error).splitlines()[0][:200]})"
    fewer = f"Use a smaller {argument('batch_size')}, a smaller {argument('capacity')}"
    if host_experts.FAILED in str(error):
        return CapacityError(
            f"the host has no memory for applying its experts. The model stays usable. {fewer} {cause}"
        )
    weights = sum(array.nbytes for array in jax.tree.leaves(model))
    banks = len(find_host_weights(model)) // 3
    more = f", experts of more layers in host memory, {argument('experts', f'host:{banks + 1}')}" if banks else ""
    return CapacityError(
        f"the device is out of memory: weights take {weights / 1e9:.2f} GB, the pages of the cache "
        f"{cache_bytes / 1e9:.2f} GB, temporaries of a step the rest. The model stays usable. {fewer}{more}, or "
        f"{argument('cache_dtype', 'fp8')} {cause}"
    )
