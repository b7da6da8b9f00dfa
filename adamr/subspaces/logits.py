"""Gradients of a network's outputs, one per sample: what OGD protects.

The gradient of the loss vanishes where the loss is fitted; that of a logit does not.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree

__all__ = ["logit_gradients"]


def _lengths(tree: Any) -> set[int]:
    return {x.shape[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(tree)}


def _check_labels(labels: Any, count: int, classes: int) -> jax.Array:
    if labels is None:
        raise ValueError(
            "labels is None: variant='ground_truth' needs the class of every input; "
            "'average' and 'all' need none."
        )
    labels = jnp.asarray(labels)
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels has shape {labels.shape} and dtype {labels.dtype}, expected "
            f"integers of shape {(count,)}, one per input."
        )
    if not _tree.is_traced(labels) and jnp.any((labels < 0) | (labels >= classes)):
        raise ValueError(
            f"labels must lie in [0, {classes}), the number of logits, got values from "
            f"{labels.min()} to {labels.max()}."
        )
    return labels


def logit_gradients(
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: Any = None,
    *,
    variant: Literal["ground_truth", "all", "average"] = "ground_truth",
    chunk_size: int | None = None,
) -> Any:
    """Per-sample gradients of logits, as samples for `grow_directions`.

    With f_c(θ, x) the logit of class c, per input x with label y:

        "ground_truth" (OGD-GTL)   ∇ f_y             1 row
        "average" (OGD-AVE)        ∇ mean_c f_c      1 row
        "all" (OGD-ALL)            ∇ f_c, every c    one row per class

    Args:
      logits_fn: (params, one input) -> logits (classes,), without a batch axis and as
        in evaluation: no dropout, fixed statistics.
      params: θ, as they are when a task is done.
      inputs: pytree of arrays with a leading axis of num_inputs.
      labels: (num_inputs,) integers in [0, classes), for "ground_truth". Under jit,
        where values are not checked, one outside gives a zero row.
      variant: which logits.
      chunk_size: how many inputs are differentiated at a time; None: all at once.

    Returns:
      A tree like `params`, arrays (num_inputs, *leaf.shape), or for "all"
      (num_inputs · classes, *leaf.shape), classes of one input side by side.

    Raises:
      ValueError: for an unknown variant, missing or bad labels, logits that are not a
        vector, or inputs of different lengths.

    >>> f = lambda w, x: w @ x
    >>> logit_gradients(f, jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.zeros(4, int)).shape
    (4, 2, 3)

    References: Farajtabar, Azizan, Mott, Li, Orthogonal Gradient Descent for Continual
      Learning, arXiv:1910.07104.
    """
    if variant not in ("ground_truth", "all", "average"):
        raise ValueError(
            f"variant is {variant!r}, expected 'ground_truth', 'all' or 'average'."
        )
    lengths = _lengths(inputs)
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "inputs must be arrays with one leading axis of the same length, at least "
            f"1: got lengths {sorted(lengths)}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    first = jax.tree.map(lambda x: x[0], inputs)
    shape = jax.eval_shape(logits_fn, params, first).shape
    if len(shape) != 1:
        raise ValueError(
            f"logits_fn gave an array of shape {shape} for one input, expected "
            "(classes,): it takes one input, without a batch axis."
        )
    (count,) = lengths
    if variant == "ground_truth":
        labels = _check_labels(labels, count, shape[0])
        # A product, not an index: a label outside picks nothing.
        picks: Any = jax.nn.one_hot(labels, shape[0])
    else:
        picks = jnp.zeros((count, 0))

    def one(example):
        x, pick = example
        if variant == "all":
            return jax.jacrev(logits_fn)(params, x)

        def value(params):
            logits = logits_fn(params, x)
            if variant == "average":
                return jnp.mean(logits)
            return jnp.sum(logits * pick.astype(logits.dtype))

        return jax.grad(value)(params)

    rows = jax.lax.map(one, (inputs, picks), batch_size=chunk_size or count)
    if variant == "all":
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return rows
