"""Placement: state lies where its parameters lie.

    params' axis      sharded along         state beside it
    fan-in            m, bases              one all-reduce of r × out numbers per step
    fan-out           m, v shared along     nothing is sent
                      the fan-in
    batch (layers)    all of these          nothing is sent

What has no axis of the parameters (counts, overlap, weights of directions) is
replicated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamr import _tree

__all__ = ["offload", "onload", "state_shardings"]


def sharding_of(x: Any) -> NamedSharding | None:
    """Where an array lies on a mesh; under a trace, only along explicit axes."""
    if _tree.is_traced(x):
        found = jax.typeof(x).sharding
        return found if AxisType.Explicit in found.mesh.axis_types else None
    found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _like(x: Any, leaf: Any, lead: int) -> Any:
    """A copy of `x` whose axes, but for the first `lead`, lie as those of `leaf`.

    An `x` that is sharded by hand stays where it is.
    """
    where = None if _tree.is_hole(leaf) else sharding_of(leaf)
    if where is None:
        return jnp.array(x, copy=True)
    if not _tree.is_traced(x):
        if isinstance(x, jax.Array) and not x.sharding.is_fully_replicated:
            return jnp.array(x, copy=True)
        x = np.asarray(x)  # a constant of no mesh
    along = zip(x.shape[lead:], leaf.shape, where.spec, strict=False)
    axes = [None] * lead + [axis if n == m else None for n, m, axis in along]
    where = NamedSharding(where.mesh, PartitionSpec(*axes))
    if _tree.is_traced(leaf) or _tree.is_traced(x):
        return jax.sharding.reshard(jnp.asarray(x), where)
    return jax.device_put(x, where, may_alias=False)


def einsum_sharding(subscripts: str, *operands: jax.Array) -> NamedSharding | None:
    """Each axis of the result as in the first operand that has it sharded.

    Under explicit sharding a contraction of sharded axes must say so.
    """
    found = [jax.typeof(x).sharding for x in operands]
    meshes = [s.mesh for s in found if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return None
    inputs, result = subscripts.split("->")
    axes: dict[str, Any] = {}
    for letters, where in zip(inputs.split(","), found, strict=True):
        for letter, axis in zip(letters, where.spec, strict=False):
            axes[letter] = axes.get(letter) or axis
    return NamedSharding(meshes[0], PartitionSpec(*map(axes.get, result)))


def copied_beside(params: Any, entries: tuple[Any, ...], lead: int = 0) -> tuple:
    """Fresh buffers in leaf order (bases, weights, rows), each beside its parameter."""
    leaves = _tree.flatten(params)[0] or [None] * len(entries)
    pairs = zip(entries, leaves, strict=True)
    return tuple(None if x is None else _like(x, leaf, lead) for x, leaf in pairs)


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """Where each array of the optimizer state belongs, from where the parameters lie.

    Moments, bases and whatever else has axes of a parameter are sharded along them as
    it is; the rest is replicated. Nothing is computed and no array is made, so it
    serves models that fit no single device:

        where = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=where)(params)

    Without it a jitted `init` leaves the state on one device, and the step compiles
    twice: `jit` does not see where its arguments lie.

    Args:
      tx: any optax transformation; its subspace as `empty_subspace` makes it.
      params: arrays, or `jax.ShapeDtypeStruct`s, with a `NamedSharding` each.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`s.

    Raises:
      ValueError: for a parameter without a `NamedSharding`, or on another mesh.

    >>> import numpy as np
    >>> mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,))
    >>> where = NamedSharding(mesh, PartitionSpec(None, "x"))
    >>> params = {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=where)}
    >>> found = state_shardings(optax.sgd(0.1, momentum=0.9), params)
    >>> tuple(found[0].trace["w"].spec)
    (None, 'x')
    """
    names, leaves = _tree.flatten_with_names(params)
    places = {
        name: getattr(x, "sharding", None)
        for name, x in zip(names, leaves, strict=True)
        if not _tree.is_hole(x)
    }
    meshes = {p.mesh for p in places.values() if isinstance(p, NamedSharding)}
    for name, found in places.items():
        if not isinstance(found, NamedSharding) or len(meshes) > 1:
            raise ValueError(
                f"params has {found} at {name!r}, expected a NamedSharding on one mesh "
                "for all leaves."
            )
    (mesh,) = meshes
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    # Types carry the placement along explicit axes through any computation.
    explicit = mesh.abstract_mesh.update(axis_types=kinds)

    def struct(x):
        where = NamedSharding(explicit, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(struct, params))

    def place(x):
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, state)


_HOST = "pinned_host"


def _has_host_memory(sharding: jax.sharding.Sharding) -> bool:
    devices = sharding.addressable_devices
    return all(
        any(memory.kind == _HOST for memory in device.addressable_memories())
        for device in devices
    )


def offload(tree: Any) -> Any:
    """The tree with its arrays in host memory, each shard on its own host.

    Args:
      tree: any pytree; what is no `jax.Array` stays as it is.

    Returns:
      The same tree with copies that keep values, dtypes and shardings, in pinned host
      memory where the backend has it, else as NumPy arrays. The originals stay until
      nothing refers to them. Give it to `onload` before computing.

    Raises:
      ValueError: for an array spread over processes on a backend without such memory.

    >>> held = offload({"moment": jnp.ones(3)})
    >>> held["moment"].sharding.memory_kind
    'pinned_host'
    >>> onload(held)["moment"] + 1
    Array([2., 2., 2.], dtype=float32)
    """

    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        if _has_host_memory(x.sharding):
            where = x.sharding.with_memory_kind(_HOST)
            return jax.device_put(x, where, may_alias=False)
        if not x.is_fully_addressable:
            raise ValueError(
                f"tree has an array of shape {x.shape} over several processes, and "
                f"{x.sharding} offers no {_HOST} memory."
            )
        return np.array(x, copy=True)

    return jax.tree.map(leaf, tree)


def onload(tree: Any) -> Any:
    """The tree with its arrays in device memory again, sharded as they were."""

    def leaf(x):
        if isinstance(x, jax.Array):
            where = x.sharding.with_memory_kind("device")
            return jax.device_put(x, where, may_alias=False)
        return jnp.array(x, copy=True) if isinstance(x, np.ndarray) else x

    return jax.tree.map(leaf, tree)
