"""A model and its tasks as the shared loop sees them: plain functions and arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["Data", "Feed", "Problem", "loss_of", "masked"]


class Data(NamedTuple):
    """Examples of one task, or of several with a leading axis.

    Attributes:
      inputs: (n, ...).
      labels: (n, ...) int32.
      classes: (all classes,) bool, False for logits that do not take part.
    """

    inputs: Any
    labels: Any
    classes: Any


class Feed(NamedTuple):
    """The tasks, as the loop needs them.

    Attributes:
      names: of the tasks.
      batches: `(task, seed, first, steps) -> (steps, ...)`: what `Problem.batch` needs
        for these steps of a task, the same at every call with the same arguments.
      train: task -> its training data, as `Problem.batch` takes it.
      samples: task -> its `Data`, from which its boundary and the memory draw.
      test: `Data` with a leading axis of tasks.
      weight: (tasks, n) of the test examples, 0 for padding.
      masks: task being learned -> (tasks, all classes) bool, the classes that compete.
    """

    names: list[str]
    batches: Callable[[int, int, int, int], Any]
    train: Callable[[int], Any]
    samples: Callable[[int], Data]
    test: Data
    weight: Any
    masks: Callable[[int], Any]


class Problem(NamedTuple):
    """A model as the loop sees it; functions of one run.

    Attributes:
      init: key -> params.
      logits: (params, inputs) -> (batch, ..., all classes).
      batch: (task's training data, what `Feed.batches` gave) -> `Data`.
      capture: (params, inputs) -> layer inputs, a tree like params; runs eagerly.
      observe: (gradient, updates, opt_state, setting) -> scalars of a step by name.
      observed: the names of these scalars.
      convolves: whether it has convolutions. XLA's CPU compiler is ten times slower
        with their gradients inside a loop than outside, so there each step is a call.
    """

    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, Any], jax.Array]
    batch: Callable[[Any, Any], Data]
    capture: Callable[[Any, Any], Any]
    observe: Callable[..., dict[str, jax.Array]] = lambda *_: {}
    observed: tuple[str, ...] = ()
    convolves: bool = False


def loss_of(problem: Problem, params: Any, data: Data) -> jax.Array:
    """Mean cross-entropy in nats over the classes that take part."""
    logits = masked(problem.logits(params, data.inputs), data.classes)
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()


def masked(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Logits of the classes that take part; the others lose to everything."""
    shape = (*classes.shape[:-1], *[1] * (logits.ndim - classes.ndim), -1)
    return jnp.where(classes.reshape(shape), logits, -1e30)
