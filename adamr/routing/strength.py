"""Strength: how much of the modification reaches the moments.

Links on a `Routed` carrier, with the argument names of this file:

    x  <-  raw − α (raw − x)                       x: `first` and `second`

    s_t = min(1, ‖raw − x‖² / ‖raw‖²)              overlap of one step (0 if raw is 0)
    s̄_t = decay · s̄_{t−1} + (1 − decay) · s_t      `overlap`, s̄_0 = 0
    α_t = alpha_max · (1 − s̄_t)                    `strength`
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import Routed, require_routed
from adamr.routing.sharing import fan_in, mean_square

__all__ = [
    "OverlapState",
    "StrengthState",
    "constant_scale",
    "overlap_adaptive_scale",
]


def _is_number(value: Any, number: float) -> bool:
    """Whether a hyperparameter is known to be `number` while tracing."""
    return isinstance(value, int | float) and value == number


def _towards_raw(routed: Routed, alphas: list[jax.Array]) -> Routed:
    """x <- raw − α (raw − x) for both modified fields, one α per leaf."""
    raw, treedef = jax.tree.flatten(routed.raw)

    def move(field):
        # A field that is the raw array itself needs no pass over memory.
        moved = [
            x if x is g else (g - a.astype(g.dtype) * (g - x)).astype(g.dtype)
            for x, g, a in zip(jax.tree.leaves(field), raw, alphas, strict=True)
        ]
        return jax.tree.unflatten(treedef, moved)

    first = move(routed.first)
    second = first if routed.second is routed.first else move(routed.second)
    if routed.second is routed.raw:
        second = routed.raw
    return Routed(first, second, routed.raw)


class StrengthState(NamedTuple):
    count: jax.typing.ArrayLike
    strength: jax.Array  # α of the last step


def constant_scale(
    alpha: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Fixed strength on a `Routed`: x <- raw − alpha (raw − x).

    Its state keeps `strength`, as that of `overlap_adaptive_scale` does.

    Args:
      alpha: in [0, 1], or a schedule of it; 0 is the raw gradient, 1 the modified one.

    Returns:
      A link on `Routed`.

    Raises:
      ValueError: for a number outside [0, 1].
      TypeError: at update, without a route before it.

    >>> tx = constant_scale(0.5)
    >>> g = jnp.ones(1)
    >>> tx.update(Routed(0 * g, g, g), tx.init(g))[0].first
    Array([0.5], dtype=float32)
    """
    check_unit("alpha", alpha)

    def strength_at(count):
        return jnp.asarray(alpha(count) if callable(alpha) else alpha, jnp.float32)

    def init_fn(params):
        del params
        count = jnp.zeros([], jnp.int32)
        return StrengthState(count, jnp.array(strength_at(count), copy=True))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "constant_scale")
        value = strength_at(state.count)
        state = StrengthState(optax.safe_increment(state.count), value)
        # 0 and 1 are exact: the subtraction would round, and rounding leaks.
        if _is_number(alpha, 1.0):
            return updates, state
        if _is_number(alpha, 0.0):
            return Routed(*[updates.raw] * 3), state
        leaves = len(jax.tree.leaves(updates.raw))
        return _towards_raw(updates, [value] * leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_unit(name: str, value: Any) -> None:
    """Raises for a number outside [0, 1]; schedules and tracers pass."""
    if callable(value) or _tree.is_traced(value):
        return
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}.")


class OverlapState(NamedTuple):
    """Scalars, or arrays (num_leaves,) in leaf order with `aggregate="leaf"`."""

    count: jax.typing.ArrayLike
    overlap: jax.Array  # s̄, not debiased
    strength: jax.Array  # α of the last step


def _in_unit(x: jax.Array, unit: float) -> jax.Array:
    """x / unit, float32."""
    if unit == 1.0:
        return x.astype(jnp.float32)
    return (_tree.widened(x, jnp.zeros([], jnp.float32)) / unit).astype(jnp.float32)


def _squared_norms(raw: Any, unit: float) -> jax.Array:
    """‖raw / unit‖² per leaf, in float32.

    By way of the means over the fan-in: a v shared there takes the same means, and the
    compiler computes an expression that occurs twice only once.
    """

    def norm(name, x):
        mean = mean_square(_in_unit(x, unit), fan_in(name, x.shape), jnp.float32)
        return x.size // max(mean.size, 1) * jnp.sum(mean)

    names, leaves = _tree.flatten_with_names(raw)
    pairs = zip(names, leaves, strict=True)
    return jnp.stack([norm(n, x) for n, x in pairs if not _tree.is_hole(x)])


def _squared_distances(routed: Routed, unit: float) -> Sequence[jax.Array]:
    """‖(raw − x) / unit‖² per leaf, x the field that the modifier changed."""

    def distance(x, g):
        if x is g:
            return jnp.zeros([], jnp.float32)
        return _tree.squared_norm(_in_unit(g, unit) - _in_unit(x, unit))

    def changed(field):
        return jax.tree.leaves(jax.tree.map(distance, field, routed.raw))

    away = changed(routed.first)
    if routed.second is not routed.first and routed.second is not routed.raw:
        away = list(map(jnp.maximum, away, changed(routed.second)))
    return away


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.minimum(part / jnp.where(whole > 0, whole, 1.0), 1.0)


_AGGREGATES = {
    "global": lambda away, raw: _share(jnp.sum(away), jnp.sum(raw)),
    "mean": lambda away, raw: jnp.mean(_share(away, raw)),
    "leaf": _share,
}

# Of a smaller ‖raw‖², float32 may have lost a part: squares below 1e-38 are 0.
_LEAST_ENERGY = 1e-20
_SMALL, _LARGE = 2.0**-80, 2.0**80


def _overlap(
    routed: Routed, aggregate: str, distances: _tree.Distances | None
) -> jax.Array:
    """s_t from ‖(raw − x) / unit‖² and ‖raw / unit‖² per leaf.

    The unit is 1, or 2^±80 where squares would leave the range of float32.
    """
    share = _AGGREGATES[aggregate]
    if not jax.tree.leaves(routed.raw):
        return share(jnp.zeros([0], jnp.float32), jnp.zeros([0], jnp.float32))
    if distances is None:
        distances = functools.partial(_squared_distances, routed)

    def energies(unit: float) -> tuple[jax.Array, jax.Array]:
        return jnp.stack(distances(unit)), _squared_norms(routed.raw, unit)

    away, raw = energies(1.0)
    usual = share(away, raw)
    whole = jnp.sum(raw) if aggregate == "global" else raw
    low, high = whole < _LEAST_ENERGY, ~jnp.isfinite(whole)

    def rescaled() -> jax.Array:
        (small, small_raw), (large, large_raw) = energies(_SMALL), energies(_LARGE)
        return share(
            jnp.where(low, small, jnp.where(high, large, away)),
            jnp.where(low, small_raw, jnp.where(high, large_raw, raw)),
        )

    return jax.lax.cond(jnp.any(low | high), rescaled, lambda: usual)


def overlap_adaptive_scale(
    alpha_max: float = 0.5,
    decay: float = 0.99,
    *,
    aggregate: Literal["global", "mean", "leaf"] = "global",
    rule: Callable[[jax.Array], jax.Array] | None = None,
    debias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Strength that follows the smoothed overlap: α = alpha_max (1 − s̄).

    The more of the gradient the modifier removes, the weaker this rule protects; it is
    the published rule, not a recommendation: on streams with large overlap it gives
    most of the protection away.

    Extra argument of `update`:
      distances: optional, a function of a unit (a float) that returns
        ‖(raw − x) / unit‖² per leaf in leaf order, from a caller for whom that is
        cheap, as it is for `adamr` with a projection.

    Args:
      alpha_max: strength at zero overlap, in [0, 1].
      decay: of the average s̄, in [0, 1]; the paper says 0.99, its code 0.98.
      aggregate: "global": one α from the energies summed over all leaves; "mean": one
        α from the mean of the ratios of all leaves, unprotected ones included (the
        paper's code takes the mean over protected ones); "leaf": one α per leaf, each
        from its own ratio.
      rule: s̄ -> α in place of the falling rule; must be jittable, result clipped to
        [0, 1].
      debias: divide s̄ by 1 − decay^t before the rule.

    Returns:
      A link on `Routed`; its state keeps `overlap` and `strength` under these names,
      so `optax.tree.get(opt_state, "strength")` reads them. A zero gradient has
      overlap 0; a step whose overlap is not finite leaves s̄ as it was. Gradients may be
      of any scale in float32.

    Raises:
      ValueError: for alpha_max or decay outside [0, 1] or an unknown aggregate.
      TypeError: at update, without a route before it.

    >>> tx = overlap_adaptive_scale(alpha_max=0.5, decay=0.0)
    >>> g = jnp.array([3.0, 4.0])
    >>> _, state = tx.update(Routed(jnp.array([0.0, 4.0]), g, g), tx.init(g))
    >>> print(f"{state.overlap:.2f} {state.strength:.2f}")
    0.36 0.32

    References: arXiv:2604.22407 (withdrawn), section on adaptive decoupled routing.
    """
    check_unit("alpha_max", alpha_max)
    check_unit("decay", decay)
    if aggregate not in _AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}, expected {list(_AGGREGATES)}.")

    def strength_of(overlap):
        alpha = alpha_max * (1.0 - overlap) if rule is None else rule(overlap)
        return jnp.clip(jnp.asarray(alpha, jnp.float32), 0.0, 1.0)

    def init_fn(params):
        count = len(jax.tree.leaves(params))
        shape = (count,) if aggregate == "leaf" else ()
        return OverlapState(
            count=jnp.zeros([], jnp.int32),
            overlap=jnp.zeros(shape, jnp.float32),
            strength=jnp.array(strength_of(jnp.zeros(shape, jnp.float32)), copy=True),
        )

    def update_fn(updates, state, params=None, *, distances=None, **extra_args):
        del params, extra_args
        require_routed(updates, "overlap_adaptive_scale")
        step = _overlap(updates, aggregate, distances)
        smoothed = decay * state.overlap + (1.0 - decay) * step
        overlap = jnp.where(jnp.isfinite(step), smoothed, state.overlap)
        count = optax.safe_increment(state.count)
        weight = 1.0 - jnp.asarray(decay, jnp.float32) ** count
        seen = overlap / jnp.where(weight > 0, weight, 1.0) if debias else overlap
        strength = strength_of(seen)
        leaves = len(jax.tree.leaves(updates.raw))
        alphas = list(strength) if aggregate == "leaf" else [strength] * leaves
        state = OverlapState(count, overlap.astype(jnp.float32), strength)
        if rule is None and _is_number(alpha_max, 0.0):
            return Routed(*[updates.raw] * 3), state
        return _towards_raw(updates, alphas), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
