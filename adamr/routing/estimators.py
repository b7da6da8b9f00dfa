"""Estimators of the second moment.

An estimator turns the squares that `faithful_second_moment` feeds it into v̂. Each is
one `init` and one `update` on whole trees; `ESTIMATORS` is the table. With an identity
modifier each equals its optax twin: `scale_by_adam` bit for bit, `scale_by_amsgrad`,
`scale_by_rms`, `scale_by_rss`, `scale_by_yogi` and `scale_by_factored_rms` to rounding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adamr import _tree

__all__ = ["ESTIMATORS", "Estimator"]


class Estimator(NamedTuple):
    """One way to turn squares into v̂.

    Attributes:
      init: `zeros -> nu`, where `zeros` has the shape of v.
      update: `(squares, nu, b2, count) -> (nu_hat, nu)`.
      shapes: `(nu, gradient) ->` arrays with the shape and dtype of v.
      initial: what mu starts from; optax's Yogi is the one that is not 0.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, ArrayLike, ArrayLike], tuple[Any, Any]]
    shapes: Callable[[Any, Any], Any] = lambda nu, gradient: nu
    initial: float = 0.0


class AmsgradMoments(NamedTuple):
    nu: Any
    nu_max: Any


class FactoredMoments(NamedTuple):
    row: Any
    column: Any
    full: Any


def _ema(square, nu, b2):
    return jax.tree.map(lambda s, v: (1 - b2) * s + b2 * v, square, nu)


def _adam(square, nu, b2, count):
    nu = _ema(square, nu, b2)
    return optax.tree.bias_correction(nu, b2, count), nu


def _amsgrad(square, state, b2, count):
    nu_hat, nu = _adam(square, state.nu, b2, count)
    nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu_hat)
    return nu_max, AmsgradMoments(nu, nu_max)


def _rmsprop(square, nu, b2, count):
    nu = _ema(square, nu, b2)
    return nu, nu


def _adagrad(square, nu, b2, count):
    nu = jax.tree.map(jnp.add, square, nu)
    return nu, nu


def _yogi(square, nu, b2, count):
    nu = jax.tree.map(lambda s, v: v - (1 - b2) * jnp.sign(v - s) * s, square, nu)
    return optax.tree.bias_correction(nu, b2, count), nu


def _factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two largest axes, when both have at least 128 entries (Shazeer & Stern)."""
    if len(shape) < 2:
        return None
    *_, smaller, larger = sorted(range(len(shape)), key=lambda d: shape[d])
    return (smaller, larger) if shape[smaller] >= 128 else None


def _adafactor_init(zeros):
    def mean_over(which):
        def leaf(z):
            axes = _factored_axes(z.shape)
            # A leaf that is not factored gets a (1,): checkpoints refuse arrays of
            # size 0.
            return jnp.sum(z, axis=axes[which]) if axes else jnp.zeros((1,), z.dtype)

        return _tree.in_leaf_order(zeros, leaf)

    def full(z):
        return (
            jnp.zeros((1,), z.dtype) if _factored_axes(z.shape) else jnp.zeros_like(z)
        )

    return FactoredMoments(mean_over(1), mean_over(0), _tree.in_leaf_order(zeros, full))


def _adafactor(square, state, b2, count):
    t = jnp.asarray(count, jnp.float32)
    decay = jnp.minimum(b2, 1.0 - t**-0.8)

    def leaf(s, row, column, full):
        axes, s = _factored_axes(s.shape), s + 1e-30

        def blend(old, new):
            return (decay * old + (1.0 - decay) * new).astype(old.dtype)

        if axes is None:
            full = blend(full, s)
            return full, row, column, full
        smaller, larger = axes
        row = blend(row, jnp.mean(s, axis=larger))
        column = blend(column, jnp.mean(s, axis=smaller))
        kept = smaller - 1 if smaller > larger else smaller
        row_share = row / jnp.mean(row, axis=kept, keepdims=True)
        nu_hat = jnp.expand_dims(row_share, larger) * jnp.expand_dims(column, smaller)
        return nu_hat, row, column, full

    leaves, treedef = jax.tree.flatten(square)
    updated = [leaf(*each) for each in zip(leaves, *state, strict=True)]
    nu_hat, row, column, full = zip(*updated, strict=True) if updated else ((),) * 4
    return jax.tree.unflatten(treedef, nu_hat), FactoredMoments(row, column, full)


def _adafactor_shapes(state, gradient):
    def leaf(row, full, g):
        shape = g.shape if row.size > 1 else full.shape
        return jax.ShapeDtypeStruct(shape, full.dtype)

    leaves = jax.tree.leaves(gradient)
    return tuple(map(leaf, state.row, state.full, leaves))


def _filled(value):
    return lambda zeros: jax.tree.map(lambda z: jnp.full_like(z, value), zeros)


def _amsgrad_init(zeros):
    return AmsgradMoments(zeros, jax.tree.map(jnp.zeros_like, zeros))


Estimators = Literal["adam", "amsgrad", "rmsprop", "adagrad", "yogi", "adafactor"]
ESTIMATORS = {
    "adam": Estimator(lambda zeros: zeros, _adam),
    "amsgrad": Estimator(_amsgrad_init, _amsgrad, lambda state, gradient: state.nu),
    "rmsprop": Estimator(lambda zeros: zeros, _rmsprop),
    "adagrad": Estimator(_filled(0.1), _adagrad),
    "yogi": Estimator(_filled(1e-6), _yogi, initial=1e-6),
    "adafactor": Estimator(_adafactor_init, _adafactor, _adafactor_shapes),
}
