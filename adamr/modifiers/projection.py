"""Projection off a protected subspace."""

from typing import Any, NamedTuple

import optax

from adamr.routing.carrier import Measured, plain_gradient
from adamr.subspaces.protected import Protected, Source, beside, require_source

__all__ = ["ProjectOutState", "project_out"]


class ProjectOutState(NamedTuple):
    subspace: Protected


def projection(
    subspace: Source, link: str, state_type: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation of `project_out` and `protect_update`."""
    require_source(subspace, link)

    def init_fn(params):
        return state_type(beside(subspace, params, link))

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, link, params)
        del params, extra_args
        return state.subspace.project(updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Projection(optax.GradientTransformationExtraArgs):
    """A projection that says how far it moved each leaf."""

    def measure(self, updates: Any, state: ProjectOutState) -> Measured:
        gradient, distances = state.subspace.measured_project(updates)
        return Measured(gradient, distances, state)


def project_out(
    subspace: Source,
) -> optax.GradientTransformationExtraArgs:
    """The linear projection modifier: g̃ = g − U diag(λ) Uᵀ g on every protected leaf.

    GPM, SGP, OGD, PCA-OGD and Adam-NSCL differ only in how the subspace is built.

    Args:
      subspace: bases U and weights λ; or `Directions`, for g̃ = g − Σ ⟨g, v⟩ v over all
        leaves together; or a function of the parameters that makes one, called in
        `init`, such as `empty_subspace`. The state holds a copy, which `set_subspace`
        replaces at a task boundary without recompiling. Where `optax.masked` hides
        leaves, directions are restricted to the others and made orthonormal again.

    Returns:
      A modifier for a route, or a plain link. Contractions run in float32 at the
      highest precision; a leaf whose basis is full gets exactly 0. The guarantee
      Uᵀ g̃ = 0 holds for the gradient; what survives the preconditioner depends on the
      route (see `adamr.protection`).

    Raises:
      ValueError: at init or update, for a tree with other leaves than the subspace.
      TypeError: for anything but a subspace or a function that returns one; at update,
        for a `Routed` or a complex leaf.

    >>> import jax.numpy as jnp
    >>> from adamr import make_subspace
    >>> g = {"w": jnp.ones((2, 3))}
    >>> tx = project_out(make_subspace(g, {"w": jnp.array([[1.0], [0.0]])}))
    >>> tx.update(g, tx.init(g))[0]["w"][:, 0]
    Array([0., 1.], dtype=float32)

    References: Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762.
    """
    return _Projection(*projection(subspace, "project_out", ProjectOutState))
