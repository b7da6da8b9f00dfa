"""The merging link: m from `first`, v from `second`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr.routing.carrier import require_routed
from adamr.routing.estimators import ESTIMATORS
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
