"""Meshes, and shardings from the letters of a leaf's name: `pieces` says which mesh axis splits which letter."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ..errors import CapacityError, UsageError, listing
from ..layout import Leaf
from ..system.compilation import require_device
from . import partition


def of_leaf(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one stored component of `leaf`; its shape has 1 where it does not vary along an axis."""
    return NamedSharding(mesh, PartitionSpec(*partition.axes(mesh.shape, leaf, shape)))


def check(mesh: Mesh, components: list[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError that lists every leaf the mesh does not divide evenly, UsageError where it is no mesh."""
    if not isinstance(mesh, Mesh):
        raise UsageError(f'mesh must be what ds.mesh("expert=4,model=2") gives, not {mesh!r:.200}')
    if strange := [name for name in mesh.shape if name not in partition.NAMES]:
        raise UsageError(f"the mesh has axes {listing(strange)}; known are {listing(partition.NAMES)}")
    partition.check(mesh.shape, components)


def mesh(sizes: str | Mapping[str, int]) -> Mesh:
    """A mesh over the first devices, written as "expert=4,model=2" or as a mapping; axes are data, model and expert.

    Raises UsageError where it is not understood, CapacityError where there are not as many devices.
    """
    sizes = partition.parse(sizes)
    require_device()
    needed, devices = int(np.prod(list(sizes.values()))), jax.devices()
    if needed > len(devices):
        raise CapacityError(
            f"the mesh {', '.join(f'{name}={size}' for name, size in sizes.items())} needs {needed} devices, but there "
            f"are {len(devices)} ({devices[0].platform})"
        )
    if jax.process_count() > 1 and needed < len(devices):
        raise CapacityError(
            f"the mesh takes {needed} of the {len(devices)} devices that {jax.process_count()} processes have; "
            "it must take all"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:needed])


def by_rows(mesh: Mesh | None, tree: Any) -> Any:
    """`tree`, whose arrays have a row of the batch each, with the rows split over "data" where it divides them.

    Inside a program it is a constraint: what comes out is spread as it came in, and no program is compiled twice.
    """
    if mesh is None:
        return tree

    def place(x: jax.Array) -> jax.Array:
        spread = NamedSharding(mesh, PartitionSpec("data" if groups(mesh, len(x)) > 1 else None))
        return (jax.lax.with_sharding_constraint if isinstance(x, Tracer) else jax.device_put)(x, spread)

    return jax.tree.map(place, tree)


def over_rows(function: Callable) -> Callable:
    """`function`, whose arguments and results have a row of the batch each, on the rows that a device has, all of them.

    To sort a row, or to pick and place in it, XLA would ask the other devices again and again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def spread(*arrays: Any) -> Any:
        split = all(groups(mesh, len(x)) > 1 for x in jax.tree.leaves(arrays))
        spec = PartitionSpec("data" if split else None)
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return spread


def over_rows_and_heads(function: Callable, operands: tuple[str, ...], out: str) -> Callable:
    """Return `function` on the rows (B) and heads (H) that each device has.

    `operands` and `out` name the leading axes of its arguments and result. A letter that the mesh does not divide is
    not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function

    def spread(*arrays: Any) -> Any:
        pairs = list(zip(operands, arrays, strict=True))
        sizes = {
            letter: size
            for letters, array in pairs
            for x in jax.tree.leaves(array)
            for letter, size in zip(letters, x.shape, strict=False)
        }

        def axis(letter: str) -> str | None:
            name = partition.AXES[letter] if letter in "BH" else None
            return name if name in mesh.shape and sizes[letter] % mesh.shape[name] == 0 else None

        specs = tuple(
            jax.tree.map(lambda _, letters=letters: PartitionSpec(*map(axis, letters)), array)
            for letters, array in pairs
        )
        result = PartitionSpec(*map(axis, out))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(*arrays)

    return spread


def groups(mesh: Mesh | AbstractMesh | None, rows: int) -> int:
    """How many groups of devices have rows of their own: one where "data" does not divide the rows."""
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    return 1 if rows % parts else parts


def on(mesh: Mesh | None) -> AbstractContextManager:
    """Inside the `with`, `shard_product` and `over_rows` spread their work over `mesh`."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def shard_product(spec: str, product: Callable[[jax.Array, Any], jax.Array]):
    """`product` of an array with axes `left` and a weight with axes `right`, each device multiplying the parts it has.

    Where a letter that is summed over is split, the parts are added up over the devices; inside a shard_map that is its
    own affair. Experts are `experts`' affair: the one weight here that has their letter is the router, and every device
    routes alike.
    """
    left, right, out = spec.replace("->", ",").split(",")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return product

    def axes(letters: str, part: jax.Array) -> list[str | None]:
        found = zip(partition.axes_of(mesh.shape, letters, part.shape), part.shape, strict=True)
        return [axis if axis != "expert" and cuts(axis, size) else None for axis, size in found]

    def cuts(axis: str | None, size: int) -> bool:
        return mesh.shape.get(axis, 1) > 1 and size % mesh.shape[axis] == 0

    def spread(x: jax.Array, w: Any) -> jax.Array:
        splitting = axes(left, x)
        splits = dict(zip(right, axes(right, w), strict=True)) | dict(zip(left, splitting, strict=True))
        added = tuple(axis for letter, axis in splits.items() if axis and letter not in out)
        specs = jax.tree.map(lambda part: PartitionSpec(*axes(right, part)), w)
        return jax.shard_map(
            lambda x, w: jax.lax.psum(product(x, w), added),
            mesh=mesh,
            in_specs=(PartitionSpec(*splitting), specs),
            out_specs=PartitionSpec(*(splits[letter] for letter in out)),
            check_vma=False,
        )(x, w)

    return spread
