"""Some examples of every finished task, and the gradients of the loss on them.

What replay and gradient constraints need: the gradients here are extra arguments of
`update`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.harness.problem import Data, Feed, Problem, loss_of

__all__ = [
    "Memory",
    "empty_memory",
    "from_first_task",
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


def _gradient(problem: Problem) -> Callable[[Any, Data], Any]:
    return jax.grad(functools.partial(loss_of, problem))


def memory_gradient(
    problem, params, memory, key, *, name="memory_gradient", count=None
):
    """The gradient on `count` stored examples; None: as many as a task's memory has."""
    count = memory.data.labels.shape[1] if count is None else count
    gradient = _gradient(problem)(params, _draw(memory, key, count))
    any_seen = jnp.any(memory.seen)
    return {name: jax.tree.map(lambda g: jnp.where(any_seen, g, 0.0), gradient)}


def from_first_task(replay: optax.GradientTransformationExtraArgs):
    """Mixes nothing in while the memory is empty: its gradient is 0 then."""

    def update(g, state, params=None, *, memory_gradient, **extra):
        empty = optax.tree.norm(memory_gradient, squared=True) == 0

        def left_out(x):
            return x is None or isinstance(x, optax.MaskedNode)

        def mixed_in(g, memory):
            # What one of the trees leaves out is for the link to judge.
            keep = left_out(g) or left_out(memory)
            return memory if keep else jnp.where(empty, g, memory)

        other = jax.tree.map(mixed_in, g, memory_gradient, is_leaf=left_out)
        return replay.update(g, state, params, memory_gradient=other, **extra)

    return optax.GradientTransformationExtraArgs(replay.init, update)


def _in_parts(memory: Memory, parts: int) -> Memory:
    """Every task as `parts` tasks, each with an equal share of its examples."""
    room = memory.data.labels.shape[1]
    if not 1 <= parts <= room:
        raise ValueError(f"parts is {parts}, expected 1 to {room}, a task's examples.")

    def cut(x):
        return x[:, : room // parts * parts].reshape(-1, room // parts, *x.shape[2:])

    inputs, labels, classes = memory.data
    data = Data(cut(inputs), cut(labels), jnp.repeat(classes, parts, axis=0))
    return Memory(data, jnp.repeat(memory.seen, parts))


def memory_gradients(problem, params, memory, key, *, parts=1):
    """One gradient per task, or per part of its memory, task by task."""
    del key
    memory = _in_parts(memory, parts)
    gradient = functools.partial(_gradient(problem), params)
    if problem.convolves or jax.default_backend() != "cpu":
        each = jax.vmap(gradient)(memory.data)
    else:  # one by one is faster there, and those not seen yet cost nothing
        none = jax.tree.map(jnp.zeros_like, params)
        each = jax.lax.map(
            lambda task: jax.lax.cond(task.seen, gradient, lambda _: none, task.data),
            memory,
        )
    return {"memory_gradients": each, "memory_mask": memory.seen}
