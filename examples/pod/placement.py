"""Where things lie: the mesh, and rules for parameters and batches.

    data     copies of the model, each with its part of the batch
    fsdp     the batch is split, and so are parameters and state: gathered for use
    tensor   the features inside a block are split

A kernel's spec names a mesh axis per axis of the kernel. `adamr.state_shardings` puts
the optimizer's state where the parameters are.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Part of a kernel's name -> spec of its last two axes (in, out); the first that fits.
RULES = {
    "qkv": P("fsdp", "tensor"),
    "attention/out": P("tensor", "fsdp"),
    "up/": P("fsdp", "tensor"),
    "down/": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    "embedding": P(None, "fsdp"),
}


class PlacementError(ValueError):
    """A mesh that cannot be used; the message is meant for the user."""


def parse_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that `data=4,fsdp=2` names; axes that are not named have size 1.

    Raises:
      PlacementError: for another axis, a size that is not a positive number, or sizes
        whose product is not the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise PlacementError(
                f"--mesh: got {part!r} in {text!r}, expected <axis>=<size> with an "
                f"axis out of {', '.join(AXES)}, each once, and a size of at least 1."
            )
        sizes[axis] = int(size)
    product = math.prod(sizes.values())
    if product != len(devices):
        raise PlacementError(
            f"--mesh: {text!r} needs {product} devices, but there are {len(devices)}: "
            "the sizes must multiply to that number."
        )
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def spec_of(name: str, shape: tuple[int, ...]) -> P:
    """The spec of a parameter: by rule for kernels, whole for the rest.

    Axes before the last two stack layers and stay whole.
    """
    found = [spec for part, spec in RULES.items() if part in name]
    whole = [None] * len(shape)
    return P(*whole[:-2], *found[0]) if found and len(shape) > 1 else P(*whole)


def param_specs(params: Any) -> Any:
    """A tree like `params` of specs."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return spec_of(name, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def check_fit(params: Any, specs: Any, mesh: Mesh) -> None:
    """Raises a PlacementError for a parameter that its axes do not divide."""
    for (path, x), spec in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True
    ):
        for size, axis in zip(x.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise PlacementError(
                    f"--mesh: {axis}={mesh.shape[axis]} does not divide an axis of "
                    f"{name}, whose shape is {x.shape}."
                )


def shardings(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def structs(shapes: Any, where: Any) -> Any:
    """The shapes with the shardings, for programs that are compiled without arrays."""

    def leaf(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, where)


def gathered(specs: Any) -> Any:
    """The specs while the parameters are in use: whole along `fsdp`."""

    def leaf(spec):
        return P(*(None if axis == "fsdp" else axis for axis in spec))

    return jax.tree.map(leaf, specs)


def bytes_per_device(tree: Any) -> int:
    """Of the largest part of every array that a device holds."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    ]
    return sum(sizes)


def put_batch(batch: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
    """The batch, which every process has whole, split along `axis`."""
    spec = P(*[None] * axis, BATCH)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(batch.shape, sharding, lambda at: batch[at])


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)
