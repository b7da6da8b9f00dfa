"""Quadratic penalties as proximal steps: stable at any weight of the penalty.

    u = (d + D k (θ − θ*)) / (1 + η D k),    k = strength · Ω

so that θ − η u is the proximal point of the penalty at θ − η d, in the norm of the
preconditioner, √(xᵀ D⁻¹ x). `adamr.modifiers.penalty` compares the links for penalties.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr.modifiers.penalty import (
    Anchor,
    anchor_at,
    check_numbers,
    need_params,
    widen,
)
from adamr.routing.carrier import plain_gradient, require_routed
from adamr.routing.estimators import Estimators
from adamr.routing.merge import (
    FaithfulSecondMomentState,
    MomentOptions,
    advance_moments,
    check_moments,
    init_moments,
)
from adamr.routing.sharing import Guard, Share

__all__ = [
    "ProximalMomentState",
    "ProximalPenaltyState",
    "proximal_penalty",
    "proximal_second_moment",
]


class ProximalMomentState(NamedTuple):
    """`steps` is the schedule's clock, which no reset of the moments turns back."""

    steps: jax.typing.ArrayLike
    anchor: Anchor
    moments: FaithfulSecondMomentState


class ProximalPenaltyState(NamedTuple):
    count: jax.typing.ArrayLike
    anchor: Anchor


def _rate(learning_rate: optax.ScalarOrSchedule, count: Any) -> jax.Array:
    value = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.asarray(value, jnp.float32)


def _proximal(m, d, strength, omega, rate, p, anchor):
    """u with θ − η u = argmin_x ½ ‖x − (θ − η m/d)‖² d/η + ½ k ‖x − θ*‖²."""
    k = jnp.asarray(strength, jnp.float32) * omega
    k = jnp.minimum(k, 1e20)  # k / d must not overflow
    # Multiplied through by d, so that no 1/ε appears; k = 0 leaves m/d bit for bit.
    total = d + rate * k
    return m / total + k / total * (p - anchor)


def proximal_second_moment(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    importance: Any = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A merging link: Adam's step, then the penalty's proximal point in Adam's norm.

    With d = m̂ D, D = 1 / (√(v̂ + eps_root) + eps), k = strength · Ω, η = learning_rate:

        u = (d + D k (θ − θ*)) / (1 + η D k)
        θ − η u = (θ̂ + η D k θ*) / (1 + η D k),   θ̂ = θ − η d

    θ − η u minimises Σ (x − θ̂)² / (2 η D) + (strength/2) Σ Ω (x − θ*)² over x.
    Guarantee: it lies between θ̂ and θ*, for any strength and any v̂. With Ω = 0 the
    link is `faithful_second_moment`, bit for bit. The moments see the task's gradient
    only. Put it after `route_first_moment(optax.identity())` and directly before
    `optax.scale_by_learning_rate(learning_rate)` of the same rate.

    Args:
      learning_rate: η, a number or a schedule, which is read at the number of steps
        before this one, as `optax.scale_by_learning_rate` does.
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2. λ Ω is
        capped at 1e20.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.
      importance: Ω at the start, as for `quadratic_penalty`.

    Returns:
      A link from `Routed` to a plain tree in the dtype of `raw`. Its state holds an
      `Anchor`.

    Raises:
      ValueError: as `faithful_second_moment` and `quadratic_penalty`.
      TypeError: at update, without a route before it.

    >>> from adamr.routing import route_first_moment
    >>> tx = optax.chain(
    ...     route_first_moment(optax.identity()),
    ...     proximal_second_moment(0.1, 1e9, importance=1.0),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> state = tx.init(jnp.zeros(1))
    >>> theta = jnp.array([0.5])
    >>> print((theta + tx.update(jnp.ones(1), state, theta)[0]).round(6))
    [0.]

    References:
      Parikh, Boyd, Proximal Algorithms, Foundations and Trends in Optimization 2014.
      Zhuang et al., Understanding AdamW through Proximal Methods and Scale-Freeness,
      arXiv:2202.00089.
    """
    check_numbers("proximal_second_moment", importance, strength=strength)
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    check_moments(options)

    def init_fn(params):
        return ProximalMomentState(
            jnp.zeros([], jnp.int32),
            anchor_at(params, importance),
            init_moments(options, params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_routed(updates, "proximal_second_moment")
        need_params(params, "proximal_second_moment")
        rate = _rate(learning_rate, state.steps)
        (mu_hat, denominator), inner = advance_moments(options, updates, state.moments)
        treedef = jax.tree.structure(updates.raw)
        moments = (
            jax.tree.unflatten(treedef, leaves) for leaves in (mu_hat, denominator)
        )

        def step(raw, m, d, p, omega, anchor):
            u = _proximal(m, d, strength, omega, rate, widen(p), anchor)
            return u.astype(raw.dtype)

        steps = jax.tree.map(step, updates.raw, *moments, params, *state.anchor)
        count = optax.safe_increment(state.steps)
        return steps, ProximalMomentState(count, state.anchor, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def proximal_penalty(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike = 1.0,
    *,
    importance: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The proximal point of the penalty after an unsigned step d, in the plain norm.

        u = (d + k (θ − θ*)) / (1 + η k),   k = strength · Ω
        θ − η u = (θ̂ + η k θ*) / (1 + η k),   θ̂ = θ − η d

    For SGD, with momentum or not; after Adam it is the decoupled form, whose pull does
    not depend on v̂. Guarantee: θ − η u lies between θ̂ and θ*, for any strength. Put it
    directly before `optax.scale_by_learning_rate` of the same rate.

    Args:
      learning_rate: η, a number or a schedule.
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2.
      importance: Ω at the start, as for `quadratic_penalty`.

    Returns:
      A link from a plain tree to a plain tree. Its state holds an `Anchor`.

    Raises:
      ValueError, TypeError: as `quadratic_penalty`.

    >>> tx = optax.chain(
    ...     optax.trace(0.9),
    ...     proximal_penalty(0.1, 10.0, importance=1.0),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> state = tx.init(jnp.zeros(1))
    >>> print(tx.update(jnp.zeros(1), state, jnp.array([0.5]))[0])
    [-0.25]
    """
    check_numbers("proximal_penalty", importance, strength=strength)

    def init_fn(params):
        return ProximalPenaltyState(
            jnp.zeros([], jnp.int32), anchor_at(params, importance)
        )

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "proximal_penalty", params)
        del extra_args
        need_params(params, "proximal_penalty")
        rate = _rate(learning_rate, state.count)

        def step(d, p, omega, anchor):
            u = _proximal(d, 1.0, strength, omega, rate, widen(p), anchor)
            return u.astype(d.dtype)

        steps = jax.tree.map(step, updates, params, *state.anchor)
        count = optax.safe_increment(state.count)
        return steps, ProximalPenaltyState(count, state.anchor)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
