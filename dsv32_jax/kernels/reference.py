"""The definition of products with stored weights, in XLA's own operations. Every kernel is tested against it."""

import jax
import jax.numpy as jnp

from ..quantization.formats import Weight, split_scale
from ..system import host

BLOCK = (1, 256)
"""The least and the most rows of a block: each is a product of its own, for which its matrix is dequantized."""


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of two arrays of one dtype, accumulated and returned in float32, never in TF32.

    Products of bfloat16 are exact in float32, so converting first gives the same. A CPU without instructions for them
    converts anyway, and in other layouts jaxlib 0.10.2 accepts the product of bfloat16 and fails when it runs.
    """

    def multiply(a, b):
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def convert_first(a, b):
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32 or (_is_batched_first(spec) and host.has_avx512_bf16()):
        return multiply(a, b)
    return jax.lax.platform_dependent(a, b, cpu=convert_first, default=multiply)


def _is_batched_first(spec: str) -> bool:
    """Return whether the letters that occur in both operands and the result are the first of all three."""
    left, right, out = spec.replace("->", ",").split(",")
    shared = "".join(letter for letter in left if letter in right and letter in out)
    return all(letters.startswith(shared) for letters in (left, right, out))


def einsum(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """Return the product of activations with one weight in float32.

    It is multiplied in x's dtype, in which a weight without its tensor scale is exact; that scale multiplies the sums.
    """
    values, scale = split_scale(w, x.dtype)
    return dot(*_join_contracted(spec, x, values)) * scale.reshape(())


def multiply_blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Weight) -> jax.Array:
    """Multiply block i of x by the matrix `expert_n[i]` of the bank [E, o, z]: float32 [n, b, o].

    An id outside of the bank gives zeros. Matrices without a block are not read.
    """
    experts = bank.shape[0]

    def run(expert, x_bz):
        return einsum("bz,oz->bo", x_bz, _pick(bank, expert))

    def skip(_, x_bz):
        return jnp.zeros((len(x_bz), bank.shape[1]), jnp.float32)

    def visit(_, block):
        expert, x_bz = block
        return None, jax.lax.cond((expert >= 0) & (expert < experts), run, skip, expert, x_bz)

    return jax.lax.scan(visit, None, (expert_n, x_nbz))[1]


def multiply_columns(x_nbz: jax.Array, bank_nzo: jax.Array) -> jax.Array:
    """Multiply block i of x by matrix i of the bank, which is stored as [in, out]: float32 [n, b, o]."""
    return dot("nbz,nzo->nbo", x_nbz, bank_nzo.astype(x_nbz.dtype))


def index_scores(q_BTiJ: jax.Array, w_BTi: jax.Array, k_BSJ: jax.Array) -> jax.Array:
    """Return the sum over index heads of w * relu(q . k), float32 [B, T, S]."""
    match_BTiS = jax.nn.relu(dot("BTiJ,BSJ->BTiS", q_BTiJ, k_BSJ))
    return dot("BTi,BTiS->BTS", w_BTi, match_BTiS)


def select_topk(score_BTS: jax.Array, topk: int) -> jax.Array:
    """Return the positions of the `topk` largest scores of each query, -1 if there are fewer.

    Of equal scores the lower position is selected; both zeros are equal, of which XLA takes +0 first. NaN counts as the
    largest, so that it reaches the logits.
    """
    score_BTS = jnp.where(score_BTS == 0, 0, score_BTS)
    top_BTk, selected_BTk = jax.lax.top_k(score_BTS, min(topk, score_BTS.shape[-1]))
    return jnp.where(top_BTk != -jnp.inf, selected_BTk, -1)


def _join_contracted(spec: str, x: jax.Array, w: jax.Array) -> tuple[str, jax.Array, jax.Array]:
    """Reshape the axes that end both operands and are contracted together to one.

    XLA's CPU dot copies a weight that is contracted over two axes: 30 times the time of the product for W^O.
    """
    left, right, out = spec.replace("->", ",").split(",")
    count = count_contracted(left, right, out)
    if count < 2:
        return spec, x, w
    joined = f"{left[:-count]}z,{right[:-count]}z->{out}"
    return joined, x.reshape(*x.shape[:-count], -1), w.reshape(*w.shape[:-count], -1)


def count_contracted(left: str, right: str, out: str) -> int:
    """Count the letters that end both operands and are contracted together."""
    count = 0
    while left[-count - 1 :] == right[-count - 1 :] and left[-count - 1] not in out and count < len(right) - 1:
        count += 1
    return count


def _pick(bank: Weight, expert: jax.Array) -> Weight:
    """Return one matrix of the bank in its own format.

    The barrier keeps XLA from converting the scales of all experts before it picks one.
    """
    bank, expert = jax.lax.optimization_barrier((bank, expert))
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), bank)
