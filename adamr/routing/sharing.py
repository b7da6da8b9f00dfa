"""Sharing of v."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.axes import default_axes
from adamr.subspaces.subspace import Subspace, check_leaves, layout

__all__ = ["Guard", "Share", "check_options", "contracted", "shared_zeros", "squares"]


Rule = Callable[[str, tuple[int, ...]], tuple[int, ...]]


Share = Literal["fan_in"] | Subspace | Rule


Guard = bool | Literal["shared"]


def fan_in(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`share="fan_in"`: the axes that a kernel contracts with its input."""
    axes = default_axes(path, shape)
    return axes.protected if axes else ()


def check_options(share: Any, guard: Any) -> None:
    named = share is None or (isinstance(share, str) and share == "fan_in")
    if not (named or isinstance(share, Subspace) or callable(share)):
        got = repr(share) if isinstance(share, str) else f"a {type(share).__name__}"
        raise ValueError(
            f"share is {got}, expected None, 'fan_in', a Subspace or a function "
            "(path, shape) -> axes."
        )
    if guard not in (True, False, "shared"):
        raise ValueError(f"guard is {guard!r}, expected True, False or 'shared'.")


def contracted(subspaces: Sequence[Subspace], params: Any) -> Rule:
    """The axes that the subspaces' projections contract, per leaf of params."""
    names = _tree.flatten_with_names(params)[0]
    axes: dict[str, set[int]] = {name: set() for name in names}
    for subspace in subspaces:
        for name, basis, weights in zip(names, *subspace, strict=False):
            if basis is not None and weights is not None:
                axes[name] |= set(layout(basis, weights).protected)
    return lambda path, shape: tuple(sorted(axes[path]))


def shared_zeros(params: Any, share: Share, dtype: Any) -> Any:
    """Zeros for v in leaf order, with size 1 along the axes that `share` names."""
    names, leaves = _tree.flatten_with_names(params)
    if isinstance(share, Subspace):
        if leaves:  # `optax.tree.map_params` passes a placeholder
            check_leaves(share, params, "share")
        rule = contracted([share], params)
    else:
        rule = fan_in if share == "fan_in" else share

    def zeros(leaf, path):
        axes = rule(path, leaf.shape)
        if not axes:
            return jnp.zeros_like(leaf, dtype=dtype)
        # A reduction, not a shape: so the result keeps the other axes' sharding.
        return jnp.zeros_like(jnp.sum(leaf, axis=axes, keepdims=True), dtype=dtype)

    kept = [n for n, x in zip(names, leaves, strict=True) if not _tree.is_hole(x)]
    return _tree.in_leaf_order(params, zeros, kept)


def squares(
    first: Any,
    second: Any,
    shapes: Any,
    *,
    guard: Guard,
    means: list[jax.Array] | None = None,
) -> Any:
    """What v is fed: second², guarded by first².

    Args:
      first: tree of gradients that enter the first moment.
      second: tree of gradients that enter the second moment.
      shapes: tree (params-like or leaf-order tuple) of arrays or shape structs with
        the shape and dtype of v.
      guard: False, or True: element-wise leaves take max(second², first²), or "shared":
        leaves with a shared v, too, take the larger of the two means.
      means: float32 means of second² along some axes per leaf, used where they are
        those of v: XLA would send a second reduction of a sharded leaf again.

    Returns:
      A tree with the structure of `shapes`.
    """

    def leaf(f, s, like, mean):
        axes = tuple(d for d in range(s.ndim) if like.shape[d] != s.shape[d])

        def fed(x):
            square = jnp.square(x.astype(like.dtype))
            return jnp.mean(square, axis=axes, keepdims=True) if axes else square

        kind = (like.shape, like.dtype)
        if axes and mean is not None and (mean.shape, mean.dtype) == kind:
            square = mean
        else:
            square = fed(s)
        # The same array in both places is the common case: max(x, x) costs a pass.
        if f is s or not guard or (axes and guard != "shared"):
            return square
        return jnp.maximum(square, fed(f))

    likes, treedef = jax.tree.flatten(shapes)
    seconds = jax.tree.leaves(second)
    known = [None] * len(seconds) if means is None else means
    each = zip(jax.tree.leaves(first), seconds, likes, known, strict=True)
    return jax.tree.unflatten(treedef, [leaf(*one) for one in each])
