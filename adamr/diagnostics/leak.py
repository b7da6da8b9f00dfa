"""How much of a step lies inside the protected space."""

from typing import Any

import jax.numpy as jnp

from adamr import _tree
from adamr.diagnostics.measured import Measured, measure, ratio, same
from adamr.subspaces.protected import require_subspace
from adamr.subspaces.subspace import Subspace, coordinates

__all__ = ["effective_learning_rate", "update_leak"]


def _share_inside(name: str, subspace: Subspace, updates: Any, *first: Any) -> Measured:
    """‖UᵀΔ‖ / ‖Δ‖ of the step Δ = `updates`, or ‖UᵀΔ‖ / ‖Uᵀf‖ with f = `first`."""
    require_subspace(subspace, name)
    trees = (updates, *first)
    for tree in trees:
        subspace.check(tree, "subspace")

    def squares(basis, weights, *leaves):
        if basis is None or any(map(_tree.is_hole, leaves)):
            return []
        inside = [coordinates(basis, weights, x) for x in leaves]
        part, whole = inside if first else (*inside, *leaves)
        return [jnp.stack([_tree.squared_norm(part), _tree.squared_norm(whole)])]

    leaves = list(map(squares, *subspace, *(_tree.flatten(tree)[0] for tree in trees)))
    return measure(leaves, same, finish=lambda pair: jnp.sqrt(ratio(pair)))


def update_leak(updates: Any, subspace: Subspace) -> Measured:
    """‖UᵀΔ‖ / ‖Δ‖: the share of the step's length inside the protected space.

    Args:
      updates: the step Δ, a tree like the parameters, any float dtype.
      subspace: U; every direction counts in full, whatever its weight λ.

    Returns:
      `Measured` over the protected leaves, in [0, 1] to rounding; 0 for a zero step,
      NaN for one that is not finite.

    Raises:
      ValueError: if updates does not have the leaves the subspace was made for.

    >>> from adamr import make_subspace
    >>> step = {"w": jnp.array([[3.0], [4.0]])}
    >>> u = make_subspace(step, {"w": jnp.array([[1.0], [0.0]])})
    >>> print(update_leak(step, u).total.round(3))
    0.6
    """
    return _share_inside("update_leak", subspace, updates)


def effective_learning_rate(first: Any, updates: Any, subspace: Subspace) -> Measured:
    """‖UᵀΔ‖ / ‖Uᵀf‖: how far a unit of f moves along old directions.

    Where U consists of coordinates in which Adam divides, shared routing makes this
    1/(1 − α) times the value of decoupled routing (Proposition 1 of the paper).

    Args:
      first: f, the gradient that entered the first moment, a tree like the parameters.
      updates: the step Δ, a tree like the parameters.
      subspace: U; every direction counts in full, whatever its weight λ.

    Returns:
      `Measured` over the protected leaves; inf where the step leaks and f does not.

    Raises:
      ValueError: if a tree does not have the leaves the subspace was made for.

    >>> from adamr import make_subspace
    >>> f = {"w": jnp.array([[2.0], [1.0]])}
    >>> u = make_subspace(f, {"w": jnp.array([[1.0], [0.0]])})
    >>> print(effective_learning_rate(f, {"w": -0.05 * f["w"]}, u).total.round(3))
    0.05

    References:
      Hu et al., Hidden Failure Modes of Gradient Modification under Adam in Continual
      Learning, arXiv:2604.22407 (withdrawn by its authors for its experiments).
    """
    return _share_inside("effective_learning_rate", subspace, updates, first)
