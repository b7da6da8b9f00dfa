"""The mesh of devices that `--mesh` names, and arrays on it.

data     copies of the model, each with its part of the batch
fsdp     the batch is split, and so are parameters and state: gathered for use
tensor   the features inside a block are split
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.harness.example import UsageError

__all__ = [
    "AXES",
    "BATCH",
    "PlacementError",
    "batch_parts",
    "bytes_per_device",
    "check_batch",
    "parse_mesh",
    "put_batch",
    "read_mesh",
    "simulate",
    "structs",
]

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


class PlacementError(UsageError):
    """A mesh that cannot be used; the message is meant for the user."""


def simulate(devices: int) -> None:
    """CPU devices in place of what there is; before anything asks JAX for its devices.

    Later there are as many as there were: `parse_mesh` says so if they do not fit.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX has started
        pass


def read_mesh(text: str) -> dict[str, int]:
    """The sizes that `data=4,fsdp=2` names.

    Raises:
      PlacementError: for another axis, or a size that is not a positive number.
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
    return sizes


def parse_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that `data=4,fsdp=2` names; axes that are not named have size 1.

    Raises:
      PlacementError: as `read_mesh`, and for sizes whose product is not the number of
        devices.
    """
    sizes = read_mesh(text)
    product = math.prod(sizes.values())
    if product != len(devices):
        raise PlacementError(
            f"--mesh: {text!r} needs {product} devices, but there are {len(devices)}: "
            "the sizes must multiply to that number."
        )
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(batch: int, mesh: Mesh, rows: str) -> None:
    """Raises a PlacementError for a batch that the mesh does not divide."""
    parts = batch_parts(mesh)
    if batch % parts:
        raise PlacementError(
            f"--batch: got {batch} {rows}, which data x fsdp = {parts} does not "
            "divide: take another --batch or --mesh."
        )


def put_batch(batch: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
    """The batch, which every process has whole, split along `axis`."""
    sharding = NamedSharding(mesh, P(*[None] * axis, BATCH))
    return jax.make_array_from_callback(batch.shape, sharding, lambda at: batch[at])


def structs(shapes: Any, where: Any) -> Any:
    """The shapes with the shardings, for programs that are compiled without arrays."""

    def leaf(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, where)


def bytes_per_device(tree: Any) -> int:
    """Of the largest part of every array that a device holds."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    ]
    return sum(sizes)
