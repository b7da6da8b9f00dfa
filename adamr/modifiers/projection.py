"""Projection off a protected subspace."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import require_plain
from adamr.sharding import copied_beside
from adamr.subspaces.directions import Directions, check_directions
from adamr.subspaces.gram_schmidt import restrict
from adamr.subspaces.subspace import (
    Subspace,
    check_leaves,
    measured_projection,
    project,
)

__all__ = ["ProjectOutState", "project_out"]


class ProjectOutState(NamedTuple):
    subspace: Subspace | Directions


def require_subspace(subspace: Any, link: str) -> None:
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"{link}: subspace must be a Subspace, got {type(subspace).__name__}: make "
            "one with make_subspace or empty_subspace."
        )


def _require_either(subspace: Any, link: str) -> None:
    if not isinstance(subspace, Subspace | Directions):
        raise TypeError(
            f"{link}: subspace must be a Subspace, got {type(subspace).__name__}: make "
            "one with make_subspace or empty_subspace, or Directions of the whole "
            "parameter vector with empty_directions."
        )


def copy_subspace(subspace: Any, params: Any) -> Any:
    """Fresh buffers: the optimizer's state may be donated, the argument may not."""
    if isinstance(subspace, Subspace):
        return Subspace(*(copied_beside(params, field) for field in subspace))
    rows = copied_beside(params, subspace.rows, lead=1)
    return Directions(rows, jnp.array(subspace.used, copy=True))


def projection(
    subspace: Subspace | Directions, link: str, state_type: type
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind `project_out` and `protect_update`."""
    _require_either(subspace, link)

    def init_fn(params):
        here: Any = subspace
        if isinstance(here, Directions):
            if not jax.tree.leaves(params):  # their leaves depend on the parameters
                return state_type(jnp.zeros([]))
            if len(leaves := _tree.flatten(params)[0]) == len(here.rows):
                here = restrict(here, leaves)
            check_directions(here, params, f"{link}(subspace)")
        elif jax.tree.leaves(params):
            check_leaves(here, params, f"{link}(subspace)")
        return state_type(copy_subspace(here, params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_plain(updates, link)
        return project(state.subspace, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Projection(optax.GradientTransformationExtraArgs):
    """A modifier that tells its route how far it moved the gradient."""

    @staticmethod
    def measured_update(updates, state):
        require_plain(updates, "project_out")
        projected, distances = measured_projection(state.subspace, updates)
        return projected, distances, state


def project_out(
    subspace: Subspace | Directions,
) -> optax.GradientTransformationExtraArgs:
    """The linear projection modifier: g̃ = g − U diag(λ) Uᵀ g on every protected leaf.

    GPM, SGP, OGD, PCA-OGD and Adam-NSCL differ only in how the subspace is built.

    Args:
      subspace: bases U and weights λ; or `Directions`, for g̃ = g − Σ ⟨g, v⟩ v over all
        leaves together. Held in the state, so that `set_subspace` can replace it at a
        task boundary without recompiling. Where `optax.masked` hides leaves,
        directions are restricted to the others and made orthonormal again.

    Returns:
      A modifier for a route, or a plain link. Contractions run in float32 at the
      highest precision; a leaf whose basis is full gets exactly 0. The guarantee
      Uᵀ g̃ = 0 is for the gradient: what survives the preconditioner depends on the
      routing (see `adamr.protection`).

    Raises:
      ValueError: at init or update, for a tree that the subspace was not made for.
      TypeError: for a `Routed`.

    >>> from adamr import make_subspace
    >>> g = {"w": jnp.ones((2, 3))}
    >>> tx = project_out(make_subspace(g, {"w": jnp.array([[1.0], [0.0]])}))
    >>> tx.update(g, tx.init(g))[0]["w"][:, 0]
    Array([0., 1.], dtype=float32)

    References: Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762.
    """
    tx = projection(subspace, "project_out", ProjectOutState)
    # What directions take from one leaf needs a pass over memory.
    return tx if isinstance(subspace, Directions) else _Projection(*tx)
