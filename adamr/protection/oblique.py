"""Projection in the preconditioner's own metric: the allowed step nearest to Adam's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import require_routed
from adamr.routing.estimators import Estimators
from adamr.routing.merge import (
    FaithfulSecondMomentState,
    MomentOptions,
    advance_moments,
    check_moments,
    init_moments,
)
from adamr.routing.sharing import Guard, Share
from adamr.subspaces.protected import SubspaceSource, beside, require_source
from adamr.subspaces.subspace import Subspace, layout, project_leaf, used

__all__ = ["ObliqueState", "oblique_second_moment"]

_LINK = "oblique_second_moment"


class ObliqueState(NamedTuple):
    subspace: Subspace
    moments: FaithfulSecondMomentState


def _oblique_leaf(basis, weights, m, d):
    """D(m − U diag(λ) x), (UᵀDU) x = UᵀDm, one r × r system per output."""
    how = layout(basis, weights)
    outputs = [a for a in range(m.ndim) if a not in how.batch + how.protected]
    order = (*how.batch, *outputs, *how.protected)
    batch = tuple(m.shape[a] for a in how.batch)

    def rows(x):  # (*batch, outputs, fan_in)
        x = jnp.broadcast_to(x.astype(jnp.float32), m.shape).transpose(order)
        return x.reshape(*batch, -1, how.fan_in)

    def einsum(subscripts, *operands):
        return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)

    u = basis.astype(jnp.float32).transpose(*order, m.ndim)
    u = u.reshape(*batch, how.fan_in, how.capacity)
    lam = weights.astype(jnp.float32).reshape(*batch, 1, how.capacity)
    # x does not change with the scale of D: a largest entry of 1 keeps it in range.
    metric = rows(d)
    metric = metric / jnp.max(metric, axis=-1, keepdims=True)
    gram = einsum("...on,...nrs->...ors", metric, einsum("...nr,...ns->...nrs", u, u))
    padding = 1.0 - used(basis, weights).reshape(*batch, 1, how.capacity)
    gram = gram + einsum("...r,rs->...rs", padding + 1e-7, jnp.eye(how.capacity))
    target = einsum("...on,...nr->...or", metric * rows(m), u)
    x = jnp.linalg.solve(gram, target[..., None])[..., 0]
    step = rows(d) * (rows(m) - einsum("...or,...nr->...on", lam * x, u))
    back = [order.index(a) for a in range(m.ndim)]
    step = step.reshape([m.shape[a] for a in order]).transpose(back)
    # Rounding in an ill-conditioned solve must not cost the invariant, which holds
    # along the directions that are wholly protected.
    return project_leaf(basis, jnp.where(weights < 1, 0.0, weights), step)


def oblique_second_moment(
    subspace: SubspaceSource,
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
    """A merging link that projects in the metric of Adam's D = 1 / (√(v̂+ε_root) + ε).

        Δ = D (m̂ − U diag(λ) x),   (UᵀDU) x = UᵀD m̂

    Guarantee (λ = 1): UᵀΔ = 0; ⟨m̂, Δ⟩ ≥ 0; and Δ is the point of the allowed space
    closest to D m̂ in the norm of D⁻¹. Use it with the raw gradient in both moments
    (`route_first_moment(optax.identity())`) or with a projected first moment. It costs
    an r × r solve per output unit and out · r² numbers of working memory per leaf, so
    keep the rank at 64 or less.

    Args:
      subspace: as for `project_out`.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.

    Returns:
      A link from `Routed` to a plain tree.

    Raises:
      ValueError: for an unknown estimator, share or guard; at init or update, for a
        tree with other leaves than the subspace.
      TypeError: for anything but a `Subspace` or a function that returns one; at
        update, without a route before it.
    """
    require_source(subspace, _LINK, Subspace)
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    check_moments(options)

    def init_fn(params) -> Any:
        here = beside(subspace, params, _LINK, Subspace)
        return ObliqueState(here, init_moments(options, params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, _LINK)
        (mu_hat, root), inner = advance_moments(options, updates, state.moments)

        def leaf(raw, m, denominator, basis, weights):
            if basis is None:
                return (m / denominator).astype(raw.dtype)
            step = _oblique_leaf(basis, weights, m, 1.0 / denominator)
            return step.astype(raw.dtype)

        positions = _tree.flatten(updates.raw)[0]
        here = state.subspace.at(updates.raw)
        moments = (_tree.spread(x, positions) for x in (mu_hat, root))
        steps = _tree.map_positions(leaf, updates.raw, *moments, *here)
        return steps, ObliqueState(state.subspace, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
