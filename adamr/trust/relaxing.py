"""Relaxing a frozen space without storing more: Restricted Orthogonal Gradient (ROGO).

Part of the frozen space M that the new task needs most, the *relaxing* space B ⊆ M, is
opened through a penalised scaling and folded into the weights when the task ends:

    W_eff = W + B (Q − I) Bᵀ W,   loss + β ‖Q − I‖²,   then W <- W_eff

The scaling is that of `adamr.scales`; the step of W stays projected off all of M. With
an empty B this is GPM (`test_t7_above_threshold_1_nothing_is_relaxed`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamr.subspaces.columns import (
    FLOOR,
    append,
    extend,
    matmul,
    normalized,
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
    columns, _ = to_columns(basis, weights)
    opened, _ = to_columns(start, start_weights)
    fan_in = columns.shape[-2]
    rows, usable = normalized(rows)
    empty = jnp.zeros((*columns.shape[:-1], fan_in), columns.dtype)
    gradient = extend(empty, rows, energy)
    inside = matmul(transpose(columns), gradient)
    done = matmul(transpose(columns), opened)
    inside = inside - matmul(done, matmul(transpose(done), inside))
    square, vectors = spectrum(matmul(inside, transpose(inside)))
    # Squared cosines: at most 1, so that a threshold above 1 relaxes nothing.
    square = jnp.minimum(square, 1.0)
    wanted = (jnp.sqrt(square) >= threshold) & (square > FLOOR[str(square.dtype)])
    new = jnp.where(wanted[..., None, :], matmul(columns, vectors), 0.0)
    grown = append(opened, new, jnp.sum(wanted, axis=-1, dtype=jnp.int32))
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
    MᵀUUᵀM gives them all: the authors' loop of QR deflations, without the loop
    (`test_relaxing_subspace_equals_the_greedy_search`).

    Args:
      memory: the frozen space M.
      gradients: tree like the parameters: G, unprojected, on a batch of this task.
      energy: the authors use 0.97 to 0.99, growing with depth.
      threshold: cosine; the authors use 0.9 to 0.95. Above 1 relaxes nothing.
      start: what is relaxed already (the authors search twice per task); the new
        directions come behind it, so that its Q stays valid.

    Returns:
      A `Subspace` in the shapes of `memory` with span inside it. Gradients that are
      zero, missing or not finite add nothing.

    Raises:
      ValueError: for gradients or a start that do not fit, or energy outside [0, 1].

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

    def leaf(rows, basis, weights, *before):
        if basis is None or rows is None:
            return before
        return on_host(
            _search, *before, basis, weights, rows, energy=energy, threshold=threshold
        )

    rows = gradient_samples(memory, gradients)
    return Subspace(*zip(*map(leaf, rows, *memory, *opened), strict=True))
