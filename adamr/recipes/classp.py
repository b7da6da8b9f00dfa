"""CLASSP: steps only where the gradient is large, smaller where much has moved."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import plain_gradient

__all__ = ["ClasspState", "classp"]


class ClasspState(NamedTuple):
    count: jax.typing.ArrayLike
    total: Any  # S, float32, a tree like the parameters


def classp(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    threshold: optax.ScalarOrSchedule = 0.5,
    power: float = 1.0,
    eps: float = 1e-5,
    suppress: optax.ScalarOrSchedule = True,
) -> optax.GradientTransformationExtraArgs:
    """CLASSP: sparse steps, and smaller ones where a weight has moved much before.

    In every coordinate with g² > threshold,

        S <- S + |g|^power
        step = −learning_rate · g / (eps + S)^(1/power)     with `suppress`
        step = −learning_rate · g                           without

    and elsewhere neither S nor the weight changes. On the first data set the authors
    gather S without suppression; later they suppress, with threshold 0. Both arguments
    therefore take schedules of the step count, such as `lambda count: count >= 1000`,
    or values set through `optax.inject_hyperparams` (suppress as 0.0 and 1.0).

    This is the method as the paper states it. The authors' code compares
    `(g²).any()`, one truth value per tensor, with the threshold, so any tensor with a
    gradient is updated as a whole if threshold < 1 and none otherwise. It also drops
    the power in S, where it adds |g|.

    Args:
      learning_rate: a number or a schedule.
      threshold: τ ≥ 0 for g².
      power: p > 0.
      eps: > 0.
      suppress: whether S divides the step.

    Returns:
      An optimizer. Where g is not finite nothing changes.

    >>> g = jnp.array([1.0, 0.5])
    >>> tx = classp(1.0, power=2.0, eps=3.0)
    >>> print(tx.update(g, tx.init(g))[0])
    [-0.5  0. ]

    References:
      Ludwig, CLASSP: a Biologically-Inspired Approach to Continual Learning through
      Adjustment Suppression and Sparsity Promotion, arXiv:2405.09637.
    """
    for name, value in {"power": power, "eps": eps}.items():
        if _tree.is_known(value) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")

    def at(value, count):
        return value(count) if callable(value) else value

    def init_fn(params):
        return ClasspState(
            jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=jnp.float32)
        )

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "classp", params)
        del params, extra_args
        rate, tau, divide = (
            jnp.asarray(at(value, state.count))
            for value in (learning_rate, threshold, suppress)
        )

        def leaf(g, total):
            wide = g.astype(jnp.float32)
            active = jnp.isfinite(wide) & (jnp.square(wide) > tau)
            more = (total + jnp.abs(wide) ** power).astype(total.dtype)
            total = jnp.where(active, more, total)
            divisor = jnp.where(divide != 0, (eps + total) ** (1.0 / power), 1.0)
            step = jnp.where(active, -rate * wide / divisor, 0.0)
            return step.astype(g.dtype), total

        leaves, treedef = jax.tree.flatten(updates)
        totals, kind = jax.tree.flatten(state.total)
        pairs = [leaf(g, s) for g, s in zip(leaves, totals, strict=True)]
        steps = jax.tree.unflatten(treedef, [step for step, _ in pairs])
        total = jax.tree.unflatten(kind, [total for _, total in pairs])
        return steps, ClasspState(optax.safe_increment(state.count), total)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
