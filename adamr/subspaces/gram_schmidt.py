"""Directions from samples: Gram-Schmidt over whole vectors, and principal directions.

Samples are whole gradients: trees like the parameters with a leading axis. All
functions are pure, run under jit, and keep every shape. An inner product is a sum over
leaves; leaves are never concatenated.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _rows as matrix
from adamr import _tree
from adamr.subspaces.directions import Directions
from adamr.subspaces.vectors import as_matrix, held, orthonormalize

__all__ = ["grow_directions", "principal_directions"]

# Shares of the largest energy below this are float32 noise of the Gram matrix.
_ENERGY_FLOOR = 1e-6


def _check_samples(samples: Any, like: Sequence[Any] | None) -> list[jax.Array]:
    """The arrays of `samples` where `like` has rows, or all of them without `like`."""
    names, leaves = _tree.flatten_with_names(samples)
    if like is None:
        like = [None if _tree.is_hole(x) else x for x in leaves]
    if len(leaves) != len(like):
        raise ValueError(
            f"samples must have one entry per parameter leaf: got {len(leaves)} "
            f"({_tree.listed(names)}), expected {len(like)}."
        )
    found = []
    for name, x, row in zip(names, leaves, like, strict=True):
        if row is None:
            continue
        shape = None if _tree.is_hole(x) else jnp.shape(x)
        lead = found[0].shape[0] if found else shape[0] if shape else "num_samples"
        wanted = (lead, *row.shape[1:])
        if shape != wanted:
            raise ValueError(
                f"samples has shape {shape} at {name}, expected {wanted}: one whole "
                "gradient per entry of axis 0."
            )
        found.append(jnp.asarray(x))
    if found and not found[0].shape[0]:
        raise ValueError("samples is empty: its axis 0 has length 0.")
    return found


def grow_directions(
    directions: Directions,
    samples: Any,
    *,
    max_new: int | None = None,
    tolerance: float = 1e-5,
) -> Directions:
    """Gram-Schmidt: appends the new directions of the samples x, in their order.

        r = x − Σ_i ⟨x, v_i⟩ v_i  (twice),    v_new = r / ‖r‖  if  ‖r‖ > tolerance ‖x‖

    Samples may have any scale. Those that are zero, not finite, or already in the span
    of the v_i add nothing.

    Args:
      directions: v_i, what is protected so far.
      samples: tree like the parameters, or a tuple in leaf order, of float arrays
        (num_samples, *leaf.shape): whole gradients, such as those of `logit_gradients`.
        Entries of leaves that the directions leave out are ignored.
      max_new: how many directions to add at most; None: one per sample.
      tolerance: the share of a sample's length that must be new, in [0, 1).

    Returns:
      `Directions` of the same shapes. Under jit, directions without room are dropped.

    Raises:
      ValueError: for samples that are empty or of the wrong shape, and, outside jit, if
        there is too little room for their directions.

    >>> from adamr import empty_directions
    >>> d = empty_directions({"w": jnp.zeros(2), "b": jnp.zeros(1)}, 2)
    >>> rows = jnp.array([[3.0, 0.0], [6.0, 0.0]])
    >>> d = grow_directions(d, {"w": rows, "b": jnp.array([[4.0], [8.0]])})
    >>> print(d.used, d.rows[0][0], d.rows[1][0])  # b, w: the order of the leaves
    1 [0.8] [0.6 0. ]

    References:
      Farajtabar, Azizan, Mott, Li, Orthogonal Gradient Descent for Continual Learning,
      arXiv:1910.07104.
    """
    found = _check_samples(samples, directions.rows)
    rows = held(directions.rows)
    if not rows:
        return directions
    most = found[0].shape[0] if max_new is None else max_new
    grown, used, overflow = orthonormalize(
        rows, directions.used, found, most, tolerance
    )
    if not _tree.is_traced(overflow) and overflow:
        raise ValueError(
            f"samples hold more new directions than there is room for: capacity is "
            f"{rows[0].shape[0]}, of which {directions.used} were used. Ask "
            "empty_directions for more capacity, bound the number with max_new, or "
            "pass only the strongest: principal_directions(samples, count)."
        )
    return Directions(tuple(_tree.spread(grown, directions.rows)), used)


@functools.partial(jax.jit, static_argnames="count")
def _principal(samples, count):
    """`principal_directions` of a list of arrays."""
    samples = [x.astype(jnp.float32) for x in samples]
    inner = [tuple(range(1, x.ndim)) for x in samples]
    peaks = [_tree.largest(x, a) for x, a in zip(samples, inner, strict=True)]
    peak = functools.reduce(jnp.maximum, peaks)  # NaN stays NaN
    usable = jnp.isfinite(peak)
    top = jnp.max(jnp.where(usable, peak, 0.0))
    top = jnp.where(top > 0, top, 1.0)

    def scaled(x):
        keep = usable.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(keep, x / top, 0.0)

    samples = [scaled(x) for x in samples]
    gram = matrix.gram(*as_matrix(samples))[0]
    gram = gram / jnp.maximum(jnp.trace(gram), jnp.finfo(jnp.float32).tiny)
    energy, vectors = jnp.linalg.eigh(gram)
    energy, vectors = energy[::-1][:count], vectors[:, ::-1][:, :count]
    real = energy > _ENERGY_FLOOR * energy[0]
    highest = jax.lax.Precision.HIGHEST
    out = [jnp.einsum("nk,n...->k...", vectors, x, precision=highest) for x in samples]
    square = sum(jnp.sum(x * x, axis=a) for x, a in zip(out, inner, strict=True))
    scale = jnp.where(real, jax.lax.rsqrt(jnp.where(real, square, 1.0)), 0.0)
    return [x * scale.reshape(-1, *[1] * (x.ndim - 1)) for x in out]


def principal_directions(samples: Any, count: int) -> Any:
    """The `count` directions that hold most of the samples' energy, strongest first.

    They are the leading right singular vectors of the matrix X whose rows are the
    samples, computed from the eigenvectors of the Gram matrix X Xᵀ. The samples are not
    centred: a gradient that all of them share is the direction to protect first, and
    centring would remove it.

    Args:
      samples: tree like the parameters, of float arrays (num_samples, *leaf.shape).
        Samples that are not finite count as zero.
      count: how many, at least 1; no more than num_samples are returned.

    Returns:
      A tree like `samples` of float32 arrays (count, *leaf.shape), which
      `grow_directions` takes as samples. Directions with less than 1e-6 of the
      strongest one's energy are float32 noise and become zero.

    Raises:
      ValueError: for a count below 1, or arrays of different lengths.

    >>> x = {"w": jnp.array([[2.0, 0.0], [2.0, 0.1]])}
    >>> print(jnp.abs(principal_directions(x, 1)["w"]).round(1))
    [[1. 0.]]

    References:
      Doan, Bennani, Mazoure, Rabusseau, Alquier, A Theoretical Analysis of Catastrophic
      Forgetting through the NTK Overlap Matrix, arXiv:2010.04003.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    found = _check_samples(samples, None)
    strongest = _principal(found, min(count, found[0].shape[0]))
    return jax.tree.unflatten(jax.tree.structure(samples), strongest)
