"""Quadratic penalties: one anchor and one importance per parameter, for every method.

    penalty(θ) = (strength / 2) Σ Ω (θ − θ*)²        gradient: strength · Ω (θ − θ*)

L2-SP, EWC, SI, MAS and RWalk differ only in Ω and θ*, which `adamr.penalties` sets
between tasks. `strength` is λ, the weight of the penalty, always with the factor 1/2.
For authors who leave the 1/2 out it is twice their constant (SI's c, MAS's and RWalk's
λ).

    link                     step θ' (η the rate, D Adam's 1 / (√v̂ + ε))     stable
    quadratic_penalty        g̃ = g + strength Ω (θ − θ*), then any moments    see there
    proximal_second_moment   (θ̂ + η D k θ*) / (1 + η D k),  θ̂ = θ − η D m̂    always
    proximal_penalty         (θ̂ + η k θ*) / (1 + η k),      θ̂ = θ − η d      always

with k = strength · Ω. The last two (`adamr.protection.proximal`) solve the penalty
implicitly, so no weight is too large. The first, in the first moment only, divides the
pull by a √v̂ that does not contain it, and diverges where the new task is fitted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import plain_gradient

__all__ = [
    "Anchor",
    "PenaltyState",
    "quadratic_penalty",
]


class Anchor(NamedTuple):
    """The penalty ½ Σ Ω (θ − θ*)²; trees like the parameters, float32 or wider.

    Attributes:
      importance: Ω ≥ 0; zero where nothing is penalised, such as new heads.
      anchor: θ*.
    """

    importance: Any
    anchor: Any


class PenaltyState(NamedTuple):
    anchor: Anchor


def widen(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def anchor_at(params: Any, importance: Any) -> Anchor:
    """Fresh buffers: the state may be donated, parameters and argument may not."""
    _tree.require_arrays(params, "params")
    params = jax.tree.map(jnp.asarray, params)
    positions = _tree.flatten(params)[0]
    one = jax.tree_util.all_leaves([importance]) and jnp.ndim(importance) == 0
    if one or not positions:
        weights = [importance] * len(positions)
    else:
        weights = _tree.flatten_like(importance, "importance", params)

    def fill(p, weight):
        zeros = jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
        if _tree.is_hole(weight):
            return zeros
        if jnp.ndim(weight) and jnp.shape(weight) != p.shape:
            raise ValueError(
                f"importance has a leaf of shape {jnp.shape(weight)} for a parameter "
                f"of shape {p.shape}: pass that shape, a number or None."
            )
        return zeros + jnp.asarray(weight, zeros.dtype)

    return Anchor(
        importance=_tree.map_positions(fill, params, weights),
        anchor=jax.tree.map(lambda p: jnp.array(widen(p), copy=True), params),
    )


def check_numbers(link: str, importance: Any, **numbers: Any) -> None:
    for name, value in {"importance": importance, **numbers}.items():
        if _tree.is_known(value) and not value >= 0:
            raise ValueError(f"{link}: {name} must not be negative, got {value}.")


def need_params(params: Any, link: str) -> None:
    if params is None:
        raise ValueError(f"{link} needs params: pass update(gradient, state, params).")


def quadratic_penalty(
    strength: jax.typing.ArrayLike = 1.0, *, importance: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The gradient of the penalty added: g̃ = g + strength · Ω (θ − θ*).

    It adds the gradient of (strength / 2) Σ Ω (θ − θ*)². Its guarantee depends on what
    follows:

        plain SGD             contracts while η · strength · Ω < 2, diverges above
        route_both_moments    Adam on the penalised loss: steps are bounded for any
                              weight, but a large penalty drowns the new task
        route_first_moment    diverges where v̂ gets small (`guard=False`), or behaves
                              as the line above (`guard=True`)

    `proximal_second_moment` and `proximal_penalty` have no such limit.

    Args:
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2.
      importance: Ω at the start, a number for every parameter or a tree like params of
        arrays, numbers and None (0). 0: nothing is penalised before the first
        `consolidate`.

    Returns:
      A modifier, to be put in a route or before any optimizer. Its state holds an
      `Anchor`; θ* starts as a copy of the parameters given to `init`.

    Raises:
      ValueError: for a negative number; at init, for an importance that does not fit;
        at update, without `params`.
      TypeError: for a `Routed`.

    >>> tx = quadratic_penalty(10.0, importance=1.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> print(tx.update(jnp.ones(2), state, jnp.array([0.0, 0.5]))[0])
    [1. 6.]

    References:
      Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
      arXiv:1612.00796. Li et al., Explicit Inductive Bias for Transfer Learning with
      Convolutional Networks, arXiv:1802.01483.
    """
    check_numbers("quadratic_penalty", importance, strength=strength)

    def init_fn(params):
        return PenaltyState(anchor_at(params, importance))

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "quadratic_penalty", params)
        del extra_args
        need_params(params, "quadratic_penalty")

        def add(g, p, omega, anchor):
            pull = jnp.asarray(strength, jnp.float32) * omega * (widen(p) - anchor)
            return (g + pull).astype(g.dtype)

        return jax.tree.map(add, updates, params, *state.anchor), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
