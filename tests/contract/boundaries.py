"""Every task boundary, as functions on a state that holds what they need."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import adamr
from adamr._nodes import find_nodes
from adamr.modifiers import Anchor, FopngState
from adamr.penalties import RWalkState, SIState
from adamr.protection import HalfFineTuningState
from adamr.routing import OverlapState

Boundary = Callable[[Any, Any], Any]


def _like(params: Any, value: float) -> Any:
    return jax.tree.map(lambda p: jnp.full(p.shape, value), params)


def _samples(state: Any, params: Any) -> Any:
    """One sample per leaf: its gradient's columns."""
    return adamr.subspaces.gradient_samples(adamr.get_subspace(state), params)


def _fisher(state: Any, params: Any) -> Any:
    old, new = _like(params, 1.0), _like(params, 2.0)
    return adamr.modifiers.set_fisher(state, old=old, new=new)


def subspaces_of(state: Any) -> list[adamr.Subspace]:
    """One of each shape: `osft` holds two, the other recipes one."""
    found = find_nodes(state, adamr.Subspace)
    return list({str(jax.tree.map(jnp.shape, s)): s for s in found}.values())


def set_grown(state: Any, gradient: Any, **options: Any) -> Any:
    """Every subspace grown by the gradient's columns, or rows."""
    samples = adamr.subspaces.gradient_samples
    held = subspaces_of(state)
    grown = [adamr.grow_subspace(s, samples(s, gradient), **options) for s in held]
    return adamr.set_subspace(state, grown if len(grown) > 1 else grown[0])


BOUNDARIES: dict[str, tuple[type | None, Boundary]] = {
    "reset_moments": (None, lambda s, p: adamr.reset_moments(s)),
    "reset_overlap": (OverlapState, lambda s, p: adamr.reset_overlap(s)),
    "set_subspace": (
        adamr.Subspace,
        set_grown,
    ),
    "protect_inputs": (
        adamr.Subspace,
        lambda s, p: adamr.protect_inputs(s, _samples(s, p)),
    ),
    "project_moments": (
        adamr.Subspace,
        lambda s, p: adamr.state.project_moments(s),
    ),
    "set_directions": (
        adamr.Directions,
        lambda s, p: adamr.set_subspace(s, adamr.get_subspace(s)),
    ),
    "consolidate": (Anchor, lambda s, p: adamr.consolidate(s, p, _like(p, 2.0))),
    "set_anchor": (Anchor, lambda s, p: adamr.set_anchor(s, Anchor(_like(p, 2.0), p))),
    "consolidate_si": (SIState, lambda s, p: adamr.consolidate_si(s, p)),
    "consolidate_rwalk": (RWalkState, lambda s, p: adamr.consolidate_rwalk(s, p)),
    "set_fisher": (FopngState, _fisher),
    "redraw_half": (HalfFineTuningState, lambda s, p: adamr.redraw_half(s)),
}


def that_apply(state: Any) -> Iterator[tuple[str, Boundary]]:
    """The boundaries for which the state holds what they change."""
    for name, (kind, boundary) in BOUNDARIES.items():
        if name == "protect_inputs" and len(subspaces_of(state)) > 1:
            continue  # inputs protect one side
        if kind is None or find_nodes(state, kind):
            yield name, boundary
