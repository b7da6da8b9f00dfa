"""Importance gathered along the path: what each parameter did for the task's loss.

Wrappers around a whole optimizer. They see the gradient g that comes in, which is the
task's own (a penalty belongs inside the wrapper), and the change δ that goes out, after
the rounding to the parameter's dtype:

    track_path   ω <- ω − g δ                              Synaptic Intelligence
    track_walk   ω as above, compared with ½ F Δ² every `interval` steps; F a running
                 mean of g²                                RWalk

Σ ω over parameters is the decrease of the loss, to first order in the steps.
`adamr.consolidation` turns it into a penalty at a task boundary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _trees
from adamr.modifiers.penalty import widen
from adamr.routing import require_plain

__all__ = ["PathState", "WalkState", "track_path", "track_walk"]


class PathState(NamedTuple):
    """ω, a tree like the parameters, and the state of the wrapped optimizer."""

    omega: Any
    inner: Any


class WalkState(NamedTuple):
    """Trees like the parameters unless said otherwise.

    Attributes:
      count: int32, steps in this task.
      tasks: int32, boundaries so far.
      fisher: F, running mean of g².
      squares: Σ g² of the interval.
      omega: −Σ g δ of the interval.
      mark: θ at the start of the interval.
      score: s of this task.
      past_score: s of the tasks before.
      inner: state of the wrapped optimizer.
    """

    count: jax.typing.ArrayLike
    tasks: jax.typing.ArrayLike
    fisher: Any
    squares: Any
    omega: Any
    mark: Any
    score: Any
    past_score: Any
    inner: Any


def _stored(x: jax.Array) -> jax.Array:
    """In float32 or wider, the value that memory will hold."""
    wide = widen(x)
    if wide.dtype == x.dtype:
        return wide
    # Compilers may keep a bfloat16 intermediate in float32; the parameter is rounded.
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)


def _observe(link, optimizer, updates, inner, params, task_gradient, extra_args):
    """The inner step, its state, the task's gradient, −g δ and θ after the step."""
    require_plain(updates, link)
    if params is None:
        raise ValueError(f"{link} needs params: pass update(gradient, state, params).")
    steps, inner = optimizer.update(updates, inner, params, **extra_args)
    moved = jax.tree.map(_stored, optax.apply_updates(params, steps))
    if task_gradient is None:
        gradient = jax.tree.map(widen, updates)
    else:
        leaves = _trees.flatten_like(task_gradient, "task_gradient", updates)

        def align(u, g):
            if jnp.shape(g) != u.shape:
                raise ValueError(
                    f"task_gradient has a leaf of shape {jnp.shape(g)}, expected "
                    f"{u.shape}: pass the gradient of the task's loss, like params."
                )
            return widen(jnp.asarray(g))

        gradient = _trees.map_positions(align, updates, leaves)

    def work(g, new, p):
        gained = -g * (new - widen(p))
        return jnp.where(jnp.isfinite(gained), gained, 0.0)

    return steps, inner, gradient, jax.tree.map(work, gradient, moved, params), moved


def track_path(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Synaptic Intelligence's path integral around an optimizer: ω <- ω − g δ.

    g is the incoming gradient and δ = apply_updates(θ, step) − θ the change that really
    happens, so Adam, clipping, weight decay and rounding are all in it. Put penalties
    and modifiers inside, so that g is the task's own gradient. On a quadratic loss ω is
    each coordinate's share of its decrease: `test_t16_path_integral`. Gradient noise
    makes it too large, as in the original.

    Extra argument of `update`:
      task_gradient: optional, a tree like the gradient: the task's gradient, where the
        incoming one is something else (replay mixed in, a penalty in the loss).

    Args:
      optimizer: a whole one, learning rate included. `optax.MultiSteps` and
        `apply_if_finite` go around `track_path`, not inside.

    Returns:
      An optimizer with the steps of `optimizer`; `consolidate_path` ends a task. A
      product g δ that is not finite adds nothing.

    Raises:
      ValueError: at update, without `params` or for a `task_gradient` that does not
        fit.

    >>> tx = track_path(optax.sgd(0.5))
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
        return PathState(_zeros(params), optimizer.init(params))

    def update_fn(updates, state, params=None, *, task_gradient=None, **extra_args):
        steps, inner, _, work, _ = _observe(
            "track_path", optimizer, updates, state.inner, params, task_gradient,
            extra_args,
        )  # fmt: skip
        return steps, PathState(optax.tree.add(state.omega, work), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def track_walk(
    optimizer: optax.GradientTransformation,
    interval: int = 10,
    alpha: float = 0.9,
    damping: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """RWalk's score around an optimizer: loss decrease per unit of KL divergence.

        ω <- ω − g δ                                       every step
        s <- s + relu(ω / (½ F Δ² + damping)), ω <- 0      every `interval` steps, Δ the
        F <- (1 − alpha) F + alpha · mean of g²            change over the interval

    s uses the F from before its refresh, as the authors' code does; that code leaves
    out the ½, the paper and this function do not: `test_t18_walk_score`.

    Extra argument of `update`: `task_gradient`, as for `track_path`.

    Args:
      optimizer: a whole one, with its penalty inside, as for `track_path`.
      interval: steps; the authors use 10 and 50. Only whole intervals count.
      alpha: in [0, 1], the weight of the newest interval.
      damping: > 0, added to ½ F Δ².

    Returns:
      An optimizer with the steps of `optimizer`; `consolidate_walk` ends a task. Terms
      that are not finite add nothing.

    Raises:
      ValueError: for an interval below 1, an alpha outside [0, 1], a negative damping;
        at update, as `track_path`.

    >>> tx = track_walk(optax.sgd(0.5), interval=1, damping=1.0)
    >>> theta = jnp.array([1.0])
    >>> _, state = tx.update(2 * theta, tx.init(theta), theta)
    >>> print(state.score)
    [2.]

    References:
      Chaudhry et al., Riemannian Walk for Incremental Learning, arXiv:1801.10112.
    """
    for name, value, low, high in [
        ("interval", interval, 1, float("inf")),
        ("alpha", alpha, 0, 1),
        ("damping", damping, 0, float("inf")),
    ]:
        if _trees.is_known(value) and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        return WalkState(
            count=jnp.zeros([], jnp.int32),
            tasks=jnp.zeros([], jnp.int32),
            fisher=_zeros(params),
            squares=_zeros(params),
            omega=_zeros(params),
            mark=jax.tree.map(lambda p: jnp.array(widen(p), copy=True), params),
            score=_zeros(params),
            past_score=_zeros(params),
            inner=optimizer.init(params),
        )

    def end_interval(state, moved):
        def score(s, omega, fisher, new, mark):
            distance = 0.5 * fisher * jnp.square(new - mark) + damping
            gained = jnp.where(distance > 0, omega / distance, 0.0)
            return s + jnp.where(jnp.isfinite(gained), jax.nn.relu(gained), 0.0)

        def refresh(fisher, squares):
            new = (1 - alpha) * fisher + alpha * (squares / interval)
            return new.astype(fisher.dtype)

        return state._replace(
            score=jax.tree.map(
                score, state.score, state.omega, state.fisher, moved, state.mark
            ),
            fisher=jax.tree.map(refresh, state.fisher, state.squares),
            squares=optax.tree.zeros_like(state.squares),
            omega=optax.tree.zeros_like(state.omega),
            mark=moved,
        )

    def update_fn(updates, state, params=None, *, task_gradient=None, **extra_args):
        steps, inner, gradient, work, moved = _observe(
            "track_walk", optimizer, updates, state.inner, params, task_gradient,
            extra_args,
        )  # fmt: skip

        def add_square(total, g):
            square = jnp.square(g)
            return total + jnp.where(jnp.isfinite(square), square, 0.0)

        state = state._replace(
            count=optax.safe_increment(state.count),
            squares=jax.tree.map(add_square, state.squares, gradient),
            omega=optax.tree.add(state.omega, work),
            inner=inner,
        )
        # The statistics pass over memory only when they change.
        outer = state._replace(inner=None)
        due = state.count % interval == 0
        outer = jax.lax.cond(due, end_interval, lambda s, _: s, outer, moved)
        return steps, outer._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
