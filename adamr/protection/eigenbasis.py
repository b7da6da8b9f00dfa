"""Preconditioning in the eigenbasis of the protected space, where P is diagonal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import Routed, plain_gradient
from adamr.subspaces.protected import SubspaceSource, beside, require_source
from adamr.subspaces.subspace import (
    Subspace,
    coordinates,
    reconstruct,
    used,
    without,
)

__all__ = ["EigenbasisState", "Rotated", "in_eigenbasis"]


class Rotated(NamedTuple):
    """One leaf in the eigenbasis of its protected space."""

    along: jax.Array  # c = Uᵀ g
    rest: jax.Array  # g − U c


class EigenbasisState(NamedTuple):
    subspace: Subspace
    inner: Any


def rotate(subspace: Subspace, tree: Any) -> tuple:
    """Leaves in order; protected ones split into coordinates along U and the rest."""

    def leaf(x, basis, weights):
        if basis is None or _tree.is_hole(x):
            return x
        along = coordinates(basis, weights, x)
        rest = x.astype(jnp.float32) - reconstruct(basis, weights, along)
        return Rotated(along.astype(x.dtype), rest.astype(x.dtype))

    return tuple(map(leaf, _tree.flatten(tree)[0], *subspace.at(tree)))


def in_eigenbasis(
    preconditioner: optax.GradientTransformation, subspace: SubspaceSource
) -> optax.GradientTransformationExtraArgs:
    """Runs a preconditioner in the eigenbasis of the protected space and rotates back.

    The coordinates along U get moments of their own, and so does the rest of the leaf
    (kept off U on the way out):

        g -> (Uᵀg, g − UUᵀg) -> preconditioner -> (a, b) -> U a + (b − UUᵀb)

    There the projector is diagonal, so attenuating a direction by 1 − α does exactly
    what Proposition 1 of the paper says: routed, the step along it is (1 − α) of
    Adam's; shared, it is Adam's. Guarantee: with a fully projected first moment and
    the raw gradient in the second, UᵀΔ = 0; and ⟨g, Δ⟩ ≥ 0 on the first step. Do not
    put `route_both_moments` before it at full strength: all that is left along U is
    rounding, and a v of its own scales that up to whole steps.

    Args:
      preconditioner: `faithful_second_moment(...)` or any plain optax preconditioner.
        It sees a tuple in leaf order in which a protected leaf is a `Rotated`.
      subspace: bases U (λ is the modifier's business); r more rows of moments per leaf.

    Returns:
      A link that takes what `preconditioner` takes. Parameters also reach it rotated.
      `set_subspace` resets its moments, since their coordinates change meaning.

    Raises:
      ValueError: at init or update, for a tree with other leaves than the subspace.
      TypeError: for anything but a `Subspace` or a function that returns one.
    """
    require_source(subspace, "in_eigenbasis", Subspace)
    inner = optax.with_extra_args_support(preconditioner)

    def rotate_params(here, params):
        return jnp.zeros([]) if _tree.is_placeholder(params) else rotate(here, params)

    def init_fn(params) -> Any:
        here = beside(subspace, params, "in_eigenbasis", Subspace)
        return EigenbasisState(here, inner.init(rotate_params(here, params)))

    def update_fn(updates, state, params=None, **extra_args):
        basis = state.subspace
        if isinstance(updates, Routed):
            # A tree that occurs twice in the carrier is rotated once.
            once = {id(tree): rotate(basis, tree) for tree in updates}
            plain, rotated = updates.raw, Routed(*(once[id(t)] for t in updates))
        else:
            plain = plain_gradient(updates, "in_eigenbasis", params)
            rotated = rotate(basis, plain)
        if params is not None:
            params = rotate(basis, params)
        steps, inner_state = inner.update(rotated, state.inner, params, **extra_args)

        def leaf(like, step, basis, weights):
            if basis is None:
                return step.astype(like.dtype)
            along, rest = step.along.astype(jnp.float32), step.rest.astype(jnp.float32)
            back = reconstruct(basis, weights, along)
            leaked = coordinates(basis, weights, rest)  # 0 along padding
            leaked = reconstruct(basis, weights, leaked)
            back = back + without(basis, used(basis, weights), rest, leaked)
            return back.astype(like.dtype)

        steps = _tree.map_positions(leaf, plain, steps, *basis.at(plain))
        return steps, EigenbasisState(basis, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
