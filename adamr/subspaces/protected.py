"""What a link may protect: a `Subspace` per leaf, or `Directions` of the whole vector.

Both answer the same calls, so a link does not ask which of them it holds:

    project(tree)            g̃, without the protected part
    measured_project(tree)   g̃, and unit -> ‖(g − g̃) / unit‖² per leaf
    check(tree, argument)    raises unless the tree has the leaves it was made for
    restrict(tree)           over the leaves that are not holes in the tree
    beside(params)           fresh buffers, placed as the parameters are
    ranks()                  how many directions are in use

A link and a recipe also take a function `params -> Subspace` (or Directions), which
runs in `init`: for trainers that build the optimizer before the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.directions import Directions
from adamr.subspaces.subspace import Subspace

__all__ = [
    "DirectionsSource",
    "Protected",
    "Source",
    "SubspaceSource",
    "beside",
    "fits",
    "is_unmade",
    "made",
    "project",
    "require_source",
    "require_subspace",
]

Protected = Subspace | Directions
Source = Protected | Callable[[Any], Protected]
SubspaceSource = Subspace | Callable[[Any], Subspace]
DirectionsSource = Directions | Callable[[Any], Directions]


_UNMADE = jnp.int8


class _Words(NamedTuple):
    argument: str
    expected: str
    makers: str


_WORDS: dict[Any, _Words] = {
    Subspace: _Words("subspace", "a Subspace", "make_subspace or empty_subspace"),
    Directions: _Words("directions", "Directions", "empty_directions"),
    Protected: _Words(
        "subspace",
        "a Subspace",
        "make_subspace or empty_subspace, or Directions of the whole parameter vector "
        "with empty_directions",
    ),
}


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


def fits(subspace: Protected, tree: Any) -> bool:
    """Whether `tree` has the leaves that it was made for."""
    try:
        subspace.check(tree, "subspace")
    except ValueError:
        return False
    return True


def require_subspace(subspace: Any, name: str) -> None:
    """Raises unless it is a `Subspace`."""
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"{name}: subspace must be a Subspace, got {type(subspace).__name__}: make "
            "one with make_subspace or empty_subspace."
        )


def require_source(source: Any, link: str, kind: Any = Protected) -> None:
    """Raises unless it is of the kind, or a function that may return one."""
    if isinstance(source, kind) or (
        callable(source) and not isinstance(source, Protected)
    ):
        return
    argument, expected, makers = _WORDS[kind]
    raise TypeError(
        f"{link}: {argument} must be {expected}, got {type(source).__name__}: make one "
        f"with {makers}, or pass a function of the parameters that does."
    )


def is_unmade(subspace: Any) -> bool:
    """Whether it is the opaque leaf of a function that has not made a subspace yet."""
    return getattr(subspace, "dtype", None) == _UNMADE


def made(source: Source, params: Any, link: str, kind: Any = Protected) -> Any:
    """What `source` protects of these parameters: itself, or what it returns."""
    if isinstance(source, Protected):
        return source
    found = source(params)
    if not isinstance(found, kind):
        raise TypeError(
            f"{link}: the function must return {_WORDS[kind].expected}, got "
            f"{type(found).__name__}."
        )
    return found


def beside(source: Source, params: Any, link: str, kind: Any = Protected) -> Any:
    """A link's own copy: made, restricted to the leaves it sees, checked and placed.

    `optax.tree.map_params` passes a placeholder without leaves, of which a function
    can make nothing: then the result is one opaque leaf, known by its dtype.
    """
    if _tree.is_placeholder(params):
        known = isinstance(source, Protected)
        return source.beside(params) if known else jnp.zeros([], _UNMADE)
    _tree.require_arrays(params, link)
    here = made(source, params, link, kind).restrict(params)
    here.check(params, f"{link}({_WORDS[kind].argument})")
    return here.beside(params)
