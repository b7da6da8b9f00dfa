"""Gradients of a network's outputs, one per sample, which OGD protects.

The gradient of the loss vanishes where the loss is fitted; that of a logit does not.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree

__all__ = ["logit_gradients"]


def _lengths(tree: Any) -> set[int]:
    """Sizes of the leading axes; 0 for a scalar."""
    return {x.shape[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(tree)}


def _check_labels(labels: Any, count: int, classes: int) -> jax.Array:
    """The labels as an array, if they are integers (count,) in [0, classes)."""
    if labels is None:
        raise ValueError(
            "labels is None, expected the class of every input: variant='ground_truth' "
            "needs them, 'average' and 'all' do not."
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
      logits_fn: (params, one input) -> logits, a float array (classes,), without a
        batch axis and in evaluation mode: no dropout, fixed statistics. One logit,
        (1,) or a scalar, is that of a sigmoid, with classes 0 and 1.
      params: θ at the end of a task.
      inputs: x, a pytree of arrays with a leading axis of num_inputs ≥ 1.
      labels: y, (num_inputs,) integers in [0, classes); read for "ground_truth" only.
        Under jit values are not checked, and a label outside gives a zero row.
      variant: which logits: "ground_truth", "average" or "all".
      chunk_size: how many inputs are differentiated at a time, at least 1; None: all.

    Returns:
      A tree like `params` of arrays (num_inputs, *leaf.shape), or for "all"
      (num_inputs · classes, *leaf.shape), in which the classes of one input are
      neighbours.

    Raises:
      ValueError: for an unknown variant, missing or bad labels, logits that are not a
        vector, inputs of different lengths, or a chunk_size below 1.

    >>> f = lambda w, x: w @ x
    >>> logit_gradients(f, jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.zeros(4, int)).shape
    (4, 2, 3)

    References:
      Farajtabar, Azizan, Mott, Li, Orthogonal Gradient Descent for Continual Learning,
      arXiv:1910.07104.
    """
    if variant not in ("ground_truth", "all", "average"):
        raise ValueError(
            f"variant is {variant!r}, expected 'ground_truth', 'all' or 'average'."
        )
    lengths = _lengths(inputs)
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "inputs must be arrays with a leading axis of the same length, at least 1, "
            f"got lengths {sorted(lengths)}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    first = jax.tree.map(lambda x: x[0], inputs)

    def logits_of(params, x):
        return jnp.atleast_1d(logits_fn(params, x))

    shape = jax.eval_shape(logits_of, params, first).shape
    if len(shape) != 1:
        raise ValueError(
            f"logits_fn returned an array of shape {shape} for one input, expected "
            "(classes,): it takes a single input, without a batch axis."
        )
    (count,) = lengths
    if variant == "ground_truth":
        labels = _check_labels(labels, count, max(shape[0], 2))
        # One-hot rows rather than indices: a label outside then picks nothing. A
        # sigmoid's two classes differ in the sign of their one logit.
        picks: Any = jax.nn.one_hot(labels, shape[0])
        picks = jnp.ones((count, 1)) if shape[0] == 1 else picks
    else:
        picks = jnp.zeros((count, 0))

    def one(example):
        x, pick = example
        if variant == "all":
            return jax.jacrev(logits_of)(params, x)

        def value(params):
            logits = logits_of(params, x)
            if variant == "average":
                return jnp.mean(logits)
            return jnp.sum(logits * pick.astype(logits.dtype))

        return jax.grad(value)(params)

    rows = jax.lax.map(one, (inputs, picks), batch_size=chunk_size or count)
    if variant == "all":
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return rows
