"""Some examples of every finished task, and the gradients of the loss on them.

What replay and gradient constraints need. `gradient_of(params, data)` below is the
gradient of the mean loss; its results are extra arguments of `update`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.problem import Data, Feed

__all__ = [
    "Memory",
    "empty_memory",
    "memory_gradient",
    "memory_gradients",
    "remember",
    "with_classes",
]


class Memory(NamedTuple):
    """A fixed number of examples of every finished task.

    Attributes:
      data: `Data` with a leading axis of tasks; zeros where nothing is stored yet.
      seen: (tasks,) bool.
    """

    data: Data
    seen: jax.Array


def empty_memory(feed: Feed, runs: int, size: int) -> Memory:
    """Room for `size` examples of every task, for all runs."""
    like, tasks = feed.samples(0), len(feed.names)
    room = (runs, tasks, size)
    data = Data(
        jnp.zeros((*room, *like.inputs.shape[1:]), like.inputs.dtype),
        jnp.zeros((*room, *like.labels.shape[1:]), jnp.int32),
        jnp.ones((runs, tasks, like.classes.shape[-1]), bool),
    )
    return Memory(data, jnp.zeros((runs, tasks), bool))


def with_classes(memory: Memory, classes: jax.Array) -> Memory:
    """The memory with the classes that compete now, (tasks, all classes)."""
    wide = jnp.broadcast_to(classes, memory.data.classes.shape)
    return memory._replace(data=memory.data._replace(classes=wide))


def remember(memory: Memory, data: Data, task: int, seeds: list[int]) -> Memory:
    """The memory with some examples of a task in it, drawn anew for every run."""
    room = memory.data.labels.shape[2]
    chosen = np.stack(
        [
            np.random.default_rng([seed, task, 1]).choice(
                len(data.labels), room, replace=room > len(data.labels)
            )
            for seed in seeds
        ]
    )
    new = Data(
        np.asarray(data.inputs)[chosen],
        np.asarray(data.labels)[chosen],
        np.broadcast_to(np.asarray(data.classes), memory.data.classes[:, 0].shape),
    )
    put = jax.tree.map(lambda m, x: m.at[:, task].set(x), memory.data, new)
    return Memory(put, memory.seen.at[:, task].set(True))


def _draw(memory: Memory, key: jax.Array, count: int) -> Data:
    """Examples drawn from all seen tasks alike."""
    which, where = jax.random.split(key)
    weights = memory.seen.astype(jnp.float32)
    weights = jnp.where(weights.sum() > 0, weights, 1.0)
    task = jax.random.choice(
        which, len(weights), (count,), p=weights / jnp.sum(weights)
    )
    place = jax.random.randint(where, (count,), 0, memory.data.labels.shape[1])
    inputs, labels, classes = memory.data
    return Data(inputs[task, place], labels[task, place], classes[task])


def memory_gradient(
    gradient_of, params, memory, key, *, name="memory_gradient", count=None
):
    """The gradient on `count` stored examples; None: as many as a task's memory has."""
    count = memory.data.labels.shape[1] if count is None else count
    gradient = gradient_of(params, _draw(memory, key, count))
    any_seen = jnp.any(memory.seen)
    return {name: jax.tree.map(lambda g: jnp.where(any_seen, g, 0.0), gradient)}


def memory_gradients(gradient_of, params, memory, key):
    """One gradient per task."""
    del key
    each = jax.vmap(gradient_of, in_axes=(None, 0))(params, memory.data)
    return {"memory_gradients": each, "memory_mask": memory.seen}
