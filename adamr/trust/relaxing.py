"""Relaxing a frozen space without storing more: restricted orthogonal gradients (ROGO).

The part of the frozen space M that the new task needs most, the *relaxing* space B ⊆ M,
is opened through a penalised scaling Q, which is folded into the weights when the task
ends:

    W_eff = W + B (Q − I) Bᵀ W,   loss + β ‖Q − I‖²,   then W <- W_eff

`adamr.trust.scaled_weights` computes W_eff; the step of W stays projected off all of M.
With an empty B this is GPM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    append_columns,
    extend_by_samples,
    matmul,
    normalized_samples,
    on_host,
    spectrum,
    to_columns,
    to_storage,
    transpose,
    used_columns,
)
from adamr.subspaces.grow import gradient_samples
from adamr.subspaces.subspace import Subspace

__all__ = ["relaxing_subspace"]


@functools.partial(jax.jit, static_argnames="energy")
def _search(start, start_weights, basis, weights, rows, energy, threshold):
    """The basis and weights `start`, with one leaf's new relaxing directions added."""
    columns, _ = to_columns(basis, weights)
    opened, _ = to_columns(start, start_weights)
    fan_in = columns.shape[-2]
    rows, usable = normalized_samples(rows)
    empty = jnp.zeros((*columns.shape[:-1], fan_in), columns.dtype)
    gradient = extend_by_samples(empty, rows, energy)
    inside = matmul(transpose(columns), gradient)
    done = matmul(transpose(columns), opened)
    inside = inside - matmul(done, matmul(transpose(done), inside))
    square, vectors = spectrum(matmul(inside, transpose(inside)))
    # Squared cosines: at most 1, so that a threshold above 1 relaxes nothing.
    square = jnp.minimum(square, 1.0)
    floor = ENERGY_FLOOR[str(square.dtype)]
    wanted = (jnp.sqrt(square) >= threshold) & (square > floor)
    new = jnp.where(wanted[..., None, :], matmul(columns, vectors), 0.0)
    grown = append_columns(opened, new, jnp.sum(wanted, axis=-1, dtype=jnp.int32))
    lam = used_columns(grown).astype(columns.dtype)
    return to_storage(grown, lam, start, start_weights)


def relaxing_subspace(
    memory: Subspace,
    gradients: Any,
    *,
    energy: float = 0.97,
    threshold: float = 0.95,
    start: Subspace | None = None,
) -> Subspace:
    """The directions inside the frozen space that the current gradient needs most.

    With U the leading left singular vectors of the gradient G (fan-in × outputs) that
    hold the share `energy` of ‖G‖², takes u ∈ span M, one after the other, each
    orthogonal to those before it,

        u = argmax ‖Uᵀ u‖ over unit u,   while ‖Uᵀ u‖ ≥ threshold

    These are the principal vectors of M towards U, so one eigendecomposition of
    MᵀUUᵀM finds all the directions that the authors' greedy loop finds one by one.

    Args:
      memory: the frozen space M.
      gradients: G, tree like the parameters: the gradient before any projection, on a
        batch of this task.
      energy: share in [0, 1]; the authors use 0.97 to 0.99, growing with depth.
      threshold: a cosine; the authors use 0.9 to 0.95. Above 1 relaxes nothing.
      start: a `Subspace` in the shapes of `memory`, the directions that are relaxed
        already (the authors search twice per task), or None. The new directions are
        added after them, so their Q stays valid.

    Returns:
      A `Subspace` in the shapes of `memory`, whose span lies inside that of `memory`.
      Gradients that are zero, missing or not finite add nothing.

    Raises:
      ValueError: for gradients or a start that do not fit `memory`, or an energy
        outside [0, 1].

    >>> from adamr import make_subspace
    >>> from adamr.subspaces import rank
    >>> g = jnp.array([[3.0], [4.0], [0.0]])
    >>> memory = make_subspace(g, jnp.eye(3)[:, :2])
    >>> relaxed = relaxing_subspace(memory, g)
    >>> print(int(rank(relaxed)[0]), jnp.abs(relaxed.bases[0][:, 0, 0]))
    1 [0.6 0.8 0. ]

    References:
      Yang et al., Restricted Orthogonal Gradient Projection for Continual Learning,
      arXiv:2301.12131.
    """
    if not 0.0 <= energy <= 1.0:
        raise ValueError(f"energy must lie in [0, 1], got {energy}.")
    memory.check(gradients, "memory")
    opened = jax.tree.map(jnp.zeros_like, memory) if start is None else start
    shapes = [jax.tree.map(jnp.shape, s) for s in (memory, opened)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"start has shapes {shapes[1]}, expected {shapes[0]}.")

    options = dict(energy=energy, threshold=threshold)

    def leaf(rows, basis, weights, open_basis, open_weights):
        if basis is None or rows is None:
            return open_basis, open_weights
        arrays = (open_basis, open_weights, basis, weights, rows)
        return on_host(_search, *arrays, **options)

    rows = gradient_samples(memory, gradients)
    return Subspace(*zip(*map(leaf, rows, *memory, *opened), strict=True))
