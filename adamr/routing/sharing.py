"""Sharing of v: one number for all coordinates along some axes of a leaf.

Adam divides every coordinate by its own √v. Along the axis that a projection mixes,
that undoes the projection: P m is in the allowed space, D P m is not. With one v along
that axis, D is a multiple of the identity there and D P = P D.

`share` says along which axes, and acts in `init` alone: v gets size 1 along them. From
then on the shapes of the state say it. `update` compares the shape of v with that of
the gradient and takes the mean of the squares along the axes where they differ.

The guard feeds v with max(second², first²) instead of second². Without it, a coordinate
where second = 0 and first ≠ 0 takes steps of size 1/eps.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.axes import Axes, default_axes
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["Guard", "Share", "check_options", "mean_square", "shared_zeros", "squares"]

Rule = Callable[[str, tuple[int, ...]], tuple[int, ...] | Axes | None]
Share = Literal["fan_in"] | Subspace | Sequence[Subspace] | Rule
Guard = bool | Literal["shared"]


def fan_in(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`share="fan_in"`: the axes that a kernel contracts with its input."""
    axes = default_axes(path, shape)
    return axes.protected if axes else ()


def _subspaces(share: Any) -> tuple[Subspace, ...] | None:
    """The subspaces that `share` holds, or None if it is a name or a rule."""
    if isinstance(share, Subspace):
        return (share,)
    if not isinstance(share, list | tuple):
        return None
    return tuple(share) if all(isinstance(s, Subspace) for s in share) else None


def check_options(share: Share | None, guard: Guard) -> None:
    """Raises for a share or a guard that is unknown."""
    named = share is None or (isinstance(share, str) and share == "fan_in")
    if not (named or callable(share) or _subspaces(share) is not None):
        got = repr(share) if isinstance(share, str) else f"a {type(share).__name__}"
        raise ValueError(
            f"share is {got}, expected None, 'fan_in', a Subspace or a function "
            "(path, shape) -> axes."
        )
    if guard not in (True, False, "shared"):
        raise ValueError(f"guard is {guard!r}, expected True, False or 'shared'.")


def _contracted(subspaces: Sequence[Subspace], leaf: int) -> tuple[int, ...]:
    """The axes of one leaf that the projections contract."""
    axes: set[int] = set()
    for subspace in subspaces:
        basis, weights = subspace.bases[leaf], subspace.weights[leaf]
        if basis is not None and weights is not None:
            axes |= set(layout(basis, weights).protected)
    return tuple(sorted(axes))


def _shared_axes(params: Any, share: Share | None) -> list[tuple[int, ...]]:
    """The axes along which v is one number, for every position of `params`."""
    names, leaves = _tree.flatten_with_names(params)
    if share is None:
        return [()] * len(leaves)
    subspaces = _subspaces(share)
    if subspaces is not None:
        here = [s.at(params, "share") for s in subspaces] if leaves else []
        return [_contracted(here, i) for i in range(len(leaves))]
    rule: Any = fan_in if share == "fan_in" else share

    def named(name, leaf):
        axes = None if _tree.is_hole(leaf) else rule(name, leaf.shape)
        return axes.protected if isinstance(axes, Axes) else axes or ()

    return list(map(named, names, leaves))


def shared_zeros(params: Any, share: Share, dtype: Any) -> Any:
    """Zeros for v in leaf order, with size 1 along the axes that `share` names."""

    def zeros(leaf, axes):
        if not axes:
            return jnp.zeros_like(leaf, dtype=dtype)
        # A reduction, not a shape: so the result keeps the other axes' sharding.
        return jnp.zeros_like(jnp.sum(leaf, axis=axes, keepdims=True), dtype=dtype)

    axes, leaves = _shared_axes(params, share), _tree.flatten(params)[0]
    kept = [a for a, x in zip(axes, leaves, strict=True) if not _tree.is_hole(x)]
    return _tree.in_leaf_order(params, zeros, kept)


def mean_square(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """⟨x²⟩ along the axes, which keep size 1; x² without axes; 0 for no entries."""
    square = jnp.square(x.astype(dtype))
    reduce = jnp.mean if x.size else jnp.sum
    return reduce(square, axis=axes, keepdims=True) if axes else square


def squares(first: Any, second: Any, shapes: Any, *, guard: Guard) -> Any:
    """What v is fed: second², guarded by first².

    Args:
      first: tree of gradients that enter the first moment.
      second: tree of gradients that enter the second moment.
      shapes: tree (params-like or leaf-order tuple) of arrays or shape structs with
        the shape and dtype of v.
      guard: False: second². True: element-wise leaves take max(second², first²).
        "shared": leaves with a shared v also take the larger of the two means.

    Returns:
      A tree with the structure of `shapes`.
    """

    def leaf(f, s, like):
        axes = tuple(d for d in range(s.ndim) if like.shape[d] != s.shape[d])
        square = mean_square(s, axes, like.dtype)
        # The same array in both places is the common case: max(x, x) costs a pass.
        if f is s or not guard or (axes and guard != "shared"):
            return square
        return jnp.maximum(square, mean_square(f, axes, like.dtype))

    likes, treedef = jax.tree.flatten(shapes)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), likes, strict=True)
    return jax.tree.unflatten(treedef, [leaf(*each) for each in leaves])
