"""Reaching into any optimizer state: task boundaries and diagnostics by name.

A task boundary is a pure function on state, outside the step. These functions find
their targets inside chain, masked, partition, MultiSteps, inject_hyperparams,
apply_if_finite and nnx.Optimizer by type, so no path is needed. Shapes, dtypes and
placement stay, so the compiled step runs on.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonState

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes, replace_arrays
from adamr._tree import placed_like
from adamr.modifiers.natural import FopngState, renew_basis
from adamr.protection.eigenbasis import EigenbasisState
from adamr.routing.merge import FaithfulSecondMomentState
from adamr.routing.strength import OverlapState, StrengthState
from adamr.subspaces.covariance import Covariance
from adamr.subspaces.directions import Directions
from adamr.subspaces.grow import grow_subspace
from adamr.subspaces.protected import Protected, fits
from adamr.subspaces.subspace import Subspace

__all__ = [
    "get_subspace",
    "project_moments",
    "protect_inputs",
    "read_diagnostics",
    "reset_moments",
    "reset_overlap",
    "set_subspace",
]


Shapes = tuple[tuple[int, ...] | None, ...]


def _shapes(subspace: Protected) -> Shapes:
    leaves = jax.tree.leaves(tuple(subspace), is_leaf=lambda x: x is None)
    return tuple(None if x is None else jnp.shape(x) for x in leaves)


def _all_held(opt_state: Any) -> list[Protected]:
    """One subspace of each kind and shape that the links of the state hold."""
    found = find_nodes(opt_state, Subspace, Directions)
    if not found:
        raise ValueError(
            "opt_state holds no Subspace and no Directions (it is a "
            f"{type(opt_state).__name__}): build the optimizer with a recipe that "
            "takes them (gpm, gpm_si, osft, ogd, ...), or with project_out, "
            "protect_update, oblique_second_moment, in_eigenbasis or fopng."
        )
    return list({(type(each), _shapes(each)): each for each in found[::-1]}.values())


def held_subspace(opt_state: Any) -> Any:
    """The subspace that the links of the state hold, all of them the same."""
    held = _all_held(opt_state)
    if len(held) > 1:
        raise ValueError(
            "opt_state holds subspaces of different shapes: pass the part of the "
            "state that has one of them. (set_subspace takes several, as osft needs.)"
        )
    return held[0]


def get_subspace(opt_state: Any) -> Any:
    """A copy of the subspace inside an optimizer state.

    Args:
      opt_state: of any wrapper around a link that holds a subspace.

    Returns:
      A `Subspace`, or `Directions` where the optimizer was built with them.

    Raises:
      ValueError: if there is none, or several of different shapes.

    >>> from adamr import empty_subspace, project_out
    >>> from adamr.subspaces import rank
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> state = project_out(empty_subspace(params)).init(params)
    >>> int(rank(get_subspace(state))[0])
    0
    """
    return jax.tree.map(jnp.copy, held_subspace(opt_state))


def set_subspace(
    opt_state: Any,
    subspace: Protected | Sequence[Subspace],
    *,
    moments: Literal["project", "reset", "keep"] = "project",
) -> Any:
    """The state with every subspace in it replaced; the step does not recompile.

    Args:
      opt_state: of any wrapper around a link that holds a subspace.
      subspace: of the same kind and shapes, such as `grow_subspace(get_subspace(state),
        ...)` or `grow_directions(...)`. Directions over leaves that the optimizer does
        not see are restricted to those it sees. For a state that holds several, as that
        of `osft` does: all of them, in any order, each told by its shapes.
      moments: what happens to the routed first moment, which was gathered in the old
        allowed space and would leak into the new directions for ~1/(1−b1) steps.
        "project" (default): m <- m − U diag(λ) Uᵀ m, v stays; "reset": m, v and the
        count of all of `opt_state` start anew (`reset_moments`), other parts of a
        partition included; "keep": nothing. Moments in an eigenbasis are reset in both
        of the first two, since their coordinates change meaning. Plain optax moments
        under `protect_update` stay with "project": their update is projected.

    Returns:
      A state of the same structure, shapes, dtypes and placement.

    Raises:
      ValueError: if the state holds no subspace, or one of other shapes; for another
        word in `moments`.
      TypeError: if it holds one of another kind.

    >>> from adamr import make_subspace, project_out
    >>> from adamr.subspaces import rank
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> empty = make_subspace(params, {"w": jnp.zeros((3, 0))})
    >>> state = project_out(empty).init(params)
    >>> state = set_subspace(state, make_subspace(params, {"w": jnp.eye(3)[:, :2]}))
    >>> int(rank(get_subspace(state))[0])
    2
    """
    if moments not in ("project", "reset", "keep"):
        raise ValueError(f"moments is {moments!r}, expected project, reset or keep.")
    several = type(subspace) in (list, tuple)
    given: list[Any] = list(subspace) if several else [subspace]
    held = _all_held(opt_state) if several else [held_subspace(opt_state)]
    kind = type(held[0])
    for each in given:
        if not isinstance(each, kind):
            raise TypeError(
                f"subspace must be a {kind.__name__}, got {type(each).__name__}: the "
                f"state holds a {kind.__name__}."
            )
    # Restricted to the leaves that the optimizer sees.
    given = [each.restrict(held[0][0]) for each in given]
    new, old = ({_shapes(each): each for each in group} for group in (given, held))
    if new.keys() != old.keys():
        raise ValueError(
            f"subspace has shapes {list(new)}, the state holds {list(old)}: keep "
            "max_rank and axes unchanged (of Directions, capacity and exclude; of "
            "weight_subspaces, room), or initialise the optimizer anew."
        )

    def swap(old):
        return replace_arrays(old, jax.tree.leaves(new[_shapes(old)]))

    opt_state = map_nodes(swap, opt_state, kind)
    opt_state = map_nodes(renew_basis, opt_state, FopngState)
    if moments == "project":
        return project_moments(opt_state)
    return reset_moments(opt_state) if moments == "reset" else opt_state


def _require_some(inputs: Any, subspace: Subspace) -> None:
    """Raises if no leaf of the subspace has inputs."""
    given = inputs.moments if isinstance(inputs, Covariance) else inputs
    leaves = _tree.flatten(given)[0]
    pairs = zip(leaves, subspace.bases, strict=False)
    if not any(b is not None and not _tree.is_hole(x) for x, b in pairs):
        raise ValueError(
            "inputs has None at every leaf that the subspace protects, expected the "
            "layer inputs of at least one: nothing would be protected."
        )


def protect_inputs(
    opt_state: Any,
    inputs: Any,
    *,
    threshold: float = 0.97,
    scaling: float | None = None,
    moments: Literal["project", "reset", "keep"] = "project",
) -> Any:
    """Ends a task: the state that also protects the inputs of the finished task.

        U <- grow_subspace(U, inputs, threshold),    m <- m − U diag(λ) Uᵀ m

    The commonest task boundary in one call: `get_subspace`, `grow_subspace` and
    `set_subspace`. The step does not recompile.

    Args:
      opt_state: of any wrapper around a link that holds a `Subspace`.
      inputs: layer inputs of the finished task, as `grow_subspace` takes them: a tree
        like the parameters of arrays (num_samples, n) or None, or a `Covariance`.
      threshold: the share of the inputs' energy to protect, in [0, 1].
      scaling: None, or α > 0 of Scaled Gradient Projection; see `grow_subspace`.
      moments: what happens to the first moment; see `set_subspace`.

    Returns:
      A state of the same structure, shapes, dtypes and placement.

    Raises:
      TypeError: if the state holds `Directions`, which grow from whole gradients.
      ValueError: as `grow_subspace` and `set_subspace` raise it.

    >>> from adamr import adamr, empty_subspace, project_out
    >>> params = {"w": jnp.ones((3, 2))}
    >>> tx = adamr(0.1, project_out(empty_subspace(params)))
    >>> inputs = {"w": jnp.array([[0.0, 2.0, 0.0]])}
    >>> state = protect_inputs(tx.init(params), inputs)
    >>> step, state = tx.update(params, state, params)
    >>> [f"{x:.2f}" for x in jnp.abs(step["w"][:, 0])]
    ['0.10', '0.00', '0.10']

    References: Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762.
    """
    subspace = held_subspace(opt_state)
    if not isinstance(subspace, Subspace):
        raise TypeError(
            "protect_inputs: the state holds Directions, which grow from whole "
            "gradients: set_subspace(opt_state, grow_directions(get_subspace("
            "opt_state), gradients))."
        )
    _require_some(inputs, subspace)
    grown = grow_subspace(subspace, inputs, threshold=threshold, scaling=scaling)
    return set_subspace(opt_state, grown, moments=moments)


def project_moments(opt_state: Any) -> Any:
    """Projects every routed first moment off the subspaces that the state holds.

    m <- m − U diag(λ) Uᵀ m; moments in an eigenbasis are reset (see `set_subspace`).

    Args:
      opt_state: of any wrapper around links that hold subspaces.

    Raises:
      ValueError: if there is no subspace.
    """
    held = _all_held(opt_state)

    def leaf(node):
        if isinstance(node, EigenbasisState):
            return reset_moments(node)
        projected = node.mu
        for subspace in held:
            if fits(subspace, projected):  # not that of another part of a partition
                projected = subspace.project(projected)
        return node._replace(mu=jax.tree.map(placed_like, node.mu, projected))

    return map_nodes(leaf, opt_state, EigenbasisState, FaithfulSecondMomentState)


MOMENTS = {"mu", "nu", "trace", "ema"}


def _has_moments(node: Any) -> bool:
    named = not MOMENTS.isdisjoint(getattr(node, "_fields", ()))
    return named or isinstance(node, optax.ScaleByAdanState)


def reset_moments(opt_state: Any) -> Any:
    """Zeros for count, m and v of every state with such a field, optax's too.

    The fields are `mu` and `nu`, of plain momentum `trace` and `ema`, and those of
    Adan. Bias correction starts anew with the count, so the first step is full-sized as
    on the first day.

    >>> tx = optax.adam(1e-3)
    >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> optax.tree.get(reset_moments(state), "mu")
    Array([0., 0.], dtype=float32)
    """

    def reset(node):
        if not _has_moments(node):
            return node
        kept = {"ns_coeffs": node.ns_coeffs} if isinstance(node, MuonState) else {}
        return _tree.cleared(node)._replace(**kept)

    return jax.tree.map(reset, opt_state, is_leaf=_has_moments)


def reset_overlap(opt_state: Any) -> Any:
    """Forgets the smoothed overlap, as the paper's code does at each new task."""

    def reset(node):
        count, overlap = _tree.cleared((node.count, node.overlap))
        return node._replace(count=count, overlap=overlap)

    return map_nodes(reset, opt_state, OverlapState)


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
        found["rank"] = node.ranks()
    for node in find_nodes(opt_state, FaithfulSecondMomentState)[:1]:
        found["count"] = node.count
    return found
