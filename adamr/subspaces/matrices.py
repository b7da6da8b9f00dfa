"""Which leaves are matrices, fan-in × fan-out, that a projection acts on from one side.

An optimizer that orthogonalises its step takes a leaf as matrices, one per slice along
the batch axes. A projection survives that if it acts within a slice and on one side.
"""

import math
from collections.abc import Sequence
from typing import Any

from adamr import _tree
from adamr.subspaces.axes import Axes, default_axes, flatten_axes
from adamr.subspaces.subspace import Layout, Subspace, layout

__all__ = ["matrices", "matrix_axes", "outputs"]


def matrix_axes(path: str, shape: tuple[int, ...]) -> Axes | None:
    """`default_axes`, with None for embeddings, which are tables rather than matrices.

    >>> matrix_axes("layer/kernel", (4, 8))
    Axes(protected=(0,), batch=())
    >>> matrix_axes("embed/embedding", (100, 8)) is None
    True
    """
    return None if "embed" in path.lower() else default_axes(path, shape)


def outputs(axes: Axes, ndim: int) -> tuple[int, ...]:
    """The axes that are neither contracted with the input nor batch axes."""
    return tuple(d for d in range(ndim) if d not in axes.protected + axes.batch)


def _acts_along(side: Layout, axes: Axes) -> set[int]:
    """The axes of a slice that a projection mixes, or that its basis depends on."""
    return set(side.protected) | (set(side.batch) - set(axes.batch))


def _sides(subspaces: Sequence[Subspace], position: int) -> list[Layout]:
    """The axes of every basis of one leaf; none where all of them have size 1."""
    found = []
    for subspace in subspaces:
        basis, weights = subspace.bases[position], subspace.weights[position]
        if basis is not None and weights is not None:
            found.append(layout(basis, weights))
    return [side for side in found if side.protected]


def _checked(name: str, leaf: Any, axes: Axes, sides: Sequence[Layout]) -> Axes | None:
    """The axes if every projection acts on one side; None for a vector."""
    rows, columns = set(axes.protected), set(outputs(axes, leaf.ndim))
    for side in sides:
        mixed = _acts_along(side, axes)
        if not (mixed <= rows or mixed <= columns):
            raise ValueError(
                f"axes has {axes} at {name}, but a subspace is projected along axes "
                f"{side.protected}: expected them on one side of the matrix, all in "
                "`protected` or all among the outputs."
            )
    return axes if columns and math.prod(leaf.shape) else None


def matrices(tree: Any, axes: Any, subspaces: Sequence[Subspace]) -> list[Axes | None]:
    """How each position of `tree` is a matrix; None: it is none, or a hole.

    Args:
      tree: like the parameters.
      axes: a tree like the parameters of `Axes` or None, or a rule (path, shape) ->
        `Axes` or None. None: those of the leaf's first subspace, else `matrix_axes`.
      subspaces: whose projections must act on one side of each matrix.

    Raises:
      ValueError: if one of them acts on both.
    """
    names, leaves = _tree.flatten_with_names(tree)
    how = flatten_axes(matrix_axes if axes is None else axes, tree)
    here = [s.at(tree) for s in subspaces] if leaves else []
    found: list[Axes | None] = []
    for i, (name, leaf, given) in enumerate(zip(names, leaves, how, strict=True)):
        if given is None or _tree.is_hole(leaf):
            found.append(None)
            continue
        sides = _sides(here, i)
        given = Axes(*given).normalized(leaf.ndim)
        if axes is None and sides:
            given = Axes(sides[0].protected, sides[0].batch)
        found.append(_checked(name, leaf, given, sides))
    return found
