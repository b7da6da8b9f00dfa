"""Task boundaries of the path integrals: what training itself found important.

    consolidate_path         SI: the path integral of `track_path` becomes importance
    consolidate_walk         RWalk: likewise, for `track_walk`

See `consolidation.py` for importance that is computed from data.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adamr import _trees
from adamr._trees import placed_like
from adamr.consolidation import rewrite_anchors
from adamr.path_integral import PathState, WalkState
from adamr.state import _map_nodes, find_nodes

__all__ = ["consolidate_path", "consolidate_walk"]


def _trackers(opt_state: Any, kind: type, wrapper: str) -> None:
    if not find_nodes(opt_state, kind):
        raise ValueError(
            f"opt_state holds no {kind.__name__}: build the optimizer as "
            f"{wrapper}(optimizer), with the penalty inside."
        )


def consolidate_path(
    opt_state: Any, params: Any, damping: jax.typing.ArrayLike = 0.1
) -> Any:
    """Ends a task of Synaptic Intelligence: the path integral ω becomes importance.

        Ω <- relu(Ω + ω / ((θ − θ*)² + damping)),   θ* <- θ,   ω <- 0

    As in the authors' code the relu acts on the sum. Their penalty c Σ Ω (θ − θ*)² has
    no 1/2: strength = 2 c (`si` converts). `test_t16_path_integral`: for a quadratic
    loss and damping 0, Ω is half its curvature, so c = 1 gives the loss back.

    Args:
      opt_state: of any wrapper around `track_path(optimizer)` with a penalty in it.
      params: θ at the end of the task.
      damping: ξ ≥ 0; the authors use 0.1 and 1e-3. A parameter that did not move, with
        damping 0, gets nothing.

    Returns:
      A new state, in which the step does not recompile.

    Raises:
      ValueError: if the state holds no `PathState` or no penalty in it; for params that
        do not fit.

    References: Zenke, Poole, Ganguli, arXiv:1703.04200.
    """
    _trackers(opt_state, PathState, "track_path")

    def end(node):
        def merge(omega, anchor, theta, path):
            distance = jnp.square(theta - anchor) + damping
            gained = jnp.where(distance > 0, path / distance, 0)
            gained = jnp.where(jnp.isfinite(gained), gained, 0)
            return jax.nn.relu(omega + gained), theta

        inner = rewrite_anchors(node.inner, merge, params=params, path=node.omega)
        return PathState(_cleared(node.omega), inner)

    return _map_nodes(end, opt_state, PathState)


def _cleared(tree: Any) -> Any:
    return jax.tree.map(lambda x: placed_like(x, jnp.zeros_like(x)), tree)


def _normalised(tree: Any) -> Any:
    """(x − min) / (max − min) over all leaves; zeros where all are equal."""
    leaves = jax.tree.leaves(tree)
    low = jnp.min(jnp.stack([jnp.min(x) for x in leaves]))
    span = jnp.max(jnp.stack([jnp.max(x) for x in leaves])) - low
    safe = jnp.where(span > 0, span, 1)
    return jax.tree.map(lambda x: (x - low) / safe, tree)


def consolidate_walk(opt_state: Any, params: Any) -> Any:
    """Ends a task of RWalk: Fisher information and score become importance.

        s <- ½ (s_past + s_task)        after the first task s_task
        Ω <- [F] + [s],   θ* <- θ       [x]: to [0, 1] over all parameters
        s_task <- 0                     F runs on, a new interval begins

    The authors' penalty λ Σ Ω (θ − θ*)² has no 1/2: strength = 2 λ. Their code adds
    ½ (s_past + s_task) to s_past instead of replacing it; this is the paper's average.

    Args:
      opt_state: of any wrapper around `track_walk(optimizer)` with a penalty in it.
      params: θ at the end of the task.

    Returns:
      A new state, in which the step does not recompile.

    Raises:
      ValueError: if the state holds no `WalkState` or no penalty in it; for params that
        do not fit.

    References: Chaudhry et al., arXiv:1801.10112.
    """
    _trackers(opt_state, WalkState, "track_walk")

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
        theta = _trees.flatten_like(params, "params", node.mark)
        return WalkState(
            count=placed_like(node.count, jnp.zeros_like(node.count)),
            tasks=placed_like(node.tasks, node.tasks + 1),
            fisher=node.fisher,
            squares=_cleared(node.squares),
            omega=_cleared(node.omega),
            mark=_trees.map_positions(placed_like, node.mark, theta),
            score=_cleared(node.score),
            past_score=jax.tree.map(placed_like, node.past_score, past),
            inner=inner,
        )

    return _map_nodes(end, opt_state, WalkState)
