"""One program over several processes, each with devices of its own (JAX's multi-controller runtime).

All of them run the same Python and must take the same turns. Where a turn depends on the clock, on free memory or on
Ctrl-C they agree here; for a mesh within one process that costs nothing.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..errors import UsageError


def fetch(x: jax.Array) -> np.ndarray:
    """All of `x`, wherever its pieces are; where they are in several processes, all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def least(mesh: Mesh | None, nbytes: int) -> int:
    """The smallest of the byte counts that the processes of `mesh` give, in whole MiB where there are several."""
    if mesh is None or not mesh.is_multi_process:
        return nbytes
    return int(_of_all(np.int32(nbytes >> 20)).min()) << 20


def any_of(mesh: Mesh | None, answer: bool) -> bool:
    """Whether the answer of any process of `mesh` is yes."""
    if mesh is None or not mesh.is_multi_process:
        return answer
    return bool(_of_all(np.int32(answer)).any())


def asking(mesh: Mesh | None, ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, answered alike in every process: yes where one of them says so."""
    return lambda: any_of(mesh, ask())


def require_same(mesh: Mesh | None, request: Any) -> None:
    """Raise UsageError in every process where they were not all asked the same."""
    if mesh is None or not mesh.is_multi_process:
        return
    digests = _of_all(np.frombuffer(hashlib.sha256(repr(request).encode()).digest(), np.uint8))
    differing = [i for i, digest in enumerate(digests) if (digest != digests[0]).any()]
    if differing:
        raise UsageError(
            f"{len(differing)} of {len(digests)} processes were asked something else than process 0: "
            f"{', '.join(map(str, differing[:8]))}; give all the same prompts and options. Nothing was run"
        )


def _of_all(value: Any) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(value))
