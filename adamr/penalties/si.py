"""Synaptic Intelligence: importance from the trajectory of training.

    every step     ω <- ω − g δ                                    track_si
    task's end     Ω <- relu(Ω + ω / ((θ − θ*)² + damping))        consolidate_si

Ω and θ* belong to the penalty inside the wrapped optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.penalties._tracking import end_task, observe, wide_zeros
from adamr.penalties.anchor import rewrite_anchors

__all__ = ["SIState", "consolidate_si", "track_si"]


class SIState(NamedTuple):
    """ω, a tree like the parameters, and the state of the wrapped optimizer."""

    omega: Any
    inner: Any


def track_si(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Synaptic Intelligence's ω, gathered around an optimizer: ω <- ω − g δ.

    g is the incoming gradient and δ = apply_updates(θ, step) − θ the change that really
    happens, so it includes Adam, clipping, weight decay and rounding. Put penalties and
    modifiers inside, so that g is the task's own gradient. On a quadratic loss, in the
    limit of small steps, ω is each coordinate's share of the decrease of the loss.
    Gradient noise makes it too large, as in the original.

    Extra argument of `update`:
      task_gradient: optional, a tree like the gradient: that of the task's loss, where
        the incoming one is something else (replay mixed in, a penalty in the loss).

    Args:
      optimizer: a whole one, learning rate included. `optax.MultiSteps` and
        `apply_if_finite` go around `track_si`, not inside.

    Returns:
      An optimizer with the steps of `optimizer`; `consolidate_si` ends a task. A
      product g δ that is not finite adds nothing.

    Raises:
      ValueError: at update, without `params` or for a `task_gradient` that does not
        fit.

    >>> tx = track_si(optax.sgd(0.5))
    >>> theta = jnp.array([1.0])
    >>> _, state = tx.update(2 * theta, tx.init(theta), theta)
    >>> print(state.omega)
    [2.]

    References:
      Zenke, Poole, Ganguli, Continual Learning Through Synaptic Intelligence,
      arXiv:1703.04200.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        return SIState(wide_zeros(params), optimizer.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        seen = observe(
            "track_si", optimizer, updates, state.inner, params, **extra_args
        )
        omega = optax.tree.add(state.omega, seen.work)
        return seen.steps, SIState(omega, seen.inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def consolidate_si(
    opt_state: Any, params: Any, damping: jax.typing.ArrayLike = 1e-3
) -> Any:
    """Ends a task of Synaptic Intelligence: what ω gathered becomes importance.

        Ω <- relu(Ω + ω / ((θ − θ*)² + damping)),   θ* <- θ,   ω <- 0

    As in the authors' code the relu acts on the sum. Their penalty c Σ Ω (θ − θ*)² has
    no 1/2, so it is a `quadratic_penalty` of strength 2 c (`si` converts). For a
    quadratic loss and damping 0, Ω is half its curvature, so c = 1 gives the loss back.

    Args:
      opt_state: of any wrapper around `track_si(optimizer)` with a penalty in it.
      params: θ at the end of the task.
      damping: ξ ≥ 0. All that was measured here has the default (docs/evidence/how.md);
        the authors use 0.1 and 1e-3. A parameter that did not move, with damping 0,
        gets nothing.

    Returns:
      A new state, in which the step does not recompile.

    Raises:
      ValueError: if the state holds no `SIState` or no penalty in it; for params that
        do not fit.

    References: Zenke, Poole, Ganguli, arXiv:1703.04200.
    """

    def end(node):
        def merge(omega, anchor, theta, work):
            distance = jnp.square(theta - anchor) + damping
            gained = jnp.where(distance > 0, work / distance, 0)
            gained = jnp.where(jnp.isfinite(gained), gained, 0)
            return jax.nn.relu(omega + gained), theta

        inner = rewrite_anchors(node.inner, merge, params=params, work=node.omega)
        return SIState(_tree.cleared(node.omega), inner)

    return end_task(opt_state, SIState, "track_si", end, recipes="gpm_si or si")
