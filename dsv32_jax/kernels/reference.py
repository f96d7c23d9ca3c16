"""What a product with a stored weight is: the definition that every kernel is tested against."""

import jax
import jax.numpy as jnp

from ..quantization.formats import Weight, exact
from ..system import host


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, accumulated and returned in float32, never in TF32.

    Products of bfloat16 are exact in float32, so it makes no difference that a CPU converts first where it has no
    instructions for them, or where XLA would take the product as it is and fail when it runs (jaxlib 0.10.2).
    """

    def multiply(a, b):
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def convert_first(a, b):
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32 or (_is_batched_first(spec) and host.has_avx512_bf16()):
        return multiply(a, b)
    return jax.lax.platform_dependent(a, b, cpu=convert_first, default=multiply)


def _is_batched_first(spec: str) -> bool:
    """Whether the letters that both operands share with the result stand first in all three, in one order."""
    left, right, out = spec.replace("->", ",").split(",")
    shared = "".join(letter for letter in left if letter in right and letter in out)
    return all(letters.startswith(shared) for letters in (left, right, out))


def product(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """The einsum of `x` with one weight, in float32: multiplied in x's dtype, in which weights but for the tensor scale
    are exact; that multiplies the sums."""
    values, scale = exact(w, x.dtype)
    return dot(*_join_contracted(spec, x, values)) * scale.reshape(())


def blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Weight) -> jax.Array:
    """Block i of b rows times the transposed matrix `expert_n[i]` of the bank [E, o, z]: float32 [n, b, o].

    An id that is no expert stands for no matrix, and makes zeros. The matrices that nobody asks for are not touched.
    """
    experts = bank.shape[0]

    def run(expert, x_bz):
        return product("bz,oz->bo", x_bz, _pick(bank, expert))

    def nothing(_, x_bz):
        return jnp.zeros((len(x_bz), bank.shape[1]), jnp.float32)

    def visit(_, block):
        expert, x_bz = block
        return None, jax.lax.cond((expert >= 0) & (expert < experts), run, nothing, expert, x_bz)

    return jax.lax.scan(visit, None, (expert_n, x_nbz))[1]


def columns(x_nbz: jax.Array, bank_nzo: jax.Array) -> jax.Array:
    """Block i of b rows times the plain matrix i of the bank, which lies the other way: float32 [n, b, o]."""
    return dot("nbz,nzo->nbo", x_nbz, bank_nzo.astype(x_nbz.dtype))


def _join_contracted(spec: str, x: jax.Array, w: jax.Array) -> tuple[str, jax.Array, jax.Array]:
    """The same product with the last axes of both, where they are contracted together, joined to one.

    XLA's CPU dot copies a weight that is contracted over two axes: 30 times the time of the product for W^O.
    """
    left, right, out = spec.replace("->", ",").split(",")
    count = contracted(left, right, out)
    if count < 2:
        return spec, x, w
    joined = f"{left[:-count]}z,{right[:-count]}z->{out}"
    return joined, x.reshape(*x.shape[:-count], -1), w.reshape(*w.shape[:-count], -1)


def contracted(left: str, right: str, out: str) -> int:
    """How many of the last letters of both operands are contracted together."""
    count = 0
    while left[-count - 1 :] == right[-count - 1 :] and left[-count - 1] not in out and count < len(right) - 1:
        count += 1
    return count


def _pick(bank: Weight, expert: jax.Array) -> Weight:
    """One expert's matrix, in its own format.

    The barrier keeps XLA from converting the scales of all experts before it picks one.
    """
    bank, expert = jax.lax.optimization_barrier((bank, expert))
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), bank)
