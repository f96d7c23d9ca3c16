"""Two sets of texts: which experts they use differently, and which direction of the residual stream separates them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError, argument
from ..generation.options import check_option
from ..generation.score import prefill_chunks
from ..model import validation
from ..model.cache import Cache
from ..model.model import Model
from ..parallel.multihost import fetch
from ..system.reporter import show_slow
from ..system.summary import Summarized
from .observations import after_each_layer


@dataclasses.dataclass(frozen=True, repr=False)
class Contrast(Summarized):
    """How two sets of rows, a and b, differ. Rows are the sample: tokens of one row depend on each other.

    experts     a record for each routed expert: layer, expert, count_a and count_b (tokens that selected it), share_a
                and share_b (of all tokens), difference (a - b), standard_error; those that differ most in standard
                errors first, of which one counts as at least what a single token can change
    directions  a record for each layer: layer, norm of the difference of mean streams, standard_error (the norm that
                equal sets would show), ratio; the largest ratio first, with a standard error of at least a token's part
                in the mean
    direction   [layers, D] mean residual stream after each layer, a - b: what `edit(add={layer: ...})` takes
    tokens      the tokens of a and of b
    """

    experts: np.ndarray
    directions: np.ndarray
    direction: np.ndarray
    tokens: tuple[int, int]

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the experts and the layers that differ most."""
        values = {
            f"layer {one['layer']}, expert {one['expert']}": f"{one['share_a']:.1%} of a, {one['share_b']:.1%} of b, "
            f"difference {one['difference']:+.1%} ± {one['standard_error']:.1%}"
            for one in self.experts[:10]
        }
        best = self.directions[0]
        values["direction"] = (
            f"most after layer {best['layer']}: norm {best['norm']:.2f} ± {best['standard_error']:.2f}"
        )
        return f"Contrast of {self.tokens[0]} tokens with {self.tokens[1]}", values


class Sums(NamedTuple):
    """Sums over the tokens of each row: `tokens` [rows] themselves, `used` [rows, MoE layers, E] those that selected
    each expert, `stream` [rows, layers, D]."""

    tokens: np.ndarray
    used: np.ndarray
    stream: np.ndarray


def contrast(
    model: Model,
    a: Sequence[Sequence[int]],
    b: Sequence[Sequence[int]],
    *,
    cache_dtype: Any = None,
    batch_size: int | None = None,
) -> Contrast:
    """Prefill two sets of rows of token ids, at least two rows each, and return how differently they use experts and
    residual streams. Only sums over the tokens of each row are kept. Raises UsageError, CapacityError."""
    cfg = validation.config_of(model)
    options = {"cache_dtype": cache_dtype, "batch_size": check_option("batch_size", batch_size)}
    sets = [validation.check_prompts(rows, cfg.vocab_size) for rows in (a, b)]
    if few := [name for name, rows in zip("ab", sets, strict=True) if len(rows) < 2]:
        raise UsageError(f"a standard error needs at least two rows in {argument(few[0])}; split the text into more")
    sums = [_sum_rows(model, rows, options) for rows in sets]
    direction, directions = _compare_streams(sums[0], sums[1])
    experts = _compare_experts(sums[0], sums[1], cfg.first_k_dense_replace)
    return Contrast(experts, directions, direction, (int(sums[0].tokens.sum()), int(sums[1].tokens.sum())))


def _sum_rows(model: Model, rows: list[list[int]], options: dict[str, Any]) -> Sums:
    cfg = model.cfg
    moe_layers = max(0, cfg.num_hidden_layers - cfg.first_k_dense_replace)
    used = np.zeros((len(rows), moe_layers, cfg.n_routed_experts), np.int64)
    stream = np.zeros((len(rows), cfg.num_hidden_layers, cfg.hidden_size))
    with show_slow(sum(map(len, rows)), unit="tokens") as count:
        for chunk in prefill_chunks(model, rows, _sum_chunk_jit, **options):
            counts, sums = jax.tree.map(fetch, chunk.values)
            for array, values in ((used, counts), (stream, sums)):
                for layer, value in enumerate(values):
                    array[chunk.rows, layer] += value[: len(chunk.rows)]
            count(sum(chunk.counts))
    return Sums(np.array([len(row) for row in rows]), used, stream)


def sum_chunk(
    model: Model, cache: Cache, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array
) -> tuple[Cache, tuple[list[jax.Array], list[jax.Array]]]:
    """Prefill a chunk and return the new cache, and for each row sums over its tokens: of those that selected each
    expert [B, E], for each MoE layer, and of the residual stream after each layer [B, D]."""
    x_BTD, cache, seen = model.observe(tokens_BT, cache, count_B)
    real_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
    row = jnp.arange(len(count_B))[:, None, None]
    used = [
        jnp.zeros((len(count_B), model.cfg.n_routed_experts), jnp.int32)
        .at[row, layer.routing.expert_BTX]
        .add(real_BT[..., None].astype(jnp.int32))
        for layer in seen
        if layer.routing is not None
    ]
    return cache, (used, [jnp.where(real_BT[..., None], y, 0).sum(axis=1) for y in after_each_layer(seen, x_BTD)])


_sum_chunk_jit = jax.jit(sum_chunk, donate_argnames="cache")


def estimate_ratio(sums: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over tokens of what `sums` [rows, ...] adds up, and its variance, as of a ratio of two sums over
    two rows or more (Cochran, Sampling Techniques, 6.4): tokens of one row depend on each other, so rows are the
    sample."""
    rows, total = len(tokens), tokens.sum()
    mean = sums.sum(axis=0) / total
    residual = sums - mean * tokens.reshape(-1, *[1] * mean.ndim)
    return mean, rows / (rows - 1) * np.square(residual).sum(axis=0) / total**2


def _compare_experts(a: Sums, b: Sums, first: int) -> np.ndarray:
    """Return the records of all routed experts; `first` is the first layer that has some."""
    shares, variances = zip(*(estimate_ratio(one.used, one.tokens) for one in (a, b)), strict=True)
    layer, expert = np.indices(shares[0].shape)
    difference, error = shares[0] - shares[1], np.sqrt(variances[0] + variances[1])
    columns = {
        "layer": layer + first, "expert": expert, "count_a": a.used.sum(axis=0), "count_b": b.used.sum(axis=0),
        "share_a": shares[0], "share_b": shares[1], "difference": difference, "standard_error": error,
    }  # fmt: skip
    return _rank(columns, np.abs(difference) / np.maximum(error, 1 / min(a.tokens.sum(), b.tokens.sum())))


def _compare_streams(a: Sums, b: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference of mean streams [layers, D], and the records of the layers."""
    means, variances = zip(*(estimate_ratio(one.stream, one.tokens) for one in (a, b)), strict=True)
    direction = means[0] - means[1]
    norm, error = np.linalg.norm(direction, axis=-1), np.sqrt((variances[0] + variances[1]).sum(axis=-1))
    of_a_token = [np.linalg.norm(mean, axis=-1) / one.tokens.sum() for mean, one in zip(means, (a, b), strict=True)]
    least = np.maximum(error, np.maximum(*of_a_token))
    ratio = np.divide(norm, least, out=np.zeros_like(norm), where=least > 0)
    columns = {"layer": np.arange(len(norm)), "norm": norm, "standard_error": error, "ratio": ratio}
    return direction.astype(np.float32), _rank(columns, ratio)


def _rank(columns: dict[str, np.ndarray], ratio: np.ndarray) -> np.ndarray:
    """Return the columns as one structured array, those of the largest `ratio` first."""
    table = np.empty(ratio.size, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column.reshape(-1)
    return table[np.argsort(-ratio.reshape(-1), kind="stable")]
