"""The names in the lines of the methods: a small model and tasks, run as shown."""

import functools
import inspect

__all__ = ["SETTING", "run"]

SETTING = '''
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamr


class Task(NamedTuple):
    x: jax.Array
    y: jax.Array


def new_task(seed):
    x = jax.random.normal(jax.random.key(seed), (32, 8))
    return Task(x, jnp.argmax(x[:, :3], axis=1))


def forward(params, x):
    hidden = jax.nn.relu(x @ params["in"])
    return hidden @ params["out"]


def loss(params, task):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(forward(params, task.x), task.y).mean()


def train(tx, state, params, task):
    """The usual loop; here three steps on the whole task."""
    for _ in range(3):
        grads = jax.grad(loss)(params, task)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return state, params


keys = jax.random.split(jax.random.key(0), 3)
params = {
    "in": jax.random.normal(keys[0], (8, 16)) / 8**0.5,
    "out": jax.random.normal(keys[1], (16, 3)) / 4,
}
tasks = [new_task(1), new_task(2)]
old, new = tasks  # examples kept of an old task, and those of the new one
grads = jax.grad(loss)(params, new)
axes = adamr.contracted_axes(forward, params, new.x)
key = keys[2]

# Low-rank pairs A·B beside the frozen kernels `base`, for the methods of adamr.lora:
base = {"in": params["in"], "out": params["out"]}
pairs = {
    "in_lora_a": jax.random.normal(key, (8, 4)),
    "in_lora_b": jnp.zeros((4, 16)),
    "out_lora_a": jax.random.normal(key, (16, 4)),
    "out_lora_b": jnp.zeros((4, 3)),
}


def adapted(pairs, base, x):
    hidden = jax.nn.relu(x @ base["in"] + x @ pairs["in_lora_a"] @ pairs["in_lora_b"])
    return hidden @ base["out"] + hidden @ pairs["out_lora_a"] @ pairs["out_lora_b"]
'''.strip()


@functools.cache
def names() -> dict:
    """What `SETTING` defines."""
    defined: dict = {"__name__": "setting"}
    exec(SETTING, defined)
    return defined


def run(lines: str) -> dict:
    """The names after the lines ran."""
    after = dict(names())
    exec(inspect.cleandoc(lines), after)
    return after
