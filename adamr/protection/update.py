"""Exact protections: what keeps the step itself out of the protected space.

Adam's diagonal D does not commute with the projector P, so a projected gradient is not
a projected step: UᵀDPm ≠ 0. Besides sharing v along the protected axis
(`faithful_second_moment(share=...)`, for which D P = P D), four links repair it:

    link                             step            invariant  never ascends
    protect_update                   P D m           yes        no
    two_sided (protect_update after  P D P m         yes        yes
      a projected first moment)
    oblique_second_moment            D(m − U x)      yes        yes, and closest to D m
                                     UᵀΔ = 0                    in the norm of D⁻¹
    in_eigenbasis                    Q D' Qᵀ m       yes        yes

"invariant": UᵀΔ = 0, so a layer's response to protected inputs does not change.
"never ascends": ⟨g, Δ⟩ ≥ 0 for the first step of the moments.

This file holds the first two; `oblique` and `eigenbasis` hold the others.
"""

from typing import NamedTuple

import jax
import optax

from adamr.modifiers.projection import project_out, projection
from adamr.routing.carrier import route_both_moments
from adamr.routing.estimators import Estimators
from adamr.routing.merge import MomentOptions, faithful_second_moment
from adamr.routing.sharing import Guard, Share
from adamr.subspaces.protected import Protected, Source

__all__ = ["ProtectUpdateState", "protect_update", "two_sided"]


class ProtectUpdateState(NamedTuple):
    subspace: Protected


def protect_update(
    subspace: Source,
) -> optax.GradientTransformationExtraArgs:
    """Update projection: Δ <- Δ − U diag(λ) UᵀΔ, after any preconditioner.

    Guarantee: UᵀΔ = 0 (for λ = 1) whatever came before. Not a descent guarantee: with
    raw moments gᵀPDg may be negative, and a projected first moment before it
    (`two_sided`) prevents that. Weight decay belongs before it, so that the decay is
    projected as well, and the learning rate after it.

    Args:
      subspace: as for `project_out`.

    Returns:
      A link from a plain tree to a plain tree.

    Raises:
      ValueError: at init or update, for a tree with other leaves than the subspace.
      TypeError: for anything but a subspace or a function that returns one; at update,
        for a `Routed` or a complex leaf.

    >>> import jax.numpy as jnp
    >>> from adamr import make_subspace
    >>> s = make_subspace({"w": jnp.zeros((2, 1))}, {"w": jnp.array([[0.6], [0.8]])})
    >>> tx = optax.chain(optax.scale_by_adam(), protect_update(s))
    >>> g = {"w": jnp.ones((2, 1))}
    >>> step = tx.update(g, tx.init(g))[0]["w"][:, 0]
    >>> print(abs(0.6 * step[0] + 0.8 * step[1]) < 1e-6)
    True

    References:
      Wang et al., Training Networks in Null Space of Feature Covariance (Adam-NSCL),
      arXiv:2103.07113.
    """
    return projection(subspace, "protect_update", ProtectUpdateState)


def two_sided(
    subspace: Source,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient and update projected: Δ = P D P m.

    Guarantee: UᵀΔ = 0 and ⟨g, Δ⟩ ≥ 0 on the first step, also with element-wise v.

    Args:
      subspace: as for `project_out`; a task boundary sets both copies at once.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.

    Returns:
      g -> unsigned step: follow it with `optax.scale_by_learning_rate`.

    Raises:
      TypeError, ValueError: as `project_out` and `faithful_second_moment` raise them.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    return optax.chain(
        route_both_moments(project_out(subspace)),
        faithful_second_moment(**options._asdict()),
        protect_update(subspace),
    )
