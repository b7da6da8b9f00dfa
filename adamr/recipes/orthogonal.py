"""Orthogonalised momentum for matrices, Adam for all other leaves: one merging link."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from adamr import _tree
from adamr.routing.carrier import Routed, require_routed
from adamr.routing.merge import MomentOptions, faithful_second_moment, init_moments
from adamr.sharding import placed_by_compiler
from adamr.subspaces.axes import Axes
from adamr.subspaces.matrices import matrices, outputs
from adamr.subspaces.subspace import Subspace

__all__ = ["QUINTIC", "Momentum", "momentum_or_moments"]

QUINTIC = (3.4445, -4.775, 2.0315)  # optax's and the authors' coefficients


class Momentum(NamedTuple):
    """How a momentum is kept and orthogonalised; see `muon`."""

    beta: jax.typing.ArrayLike
    ns_coeffs: Any
    ns_steps: int
    nesterov: bool
    eps: jax.typing.ArrayLike


def _size(x: jax.Array, axes: Sequence[int]) -> int:
    return math.prod(x.shape[d] for d in axes)


def _orthogonalised(options: Momentum, shapes: Sequence[Axes]) -> Callable:
    """optax's Muon on lists: (gradients, momenta, count) -> (steps, momenta).

    optax 0.2.6 multiplies its steps by √max(1, fan-out / fan-in), later versions do
    not. Told that the longer side is the fan-in, which makes no difference to msign, it
    multiplies by 1; the factor is put on here.
    """
    beta, ns_coeffs, ns_steps, nesterov, eps = options

    def longer_first(x, axes):
        sides = axes.protected, outputs(axes, x.ndim)
        return MuonDimensionNumbers(*sorted(sides, key=lambda side: -_size(x, side)))

    def scaled(step, axes):
        ratio = _size(step, outputs(axes, step.ndim)) / _size(step, axes.protected)
        return step * max(1.0, ratio) ** 0.5

    def update(gradients, momenta, count):
        dims = list(map(longer_first, gradients, shapes))
        tx = scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta,
            eps,
            nesterov=nesterov,
            weight_dimension_numbers=dims,
        )
        state: Any = MuonState(count, momenta, jnp.asarray(ns_coeffs))
        steps, state = tx.update(gradients, state)
        pairs = zip(jax.tree.leaves(steps), shapes, strict=True)
        return [scaled(step, axes) for step, axes in pairs], state.mu

    return update


def _part(tree: Any, keep: Sequence[bool]) -> Any:
    """`tree` with holes at the other positions."""
    return _tree.map_positions(lambda x, k: x if k else optax.MaskedNode(), tree, keep)


def _filled(tree: Any, other: Any) -> Any:
    """`tree` with what `other` has in its holes."""

    def either(x, y):
        return y if _tree.is_hole(x) else x

    return jax.tree.map(either, tree, other, is_leaf=_tree.is_hole)


def momentum_or_moments(
    momentum: Momentum, moments: MomentOptions, axes: Any, subspaces: Sequence[Subspace]
) -> optax.GradientTransformationExtraArgs:
    """The merging link: Muon for matrices, the alias's Adam for all other leaves.

    Its state is that of `faithful_second_moment`, with `mu` of all leaves and `nu` in
    leaf order of those that are no matrices.
    """
    merge = faithful_second_moment(**moments._asdict())

    def init_fn(params):
        if _tree.is_placeholder(params):
            return init_moments(moments, params)
        others = [a is None for a in matrices(params, axes, subspaces)]
        state = init_moments(moments, _part(params, others))
        return state._replace(mu=optax.tree.zeros_like(params, dtype=moments.mu_dtype))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "muon")
        found = matrices(updates.first, axes, subspaces)
        ours, others = [a is not None for a in found], [a is None for a in found]
        gradients, treedef = jax.tree.flatten(_part(updates.first, ours))
        old = jax.tree.leaves(_part(state.mu, ours))
        update = _orthogonalised(momentum, [a for a in found if a is not None])
        steps, mu = placed_by_compiler(
            update, gradients, old, state.count, like=(gradients, old)
        )
        steps = [x.astype(g.dtype) for x, g in zip(steps, gradients, strict=True)]
        mu = [x.astype(m.dtype) for x, m in zip(mu, old, strict=True)]
        adam: Any
        rest, adam = merge.update(
            Routed(*(_part(tree, others) for tree in updates)),
            state._replace(mu=_part(state.mu, others)),
        )
        mu = _filled(treedef.unflatten(mu), adam.mu)
        return _filled(treedef.unflatten(steps), rest), adam._replace(mu=mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
