"""Host memory for what only a task boundary needs.

Covariances, sketches, directions of earlier tasks, stored gradients: a step does not
read them, so they need not fill the accelerator while it runs.

    covariance = offload(covariance)          # at the end of a boundary
    covariance = update_covariance(onload(covariance), samples)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["offload", "onload"]

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
