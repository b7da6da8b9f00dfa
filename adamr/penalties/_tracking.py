"""Importance gathered while training, from what each parameter did for the task's loss.

`track_si` and `track_rwalk` wrap a whole optimizer. They see the gradient g that comes
in, which is the task's own (a penalty belongs inside the wrapper), and the change
δ = θ' − θ that goes out, after the rounding to the parameter's dtype:

    ω <- ω − g δ

Σ ω over the parameters is the decrease of the loss, to first order in the steps. Terms
that are not finite add nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes
from adamr.modifiers.penalty import need_params, widen
from adamr.routing.carrier import plain_gradient


class Observed(NamedTuple):
    """One step of the wrapped optimizer, in trees like the parameters.

    Attributes:
      steps: what it returned.
      inner: its new state.
      gradient: g, that of the task's loss, float32 or wider.
      work: −g δ.
      moved: θ', float32 or wider, with the values that memory will hold.
    """

    steps: Any
    inner: Any
    gradient: Any
    work: Any
    moved: Any


def _stored(x: jax.Array) -> jax.Array:
    """In float32 or wider, the value that memory will hold."""
    wide = widen(x)
    if wide.dtype == x.dtype:
        return wide
    # Compilers may keep a bfloat16 intermediate in float32; the parameter is rounded.
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def _align(task_gradient: Any, updates: Any) -> Any:
    """`task_gradient` in the structure of `updates`, float32 or wider."""
    leaves = _tree.flatten_like(task_gradient, "task_gradient", updates)
    names = _tree.flatten_with_names(updates)[0]

    def leaf(u, g, name):
        found = g if _tree.is_hole(g) else f"of shape {jnp.shape(g)}"
        if _tree.is_hole(g) or jnp.shape(g) != u.shape:
            raise ValueError(
                f"task_gradient at {name!r} is {found}, expected an array of shape "
                f"{u.shape}: pass the gradient of the task's loss, like params."
            )
        return widen(jnp.asarray(g))

    return _tree.map_positions(leaf, updates, leaves, names)


def observe(
    link: str,
    optimizer: optax.GradientTransformationExtraArgs,
    updates: Any,
    inner: Any,
    params: Any,
    *,
    task_gradient: Any = None,
    **extra_args: Any,
) -> Observed:
    """Takes a step of `optimizer` and measures it along the task's gradient."""
    updates = plain_gradient(updates, link, params)
    need_params(params, link)
    steps, inner = optimizer.update(updates, inner, params, **extra_args)
    moved = jax.tree.map(_stored, optax.apply_updates(params, steps))
    if task_gradient is None:
        gradient = jax.tree.map(widen, updates)
    else:
        gradient = _align(task_gradient, updates)

    def work(g, new, p):
        gained = -g * (new - widen(p))
        return jnp.where(jnp.isfinite(gained), gained, 0.0)

    done = jax.tree.map(work, gradient, moved, params)
    return Observed(steps, inner, gradient, done, moved)


def end_task(
    opt_state: Any,
    kind: type,
    wrapper: str,
    end: Callable[[Any], Any],
    *,
    recipes: str,
) -> Any:
    """Maps `end` over the states of `wrapper` inside an optimizer state."""
    if not find_nodes(opt_state, kind):
        raise ValueError(
            f"opt_state holds no {kind.__name__}: build the optimizer with {recipes}, "
            f"or as {wrapper}(optimizer), with the penalty inside."
        )
    return map_nodes(end, opt_state, kind)


def wide_zeros(params: Any) -> Any:
    """Zeros like the parameters, float32 or wider."""
    _tree.require_arrays(params, "params")
    return jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
