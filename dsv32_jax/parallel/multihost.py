"""One program in several processes, each with its own devices (JAX's multi-controller runtime).

All processes run the same Python and must take the same branches. Where a branch depends on the clock, on free memory
or on Ctrl-C, they agree here. For a mesh within one process that costs nothing.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..errors import UsageError, listing, pluralize


def fetch(x: jax.Array) -> np.ndarray:
    """Return the whole array on the host. If it is spread over several processes, all of them must call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree_on_minimum(mesh: Mesh | None, nbytes: int) -> int:
    """Return the smallest of the processes' byte counts, in whole MiB if there are several."""
    if mesh is None or not mesh.is_multi_process:
        return nbytes
    return int(_gather(np.int32(nbytes >> 20)).min()) << 20


def agree_on_any(mesh: Mesh | None, answer: bool) -> bool:
    """Return whether the answer of any process is True."""
    if mesh is None or not mesh.is_multi_process:
        return answer
    return bool(_gather(np.int32(answer)).any())


def make_agreed(mesh: Mesh | None, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Return `ask` as a function that is True in every process if it is in any."""
    return lambda: agree_on_any(mesh, ask())


def require_same(mesh: Mesh | None, request: Any) -> None:
    """Raise UsageError in every process unless all have equal requests, as their `repr` tells."""
    if mesh is None or not mesh.is_multi_process:
        return
    digests = _gather(np.frombuffer(hashlib.sha256(repr(request).encode()).digest(), np.uint8))
    differing = [i for i, digest in enumerate(digests) if (digest != digests[0]).any()]
    if differing:
        raise UsageError(
            f"{pluralize(len(differing), 'process', 'processes')} of {len(digests)} got another request than process "
            f"0: {listing(differing)}; give all the same prompts and options. Nothing was run"
        )


def _gather(value: Any) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(value))
