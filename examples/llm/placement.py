"""Where a model lies on a mesh: as Tunix splits it, rows over data and fsdp.

    pretrained kernels   split along "fsdp" and "tp", gathered by each layer for use
    pairs A, B           as the axes of their kernel, every A's fan-in along "fsdp"
    rows, activations    split along "data" and "fsdp"
    optimizer state      as `adamr.state_shardings` says

Every decoder layer is computed once more on the way back, so that no layer's
activations and gathered kernels have to be kept.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import adamr
from examples.harness import meshes
from examples.llm.errors import ModelError

__all__ = [
    "Places",
    "kept",
    "placed",
    "places_of",
    "put_rows",
    "recomputed",
    "settled",
    "split_moments",
    "split_rows",
    "started",
    "tunix_mesh",
]

TENSOR = "tp"  # Tunix's name of the harness's axis "tensor"


def tunix_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh with Tunix's names of axes; those that it lacked have one device."""
    if mesh is None:
        return None
    names = [TENSOR if axis == "tensor" else axis for axis in mesh.axis_names]
    missing = [axis for axis in (*meshes.BATCH, TENSOR) if axis not in names]
    devices = mesh.devices.reshape(mesh.devices.shape + (1,) * len(missing))
    return Mesh(devices, (*names, *missing))


def recomputed(sizes: Any) -> Any:
    """Tunix's sizes of a model whose layers keep nothing for the way back."""
    kinds = importlib.import_module(type(sizes).__module__).RematConfig
    return dataclasses.replace(sizes, remat_config=kinds.DECODER)


def split_rows(module: nnx.Module, mesh: Mesh) -> None:
    """Makes every layer of the model compute on its device's rows.

    Otherwise the compiler may split what a layer sees along "fsdp" as the kernels are,
    and sum over devices what each of them could compute alone.
    """
    for layer in module.layers:
        layer.__class__ = _on_own_rows(type(layer), mesh)


@functools.cache
def _on_own_rows(layer: type, mesh: Mesh) -> type:
    where, parts = NamedSharding(mesh, P(meshes.BATCH)), meshes.batch_parts(mesh)

    def call(self, x, *rest):
        if x.shape[0] % parts == 0 and parts > 1:
            x = jax.lax.with_sharding_constraint(x, where)
        return layer.__call__(self, x, *rest)

    return type(layer.__name__, (layer,), {"__call__": call})


def placed(module: nnx.Module, mesh: Mesh | None) -> nnx.Module:
    """The module with its arrays, or shapes, where Tunix and Qwix say they belong.

    Raises:
      ModelError: for a mesh that does not divide one of them.
    """
    if mesh is None:
        return module

    def leaf(path, x, where):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            where.shard_shape(x.shape)
        except ValueError as error:
            raise ModelError(
                f"--mesh: it does not divide {name}, whose shape is {x.shape}, along "
                f"{tuple(where.spec)}: got {dict(mesh.shape)}, expected divisors."
            ) from error
        if "_lora_a" in name:
            where = _split_further(x.shape, where)
        shape = isinstance(x, jax.ShapeDtypeStruct)
        return x.update(sharding=where) if shape else jax.device_put(x, where)

    graph, state = nnx.split(module)
    where = jax.tree.map(_short, nnx.get_named_sharding(state, mesh))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(leaf, state, where))


def _split_further(shape: tuple[int, ...], where: NamedSharding) -> NamedSharding:
    """Along "fsdp" as well, where A has it nowhere and its first axis has room.

    A itself is small, but its basis, which lies as its fan-in, is not.
    """
    spec, mesh = where.spec, where.mesh
    if "fsdp" in spec or shape[0] % (mesh.shape["fsdp"] * mesh.shape[TENSOR]):
        return where
    return NamedSharding(mesh, P((TENSOR, "fsdp"), *spec[1:]))


def _short(sharding: NamedSharding) -> NamedSharding:
    """Without trailing None, as programs name the placements of their results."""
    axes = list(sharding.spec)
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(sharding.mesh, P(*axes))


def put_rows(rows: Any, mesh: Mesh | None) -> Any:
    """Arrays of rows, split where the mesh divides them, else whole everywhere."""
    if mesh is None:
        return rows

    def put(x):
        x = np.asarray(x)
        if len(x) % meshes.batch_parts(mesh) == 0:
            return meshes.put_batch(x, mesh)
        return jax.device_put(x, NamedSharding(mesh, P()))

    return jax.tree.map(put, rows)


class Places(NamedTuple):
    """Where the arrays of a tree lie; hashable, for programs that keep them there."""

    shardings: tuple[NamedSharding, ...]
    treedef: Any


def places_of(tree: Any, mesh: Mesh | None) -> Places | None:
    """Of arrays or structs on the mesh; None on one device."""
    if mesh is None:
        return None
    leaves, treedef = jax.tree.flatten(tree)
    return Places(tuple(_short(x.sharding) for x in leaves), treedef)


def kept(tree: Any, places: Places | None) -> Any:
    """The tree, whose arrays lie at these places; for use under jit."""
    if places is None:
        return tree
    where = jax.tree.unflatten(places.treedef, places.shardings)
    return jax.lax.with_sharding_constraint(tree, where)


def split_moments(moments: Any, mesh: Mesh | None) -> Any:
    """Gram matrices (…, n, n), of which each device holds some rows; under jit."""
    if mesh is None:
        return moments

    def leaf(x):
        split = x.ndim > 1 and x.shape[-2] % mesh.size == 0
        spec = P(*[None] * (x.ndim - 2), mesh.axis_names) if split else P()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(leaf, moments)


def settled(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that stay where they are; on one device, committed to it.

    The pretrained kernels are, and so is what a step returns. Arrays that are not
    would make `jax.jit` compile the step a second time.
    """
    return tree if mesh is not None else jax.device_put(tree, jax.local_devices()[0])


def started(tx: optax.GradientTransformation, trained: Any, mesh: Mesh | None) -> Any:
    """`tx.init(trained)`, beside the parameters."""
    if mesh is None:
        return tx.init(trained)
    where = jax.tree.map(_short, adamr.state_shardings(tx, trained))
    return jax.jit(tx.init, out_shardings=where)(trained)
