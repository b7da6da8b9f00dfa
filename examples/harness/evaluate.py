"""Accuracy and loss of all runs on every task's test data, in portions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.harness.parallel import over_runs
from examples.harness.problem import Data, masked

__all__ = ["accuracy_and_loss", "in_portions"]

PORTION = 512  # test examples scored at once


def in_portions(test: Data, weight: Any) -> tuple[Data, jax.Array]:
    """Test data as (tasks, portions, size, ...), padded with its own first examples."""
    count = weight.shape[1]
    size = min(PORTION, count)
    rows = np.arange(-(-count // size) * size) % count
    weight = np.where(np.arange(len(rows)) < count, weight[:, rows], 0.0)

    def split(x):
        x = np.asarray(x)[:, rows]
        return jnp.asarray(x.reshape(len(x), -1, size, *x.shape[2:]))

    inputs, labels = split(test.inputs), split(test.labels)
    weight = jnp.asarray(weight.reshape(labels.shape[:3]), jnp.float32)
    return Data(inputs, labels, test.classes), weight


@functools.partial(jax.jit, static_argnames="problem")
def accuracy_and_loss(problem, test, weight, params):
    """Accuracy and loss, (runs, tasks), in portions so that memory stays small.

    Where the loss is not finite the run has diverged, and its accuracy is NaN: the
    argmax over NaN would name a class, and be right for some examples.
    """

    def run(params):
        def task(both):
            data, weight = both

            def portion(now):
                inputs, labels, weight = now
                logits = masked(problem.logits(params, inputs), data.classes)
                right = logits.argmax(-1) == labels
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                over = tuple(range(1, labels.ndim))
                return weight @ right.mean(over), weight @ losses.mean(over)

            right, loss = jax.lax.map(portion, (data.inputs, data.labels, weight))
            right, loss = right.sum() / weight.sum(), loss.sum() / weight.sum()
            return jnp.where(jnp.isfinite(loss), right, jnp.nan), loss

        return jax.lax.map(task, (test, weight))

    return over_runs(run)(params)
