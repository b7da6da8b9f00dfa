"""Importance of parameters from data: Fisher information and memory-aware synapses.

    fisher_information        F = E_x E_y (∂ log p(y|x) / ∂θ)²
    memory_aware_importance   Ω = E_x |∂ ‖f(x)‖² / ∂θ|

Always one gradient per sample, then the square (the absolute value), then the mean. The
square of a mean gradient is not a Fisher information: for two samples whose gradients
are ½ and −½ it is 0, and the Fisher information is 0.25. Both are pure functions and
work under jit; call them with dropout off and normalisation statistics fixed.
`consolidate` adds what they return to the penalty.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.modifiers.penalty import widen

__all__ = ["fisher_information", "memory_aware_importance"]

_KINDS = ("true", "sampled", "empirical", "predicted")
_MOST_PASSES = 100_000


def _num_samples(inputs: Any) -> int:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "inputs must be arrays with one leading axis of samples, at least one "
            f"sample; got shapes {shapes}."
        )
    return sizes.pop()


def _mean_over_chunks(
    chunk_total: Callable[[Any, jax.Array], Any],
    params: Any,
    samples: Any,
    chunk_size: int | None,
) -> Any:
    """Mean of `chunk_total(chunk, valid)` per sample, one chunk in memory at a time."""
    n = _num_samples(samples)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    size = min(chunk_size or n, n)
    chunks = -(-n // size)
    # The last chunk is filled up with copies of the last sample that do not count.
    index = jnp.arange(chunks * size).reshape(chunks, size)

    def add(total, rows):
        chunk = jax.tree.map(lambda x: x[jnp.minimum(rows, n - 1)], samples)
        return jax.tree.map(jnp.add, total, chunk_total(chunk, rows < n)), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
    total, _ = jax.lax.scan(add, zeros, index)
    return jax.tree.map(lambda x: x / n, total)


def _sum_valid(per_sample: Any, valid: jax.Array) -> Any:
    def total(x):
        keep = valid.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(jnp.where(keep, x, 0.0), axis=0)

    return jax.tree.map(total, per_sample)


def _class_logits(logits: jax.Array) -> jax.Array:
    """Logits of at least two classes: one logit z alone is a sigmoid's, of (0, z)."""
    logits = widen(jnp.atleast_1d(logits))
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def _check_labels(labels: jax.Array, logits: jax.ShapeDtypeStruct) -> None:
    """Raises unless they are classes of the logits (num_samples, ..., classes)."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, expected {logits.shape[:-1]} for "
            f"logits {logits.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if not _tree.is_traced(labels):
        low, high = int(jnp.min(labels)), int(jnp.max(labels))
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"labels lie in [{low}, {high}], expected [0, {logits.shape[-1] - 1}]."
            )


def fisher_information(
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: jax.Array | None = None,
    *,
    kind: Literal["true", "sampled", "empirical", "predicted"] = "true",
    key: jax.Array | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal Fisher information: F = mean over x of E_y (∂ log p(y|x) / ∂θ)².

        kind          y                                    backward passes per sample
        "true"        all classes, weighted by p(y|x)      positions · classes
        "sampled"     one draw from p(y|x)                 1
        "empirical"   `labels`                             1
        "predicted"   argmax p(y|x)                        1

    "empirical" does not estimate "true": it vanishes on samples that are fitted. For a
    logistic unit at w = 0 all kinds give 0.25.

    Args:
      logits_fn: (params, one input) -> (classes,), or (..., classes) for a sample of
        several positions: its log-likelihood is then the sum over the positions, which
        count as independent given the input. One logit, (1,) or a scalar, is that of a
        sigmoid: two classes, of which it is the logit of class 1.
      params: tree of arrays.
      inputs: arrays (num_samples, ...), or a tree of them.
      labels: (num_samples, ...) integers, an array or a list, for kind="empirical"
        only.
      kind: which y, see above.
      key: of `jax.random`, for kind="sampled" only.
      chunk_size: samples at a time; memory holds that many copies of the parameters.
        None: all. The result does not depend on it, except for rounding.

    Returns:
      A tree like params, float32 or wider. What is not finite stays so, and
      `consolidate` refuses it.

    Raises:
      ValueError: for an unknown kind, missing or superfluous labels or key, labels of
        the wrong shape or range, no samples, a chunk_size below 1; for kind="true"
        with more than 100 000 backward passes per sample.

    >>> logits = lambda w, x: jnp.array([0.0, 1.0]) * w * x
    >>> print(fisher_information(logits, jnp.zeros([]), jnp.ones([2])))
    0.25

    References:
      Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
      arXiv:1612.00796. van de Ven, On the Computation of the Fisher Information in
      Continual Learning, arXiv:2502.11756.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}, expected {list(_KINDS)}.")
    if (labels is not None) != (kind == "empirical"):
        raise ValueError(
            f"kind={kind!r} with labels {'missing' if labels is None else 'given'}: "
            "pass labels for kind='empirical' and for no other."
        )
    if (key is not None) != (kind == "sampled"):
        raise ValueError(
            f"kind={kind!r} with key {'missing' if key is None else 'given'}: pass "
            "key=jax.random.key(...) for kind='sampled' and for no other."
        )
    _tree.require_arrays(params, "params")
    n = _num_samples(inputs)

    def log_probabilities(p, x):
        return jax.nn.log_softmax(_class_logits(logits_fn(p, x)))

    shape = jax.eval_shape(jax.vmap(log_probabilities, (None, 0)), params, inputs)
    passes = math.prod(shape.shape[1:])
    if kind == "true" and passes > _MOST_PASSES:
        raise ValueError(
            f"kind='true' takes {passes} backward passes per sample, one for each "
            f"position and class of logits {shape.shape[1:]}, and at most "
            f"{_MOST_PASSES} are allowed: kind='sampled' estimates the same with one."
        )
    evidence: Any = None
    if labels is not None:
        evidence = jnp.asarray(labels)
        _check_labels(evidence, shape)
    elif key is not None:
        evidence = jax.random.split(key, n)

    def expected_square(sample):
        x, _ = sample
        log_p, pull = jax.vjp(lambda p: log_probabilities(p, x), params)

        # One class at a time: memory holds one gradient, not one per class.
        def add(total, i):
            one = jax.nn.one_hot(i, log_p.size, dtype=log_p.dtype)
            (gradient,) = pull(one.reshape(log_p.shape))
            weight = jnp.exp(log_p.reshape(-1)[i])
            squares = jax.tree.map(lambda g: weight * jnp.square(widen(g)), gradient)
            return jax.tree.map(jnp.add, total, squares), None

        zeros = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        return jax.lax.scan(add, zeros, jnp.arange(log_p.size))[0]

    def square_at_label(sample):
        x, y = sample

        def log_likelihood(p):
            log_p = log_probabilities(p, x)
            if kind == "sampled":
                label = jax.random.categorical(y, log_p)
            else:
                label = y if kind == "empirical" else jnp.argmax(log_p, axis=-1)
            return jnp.sum(jnp.take_along_axis(log_p, label[..., None], axis=-1))

        gradient = jax.grad(log_likelihood)(params)
        return jax.tree.map(lambda g: jnp.square(widen(g)), gradient)

    square = expected_square if kind == "true" else square_at_label

    def chunk_total(chunk, valid):
        return _sum_valid(jax.vmap(square)(chunk), valid)

    return _mean_over_chunks(chunk_total, params, (inputs, evidence), chunk_size)


def memory_aware_importance(
    output_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    *,
    per_sample: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """Memory Aware Synapses: Ω = mean over x of |∂ ‖f(x)‖² / ∂θ|; no labels.

    Args:
      output_fn: (params, one input) -> outputs of any shape. Logits and softmax outputs
        give different Ω; the authors use the plain outputs of the network.
      params: tree of arrays.
      inputs: arrays (num_samples, ...), or a tree of them.
      per_sample: True: as written. False: the authors' default code, which takes the
        absolute value of the sum over each chunk, so that samples cancel:
        Ω = Σ over chunks |Σ_x ∂ ‖f(x)‖² / ∂θ| / num_samples, never larger.
      chunk_size: samples at a time, as for `fisher_information`.

    Returns:
      A tree like params, float32 or wider.

    Raises:
      ValueError: for no samples or a chunk_size below 1.

    >>> x = jnp.array([[1.0, -0.5], [1.0, 0.5]])
    >>> print(memory_aware_importance(jnp.dot, jnp.ones(2), x))
    [2. 1.]
    >>> print(memory_aware_importance(jnp.dot, jnp.ones(2), x, per_sample=False))
    [2.  0.5]

    References:
      Aljundi et al., Memory Aware Synapses: Learning what (not) to forget,
      arXiv:1711.09601.
    """

    def gradient(x):
        def norm(p):
            return jnp.sum(jnp.square(widen(output_fn(p, x))))

        return jax.tree.map(widen, jax.grad(norm)(params))

    def chunk_total(chunk, valid):
        gradients = jax.vmap(gradient)(chunk)
        if per_sample:
            return _sum_valid(jax.tree.map(jnp.abs, gradients), valid)
        return jax.tree.map(jnp.abs, _sum_valid(gradients, valid))

    return _mean_over_chunks(chunk_total, params, inputs, chunk_size)
