"""Where arrays lie: optimizer state beside its parameters, or in host memory.

On the devices, each array of the state is sharded along the axes that it shares with
its parameter (`state_shardings`):

    sharded axis of    state sharded along it    sent per step
    the parameter
    fan-in             m, bases                  one all-reduce of r × outputs numbers
    fan-out            m, and v shared along     nothing
                       the fan-in
    batch (layers)     m, v, bases, weights      nothing

Arrays without an axis of a parameter (counts, overlap) are replicated. State that no
step needs for a while moves to host memory and back with its sharding (`offload`,
`onload`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamr import _tree

__all__ = ["offload", "onload", "state_shardings"]


def sharding_of(x: Any) -> NamedSharding | None:
    """The placement of an array on a mesh, or None; under a trace, of explicit axes."""
    if _tree.is_traced(x):
        found = jax.typeof(x).sharding
        return found if AxisType.Explicit in found.mesh.axis_types else None
    found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _like(x: Any, leaf: Any, lead: int) -> Any:
    """A copy of `x` whose axes after the first `lead` are placed like those of `leaf`.

    An `x` that the caller has sharded keeps its placement.
    """
    where = None if _tree.is_hole(leaf) else sharding_of(leaf)
    if where is None:
        return jnp.array(x, copy=True)
    if not _tree.is_traced(x):
        if isinstance(x, jax.Array) and not x.sharding.is_fully_replicated:
            return jnp.array(x, copy=True)
        x = np.asarray(x)  # a constant that belongs to no mesh
    along = zip(x.shape[lead:], leaf.shape, where.spec, strict=False)
    axes = [None] * lead + [axis if n == m else None for n, m, axis in along]
    where = NamedSharding(where.mesh, PartitionSpec(*axes))
    if _tree.is_traced(leaf) or _tree.is_traced(x):
        return jax.sharding.reshard(jnp.asarray(x), where)
    return jax.device_put(x, where, may_alias=False)


def replicated(x: jax.Array) -> jax.Array:
    """The whole array on every device, where explicit sharding must be told."""
    where = sharding_of(x) if _tree.is_traced(x) else None
    if where is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(where.mesh, PartitionSpec()))


def einsum_sharding(subscripts: str, *operands: jax.Array) -> NamedSharding | None:
    """The sharding of a contraction's result, which explicit sharding must be told.

    Each axis lies as in the first operand that has it sharded; None without explicit
    axes.
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


def placed_by_compiler(function: Callable, *operands: Any, like: Any) -> Any:
    """`function(*operands)`, whose results lie as the arrays of `like`.

    For computations that explicit sharding cannot follow, such as a reshape that merges
    a sharded axis: inside, the compiler chooses.
    """
    where = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    explicit = [
        AxisType.Explicit in s.mesh.axis_types
        for s in jax.tree.leaves(where, is_leaf=lambda s: hasattr(s, "mesh"))
    ]
    if not any(explicit):
        return function(*operands)
    return jax.sharding.auto_axes(function, out_sharding=where)(*operands)


def copied_beside(
    params: Any, entries: tuple[Any, ...], lead: int = 0
) -> tuple[jax.Array | None, ...]:
    """Copies of entries in leaf order (bases, weights, rows), beside their parameters.

    The first `lead` axes of an entry are not those of its parameter.
    """
    leaves = _tree.flatten(params)[0] or [None] * len(entries)
    pairs = zip(entries, leaves, strict=True)
    return tuple(None if x is None else _like(x, leaf, lead) for x, leaf in pairs)


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """The sharding of each array of the optimizer state, from those of the parameters.

    Moments, bases and other arrays with axes of a parameter are sharded along them like
    the parameter; the rest is replicated. Nothing is computed and no array is made, so
    it works for models that fit no single device:

        where = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=where)(params)

    Without these shardings a jitted `init` leaves the state on one device, and the step
    compiles twice, because `jit` does not see the placement of its arguments.

    Args:
      tx: any optax transformation. Its subspace must not be sharded by hand: leave it
        as `empty_subspace` returns it.
      params: tree of arrays or `jax.ShapeDtypeStruct`s, each with a `NamedSharding`.

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
    """Whether every device of this process can reach pinned host memory."""
    devices = sharding.addressable_devices
    return all(
        any(memory.kind == _HOST for memory in device.addressable_memories())
        for device in devices
    )


def offload(tree: Any) -> Any:
    """Copies the arrays of a tree to host memory, each shard to its own host.

    Args:
      tree: any pytree; leaves that are not a `jax.Array` are returned unchanged.

    Returns:
      The tree with copies that keep values, dtypes and shardings: in pinned host memory
      where the backend has it, otherwise as NumPy arrays. The originals are freed when
      nothing refers to them. Pass the tree to `onload` before computing.

    Raises:
      ValueError: for an array over several processes on a backend without pinned host
        memory.

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
                f"tree has an array of shape {x.shape} over several processes, "
                f"expected {_HOST} memory on their devices: {x.sharding} has none."
            )
        return np.array(x, copy=True)

    return jax.tree.map(leaf, tree)


def onload(tree: Any) -> Any:
    """Copies the arrays of a tree back to device memory, with their shardings.

    Args:
      tree: from `offload`; NumPy arrays become JAX arrays on the default device.

    Returns:
      The tree with its arrays in device memory.

    >>> onload(offload(jnp.ones(2)))
    Array([1., 1.], dtype=float32)
    """

    def leaf(x):
        if isinstance(x, jax.Array):
            where = x.sharding.with_memory_kind("device")
            return jax.device_put(x, where, may_alias=False)
        return jnp.array(x, copy=True) if isinstance(x, np.ndarray) else x

    return jax.tree.map(leaf, tree)
