"""A streaming sketch of gradients or activations: fixed memory, no buffer of samples.

Frequent Directions keeps B (size × n) such that for all rows A seen so far

    0 ≤ ‖A x‖² − ‖B x‖² ≤ ‖A − A_k‖_F² / (size − k)     for every unit x and k < size,

so the basis that `grow_subspace(subspace, sketch.rows)` builds is that of the stream up
to this error.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["Sketch", "empty_sketch", "update_sketch"]


class Sketch(NamedTuple):
    """Rows in leaf order: arrays (*batch, size, n) float32, or None if unprotected."""

    rows: tuple[jax.Array | None, ...]


def empty_sketch(subspace: Subspace, size: int) -> Sketch:
    """A sketch of `size` rows for every protected leaf.

    Args:
      subspace: says which leaves and axes are protected.
      size: rows kept per leaf (at most the fan-in is of use); twice the rank that is
        to be learnt is a good choice.

    >>> from adamr import empty_subspace
    >>> s = empty_subspace({"w": jnp.zeros((4, 2))})
    >>> empty_sketch(s, 3).rows[0].shape
    (3, 4)
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")

    def leaf(basis, weights):
        if basis is None:
            return None
        how = layout(basis, weights)
        batch = tuple(basis.shape[d] for d in how.batch)
        return jnp.zeros((*batch, min(size, how.fan_in), how.fan_in), jnp.float32)

    return Sketch(tuple(map(leaf, *subspace)))


def _shrink(rows: jax.Array, new: jax.Array) -> jax.Array:
    """One Frequent Directions step on (size, n) and (num_samples, n)."""
    size, fan_in = rows.shape
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    stacked = jnp.concatenate([rows, new.astype(jnp.float32)])
    usable = jnp.all(jnp.isfinite(stacked))
    stacked = jnp.where(usable, stacked, 0.0)
    if stacked.shape[0] > fan_in:
        energy, vectors = jnp.linalg.eigh(matmul(stacked.T, stacked))
        directions = vectors.T
    else:  # the small side's Gram matrix
        energy, vectors = jnp.linalg.eigh(matmul(stacked, stacked.T))
        length = jnp.sqrt(jnp.maximum(energy, 0.0))
        directions = (
            matmul(vectors.T, stacked) / jnp.where(length > 0, length, 1)[:, None]
        )
    energy, directions = jnp.maximum(energy[::-1], 0.0), directions[::-1]
    least = energy[size] if energy.size > size else 0.0
    kept = jnp.sqrt(jnp.maximum(energy[:size] - least, 0.0))
    return jnp.where(usable, kept[:, None] * directions[:size], rows)


def update_sketch(sketch: Sketch, samples: Any) -> Sketch:
    """Takes in a batch of samples; one call per step, under jit or scan.

    Args:
      sketch: the sketch so far.
      samples: in leaf order or a tree like the parameters, (*batch, num_samples, n) or
        None; `gradient_samples(subspace, gradient)` gives them for a gradient.

    Returns:
      A `Sketch` of the same shapes. Samples that are not finite leave a leaf as it was.
    """
    leaves = _tree.flatten(samples)[0]
    if len(leaves) != len(sketch.rows):
        raise ValueError(
            f"samples must have one entry per parameter leaf: got {len(leaves)}, "
            f"expected {len(sketch.rows)}."
        )

    def leaf(rows, new):
        if rows is None or _tree.is_hole(new):
            return rows
        shrink = _shrink
        for _ in range(rows.ndim - 2):
            shrink = jax.vmap(shrink)
        return shrink(rows, new)

    return Sketch(tuple(map(leaf, sketch.rows, leaves)))
