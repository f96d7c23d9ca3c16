"""Meshes of devices, and shardings that follow from the letters of names as `partition` defines them."""

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


def mesh(sizes: str | Mapping[str, int]) -> Mesh:
    """Return a mesh over the first devices, given as "expert=4,model=2" or a mapping; axes are data, model and expert.

    Raises UsageError if it cannot be parsed, CapacityError if there are not enough devices.
    """
    sizes = partition.parse_mesh(sizes)
    require_device()
    needed, devices = int(np.prod(list(sizes.values()))), jax.devices()
    if needed > len(devices):
        raise CapacityError(
            f"the mesh {partition.format_mesh(sizes)} needs {needed} devices, but there are {len(devices)} "
            f"({devices[0].platform})"
        )
    if jax.process_count() > 1 and needed < len(devices):
        raise CapacityError(
            f"the mesh takes {needed} of the {len(devices)} devices that {jax.process_count()} processes have; "
            "it must take all"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:needed])


def check_mesh(mesh: Mesh, components: list[tuple[Leaf, tuple[int, ...]]]) -> None:
    """Raise CapacityError that lists every parameter the mesh does not divide, UsageError if it is not a mesh."""
    if not isinstance(mesh, Mesh):
        raise UsageError(f'mesh must be a Mesh, as ds.mesh("expert=4,model=2") returns it, not {mesh!r:.200}')
    if unknown := [axis for axis in mesh.shape if axis not in partition.MESH_AXES]:
        raise UsageError(f"unknown mesh axes: {listing(unknown)}; known are {listing(partition.MESH_AXES)}")
    partition.check_divisible(mesh.shape, components)


def leaf_sharding(mesh: Mesh, leaf: Leaf, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of one stored component of `leaf`, whose shape has 1 where it does not vary along an axis."""
    return NamedSharding(mesh, PartitionSpec(*partition.find_leaf_axes(mesh.shape, leaf, shape)))


def use_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Return a context in which `shard_product` and `map_rows` use the devices of `mesh`."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def count_row_groups(mesh: Mesh | AbstractMesh | None, rows: int) -> int:
    """Return the number of shards of a batch: 1 if the axis "data" does not divide the rows."""
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    return 1 if rows % parts else parts


def shard_rows(mesh: Mesh | None, tree: Any) -> Any:
    """Shard arrays whose first axis is the rows of the batch, or the pages they have, over "data", if it divides all.

    Inside a program this is a constraint: results are sharded as arguments were, and nothing is compiled twice.
    """
    if mesh is None:
        return tree

    split = all(count_row_groups(mesh, len(x)) > 1 for x in jax.tree.leaves(tree))
    target = NamedSharding(mesh, PartitionSpec("data" if split else None))

    def place(x: jax.Array) -> jax.Array:
        return (jax.lax.with_sharding_constraint if isinstance(x, Tracer) else jax.device_put)(x, target)

    return jax.tree.map(place, tree)


def map_rows(function: Callable) -> Callable:
    """Return `function`, whose arguments and results have rows first, as one that runs on each device's rows.

    To sort a row, or to gather from it and scatter to it, XLA would communicate with other devices again and again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def mapped(*arrays: Any) -> Any:
        split = all(count_row_groups(mesh, len(x)) > 1 for x in jax.tree.leaves(arrays))
        spec = PartitionSpec("data" if split else None)
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return mapped


def map_rows_and_heads(function: Callable, operands: tuple[str, ...], out: str | tuple[str, ...]) -> Callable:
    """Return `function` as one that runs on the rows (B), their pages (y) and heads (H) of each device.

    `operands` and `out` are the letters of the leading axes of its arguments and result. A letter that the mesh does
    not divide is not split, and pages are split where rows are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function

    def mapped(*arrays: Any) -> Any:
        pairs = list(zip(operands, arrays, strict=True))
        sizes = {
            letter: size
            for letters, array in pairs
            for x in jax.tree.leaves(array)
            for letter, size in zip(letters, x.shape, strict=False)
        }

        def find_axis(letter: str) -> str | None:
            letter = "B" if letter == "y" else letter
            axis = partition.LETTER_AXES[letter] if letter in "BH" else None
            return axis if axis in mesh.shape and sizes[letter] % mesh.shape[axis] == 0 else None

        specs = tuple(
            jax.tree.map(lambda _, letters=letters: PartitionSpec(*map(find_axis, letters)), array)
            for letters, array in pairs
        )
        result = jax.tree.map(lambda letters: PartitionSpec(*map(find_axis, letters)), out)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(*arrays)

    return mapped


def shard_product(spec: str, product: Callable[[jax.Array, Any], jax.Array]):
    """Return `product` of activations and a weight, an einsum of `spec`, as one in which devices multiply their shards.

    If a contracted letter is sharded, the partial sums are added up over devices. Inside a shard_map it is `product`
    itself. The letter E is not sharded here: `experts` distributes the experts, and the one weight with that letter
    is the router, with which every device routes alike.
    """
    left, right, out = spec.replace("->", ",").split(",")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return product

    def find_axes(letters: str, part: jax.Array) -> list[str | None]:
        found = zip(partition.find_axes(mesh.shape, letters, part.shape), part.shape, strict=True)
        return [axis if axis != "expert" and divides(axis, size) else None for axis, size in found]

    def divides(axis: str | None, size: int) -> bool:
        return mesh.shape.get(axis, 1) > 1 and size % mesh.shape[axis] == 0

    def sharded(x: jax.Array, w: Any) -> jax.Array:
        x_axes = find_axes(left, x)
        axes = dict(zip(right, find_axes(right, w), strict=True)) | dict(zip(left, x_axes, strict=True))
        added = tuple(axis for letter, axis in axes.items() if axis and letter not in out)
        specs = jax.tree.map(lambda part: PartitionSpec(*find_axes(right, part)), w)
        return jax.shard_map(
            lambda x, w: jax.lax.psum(product(x, w), added),
            mesh=mesh,
            in_specs=(PartitionSpec(*x_axes), specs),
            out_specs=PartitionSpec(*(axes[letter] for letter in out)),
            check_vma=False,
        )(x, w)

    return sharded
