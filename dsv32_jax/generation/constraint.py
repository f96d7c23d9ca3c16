"""Constraints of rows: which tokens may come next, and behind drafts."""

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import UsageError, pluralize
from ..model.model import Model
from .row import Row
from .sampler import bias_row


class Constraint(Protocol):
    """Says after each token of a row which ones may come next. Where tokens are drafted a deep copy is asked first."""

    def allowed(self) -> np.ndarray:
        """Return whether each token may come next, bool [V]. Raises UsageError if the constraint cannot be kept."""
        ...

    def add(self, token: int) -> None:
        """Take the token that came."""
        ...


def find_bias(model: Model, row: Row, constraint: Constraint) -> np.ndarray:
    """Return what is added to the logits of a row, [V]: -inf where it may not sample a token, or the constraint does
    not allow it next. Raises UsageError if that leaves none."""
    bias_V = bias_row(row.sampling, model.cfg.vocab_size, model.origin.tokens or model.cfg.vocab_size)
    bias_V[~constraint.allowed()] = -np.inf
    if not np.isfinite(bias_V).any():
        raise UsageError(f"the constraint leaves no token to sample after {pluralize(len(row.tokens), 'new token')}")
    return bias_V


def look_ahead(
    model: Model, rows: Sequence[Row], tokens_Bu: np.ndarray
) -> tuple[np.ndarray, list[dict[Row, np.ndarray]]]:
    """Return the last tokens and drafts of all rows, and behind each draft the biases of those of these rows that have
    constraints. A draft behind which a constraint leaves nothing becomes -1."""
    tokens_Bu = tokens_Bu.copy()
    biases: list[dict[Row, np.ndarray]] = [{} for _ in tokens_Bu[0, 1:]]
    for row in rows:
        ahead = copy.deepcopy(row.constraint)
        for u, token in enumerate(tokens_Bu[row.slot, 1:].tolist()):
            if ahead is None or token in row.request.end_ids or (u and biases[u - 1][row][token] == -np.inf):
                break
            ahead.add(token)
            try:
                biases[u][row] = find_bias(model, row, ahead)
            except UsageError:
                tokens_Bu[row.slot, 1 + u] = -1
                break
    return tokens_Bu, biases
