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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr.second_moments import (
    ESTIMATORS,
    Guard,
    Share,
    check_options,
    shared_zeros,
    squares,
)

__all__ = [
    "FaithfulSecondMomentState",
    "RouteState",
    "Routed",
    "faithful_second_moment",
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


class FaithfulSecondMomentState(NamedTuple):
    """Moments of the merging link.

    Attributes:
      count: int32 number of steps.
      mu: tree like the parameters.
      nu: tree like the parameters; with `share` a tuple in leaf order, since shared
        leaves are not parameter-shaped; for amsgrad and adafactor, their own fields.
    """

    count: jax.typing.ArrayLike
    mu: Any
    nu: Any


class Moments(NamedTuple):
    """Bias-corrected m̂ and √(v̂ + eps_root) + eps, leaves in order."""

    mu_hat: list[jax.Array]
    denominator: list[jax.Array]


def moments(
    b1, b2, eps, eps_root, *, estimator, share: Share | None, guard, mu_dtype, nu_dtype
) -> tuple[Callable, Callable]:
    """`init(params) -> state`, `advance(routed, state) -> (Moments, state)`."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected {list(ESTIMATORS)}.")
    check_options(share, guard)
    kind = ESTIMATORS[estimator]

    def init(params):
        if share is None:
            nu = optax.tree.zeros_like(params, dtype=nu_dtype)
        else:
            nu = shared_zeros(params, share, nu_dtype)
        return FaithfulSecondMomentState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.full_like(params, kind.initial, dtype=mu_dtype),
            nu=kind.init(nu),
        )

    def advance(routed, state):
        first, second, raw = routed
        mu = optax.tree.update_moment(first, state.mu, b1, 1)
        like = kind.shapes(state.nu, second)
        means = routed.mean_squares if second is raw else None
        fed = squares(first, second, like, guard=guard, means=means)
        count = optax.safe_increment(state.count)
        nu_hat, nu = kind.update(fed, state.nu, b2, count)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        root = [jnp.sqrt(v + eps_root) + eps for v in jax.tree.leaves(nu_hat)]
        # Stored in the dtypes of `init`, whatever the arithmetic promoted to: scan
        # carries the state.
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        nu = jax.tree.map(lambda new, old: new.astype(old.dtype), nu, state.nu)
        state = FaithfulSecondMomentState(count, mu, nu)
        return Moments(jax.tree.leaves(mu_hat), root), state

    return init, advance


def faithful_second_moment(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    estimator: Literal[
        "adam", "amsgrad", "rmsprop", "adagrad", "yogi", "adafactor"
    ] = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The merging link: m from `first`, v from `second`, step m̂ / (√(v̂ + ε_root) + ε).

    Args:
      b1: decay of m.
      b2: decay of v; adagrad has none, adafactor uses min(b2, 1 − t^−0.8).
      eps: added outside the root.
      eps_root: added inside the root.
      estimator: of v. Each equals its optax twin when the modifier is the identity;
        adagrad and yogi start their accumulators where optax starts them.
      share: axes over which v is one number, the mean of the squares along them. None:
        element-wise. "fan_in": the input axes of every kernel. A `Subspace`: those that
        its projection contracts. Or a function (path, shape) -> axes; () leaves a leaf
        element-wise. Sharing v along the axis of a projection makes preconditioner and
        projector commute, so a projected first moment gives a step that lies in the
        allowed space exactly.
      guard: element-wise leaves feed v with max(second², first²). Without it (the paper
        to the letter) a coordinate with second = 0 and first ≠ 0, which a projection
        makes of every dead input, takes steps of size 1/eps. The guard bounds the step;
        it does not protect. "shared": leaves with a shared v, too, by the larger of the
        two means. A projection alone does not need it, being a contraction; a penalty
        or replay chained before it does. `adamr` sees to that itself.
      mu_dtype: dtype of m; None: the parameter's.
      nu_dtype: dtype of v; None: the parameter's.

    Returns:
      A link from `Routed` to a plain tree in the dtype of `raw`. Zero gradients give
      zero steps. NaN in a gradient goes into the moments, as in optax.adam; wrap the
      chain in `optax.apply_if_finite` where that can happen.

    Raises:
      ValueError: for an unknown estimator, share or guard.
      TypeError: at update, if no route stands before it.

    >>> g = jnp.array([0.3, -2.0])
    >>> tx = faithful_second_moment()
    >>> step, _ = tx.update(Routed(0.5 * g, g, g), tx.init(g))
    >>> print(step.round(4))
    [ 0.5 -0.5]

    References:
      Kingma, Ba, Adam, arXiv:1412.6980. Hu et al., arXiv:2604.22407 (withdrawn).
      Shazeer, Stern, Adafactor, arXiv:1804.04235.
    """
    init_fn, advance = moments(
        b1, b2, eps, eps_root, estimator=estimator, share=share, guard=guard,
        mu_dtype=mu_dtype, nu_dtype=nu_dtype,
    )  # fmt: skip

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "faithful_second_moment")
        (mu_hat, root), state = advance(updates, state)

        def step(m, d, raw):
            # One division per shared number instead of one per parameter.
            ratio = m / d if d.shape == m.shape else m * (1.0 / d)
            return ratio.astype(raw.dtype)

        raw, treedef = jax.tree.flatten(updates.raw)
        steps = list(map(step, mu_hat, root, raw))
        return jax.tree.unflatten(treedef, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
