"""RWalk: importance from Fisher information and the trajectory of training.

    every step         ω <- ω − g δ                                  track_rwalk
    every interval     s <- s + relu(ω / (½ F Δ² + damping))
                       F <- (1 − alpha) F + alpha · mean of g²
    task's end         Ω <- [F] + [s]                                consolidate_rwalk

Ω and θ* belong to the penalty inside the wrapped optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._tree import placed_like
from adamr.modifiers.penalty import widen
from adamr.penalties._tracking import end_task, observe, wide_zeros
from adamr.penalties.anchor import rewrite_anchors

__all__ = ["RWalkState", "consolidate_rwalk", "track_rwalk"]


class RWalkState(NamedTuple):
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


def track_rwalk(
    optimizer: optax.GradientTransformation,
    interval: int = 10,
    alpha: float = 0.9,
    damping: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """RWalk's score around an optimizer: loss decrease per unit of KL divergence.

        ω <- ω − g δ                                       every step
        s <- s + relu(ω / (½ F Δ² + damping)), ω <- 0      every `interval` steps, Δ the
        F <- (1 − alpha) F + alpha · mean of g²            change over the interval

    s uses the F from before its refresh, as the authors' code does. That code leaves
    out the ½; the paper and this function do not.

    Extra argument of `update`: `task_gradient`, as for `track_si`.

    Args:
      optimizer: a whole one, with its penalty inside, as for `track_si`.
      interval: steps; the authors use 10 and 50. Only whole intervals count.
      alpha: in [0, 1], the weight of the newest interval.
      damping: > 0, added to ½ F Δ².

    Returns:
      An optimizer with the steps of `optimizer`; `consolidate_rwalk` ends a task. Terms
      that are not finite add nothing.

    Raises:
      ValueError: for an interval below 1, an alpha outside [0, 1], a negative damping;
        at update, as `track_si`.

    >>> tx = track_rwalk(optax.sgd(0.5), interval=1, damping=1.0)
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
        if _tree.is_known(value) and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        return RWalkState(
            count=jnp.zeros([], jnp.int32),
            tasks=jnp.zeros([], jnp.int32),
            fisher=wide_zeros(params),
            squares=wide_zeros(params),
            omega=wide_zeros(params),
            mark=jax.tree.map(lambda p: jnp.array(widen(p), copy=True), params),
            score=wide_zeros(params),
            past_score=wide_zeros(params),
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

    def update_fn(updates, state, params=None, **extra_args):
        seen = observe(
            "track_rwalk", optimizer, updates, state.inner, params, **extra_args
        )

        def add_square(total, g):
            square = jnp.square(g)
            return total + jnp.where(jnp.isfinite(square), square, 0.0)

        state = state._replace(
            count=optax.safe_increment(state.count),
            squares=jax.tree.map(add_square, state.squares, seen.gradient),
            omega=optax.tree.add(state.omega, seen.work),
            inner=None,
        )
        # The statistics pass over memory only when they change.
        due = state.count % interval == 0
        state = jax.lax.cond(due, end_interval, lambda s, _: s, state, seen.moved)
        return seen.steps, state._replace(inner=seen.inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normalised(tree: Any) -> Any:
    """(x − min) / (max − min) over all leaves; zeros where all are equal."""
    leaves = jax.tree.leaves(tree)
    low = jnp.min(jnp.stack([jnp.min(x) for x in leaves]))
    span = jnp.max(jnp.stack([jnp.max(x) for x in leaves])) - low
    safe = jnp.where(span > 0, span, 1)
    return jax.tree.map(lambda x: (x - low) / safe, tree)


def consolidate_rwalk(opt_state: Any, params: Any) -> Any:
    """Ends a task of RWalk: Fisher information and score become importance.

        s <- ½ (s_past + s_task)        after the first task s_task
        Ω <- [F] + [s],   θ* <- θ       [x]: to [0, 1] over all parameters
        s_task <- 0                     F is kept, a new interval begins

    The authors' penalty λ Σ Ω (θ − θ*)² has no 1/2, so it is a `quadratic_penalty` of
    strength 2 λ. Their code adds ½ (s_past + s_task) to s_past instead of replacing it;
    this is the paper's average.

    Args:
      opt_state: of any wrapper around `track_rwalk(optimizer)` with a penalty in it.
      params: θ at the end of the task.

    Returns:
      A new state, in which the step does not recompile.

    Raises:
      ValueError: if the state holds no `RWalkState` or no penalty in it; for params
        that do not fit.

    References: Chaudhry et al., arXiv:1801.10112.
    """

    def end(node):
        past = jax.tree.map(
            lambda old, new: jnp.where(node.tasks > 0, 0.5 * (old + new), new),
            node.past_score,
            node.score,
        )
        inner = rewrite_anchors(
            node.inner,
            lambda omega, anchor, theta, fisher, score: (fisher + score, theta),
            params=params,
            fisher=_normalised(node.fisher),
            score=_normalised(past),
        )
        theta = _tree.flatten_like(params, "params", node.mark)
        return RWalkState(
            count=_tree.cleared(node.count),
            tasks=placed_like(node.tasks, node.tasks + 1),
            fisher=node.fisher,
            squares=_tree.cleared(node.squares),
            omega=_tree.cleared(node.omega),
            mark=_tree.map_positions(placed_like, node.mark, theta),
            score=_tree.cleared(node.score),
            past_score=jax.tree.map(placed_like, node.past_score, past),
            inner=inner,
        )

    return end_task(opt_state, RWalkState, "track_rwalk", end, recipes="rwalk")
