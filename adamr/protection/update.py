"""Exact protections: what keeps the step itself out of the protected space.

Adam's diagonal D does not commute with the projector P, so a projected gradient is not
a projected step: UᵀDPm ≠ 0. Besides sharing v along the protected axis
(`faithful_second_moment(share=...)`, for which D P = P D), four links repair it:

    link                             step            invariant  never ascends
    protect_update                   P D m           yes        no
    two_sided (protect_update after  P D P m         yes        yes
      a projected first moment)
    oblique_second_moment            D(m − U x)      yes        yes, and closest to D m
                                     UᵀΔ = 0                    in the metric D⁻¹
    in_eigenbasis                    Q D' Qᵀ m       yes        yes

"invariant": UᵀΔ = 0, so a layer's response to protected inputs does not change.
"never ascends": ⟨g, Δ⟩ ≥ 0 for the first step of the moments.
Proven in tests/test_protection.py: `test_t0d_closed_form`,
`test_leak_of_exact_protections`, `test_exact_protections_descend`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _trees
from adamr.directions import Directions
from adamr.modifiers.projection import (
    copy_subspace,
    project_out,
    projection,
    require_subspace,
)
from adamr.routing import (
    FaithfulSecondMomentState,
    Routed,
    faithful_second_moment,
    moments,
    require_routed,
    route_both_moments,
)
from adamr.second_moments import Guard
from adamr.subspace import (
    Subspace,
    check_leaves,
    coordinates,
    layout,
    project_leaf,
    reconstruct,
    used,
    without,
)

__all__ = [
    "EigenbasisState",
    "ObliqueState",
    "ProtectUpdateState",
    "Rotated",
    "in_eigenbasis",
    "oblique_second_moment",
    "protect_update",
    "two_sided",
]


class ProtectUpdateState(NamedTuple):
    subspace: Subspace | Directions


def protect_update(
    subspace: Subspace | Directions,
) -> optax.GradientTransformationExtraArgs:
    """Update projection: Δ <- Δ − U diag(λ) UᵀΔ, after any preconditioner.

    Guarantee: UᵀΔ = 0 (for λ = 1) whatever came before. Not a descent guarantee: with
    raw moments gᵀPDg may be negative; put a projected first moment before it
    (`two_sided`) for one. Proven in `test_t0d_closed_form`. Weight decay and the
    learning rate belong before and after it: decay before, so that it is projected too.

    Args:
      subspace: as for `project_out`.

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
    subspace: Subspace | Directions, **kwargs
) -> optax.GradientTransformationExtraArgs:
    """Gradient and update projected: Δ = P D P m.

    Guarantee: UᵀΔ = 0 and ⟨g, Δ⟩ ≥ 0 on the first step, also with element-wise v.
    Proven in `test_t0d_closed_form` and `test_exact_protections_descend`.

    Args:
      subspace: as for `project_out`; a task boundary sets both copies at once.
      **kwargs: of `faithful_second_moment`.

    Returns:
      g -> unsigned step: follow it with `optax.scale_by_learning_rate`.
    """
    return optax.chain(
        route_both_moments(project_out(subspace)),
        faithful_second_moment(**kwargs),
        protect_update(subspace),
    )


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
    # Rounding in an ill-conditioned solve must not cost the invariant.
    return project_leaf(basis, weights, step)


def oblique_second_moment(
    subspace: Subspace,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    estimator: str = "adam",
    share: Any = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A merging link that projects in the metric of Adam's D = 1 / (√(v̂+ε_root) + ε).

        Δ = D (m̂ − U diag(λ) x),   (UᵀDU) x = UᵀD m̂

    Guarantee (λ = 1): UᵀΔ = 0; ⟨m̂, Δ⟩ ≥ 0; and Δ is the point of the allowed space
    closest to D m̂ in the metric D⁻¹. Proven in `test_t0d_closed_form`. Use it with the
    raw gradient in both moments (`route_first_moment(optax.identity())`) or with a
    projected first moment; it costs an r × r solve per output unit and out · r² numbers
    of working memory per leaf, so keep the rank at 64 or less.

    Args:
      subspace: as for `project_out`.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.

    Returns:
      A link from `Routed` to a plain tree.
    """
    require_subspace(subspace, "oblique_second_moment")
    init_moments, advance = moments(
        b1, b2, eps, eps_root, estimator=estimator, share=share, guard=guard,
        mu_dtype=mu_dtype, nu_dtype=nu_dtype,
    )  # fmt: skip

    def init_fn(params) -> Any:
        if jax.tree.leaves(params):
            check_leaves(subspace, params, "oblique_second_moment(subspace)")
        return ObliqueState(copy_subspace(subspace, params), init_moments(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "oblique_second_moment")
        (mu_hat, root), inner = advance(updates, state.moments)
        each = iter(zip(mu_hat, root, strict=True))

        def leaf(raw, basis, weights):
            m, denominator = next(each)
            if basis is None:
                return (m / denominator).astype(raw.dtype)
            step = _oblique_leaf(basis, weights, m, 1.0 / denominator)
            return step.astype(raw.dtype)

        steps = _trees.map_positions(leaf, updates.raw, *state.subspace)
        return steps, ObliqueState(state.subspace, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Rotated(NamedTuple):
    """One leaf in the eigenbasis of its protected space."""

    along: jax.Array  # c = Uᵀ g
    rest: jax.Array  # g − U c


class EigenbasisState(NamedTuple):
    subspace: Subspace
    inner: Any


def rotate(subspace: Subspace, tree: Any) -> tuple:
    """Leaves in order; protected ones split into coordinates along U and the rest."""

    def leaf(x, basis, weights):
        if basis is None or _trees.is_hole(x):
            return x
        along = coordinates(basis, weights, x)
        rest = x.astype(jnp.float32) - reconstruct(basis, weights, along)
        return Rotated(along.astype(x.dtype), rest.astype(x.dtype))

    return tuple(map(leaf, _trees.flatten(tree)[0], *subspace))


def in_eigenbasis(
    preconditioner: optax.GradientTransformation, subspace: Subspace
) -> optax.GradientTransformationExtraArgs:
    """Runs a preconditioner in the eigenbasis of the protected space and rotates back.

    The coordinates along U get moments of their own, and so does the rest of the leaf
    (kept off U on the way out):

        g -> (Uᵀg, g − UUᵀg) -> preconditioner -> (a, b) -> U a + (b − UUᵀb)

    There the projector is diagonal, so attenuating a direction by 1 − α does exactly
    what Proposition 1 of the paper says: routed, the step along it is (1 − α) of
    Adam's; shared, it is Adam's. Guarantee: with a fully projected first moment and
    the raw gradient in the second, UᵀΔ = 0; and ⟨g, Δ⟩ ≥ 0 on the first step. Proven in
    `test_proposition_1_in_the_eigenbasis` and `test_leak_of_exact_protections`. Do not
    put `route_both_moments` before it at full strength: all that is left along U is
    rounding, and a v of its own scales that up to whole steps
    (`test_shared_routing_in_the_eigenbasis_scales_rounding_up`).

    Args:
      preconditioner: `faithful_second_moment(...)` or any plain optax preconditioner.
        It sees a tuple in leaf order in which a protected leaf is a `Rotated`.
      subspace: bases U (λ is the modifier's business); r more rows of moments per leaf.

    Returns:
      A link that takes what `preconditioner` takes. Parameters reach it rotated too.
      `set_subspace` resets its moments, since their coordinates change meaning.
    """
    require_subspace(subspace, "in_eigenbasis")
    inner = optax.with_extra_args_support(preconditioner)

    def rotate_params(here, params):
        return rotate(here, params) if jax.tree.leaves(params) else jnp.zeros([])

    def init_fn(params) -> Any:
        if jax.tree.leaves(params):
            check_leaves(subspace, params, "in_eigenbasis(subspace)")
        here = copy_subspace(subspace, params)
        return EigenbasisState(here, inner.init(rotate_params(here, params)))

    def update_fn(updates, state, params=None, **extra_args):
        basis = state.subspace
        if isinstance(updates, Routed):
            # What is one tree before the rotation stays one after it.
            once = {id(tree): rotate(basis, tree) for tree in updates}
            plain, rotated = updates.raw, Routed(*(once[id(t)] for t in updates))
        else:
            plain, rotated = updates, rotate(basis, updates)
        if params is not None:
            params = rotate(basis, params)
        steps, inner_state = inner.update(rotated, state.inner, params, **extra_args)

        def leaf(like, step, basis, weights):
            if basis is None:
                return step.astype(like.dtype)
            along, rest = step.along.astype(jnp.float32), step.rest.astype(jnp.float32)
            back = reconstruct(basis, weights, along)
            inside = coordinates(basis, weights, rest)  # 0 along padding
            back = back + without(basis, used(basis, weights), rest, inside)
            return back.astype(like.dtype)

        steps = _trees.map_positions(leaf, plain, steps, *basis)
        return steps, EigenbasisState(basis, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
