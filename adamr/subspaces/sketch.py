"""A streaming sketch of gradients or activations: fixed memory, no buffer of samples.

Frequent Directions keeps B (size × n) such that for all rows A seen so far

    0 ≤ ‖A x‖² − ‖B x‖² ≤ ‖A − A_k‖_F² / (size − k)     for every unit x and k < size,

so up to this error, `grow_subspace(subspace, sketch.rows)` builds the basis of all rows
of the stream.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import matmul
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["Sketch", "empty_sketch", "update_sketch"]


class Sketch(NamedTuple):
    """A sketch of the samples of every protected leaf.

    Attributes:
      rows: in leaf order: float32 (*batch, size, n), n the fan-in, or None for an
        unprotected leaf.
    """

    rows: tuple[jax.Array | None, ...]


def empty_sketch(subspace: Subspace, size: int) -> Sketch:
    """A sketch of `size` rows of zeros for every protected leaf.

    Args:
      subspace: says which leaves and axes are protected; its bases are not read.
      size: rows kept per leaf, at least 1; no more than the fan-in are kept. Twice the
        rank to be learnt is a good choice.

    Returns:
      A `Sketch` that has seen nothing.

    Raises:
      ValueError: for a size below 1.

    >>> from adamr import empty_subspace
    >>> s = empty_subspace({"w": jnp.zeros((4, 2))})
    >>> empty_sketch(s, 3).rows[0].shape
    (3, 4)

    References:
      Ghashami, Liberty, Phillips, Woodruff, Frequent Directions: Simple and
      Deterministic Matrix Sketching, arXiv:1501.01711.
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


def shrink_rows(rows: jax.Array, new: jax.Array) -> jax.Array:
    """One Frequent Directions step on (size, n) and (num_samples, n)."""
    size, fan_in = rows.shape
    stacked = jnp.concatenate([rows, new.astype(jnp.float32)])
    usable = jnp.all(jnp.isfinite(stacked))
    stacked = jnp.where(usable, stacked, 0.0)
    if stacked.shape[0] > fan_in:
        energy, vectors = jnp.linalg.eigh(matmul(stacked.T, stacked))
        directions = vectors.T
    else:  # the smaller Gram matrix
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
    """Adds a batch of samples, in or outside jit and scan.

    Args:
      sketch: the sketch so far.
      samples: a tuple in leaf order or a tree like the parameters; per leaf a float
        array (*batch, num_samples, n), or None. `gradient_samples(subspace, gradient)`
        makes them from a gradient.

    Returns:
      A `Sketch` of the same shapes. A leaf, or a slice of a stacked one, is unchanged
      where its samples are not finite.

    Raises:
      ValueError: if samples does not have one entry per leaf.

    >>> from adamr import empty_subspace
    >>> s = empty_sketch(empty_subspace({"w": jnp.zeros((3, 2))}), 2)
    >>> s = update_sketch(s, {"w": jnp.array([[0.0, 2.0, 0.0]])})
    >>> print(jnp.abs(s.rows[0]))
    [[0. 2. 0.]
     [0. 0. 0.]]
    """
    names, leaves = _tree.flatten_with_names(samples)
    if len(leaves) != len(sketch.rows):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} ({_tree.listed(names)}), expected {len(sketch.rows)}."
        )

    def leaf(rows, new):
        if rows is None or _tree.is_hole(new):
            return rows
        shrink = shrink_rows
        for _ in range(rows.ndim - 2):
            shrink = jax.vmap(shrink)
        return shrink(rows, new)

    return Sketch(tuple(map(leaf, sketch.rows, leaves)))
