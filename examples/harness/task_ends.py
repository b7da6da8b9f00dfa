"""What methods do between two tasks, with the finished task's data and one run.

    (problem, setting, params, opt_state, data, key) -> opt_state

They run eagerly, between two chunks of steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import adamr
from examples.harness.problem import Data

__all__ = [
    "add_directions",
    "anchor_here",
    "consolidate",
    "consolidate_si",
    "consolidate_rwalk",
    "grow",
    "grow_and_consolidate_si",
    "redraw",
]


def _some(data: Data, key: jax.Array, count: int) -> Data:
    n = len(data.labels)
    chosen = np.asarray(jax.random.permutation(key, n)[: min(count, n)])
    return Data(data.inputs[chosen], data.labels[chosen], data.classes)


def grow(problem, setting, params, opt_state, data, key, *, scaling=None):
    inputs = _some(data, key, setting.samples).inputs
    return adamr.protect_inputs(
        opt_state,
        problem.capture(params, inputs),
        threshold=setting.threshold,
        scaling=scaling,
    )


def _logits_fn(problem, data):
    def one(params, x):
        logits = problem.logits(params, x[None])[0]
        return jnp.where(jnp.asarray(data.classes), logits, -1e30)

    return one


@functools.partial(jax.jit, static_argnames=("problem", "kind"))
def _fisher(problem, params, data, key, kind):
    logits = _logits_fn(problem, data)
    if kind == "mas":
        return adamr.penalties.memory_aware_importance(
            lambda p, x: problem.logits(p, x[None])[0], params, data.inputs,
            chunk_size=32,
        )  # fmt: skip
    key = key if kind == "sampled" else None
    return adamr.fisher_information(
        logits, params, data.inputs, kind=kind, key=key, chunk_size=32
    )


def consolidate(
    problem, setting, params, opt_state, data, key, *, kind="true", **options
):
    some, draw = jax.random.split(key)
    data = _some(data, some, setting.samples)
    fisher = _fisher(problem, params, data, draw, kind)
    return adamr.consolidate(opt_state, params, fisher, **options)


def add_directions(problem, setting, params, opt_state, data, key):
    """Of single predictions: where an input is a sequence, of its last position."""

    def last(x):
        return x.reshape(-1, x.shape[-1])[-1]

    directions = adamr.get_subspace(opt_state)
    data = _some(data, key, setting.new_directions)
    labels = data.labels.reshape(len(data.labels), -1)[:, -1]
    directions = adamr.recipes.ogd.ogd_directions(
        directions, lambda p, x: last(problem.logits(p, x[None])), params, data.inputs,
        labels, chunk_size=32,
    )  # fmt: skip
    return adamr.set_subspace(opt_state, directions)


def anchor_here(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    ones = jax.tree.map(jnp.ones_like, params)
    return adamr.consolidate(opt_state, params, ones, rule="replace")


def consolidate_si(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    return adamr.consolidate_si(opt_state, params)


def grow_and_consolidate_si(problem, setting, params, opt_state, data, key):
    opt_state = grow(problem, setting, params, opt_state, data, key)
    return consolidate_si(problem, setting, params, opt_state, data, key)


def consolidate_rwalk(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    return adamr.consolidate_rwalk(opt_state, params)


def redraw(problem, setting, params, opt_state, data, key):
    del problem, setting, params, data, key
    return adamr.reset_moments(adamr.redraw_half(opt_state))
