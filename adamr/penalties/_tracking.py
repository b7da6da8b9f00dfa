"""What `track_si` and `track_rwalk` share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import find_nodes
from adamr._tree import placed_like
from adamr.modifiers.penalty import widen
from adamr.routing.carrier import require_plain


def _stored(x: jax.Array) -> jax.Array:
    """In float32 or wider, the value that memory will hold."""
    wide = widen(x)
    if wide.dtype == x.dtype:
        return wide
    # Compilers may keep a bfloat16 intermediate in float32; the parameter is rounded.
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def zeros_like(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)


def observe(link, optimizer, updates, inner, params, task_gradient, extra_args):
    """The inner step, its state, the task's gradient, −g δ and θ after the step."""
    require_plain(updates, link)
    if params is None:
        raise ValueError(f"{link} needs params: pass update(gradient, state, params).")
    steps, inner = optimizer.update(updates, inner, params, **extra_args)
    moved = jax.tree.map(_stored, optax.apply_updates(params, steps))
    if task_gradient is None:
        gradient = jax.tree.map(widen, updates)
    else:
        leaves = _tree.flatten_like(task_gradient, "task_gradient", updates)

        def align(u, g):
            if jnp.shape(g) != u.shape:
                raise ValueError(
                    f"task_gradient has a leaf of shape {jnp.shape(g)}, expected "
                    f"{u.shape}: pass the gradient of the task's loss, like params."
                )
            return widen(jnp.asarray(g))

        gradient = _tree.map_positions(align, updates, leaves)

    def work(g, new, p):
        gained = -g * (new - widen(p))
        return jnp.where(jnp.isfinite(gained), gained, 0.0)

    return steps, inner, gradient, jax.tree.map(work, gradient, moved, params), moved


def require_tracker(opt_state: Any, kind: type, wrapper: str) -> None:
    if not find_nodes(opt_state, kind):
        raise ValueError(
            f"opt_state holds no {kind.__name__}: build the optimizer as "
            f"{wrapper}(optimizer), with the penalty inside."
        )


def cleared(tree: Any) -> Any:
    return jax.tree.map(lambda x: placed_like(x, jnp.zeros_like(x)), tree)
