"""Reaching into any optimizer state: task boundaries and diagnostics by name.

A task boundary is a pure function on state, outside the step. These functions find
their targets inside chain, masked, partition, MultiSteps, inject_hyperparams,
apply_if_finite and nnx.Optimizer by type, so no path is needed. Shapes, dtypes and
placement stay, so the compiled step runs on.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _trees
from adamr._trees import placed_like
from adamr.directions import Directions
from adamr.gram_schmidt import restrict
from adamr.modifiers import rows as matrix
from adamr.modifiers.natural import FopngState, damped, metric_basis, positive
from adamr.protection import EigenbasisState
from adamr.routing import FaithfulSecondMomentState
from adamr.strength import OverlapState, StrengthState
from adamr.subspace import Subspace, project, rank

__all__ = [
    "get_subspace",
    "project_moments",
    "read_diagnostics",
    "reset_moments",
    "reset_overlap",
    "set_fisher",
    "set_subspace",
]


def _map_nodes(function: Callable[[Any], Any], tree: Any, *types: type) -> Any:
    """Maps `function` over the nodes of the given types, all else unchanged."""
    found = lambda node: isinstance(node, types)  # noqa: E731
    return jax.tree.map(
        lambda node: function(node) if found(node) else node, tree, is_leaf=found
    )


def find_nodes(tree: Any, *types: type) -> list[Any]:
    """All nodes of the given types, in order."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, types))
    return [node for node in leaves if isinstance(node, types)]


def _shapes(subspace: Subspace | Directions) -> list[tuple[int, ...] | None]:
    leaves = jax.tree.leaves(tuple(subspace), is_leaf=lambda x: x is None)
    return [None if x is None else jnp.shape(x) for x in leaves]


def _replace_arrays(node: Any, arrays: list[jax.Array]) -> Any:
    old, treedef = jax.tree.flatten(node)
    pairs = zip(old, arrays, strict=True)
    return jax.tree.unflatten(treedef, [placed_like(o, n) for o, n in pairs])


def _plain(node: Any) -> Any:
    """Nested tuples of arrays or None, without the Variables of nnx.Optimizer."""
    return jax.tree.map(
        lambda x: None if x is None else jax.tree.leaves(x)[0],
        node,
        is_leaf=lambda x: not isinstance(x, tuple),
    )


def _subspaces(opt_state: Any) -> list[Any]:
    found = find_nodes(opt_state, Subspace, Directions)
    if not found:
        raise ValueError(
            "opt_state holds no Subspace and no Directions: build the optimizer with "
            "project_out, protect_update, oblique_second_moment, in_eigenbasis or "
            "fopng."
        )
    kind = lambda node: (type(node), _shapes(node))  # noqa: E731
    if any(kind(other) != kind(found[0]) for other in found[1:]):
        raise ValueError(
            "opt_state holds subspaces of different shapes: pass the part of the state "
            "that has one of them."
        )
    return found


def get_subspace(opt_state: Any) -> Any:
    """A copy of the subspace inside an optimizer state.

    Args:
      opt_state: of any wrapper around a link that holds a subspace.

    Returns:
      A `Subspace`, or `Directions` where the optimizer was built with them.

    Raises:
      ValueError: if there is none, or several of different shapes.

    >>> from adamr import empty_subspace, project_out, rank
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> state = project_out(empty_subspace(params)).init(params)
    >>> int(rank(get_subspace(state))[0])
    0
    """
    return jax.tree.map(jnp.copy, _plain(_subspaces(opt_state)[0]))


def set_subspace(
    opt_state: Any,
    subspace: Subspace | Directions,
    *,
    moments: Literal["project", "reset", "keep"] = "project",
) -> Any:
    """The state with every subspace in it replaced; the step does not recompile.

    Args:
      opt_state: of any wrapper around a link that holds a subspace.
      subspace: of the same kind and shapes, such as `grow_subspace(get_subspace(state),
        ...)` or `grow_directions(...)`. Directions over leaves that the optimizer does
        not see are restricted to those it sees.
      moments: what happens to the routed first moment, which was gathered in the old
        allowed space and would leak into the new directions for ~1/(1−b1) steps.
        "project" (default): m <- m − U diag(λ) Uᵀ m, v stays; "reset": m, v and the
        count of the merging link start anew; "keep": nothing. Moments in an eigenbasis
        are reset in both of the first two, since their coordinates change meaning.
        Plain optax moments under `protect_update` stay: their update is projected.

    Raises:
      ValueError: if the state holds no subspace, or one of other shapes.
      TypeError: if it holds one of another kind.

    >>> from adamr import make_subspace, project_out, rank
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> empty = make_subspace(params, {"w": jnp.zeros((3, 0))})
    >>> state = project_out(empty).init(params)
    >>> state = set_subspace(state, make_subspace(params, {"w": jnp.eye(3)[:, :2]}))
    >>> int(rank(get_subspace(state))[0])
    2
    """
    if moments not in ("project", "reset", "keep"):
        raise ValueError(f"moments is {moments!r}, expected project, reset or keep.")
    if not isinstance(subspace, Subspace | Directions):
        raise TypeError(
            f"subspace must be a Subspace, got {type(subspace).__name__} (or it must "
            "be Directions, if the state holds them)."
        )
    held = _subspaces(opt_state)[0]
    here = _shapes(held)
    if type(held) is not type(subspace):
        raise TypeError(
            f"subspace is a {type(subspace).__name__}, the state holds a "
            f"{type(held).__name__}."
        )
    if isinstance(subspace, Directions) and len(held[0]) == len(subspace.rows):
        subspace = restrict(subspace, held[0])
    if _shapes(subspace) != here:
        raise ValueError(
            f"subspace has shapes {_shapes(subspace)}, the state holds {here}: keep "
            "max_rank and axes as they were (of Directions, capacity and exclude), or "
            "initialise the optimizer anew."
        )

    def swap(old):
        return _replace_arrays(old, jax.tree.leaves(subspace))

    opt_state = _map_nodes(swap, opt_state, type(subspace))
    opt_state = _map_nodes(_in_metric, opt_state, FopngState)
    if moments == "project":
        return project_moments(opt_state)
    return reset_moments(opt_state) if moments == "reset" else opt_state


def _in_metric(node: FopngState) -> FopngState:
    """The basis of the constraints in the metric that the state holds."""
    directions = _plain(node.directions)
    basis = metric_basis(directions, node.fisher_old, node.fisher_new)
    return node._replace(basis=_replace_arrays(node.basis, jax.tree.leaves(basis)))


def _fisher(held: Any, fisher: Any, clean: Callable, argument: str) -> Any:
    """`held` with the values of `fisher`, checked and cleaned."""
    if fisher is None:
        return held
    found = [jnp.asarray(f) for f in matrix.align(held, fisher, argument)]
    pairs = zip(*_trees.flatten_with_names(held), strict=True)
    here = [(name, x) for name, x in pairs if not _trees.is_hole(x)]
    for (name, x), f in zip(here, found, strict=True):
        if f.shape != x.shape:
            raise ValueError(
                f"{argument} has shape {f.shape} at {name!r}, expected {x.shape}, the "
                "parameter's."
            )
        if not _trees.is_traced(f) and not jnp.all(jnp.isfinite(f) & (f >= 0)):
            raise ValueError(
                f"{argument} has negative, NaN or infinite entries at {name!r}: a "
                "Fisher diagonal is a mean of squares."
            )
    return _replace_arrays(held, clean(found))


def set_fisher(
    opt_state: Any, *, old: Any = None, new: Any = None, damping: float = 1e-3
) -> Any:
    """The state of `fopng` with other Fisher diagonals; the step does not recompile.

    Args:
      opt_state: of any wrapper around `fopng`.
      old: F of the old tasks, a tree like the parameters of values ≥ 0; None: as it
        is. After the first task its Fisher, then `average_fisher(old, task)`.
      new: F' of the current task, likewise. F' + damping · mean(F') is stored; 1, if F'
        is 0 everywhere.
      damping: > 0, as a share of the mean; entries of 0 would give infinite steps.

    Raises:
      ValueError: if the state holds no `fopng`, damping is not positive, a tree does
        not fit, or (outside jit) values are negative or not finite. Under jit those
        count as 0.

    >>> from adamr import empty_directions, fopng
    >>> g = jnp.array([2.0, 1.0])
    >>> tx = fopng(empty_directions(g, 1))
    >>> state = set_fisher(tx.init(g), new=jnp.array([4.0, 1.0]), damping=1e-6)
    >>> print(tx.update(g, state)[0].round(4))
    [0.3536 0.7071]
    """
    if _trees.is_known(damping) and not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    if not find_nodes(opt_state, FopngState):
        raise ValueError("opt_state holds no fopng: build the optimizer with it.")

    def damp(fisher):
        return damped(fisher, damping)

    def replace(node):
        node = node._replace(
            fisher_old=_fisher(node.fisher_old, old, positive, "old"),
            fisher_new=_fisher(node.fisher_new, new, damp, "new"),
        )
        return _in_metric(node)

    return _map_nodes(replace, opt_state, FopngState)


def project_moments(opt_state: Any) -> Any:
    """Projects every routed first moment off the subspace that the state holds.

    m <- m − U diag(λ) Uᵀ m; moments in an eigenbasis are reset (see `set_subspace`).
    """
    subspace = get_subspace(opt_state)

    def leaf(node):
        if isinstance(node, EigenbasisState):
            return reset_moments(node)
        if len(_trees.flatten(node.mu)[0]) != len(subspace[0]):
            return node
        mu = jax.tree.map(placed_like, node.mu, project(subspace, node.mu))
        return node._replace(mu=mu)

    return _map_nodes(leaf, opt_state, EigenbasisState, FaithfulSecondMomentState)


def _has_moments(node: Any) -> bool:
    return bool({"mu", "nu"} & set(getattr(node, "_fields", ())))


def reset_moments(opt_state: Any) -> Any:
    """Zeros for count, m and v of every state with a field `mu` or `nu`, optax's too.

    Bias correction starts anew with the count, so the first step is full-sized as on
    the first day.

    >>> import optax
    >>> tx = optax.adam(1e-3)
    >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> optax.tree.get(reset_moments(state), "mu")
    Array([0., 0.], dtype=float32)
    """

    def reset(node):
        if not _has_moments(node):
            return node
        return jax.tree.map(lambda x: placed_like(x, jnp.zeros_like(x)), node)

    return jax.tree.map(reset, opt_state, is_leaf=_has_moments)


def reset_overlap(opt_state: Any) -> Any:
    """Forgets the smoothed overlap, as the paper's code does at each new task."""

    def reset(node):
        count = placed_like(node.count, jnp.zeros_like(node.count))
        overlap = placed_like(node.overlap, jnp.zeros_like(node.overlap))
        return node._replace(count=count, overlap=overlap)

    return _map_nodes(reset, opt_state, OverlapState)


def read_diagnostics(opt_state: Any) -> dict[str, Any]:
    """What the links measured, by name; jittable, ready for a logger.

    Returns:
      `strength` if the state has a strength link, `overlap` if that is adaptive, `rank`
      (a tuple per protected leaf, or of one number for `Directions`) if it holds a
      subspace, `count` if it has a merging link. With several of a kind, the first.
    """
    found = {}
    for node in find_nodes(opt_state, OverlapState, StrengthState)[:1]:
        found["strength"] = node.strength
        if isinstance(node, OverlapState):
            found["overlap"] = node.overlap
    for node in find_nodes(opt_state, Subspace, Directions)[:1]:
        ranks = (node.used,) if isinstance(node, Directions) else rank(node)
        found["rank"] = tuple(r for r in ranks if r is not None)
    for node in find_nodes(opt_state, FaithfulSecondMomentState)[:1]:
        found["count"] = node.count
    return found
