"""Constraints of rows: which tokens may come next, and behind drafts, and how only those are sampled."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..errors import UsageError, pluralize
from ..model.model import Model
from ..parallel.sharding import shard_rows
from . import memory
from .prefill_decode import Generated, State, nothing_generated
from .row import Row
from .sampler import SamplerParams, bias_row
from .speculative import accept


class Constraint(Protocol):
    """Says after each token of a row which ones may come next. Where tokens are drafted a deep copy is asked first."""

    def allowed(self) -> np.ndarray:
        """Return whether each token may come next, bool [V]. Raises UsageError if the constraint cannot be kept."""
        ...

    def add(self, token: int) -> None:
        """Take the token that came."""
        ...


def find_allowed(model: Model, row: Row, constraint: Constraint) -> np.ndarray:
    """Return whether a row may sample each token next, bool [V]: its sampling must permit it, and the constraint allow
    it. Raises UsageError if that leaves none."""
    if row.permitted is None:
        size = model.cfg.vocab_size
        row.permitted = np.isfinite(bias_row(row.sampling, size, model.origin.tokens or size))
    allowed_V = constraint.allowed() & row.permitted
    if not allowed_V.any():
        raise UsageError(f"the constraint leaves no token to sample after {pluralize(len(row.tokens), 'new token')}")
    return allowed_V


def prepare(model: Model, rows: Iterable[Row]) -> None:
    """Find what those of these rows that have constraints may sample next, unless it is known. A row that may sample
    nothing ends with an error."""
    for row in rows:
        if row.constraint and row.allowed is None:
            try:
                row.allowed = find_allowed(model, row, row.constraint)
            except UsageError as error:
                row.interrupt(error)


def look_ahead(model: Model, rows: Sequence[Row], tokens_Bu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the last tokens and drafts of all rows, and what these rows may sample behind each, bool [c, u, V] with c
    rounded up: everything where no token is taken. A draft behind which a constraint leaves nothing becomes -1."""
    prepare(model, rows)
    tokens_Bu = tokens_Bu.copy()
    allowed_cuV = np.ones((memory.round_up_rows(len(rows)), tokens_Bu.shape[1], model.cfg.vocab_size), bool)
    for row, allowed_uV in zip(rows, allowed_cuV, strict=False):
        drafts = tokens_Bu[row.slot, 1:]
        if row.allowed is None:
            drafts[:] = -1
            continue
        allowed_uV[0] = row.allowed
        ahead = copy.deepcopy(row.constraint) if drafts.size else None
        for u, token in enumerate(drafts.tolist()):
            if ahead is None or token in row.request.end_ids or not allowed_uV[u, token]:
                break
            ahead.add(token)
            try:
                allowed_uV[u + 1] = find_allowed(model, row, ahead)
            except UsageError:
                drafts[u] = -1
                break
    return tokens_Bu, allowed_cuV


@partial(jax.jit, static_argnames="mesh")
def restrict(mesh: Mesh | None, params: SamplerParams, row_c: jax.Array, allowed_cV: jax.Array) -> SamplerParams:
    """Return parameters that forbid the rows `row_c` all but these tokens; a row beyond the batch is padding."""
    bias_cV = jnp.where(allowed_cV, jnp.float32(0), -jnp.inf)
    return shard_rows(mesh, dataclasses.replace(params, bias_BV=params.bias_BV.at[row_c].add(bias_cV, mode="drop")))


@partial(jax.jit, static_argnames=("mesh", "width"), donate_argnames="state")
def take_tokens(
    mesh: Mesh | None, each: Sequence[SamplerParams], state: State, tokens_Bu: Any, logit_BuV: jax.Array, width: int
) -> tuple[State, Generated]:
    """Return what `accept` does with tokens that were processed, and the new tokens alone."""
    generated = nothing_generated(len(tokens_Bu), len(each), width)
    return shard_rows(mesh, accept(each, state, generated, tokens_Bu, logit_BuV))
