"""What a link may protect: a `Subspace` per leaf, or `Directions` of the whole vector.

Both answer the same calls, so a link does not ask which of them it holds:

    project(tree)            g̃, without the protected part
    check(tree, argument)    raises unless the tree has the leaves it was made for
    restrict(tree)           over the leaves that are not holes in the tree
    beside(params)           fresh buffers, placed as the parameters are
    ranks()                  how many directions are in use
"""

from typing import Any

from adamr.subspaces.directions import Directions
from adamr.subspaces.subspace import Subspace

__all__ = ["Protected", "project", "require_protected", "require_subspace"]

Protected = Subspace | Directions


def project(subspace: Protected, tree: Any) -> Any:
    """g − U diag(λ) Uᵀ g on every protected leaf, the others unchanged.

    Args:
      subspace: from `make_subspace`, `empty_subspace` or `grow_subspace`; or
        `Directions` of the whole vector, for g − Σ ⟨g, v⟩ v.
      tree: a tree like the parameters it was made for, of any float dtype; the
        contraction runs in float32 at the highest precision.

    Returns:
      A tree like `tree`, with the same dtypes.

    Raises:
      ValueError: if `tree` does not have the leaves that it was made for.

    >>> import jax.numpy as jnp
    >>> from adamr import make_subspace
    >>> params = {"w": jnp.ones((2, 3))}
    >>> s = make_subspace(params, {"w": jnp.array([[1.0], [0.0]])}, max_rank=1)
    >>> project(s, params)["w"]
    Array([[0., 0., 0.],
           [1., 1., 1.]], dtype=float32)
    """
    return subspace.project(tree)


def require_subspace(subspace: Any, link: str) -> None:
    """Raises unless it is a `Subspace`."""
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"{link}: subspace must be a Subspace, got {type(subspace).__name__}: make "
            "one with make_subspace or empty_subspace."
        )


def require_protected(subspace: Any, link: str) -> None:
    """Raises unless it is a `Subspace` or `Directions`."""
    if not isinstance(subspace, Protected):
        raise TypeError(
            f"{link}: subspace must be a Subspace, got {type(subspace).__name__}: make "
            "one with make_subspace or empty_subspace, or Directions of the whole "
            "parameter vector with empty_directions."
        )
