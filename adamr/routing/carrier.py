"""Routing: which gradient the first moment sees, and which one the second.

Read this file first. A *modifier* g -> g̃ (projection, penalty, replay, mask) is any
optax transformation. A *route* runs it and sends three trees down the chain in one
carrier, `Routed(first, second, raw)`. A *strength* link moves the modified fields back
towards the raw gradient. The *merging* link ends the carrier and applies the moments:

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),             # g
        route_first_moment(project_out(subspace)),  # Routed(first=g̃, second=g, raw=g)
        overlap_adaptive_scale(alpha_max=0.5),      # x <- raw − α (raw − x)
        faithful_second_moment(),                   # m̂ / (√v̂ + ε)
        optax.scale_by_learning_rate(1e-3),
    )

A modifier knows nothing of moments, a route nothing of any method. What happens
between two tasks is a pure function on the optimizer state (`adamr.state`,
`adamr.penalties`), outside the step. The step is computed in the precision of the
parameters: a route widens gradients of a narrower dtype. The rooms:

    routing       this file; strength, merge, estimators of v, sharing of v
    modifiers     g -> g̃, one family a file
    protection    links whose step keeps its promise exactly
    subspaces     what is protected, per leaf or as whole vectors, and how it grows
    capture       the inputs of a model's layers, from which subspaces grow
    penalties     importance of parameters, and the anchor they are pulled towards
    trust         learning inside the protected space: TRGP, ROGO
    recipes       whole optimizers by the name of the paper, and the alias `adamr`
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import optax

from adamr import _tree

__all__ = [
    "RouteState",
    "Routed",
    "route_both_moments",
    "route_first_moment",
    "route_second_moment",
    "route_with_strength",
]


class Routed(NamedTuple):
    """The gradients that travel together: three trees shaped like the parameters.

    Attributes:
      first: what the first moment will see.
      second: what the second moment will see.
      raw: the gradient before the modifier.
    """

    first: Any
    second: Any
    raw: Any


class RouteState(NamedTuple):
    modifier: Any


class Measured(NamedTuple):
    """A modified gradient and how far each leaf was moved.

    Attributes:
      gradient: g̃.
      distances: unit -> ‖(g − g̃) / unit‖² per leaf, float32 scalars in leaf order. The
        unit keeps squares of extreme gradients in the range of float32.
      state: the modifier's state after the update.
    """

    gradient: Any
    distances: _tree.Distances
    state: Any


@runtime_checkable
class Measuring(Protocol):
    """A modifier that knows how far it moves a leaf without a pass over memory."""

    def measure(self, updates: Any, state: Any) -> Measured: ...


class RoutedStrengthState(NamedTuple):
    route: Any  # RouteState
    scale: Any  # of the strength link, which has a field `strength` of its own


def plain_gradient(updates: Any, link: str, params: Any = None) -> Any:
    """The gradient, in a precision no less than that of the parameters.

    Raises:
      TypeError: for a `Routed`, or a complex leaf.
    """
    if isinstance(updates, Routed):
        raise TypeError(
            f"{link} takes a plain gradient tree, got Routed: put it inside the route, "
            f"as in route_first_moment({link}(...)), or after faithful_second_moment."
        )
    _tree.require_real(updates, link)
    return updates if params is None else _tree.widened(updates, params)


def require_routed(updates: Any, link: str) -> None:
    """Raises unless a route came before the link."""
    if not isinstance(updates, Routed):
        raise TypeError(
            f"{link} takes a Routed, got {type(updates).__name__}: put a route before "
            "it, as in optax.chain(route_first_moment(modifier), "
            f"{link}(...), ...)."
        )


def require_modifier(modifier: Any, link: str) -> None:
    """Raises unless it has the two functions of an optax transformation."""
    if not (hasattr(modifier, "init") and hasattr(modifier, "update")):
        raise TypeError(
            f"{link}: modifier must be an optax.GradientTransformation, got "
            f"{type(modifier).__name__}: project_out(subspace) makes one of a subspace."
        )


def _route(
    link: str,
    modifier: optax.GradientTransformation,
    carry: Callable[[Any, Any], Routed],
) -> optax.GradientTransformationExtraArgs:
    """A link that runs `modifier` and returns `carry(g, g̃)`."""
    require_modifier(modifier, link)
    modifier = optax.with_extra_args_support(modifier)

    def init_fn(params):
        return RouteState(modifier.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, link, params)
        modified, inner = modifier.update(updates, state.modifier, params, **extra_args)
        return carry(updates, modified), RouteState(inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def route_first_moment(
    modifier: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Decoupled routing: g -> Routed(first=g̃, second=g, raw=g).

    Args:
      modifier: g -> g̃; gets the extra arguments of `update`.

    Returns:
      A link whose output a merging link such as `faithful_second_moment` must end.

    Raises:
      TypeError: if `modifier` is not an optax transformation; at update, for a `Routed`
        or a complex leaf.

    >>> import jax.numpy as jnp
    >>> tx = route_first_moment(optax.scale(0.5))
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0].first
    Array([0.5, 0.5], dtype=float32)

    References:
      Hu et al., Hidden Failure Modes of Gradient Modification under Adam in Continual
      Learning, arXiv:2604.22407 (withdrawn by its authors for its experiments).
    """
    return _route("route_first_moment", modifier, lambda g, h: Routed(h, g, g))


def route_both_moments(
    modifier: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Shared routing, what `chain(modifier, adam)` does: g -> Routed(g̃, g̃, g).

    Along a coordinate axis it cancels an attenuation by 1 − α exactly: v shrinks with
    g̃, so the effective learning rate there grows by 1 / (1 − α). See
    `route_first_moment` for arguments.
    """
    return _route("route_both_moments", modifier, lambda g, h: Routed(h, h, g))


def route_second_moment(
    modifier: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The reverse control: g -> Routed(first=g, second=g̃, raw=g).

    For experiments; see `route_first_moment` for arguments.
    """
    return _route("route_second_moment", modifier, lambda g, h: Routed(g, h, g))


def route_with_strength(
    modifier: optax.GradientTransformation, strength: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(route_first_moment(modifier), strength)` as one link.

    A modifier that measures its own change, as `project_out` does, hands the distances
    to the strength link, which then takes no pass over the leaves for them, nor a
    message between devices. The alias `adamr` uses it.

    Args:
      modifier: g -> g̃; gets the extra arguments of `update`.
      strength: a link on `Routed`, such as `overlap_adaptive_scale()`.

    Returns:
      A link whose output a merging link such as `faithful_second_moment` must end.

    >>> import jax.numpy as jnp
    >>> from adamr import constant_scale
    >>> tx = route_with_strength(optax.scale(0.0), constant_scale(0.5))
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0].first
    Array([0.5, 0.5], dtype=float32)
    """
    route = route_first_moment(modifier)
    strength = optax.with_extra_args_support(strength)

    def init_fn(params):
        return RoutedStrengthState(route.init(params), strength.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        if isinstance(modifier, Measuring):
            g = plain_gradient(updates, "route_first_moment", params)
            measured = modifier.measure(g, state.route.modifier)
            routed, inner = Routed(measured.gradient, g, g), RouteState(measured.state)
            known = {"distances": measured.distances}
        else:
            routed, inner = route.update(updates, state.route, params, **extra_args)
            known = {}
        routed, scaled = strength.update(
            routed, state.scale, params, **{**extra_args, **known}
        )
        return routed, RoutedStrengthState(inner, scaled)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
