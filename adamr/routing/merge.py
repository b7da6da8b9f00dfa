"""The merging link: it ends the carrier and applies the moments.

Per leaf, with the argument names of `faithful_second_moment`:

    m_t = b1 m_{t−1} + (1 − b1) first_t
    v_t = b2 v_{t−1} + (1 − b2) second_t²
    Δ_t = m̂_t / (√(v̂_t + eps_root) + eps)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr.routing.carrier import Routed, require_routed
from adamr.routing.estimators import ESTIMATORS, Estimators
from adamr.routing.sharing import Guard, Share, check_options, shared_zeros, squares

__all__ = ["FaithfulSecondMomentState", "faithful_second_moment"]


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


class MomentOptions(NamedTuple):
    """How a merging link keeps its moments; see `faithful_second_moment`."""

    b1: jax.typing.ArrayLike = 0.9
    b2: jax.typing.ArrayLike = 0.999
    eps: jax.typing.ArrayLike = 1e-8
    eps_root: jax.typing.ArrayLike = 0.0
    estimator: Estimators = "adam"
    share: Share | None = None
    guard: Guard = True
    mu_dtype: jax.typing.DTypeLike | None = None
    nu_dtype: jax.typing.DTypeLike | None = None


class Moments(NamedTuple):
    """Bias-corrected m̂ and √(v̂ + eps_root) + eps, leaves in order."""

    mu_hat: list[jax.Array]
    denominator: list[jax.Array]


def init_moments(options: MomentOptions, params: Any) -> FaithfulSecondMomentState:
    """Zero moments; `options.share` gives v its shape."""
    kind = ESTIMATORS[options.estimator]
    if options.share is None:
        nu = optax.tree.zeros_like(params, dtype=options.nu_dtype)
    else:
        nu = shared_zeros(params, options.share, options.nu_dtype)
    return FaithfulSecondMomentState(
        count=jnp.zeros([], jnp.int32),
        mu=optax.tree.full_like(params, kind.initial, dtype=options.mu_dtype),
        nu=kind.init(nu),
    )


def advance_moments(
    options: MomentOptions, routed: Routed, state: FaithfulSecondMomentState
) -> tuple[Moments, FaithfulSecondMomentState]:
    """One step of m and v."""
    kind = ESTIMATORS[options.estimator]
    mu = optax.tree.update_moment(routed.first, state.mu, options.b1, 1)
    like = kind.shapes(state.nu, routed.second)
    fed = squares(routed.first, routed.second, like, guard=options.guard)
    count = optax.safe_increment(state.count)
    nu_hat, nu = kind.update(fed, state.nu, options.b2, count)
    mu_hat = optax.tree.bias_correction(mu, options.b1, count)
    roots = [jnp.sqrt(v + options.eps_root) for v in jax.tree.leaves(nu_hat)]
    # Stored in the dtypes of `init`, whatever the arithmetic promoted to: scan carries
    # the state.
    mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
    nu = jax.tree.map(lambda new, old: new.astype(old.dtype), nu, state.nu)
    moments = Moments(jax.tree.leaves(mu_hat), [root + options.eps for root in roots])
    return moments, FaithfulSecondMomentState(count, mu, nu)


def check_moments(options: MomentOptions) -> None:
    """Raises for an unknown estimator, share or guard."""
    if options.estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is {options.estimator!r}, expected {list(ESTIMATORS)}."
        )
    check_options(options.share, options.guard)


def faithful_second_moment(
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
    """The merging link: m from `first`, v from `second`, step m̂ / (√(v̂ + ε_root) + ε).

    Args:
      b1: decay of m.
      b2: decay of v; adagrad has none, adafactor uses min(b2, 1 − t^−0.8).
      eps: added outside the root.
      eps_root: added inside the root.
      estimator: of v. Each equals its optax twin when the modifier is the identity;
        adagrad and yogi start their accumulators where optax starts them.
      share: axes over which v is one number, the mean of the squares along them. None:
        element-wise. "fan_in": the input axes of every kernel. A `Subspace`, or
        several: those that its projection contracts. Or a function (path, shape) ->
        axes, such as `default_axes`; () and None leave a leaf element-wise. Sharing v
        along the axis of a projection makes preconditioner and projector commute, so a
        projected first moment gives a step that lies in the allowed space exactly.
      guard: element-wise leaves feed v with max(second², first²). Without it (the paper
        to the letter) a coordinate with second = 0 and first ≠ 0, as at every dead
        input under a projection, takes steps of size 1/eps. The guard bounds the step;
        it does not protect. "shared": leaves with a shared v as well, with the
        larger of the two means. A projection alone only shortens the gradient and does
        not need it; a penalty or replay chained before the projection does. `adamr`
        chooses by itself.
      mu_dtype: dtype of m; None: the parameter's.
      nu_dtype: dtype of v; None: the parameter's.

    Returns:
      A link from `Routed` to a plain tree in the dtype of `raw`, or of the parameters
      where that is wider. Zero gradients give zero steps. NaN in a gradient goes into
      the moments, as in optax.adam; wrap the chain in `optax.apply_if_finite` where
      that can happen.

    Raises:
      ValueError: for an unknown estimator, share or guard.
      TypeError: at update, without a route before it.

    >>> g = jnp.array([0.3, -2.0])
    >>> tx = faithful_second_moment()
    >>> step, _ = tx.update(Routed(0.5 * g, g, g), tx.init(g))
    >>> print(step.round(4))
    [ 0.5 -0.5]

    References:
      Kingma, Ba, Adam, arXiv:1412.6980. Hu et al., arXiv:2604.22407 (withdrawn).
      Shazeer, Stern, Adafactor, arXiv:1804.04235.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    check_moments(options)

    def init_fn(params):
        return init_moments(options, params)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "faithful_second_moment")
        (mu_hat, root), state = advance_moments(options, updates, state)

        def step(m, d, raw):
            # One division per shared number instead of one per parameter.
            ratio = m / d if d.shape == m.shape else m * (1.0 / d)
            # m has the parameters' dtype, which a gradient may fall short of.
            wide = jnp.promote_types(raw.dtype, m.dtype)
            return ratio.astype(wide if mu_dtype is None else raw.dtype)

        raw, treedef = jax.tree.flatten(updates.raw)
        steps = list(map(step, mu_hat, root, raw))
        return jax.tree.unflatten(treedef, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
