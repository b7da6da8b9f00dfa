"""Buffers of past data for replay: reservoirs and rings, pytrees of fixed capacity.

    Reservoir   a uniform sample of everything seen                    (capacity, …)
    Ring        the newest items of each task                   (tasks, capacity, …)

`add_to_reservoir`, `add_to_ring` and `sample` are pure: they run under jit, scan and
vmap, and return the buffer to use next. Where a reservoir of M slots puts item n,
counted from 0:

    n < M   ->  slot n
    n ≥ M   ->  slot j ~ U{0, …, n} if j < M; otherwise the item is dropped

This keeps every item seen so far with the same probability, M / (n + 1). The draw of
item n depends only on the key and n: a batch is stored exactly like its items one by
one, and sampling in between changes nothing.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from adamr import _tree

__all__ = [
    "Reservoir",
    "Ring",
    "add_to_reservoir",
    "add_to_ring",
    "empty_reservoir",
    "empty_ring",
    "filled",
    "sample",
]


class Reservoir(NamedTuple):
    """A uniform sample of everything seen.

    Attributes:
      items: pytree like one item with leaves (capacity, *item), zeros where not filled.
      seen: int32: items offered so far; saturates at 2³¹ − 1.
      drawn: uint32: calls of `sample` so far.
      key: the PRNG key of all draws: uint32, or typed where its implementation is not
        JAX's default one.
    """

    items: Any
    seen: jax.Array
    drawn: jax.Array
    key: jax.Array


class Ring(NamedTuple):
    """The newest items of each task.

    Attributes:
      items: pytree like one item with leaves (tasks, capacity, *item), zeros where not
        filled.
      seen: int32 (tasks,): items offered so far per task, fewer than 2³¹.
      drawn: uint32: calls of `sample` so far.
      key: the PRNG key of all draws: uint32, or typed where its implementation is not
        JAX's default one.
    """

    items: Any
    seen: jax.Array
    drawn: jax.Array
    key: jax.Array


_INSERTS, _SAMPLES = 0, 1  # separate streams of random numbers from one key


def _key(buffer: Reservoir | Ring, stream: int, position: ArrayLike) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(buffer.key, stream), position)


def _zeros(example: Any, *lead: int) -> Any:
    """Empty slots for items like `example`, with the leading axes `lead`."""
    if not jax.tree.leaves(example):
        raise ValueError("example has no arrays, expected one item of the data.")
    # Only dtypes and shapes are read, so ShapeDtypeStructs serve as well.
    shapes = jax.eval_shape(lambda x: jax.tree.map(jnp.asarray, x), example)
    return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), shapes)


def _check_size(name: str, size: int, most: int | None = None) -> None:
    if size < 1 or (most is not None and size > most):
        room = "at least 1" if most is None else f"between 1 and {most}"
        raise ValueError(f"{name} must be {room}, got {size}.")


def empty_reservoir(capacity: int, example: Any, key: jax.Array) -> Reservoir:
    """A reservoir without items.

    Args:
      capacity: M ≥ 1, the number of slots.
      example: one item, a pytree of arrays or `jax.ShapeDtypeStruct`s without a batch
        axis; only shapes and dtypes are read.
      key: PRNG key of all draws of the buffer, typed or uint32; it is copied.

    Returns:
      A `Reservoir`.

    Raises:
      ValueError: if capacity is below 1 or example has no arrays.

    >>> buffer = empty_reservoir(3, jnp.zeros(2), jax.random.key(0))
    >>> buffer = add_to_reservoir(buffer, jnp.ones((8, 2)))
    >>> buffer.items.shape, int(buffer.seen)
    ((3, 2), 8)

    References:
      Vitter, Random Sampling with a Reservoir, ACM TOMS 11 (1985).
      Chaudhry et al., On Tiny Episodic Memories in Continual Learning,
      arXiv:1902.10486.
    """
    _check_size("capacity", capacity)
    return Reservoir(
        items=_zeros(example, capacity),
        seen=jnp.zeros([], jnp.int32),
        drawn=jnp.zeros([], jnp.uint32),
        key=_tree.stored_key(key),
    )


def empty_ring(tasks: int, capacity: int, example: Any, key: jax.Array) -> Ring:
    """A ring buffer per task, without items.

    Args:
      tasks: number of rings, at least 1; tasks are counted from 0.
      capacity: slots of each ring, at least 1.
      example: one item, a pytree of arrays or `jax.ShapeDtypeStruct`s without a batch
        axis; only shapes and dtypes are read.
      key: PRNG key of all draws of `sample`, typed or uint32; it is copied.

    Returns:
      A `Ring`.

    Raises:
      ValueError: if tasks or capacity is below 1 or example has no arrays.

    >>> buffer = empty_ring(2, 3, jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> add_to_ring(buffer, jnp.arange(1, 6), 1).items
    Array([[0, 0, 0],
           [4, 5, 3]], dtype=int32)

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning,
      arXiv:1706.08840.
    """
    _check_size("tasks", tasks)
    _check_size("capacity", capacity)
    return Ring(
        items=_zeros(example, tasks, capacity),
        seen=jnp.zeros([tasks], jnp.int32),
        drawn=jnp.zeros([], jnp.uint32),
        key=_tree.stored_key(key),
    )


def _capacity(buffer: Reservoir | Ring) -> int:
    return jax.tree.leaves(buffer.items)[0].shape[buffer.seen.ndim]


def _checked(batch: Any, buffer: Reservoir | Ring) -> tuple[Any, int]:
    """The batch as arrays like the buffer's items, and its size."""
    lead = buffer.seen.ndim + 1
    have, want = jax.tree.structure(batch), jax.tree.structure(buffer.items)
    if have != want:
        raise ValueError(
            f"batch has the structure {have}, expected the buffer's, {want}."
        )
    batch = jax.tree.map(jnp.asarray, batch)
    sizes = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "batch must have one leading axis, of the same length in every leaf, got "
            f"shapes {[x.shape for x in jax.tree.leaves(batch)]}."
        )
    for x, slots in zip(
        jax.tree.leaves(batch), jax.tree.leaves(buffer.items), strict=True
    ):
        if x.shape[1:] != slots.shape[lead:] or x.dtype != slots.dtype:
            raise ValueError(
                f"batch has items {x.dtype}{list(x.shape[1:])}, the buffer holds "
                f"{slots.dtype}{list(slots.shape[lead:])}."
            )
    return batch, sizes.pop()[0]


def add_to_reservoir(buffer: Reservoir, batch: Any) -> Reservoir:
    """Offers a batch of items to a reservoir, in order.

    Args:
      buffer: a `Reservoir`.
      batch: pytree like the example with one leading axis of any length.

    Returns:
      The buffer after the batch, equal to that after its items one by one.

    Raises:
      ValueError: if batch does not match the buffer.

    >>> buffer = empty_reservoir(4, jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> add_to_reservoir(buffer, jnp.arange(1, 4)).items
    Array([1, 2, 3, 0], dtype=int32)
    """
    batch, size = _checked(batch, buffer)
    capacity = _capacity(buffer)
    item = jnp.arange(size)
    start = jnp.minimum(buffer.seen, jnp.iinfo(jnp.int32).max - size)
    n = start + item

    def slot_of(n):
        j = jax.random.randint(_key(buffer, _INSERTS, n), (), 0, n + 1)
        return jnp.where(n < capacity, n, j)

    slot = jax.vmap(slot_of)(n)
    # Several items may draw one slot. The last one keeps it, as if they came one by
    # one; the others get distinct places outside, which a scatter drops.
    last = jnp.full([capacity], -1).at[slot].max(item, mode="drop")
    kept = (slot < capacity) & (last[jnp.minimum(slot, capacity - 1)] == item)
    place = jnp.where(kept, slot, capacity + item)

    def write(slots, new):
        return slots.at[place].set(new, mode="drop", unique_indices=True)

    items = jax.tree.map(write, buffer.items, batch)
    return Reservoir(items, start + size, buffer.drawn, buffer.key)


def add_to_ring(buffer: Ring, batch: Any, task: ArrayLike) -> Ring:
    """Stores a batch of one task, of which the newest `capacity` items stay.

    Args:
      buffer: a `Ring`.
      batch: pytree like the example with one leading axis of any length.
      task: integer in [0, tasks), may be traced. Under jit, where values are not
        checked, the batch of any other task is dropped.

    Returns:
      The buffer after the batch, equal to that after its items one by one.

    Raises:
      ValueError: if batch does not match the buffer, or, outside jit, if the buffer
        has no such task.

    >>> buffer = empty_ring(2, 3, jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> filled(add_to_ring(buffer, jnp.arange(2), 0))
    Array([[ True,  True, False],
           [False, False, False]], dtype=bool)
    """
    batch, size = _checked(batch, buffer)
    capacity, tasks = _capacity(buffer), buffer.seen.shape[0]
    task = jnp.asarray(task)
    if not isinstance(task, Tracer) and not 0 <= task < tasks:
        raise ValueError(f"task must lie in [0, {tasks}), got {task}.")
    row = jnp.where(task < 0, tasks, task)  # a negative index would count from the end
    newest = min(size, capacity)
    first = buffer.seen.at[row].get(mode="clip") + (size - newest)
    place = (first + jnp.arange(newest)) % capacity

    def write(slots, new):
        new = new[size - newest :]
        return slots.at[row, place].set(new, mode="drop", unique_indices=True)

    items = jax.tree.map(write, buffer.items, batch)
    seen = buffer.seen.at[row].add(size, mode="drop")
    return Ring(items, seen, buffer.drawn, buffer.key)


def filled(buffer: Reservoir | Ring) -> jax.Array:
    """Which slots hold an item.

    Args:
      buffer: a `Reservoir` or a `Ring`.

    Returns:
      bool (capacity,) for a reservoir, (tasks, capacity) for a ring.

    >>> buffer = empty_reservoir(3, jnp.zeros([]), jax.random.key(0))
    >>> filled(add_to_reservoir(buffer, jnp.ones(2)))
    Array([ True,  True, False], dtype=bool)
    """
    shape = (*buffer.seen.shape, _capacity(buffer))
    slot = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return slot < buffer.seen[..., None]


def sample(
    buffer: Reservoir | Ring, batch_size: int
) -> tuple[Reservoir | Ring, Any, jax.Array]:
    """Draws stored items uniformly, without replacement, from all tasks of a ring.

    A buffer that holds fewer than `batch_size` items gives all of them in random order;
    the rest of the batch is zeros with weight 0. The replay loss is Σ weights · losses:
    the mean over the drawn items, and 0 for an empty buffer, if the loss of an item of
    zeros is finite.

    Args:
      buffer: a `Reservoir` or a `Ring`.
      batch_size: number of items, from 1 to the number of slots.

    Returns:
      The buffer to use next (the same call on the old one draws the same items), the
      items with a leading axis of batch_size, and their weights, float32 (batch_size,):
      equal over the drawn items with sum 1, or all 0 if the buffer is empty.

    Raises:
      ValueError: if batch_size is out of range, or, outside jit, if buffer is empty.

    >>> buffer = empty_reservoir(4, jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> buffer = add_to_reservoir(buffer, jnp.array([5, 7]))
    >>> buffer, items, weights = sample(buffer, 3)
    >>> print(sorted(items.tolist()), weights)
    [0, 5, 7] [0.5 0.5 0. ]
    """
    holds = filled(buffer)
    _check_size("batch_size", batch_size, most=math.prod(holds.shape))
    if not isinstance(buffer.seen, Tracer) and not holds.any():
        raise ValueError(
            "buffer is empty, expected at least one item: add items first."
        )
    key = _key(buffer, _SAMPLES, buffer.drawn)
    rank = jnp.where(holds, jax.random.uniform(key, holds.shape), -1.0)
    _, chosen = jax.lax.top_k(rank.reshape(-1), batch_size)
    index = jnp.unravel_index(chosen, holds.shape)
    items = jax.tree.map(lambda slots: slots[index], buffer.items)
    valid = holds[index].astype(jnp.float32)
    weights = valid / jnp.maximum(jnp.sum(valid), 1.0)
    buffer = buffer._replace(drawn=buffer.drawn + jnp.ones([], jnp.uint32))
    return buffer, items, weights
