"""Bytes of a cache, and how many rows of one the free memory holds: known before anything is allocated."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..errors import CapacityError
from ..model import cache
from ..parallel import multihost
from ..system import host
from ..system.compilation import require_device

SHARE = 0.8
"""Of the free memory, the share that caches may take: steps need room for what they make on their way."""

ROW_OF_VOCABULARY = 4 * 6
"""Bytes that a row keeps for each token of the vocabulary: bias, counts, ends, logits."""


def row_bytes(cfg: Config, capacity: int, dtype: np.dtype, drafts: int) -> int:
    """Bytes of one row: its cache, and its place in what penalties, bias and log-probabilities need."""
    layer = jax.eval_shape(lambda: cache.empty_layer(cfg, 1, capacity, dtype))
    each = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(layer))
    return each * (cfg.num_hidden_layers + (drafts > 0)) + cfg.vocab_size * ROW_OF_VOCABULARY


def available(devices: int = 1) -> int:
    """Bytes that each of `devices` can still allocate; the devices of a CPU share the machine's memory."""
    require_device()
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return host.get_free_memory() // devices


def rows_bucket(rows: int) -> int:
    """How many rows are computed for `rows`: the next power of two."""
    return 1 << (rows - 1).bit_length()


def rows_of_a_device(batch: int, split: int) -> int:
    """A batch is split over the mesh axis "data" where that divides it."""
    return batch if batch % split else batch // split


def rows_at_once(
    cfg: Config,
    rows: int,
    each: int,
    capacity: int,
    dtype: np.dtype,
    drafts: int,
    mesh: Mesh | None = None,
    extra: int = 0,
) -> int:
    """How many of `rows` fit in memory together, each with `extra` bytes beside its cache; CapacityError where not
    even `each` of them do."""
    split, devices = (1, 1) if mesh is None else (mesh.shape.get("data", 1), mesh.size)
    one = row_bytes(cfg, capacity, dtype, drafts) + extra
    free = multihost.least(mesh, available(devices))
    batches = [1 << power for power in range((each - 1).bit_length(), (rows - 1).bit_length() + 1)]
    fitting = [batch for batch in batches if rows_of_a_device(batch, split) * one <= free * SHARE]
    if not fitting:
        smaller = "" if dtype.itemsize == 1 else ', or cache_dtype="fp8"'
        where = "" if devices == 1 else f" on each of {devices} devices"
        raise CapacityError(
            f"the cache of {each} rows of {capacity} tokens takes {each * one / 1e9:.2f} GB, but {free / 1e9:.2f} GB "
            f"are free{where}; nothing was run. Use a smaller capacity or fewer new tokens{smaller}"
        )
    return min(rows, max(fitting))


def exhausted(model: Any, cache_bytes: int, error: Exception) -> Exception:
    """What to raise for `error`: a CapacityError where the device has run out of memory, else the error itself."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    weights = sum(part.nbytes for part in jax.tree.leaves(model))
    return CapacityError(
        f"the device has no memory left: the weights take {weights / 1e9:.2f} GB, the caches of this batch "
        f"{cache_bytes / 1e9:.2f} GB, the rest is what a step makes on its way. The model stays usable. Use a smaller "
        f'batch_size, a smaller capacity, or cache_dtype="fp8" ({str(error).splitlines()[0][:200]})'
    )
