"""Merging two subspaces, and truncating one to its most protected directions.

The functions are pure, run under jit, and keep every shape of their first argument;
outside jit they compute in float64 on the host.
"""

import jax
import jax.numpy as jnp

from adamr.subspaces.columns import (
    column_numbers,
    extend_by_samples,
    matmul,
    on_host,
    to_columns,
    to_storage,
    transpose,
    used_columns,
)
from adamr.subspaces.subspace import Subspace

__all__ = ["merge_subspaces", "truncate_subspace"]


@jax.jit
def _merge_leaf(basis, weights, other, other_weights):
    columns, lam = to_columns(basis, weights)
    guest, guest_lam = to_columns(other, other_weights)
    guests = jnp.maximum(jnp.sum(used_columns(guest), axis=-1)[..., None, None], 1)
    merged = extend_by_samples(columns, transpose(guest) / jnp.sqrt(guests), 1.0)
    overlap = jnp.square(matmul(transpose(merged), guest))
    wanted = jnp.sum(overlap * guest_lam[..., None, :], axis=-1)
    lam = jnp.where(
        used_columns(merged), jnp.clip(jnp.maximum(lam, wanted), 0.0, 1.0), 0.0
    )
    return to_storage(merged, lam, basis, weights)


def merge_subspaces(subspace: Subspace, other: Subspace) -> Subspace:
    """The span of both subspaces, in the shapes of the first.

    Directions of `other` outside `subspace` are appended while there is room. With U'
    and λ' the basis and weights of `other`, a direction u gets

        λ ← max(λ, uᵀ U' diag(λ') U'ᵀ u).

    Args:
      subspace: the one whose shapes and directions stay.
      other: another of the same leaves and axes, of any capacity.

    Returns:
      A `Subspace` in the shapes of `subspace`.

    Raises:
      ValueError: if the two were made for different leaves or axes.

    >>> from adamr import make_subspace
    >>> from adamr.subspaces import rank
    >>> w = jnp.zeros((3, 2))
    >>> first, second = (make_subspace(w, jnp.eye(3)[:, i : i + 1]) for i in (0, 2))
    >>> int(rank(merge_subspaces(first, second))[0])
    2
    """
    if len(subspace.bases) != len(other.bases):
        raise ValueError(
            f"other has {len(other.bases)} leaves, expected {len(subspace.bases)}."
        )

    def leaf(position, basis, weights, guest, guest_weights):
        if guest is None:
            return basis, weights
        if basis is None or basis.shape[:-1] != guest.shape[:-1]:
            mine = None if basis is None else basis.shape
            raise ValueError(
                f"other has a basis of shape {guest.shape} at leaf {position}, "
                f"expected {mine}, of which only the last number may differ."
            )
        return on_host(_merge_leaf, basis, weights, guest, guest_weights)

    positions = range(len(subspace.bases))
    return Subspace(*zip(*map(leaf, positions, *subspace, *other), strict=True))


def truncate_subspace(subspace: Subspace, max_rank: int) -> Subspace:
    """Keeps the `max_rank` directions of largest λ per leaf; of equal ones, the older.

    The capacity does not change, so the next task can use the freed room.

    Args:
      subspace: what is protected so far.
      max_rank: how many directions to keep per leaf, at least 0.

    Returns:
      A `Subspace` of the same shapes.

    Raises:
      ValueError: for a negative max_rank.

    >>> from adamr import make_subspace
    >>> from adamr.subspaces import rank
    >>> s = make_subspace(jnp.zeros((3, 2)), jnp.eye(3)[:, :2])
    >>> int(rank(truncate_subspace(s, 1))[0])
    1
    """
    if max_rank < 0:
        raise ValueError(f"max_rank must be at least 0, got {max_rank}.")

    def leaf(basis, weights):
        if basis is None:
            return None, None
        columns, lam = to_columns(basis, weights)
        order = jnp.argsort(
            -jnp.where(used_columns(columns), lam, -1.0), axis=-1, stable=True
        )
        keep = column_numbers(lam.shape[-1], lam.shape[:-1]) < max_rank
        columns = jnp.take_along_axis(columns, order[..., None, :], axis=-1)
        columns = jnp.where(keep[..., None, :], columns, 0.0)
        lam = jnp.where(keep, jnp.take_along_axis(lam, order, axis=-1), 0.0)
        return to_storage(columns, lam, basis, weights)

    return Subspace(*zip(*map(leaf, *subspace), strict=True))
