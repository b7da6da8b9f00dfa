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

    modifiers/       g -> g̃, one family a file
    strength.py      strength links               second_moments.py  estimators of v
    recipes/         gpm, ewc, agem, …            optimizers.py      the alias `adamr`
    protection.py    exact protections            state.py           task boundaries
    subspace.py      protected per leaf           directions.py      as whole vectors
    bases.py, growth.py, sketch.py, gram_schmidt.py,
    covariance.py, null_space.py   learning these
    trust_region.py, scales.py, relaxation.py     learning inside them: TRGP, ROGO
    importance.py, path_integral.py, consolidation.py     a penalty's weights and anchor
    capture.py       layer inputs (Flax)          logits.py          logit gradients
    memory.py        stored examples              checkpoint.py      exact resume
    diagnostics.py   leaks, statistics            metrics.py         forgetting and kin
    sharding.py      state beside its parameters  offloading.py      host memory

Equations of the merging link, per leaf, with its argument names:

    m_t = b1 m_{t−1} + (1 − b1) first_t
    v_t = b2 v_{t−1} + (1 − b2) second_t²
    Δ_t = m̂_t / (√(v̂_t + eps_root) + eps)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

__all__ = [
    "RouteState",
    "Routed",
    "route_both_moments",
    "route_first_moment",
    "route_second_moment",
]


class _Gradients(NamedTuple):
    first: Any
    second: Any
    raw: Any


class Routed(_Gradients):
    """The gradients that travel together: three trees shaped like the parameters.

    Attributes:
      first: what the first moment will see.
      second: what the second moment will see.
      raw: the gradient before the modifier.
      squared_distances: None, or `() -> ‖g − g̃‖²` per leaf from a modifier that knows
        them without a pass over memory.
      mean_squares: None, or the means of raw² per leaf along the fan-in, from a link
        that took them; v shared there needs the same ones.

    The last two are not part of the pytree: a carrier that is rebuilt, as by any change
    of its fields, has none.
    """

    squared_distances: Callable[[], list[jax.Array]] | None = None
    mean_squares: list[jax.Array] | None = None


class RouteState(NamedTuple):
    modifier: Any


def require_plain(updates: Any, link: str) -> None:
    if isinstance(updates, Routed):
        raise TypeError(
            f"{link} takes a plain gradient tree, got Routed: put it inside the route, "
            f"as in route_first_moment({link}(...)), or after faithful_second_moment."
        )


def require_routed(updates: Any, link: str) -> None:
    if not isinstance(updates, Routed):
        raise TypeError(
            f"{link} takes a Routed, got {type(updates).__name__}: put a route before "
            "it, as in optax.chain(route_first_moment(modifier), "
            f"{link}(...), ...)."
        )


def _route(link: str, modifier: optax.GradientTransformation, carry: Callable):
    modifier = optax.with_extra_args_support(modifier)

    def init_fn(params):
        return RouteState(modifier.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        require_plain(updates, link)
        measured = getattr(modifier, "measured_update", None)
        if measured is not None:
            modified, distances, inner = measured(updates, state.modifier)
            routed = carry(updates, modified)
            routed.squared_distances = distances
            return routed, RouteState(inner)
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
