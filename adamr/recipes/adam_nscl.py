"""Adam-NSCL: Adam whose update is projected into the null space of past features."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.protection.update import protect_update
from adamr.routing.carrier import plain_gradient
from adamr.subspaces.protected import SubspaceSource, beside, require_source
from adamr.subspaces.subspace import Subspace, layout, project_leaf, used

__all__ = ["NormalizedProtectionState", "adam_nscl"]


class NormalizedProtectionState(NamedTuple):
    subspace: Subspace


def _normalized_leaf(basis, weights, step):
    """P Δ / ‖P‖_F; a slice with an empty basis is unchanged, as in a first task."""
    on = used(basis, weights)
    rank = jnp.sum(on, axis=-1)
    square = layout(basis, weights).fan_in - rank
    square = square + jnp.sum(on * jnp.square(1.0 - weights), axis=-1)
    norm = jnp.sqrt(jnp.where((rank > 0) & (square > 0), square, 1.0))
    projected = project_leaf(basis, weights, step.astype(jnp.float32))
    return (projected / norm).astype(step.dtype)


def _protect_normalized(
    subspace: SubspaceSource,
) -> optax.GradientTransformationExtraArgs:
    require_source(subspace, "adam_nscl", Subspace)

    def init_fn(params) -> Any:
        here = beside(subspace, params, "adam_nscl", Subspace)
        return NormalizedProtectionState(here)

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "adam_nscl", params)
        del params, extra_args
        here = state.subspace.at(updates, "adam_nscl(subspace)")

        def leaf(step, basis, weights):
            return step if basis is None else _normalized_leaf(basis, weights, step)

        return _tree.map_positions(leaf, updates, *here), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_nscl(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
    as_in_code: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam-NSCL: the raw gradient in both moments, Adam's update in the null space.

        Δ = P m̂ / (√v̂ + eps),   P = U2 U2ᵀ = I − U1 U1ᵀ

    with U2 the eigenvectors of the feature covariance that have (almost) no energy.
    Guarantee: the moments are plain Adam's bit for bit, and U1ᵀΔ = 0. The step need not
    descend: P D g can point uphill, which `two_sided` excludes. The authors' L2 penalty
    is `optax.add_decayed_weights` before this optimizer.

    Args:
      learning_rate: a number or a schedule.
      subspace: from `null_space_complement`; `empty_subspace(params)` for the first
        task, with room for the fan-in (`max_rank=None`), or a function of the
        parameters that makes it in `init`.
      b1, b2, eps, mu_dtype: as for `optax.adam`.
      as_in_code: divide P by its Frobenius norm, as the authors' code does and their
        paper does not: each layer's learning rate shrinks by √(fan-in − rank). Layers
        with an empty basis keep theirs.

    Returns:
      An optimizer.

    Raises:
      ValueError: at init or update, for a tree with other leaves than the subspace.
      TypeError: for anything but a subspace or a function that returns one.

    >>> import jax.numpy as jnp
    >>> from adamr import empty_subspace, get_subspace, set_subspace, subspaces
    >>> params = {"w": jnp.zeros((4, 1))}
    >>> tx = adam_nscl(1.0, empty_subspace(params))
    >>> state = tx.init(params)
    >>> covariance = subspaces.empty_covariance(get_subspace(state))
    >>> # ... train task 1; then pass its layer inputs, batch by batch:
    >>> inputs = {"w": jnp.diag(jnp.array([4.0, 2.0, 0.0, 0.0]))}
    >>> covariance = subspaces.update_covariance(covariance, inputs)
    >>> s = subspaces.null_space_complement(
    ...     covariance, get_subspace(state), ratio=10.0
    ... )
    >>> state = set_subspace(state, s)  # ... and train task 2
    >>> step, state = tx.update({"w": jnp.ones((4, 1))}, state, params)
    >>> print(step["w"][:, 0].round(3) + 0.0)
    [ 0.  0. -1. -1.]

    References:
      Wang, Li, Sun, Xu, Training Networks in Null Space of Feature Covariance for
      Continual Learning, arXiv:2103.07113.
    """
    protect = _protect_normalized if as_in_code else protect_update
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        protect(subspace),
        optax.scale_by_learning_rate(learning_rate),
    )
