"""Making subspaces: from given bases, or empty with room to grow; all input is checked.

Values are checked and computed in float64 on the host: this is set-up, not a step.
Under jit shapes are checked and values taken on trust.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamr import _tree
from adamr.subspaces.axes import (
    MAX_FAN_IN,
    Axes,
    default_axes,
    fan_in,
    flatten_axes,
    leaf_axes,
)
from adamr.subspaces.subspace import Subspace

__all__ = ["cast_bases", "empty_subspace", "make_subspace", "stored_shapes"]


def _axes_for(name, leaf, given: Axes | None, basis) -> Axes:
    """The axes a basis is meant for: what is said, else what its shape fits."""
    if given is not None:
        return Axes(*given).normalized(leaf.ndim)
    # A basis that is given says more than a name that sounds like a bias.
    fallback = default_axes(name, leaf.shape) or default_axes("", leaf.shape)
    if fallback is None:
        raise ValueError(f"bases has a basis at {name}, which has no fan-in axis.")
    last = leaf.ndim - 1
    guesses = [
        fallback,
        Axes(fallback.protected),
        Axes((last - 1,)),
        Axes(tuple(range(last))),
        Axes((0,)),
    ]
    for axes in guesses:
        if np.shape(basis)[:-1] in basis_shapes(axes, leaf.shape):
            return axes
    raise ValueError(
        f"bases has shape {np.shape(basis)} at {name}; expected (n, r) with n the "
        f"fan-in of a leaf of shape {leaf.shape} (second to last axis "
        f"{leaf.shape[-2]}, or all but the last {math.prod(leaf.shape[:-1])}); name "
        "other axes in axes."
    )


def basis_shapes(axes: Axes, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Accepted leading shapes of a basis or of samples: flat or axis by axis."""
    batch = tuple(shape[d] for d in axes.batch)
    fan_in = tuple(shape[d] for d in axes.protected)
    return [(*batch, math.prod(fan_in)), (*batch, *fan_in)]


def _check_values(name: str, u: np.ndarray, weights: np.ndarray) -> None:
    """Orthonormal up to zero columns; weights in [0, 1]."""
    if not np.all(np.isfinite(u)):
        raise ValueError(f"bases has NaN or infinite entries at {name}.")
    gram = np.swapaxes(u, -1, -2) @ u
    used = np.diagonal(gram, axis1=-2, axis2=-1) > 0
    error = np.max(np.abs(gram - used[..., None] * np.eye(u.shape[-1])), initial=0.0)
    if error > 1e-3:
        raise ValueError(
            f"bases must have orthonormal columns (or zero ones) at {name}: "
            f"largest entry of |UᵀU − I| is {error:.2g}, expected at most 1e-3."
        )
    if not np.all((weights >= 0) & (weights <= 1)):
        raise ValueError(
            f"weights must lie in [0, 1] at {name}, got values from "
            f"{weights.min():.3g} to {weights.max():.3g}."
        )


def _shaped(name, leaf, axes: Axes, basis, weight, max_rank):
    """One leaf's basis and weights: checked, polished, padded, in storage shape."""
    on_trust = _tree.is_traced(basis) or _tree.is_traced(weight)
    xp, dtype = (jnp, jnp.float32) if on_trust else (np, np.float64)
    u = xp.asarray(basis, dtype)
    batch = tuple(leaf.shape[d] for d in axes.batch)
    fan_in = math.prod(leaf.shape[d] for d in axes.protected)
    if u.shape[:-1] not in basis_shapes(axes, leaf.shape):
        raise ValueError(
            f"bases has shape {u.shape} at {name}, expected "
            f"{(*batch, fan_in, 'r')} for {axes} of a leaf of shape {leaf.shape}."
        )
    u = u.reshape(*batch, fan_in, u.shape[-1])
    given, capacity = u.shape[-1], _capacity(max_rank, fan_in)
    if given > capacity:
        raise ValueError(
            f"bases has {given} directions at {name}, expected at most {capacity} "
            f"(fan-in {fan_in}, max_rank {max_rank})."
        )
    lam = xp.ones((*batch, given)) if weight is None else xp.asarray(weight, dtype)
    if lam.shape not in ((given,), (*batch, given)):
        raise ValueError(
            f"weights has shape {lam.shape} at {name}, expected {(*batch, given)}."
        )
    lam = xp.broadcast_to(lam, (*batch, given))
    if not on_trust:
        _check_values(name, u, lam)
        # One Newton-Schulz step squares what is left of the orthonormality error.
        u = u @ (1.5 * np.eye(given) - 0.5 * np.swapaxes(u, -1, -2) @ u)
    used = xp.sum(u * u, axis=-2) > 0.5
    lam = lam * used
    # What grows is written after the used columns, so zero columns must come last.
    order = xp.argsort(~used, axis=-1, stable=True)
    u = xp.take_along_axis(u, order[..., None, :], axis=-1)
    lam = xp.take_along_axis(lam, order, axis=-1)
    pad = [(0, 0)] * len(batch)
    u = xp.pad(u, [*pad, (0, 0), (0, capacity - given)])
    lam = xp.pad(lam, [*pad, (0, capacity - given)])
    inner = axes.batch + axes.protected
    order = sorted(range(len(inner)), key=lambda i: inner[i])
    u = u.reshape(*batch, *(leaf.shape[d] for d in axes.protected), capacity)
    u = u.transpose(*order, len(inner))
    of_basis, of_weights = stored_shapes(leaf.shape, axes, capacity)
    u, lam = u.reshape(of_basis), lam.reshape(of_weights)
    return jnp.asarray(u, jnp.float32), jnp.asarray(lam, jnp.float32)


def stored_shapes(shape: tuple[int, ...], axes: Axes, capacity: int):
    """Shapes of a leaf's basis and of its weights."""
    inner = axes.batch + axes.protected
    basis = [n if d in inner else 1 for d, n in enumerate(shape)]
    weights = [n if d in axes.batch else 1 for d, n in enumerate(shape)]
    return (*basis, capacity), (*weights, capacity)


def _capacity(max_rank: int | None, fan_in: int) -> int:
    return fan_in if max_rank is None else min(max_rank, fan_in)


def _check_room(max_rank: int | None) -> None:
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}.")


def make_subspace(
    params: Any,
    bases: Any,
    *,
    max_rank: int | None = None,
    weights: Any = None,
    axes: Any = None,
) -> Subspace:
    """Subspace from given orthonormal bases.

    Args:
      params: the parameters (arrays or `ShapeDtypeStruct`s).
      bases: tree like `params`; an array (n, r) whose columns span the directions to
        protect, n the fan-in (second to last axis of a kernel; all axes but the last
        of a convolution, in kernel order), (layers, n, r) for stacked kernels, or None
        for an unprotected leaf. Zero columns are padding and are moved to the end.
      max_rank: room for directions per leaf, at most the fan-in; None: the fan-in.
      weights: tree like `params` of arrays (r,) in [0, 1] (Scaled Gradient
        Projection), or None for 1 everywhere.
      axes: tree like `params` of `Axes` or None; None: from the shape of the basis.

    Returns:
      A `Subspace` of fixed shapes, float32.

    Raises:
      ValueError: for a basis of the wrong shape, not orthonormal to 1e-3, with more
        directions than fit, or weights outside [0, 1]; the message names the leaf.

    >>> from adamr.subspaces import rank
    >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    >>> s = make_subspace(params, {"w": jnp.eye(3)[:, :1], "b": None}, max_rank=2)
    >>> [r if r is None else int(r) for r in rank(s)]
    [None, 1]
    """
    _check_room(max_rank)
    names, leaves = _tree.flatten_with_names(params)
    given = _tree.flatten_like(bases, "bases", params)
    nothing = [None] * len(leaves)
    lam = nothing if weights is None else _tree.flatten_like(weights, "weights", params)
    how = nothing if axes is None else flatten_axes(axes, params)
    entries = []
    for name, leaf, basis, weight, spec in zip(
        names, leaves, given, lam, how, strict=True
    ):
        if _tree.is_hole(basis) or _tree.is_hole(leaf):
            entries.append((None, None))
            continue
        spec = _axes_for(name, leaf, spec, basis)
        entries.append(_shaped(name, leaf, spec, basis, weight, max_rank))
    return Subspace(*zip(*entries, strict=True)) if entries else Subspace((), ())


def cast_bases(subspace: Subspace, dtype: jax.typing.DTypeLike) -> Subspace:
    """The subspace with its bases stored in another dtype, such as bfloat16.

    Projections still compute in float32, but with rounded bases: those in bfloat16 let
    up to 0.4 % of a gradient's norm pass into the protected space, float32 ones 1e-6.
    Grow the float32 subspace (`offload` keeps it out of the way) and let `set_subspace`
    round it into an optimizer that was built with a cast one: growing rounded bases
    adds up errors.

    Args:
      subspace: to be stored; weights stay float32.
      dtype: a floating dtype.

    Returns:
      A `Subspace` of the same shapes.

    Raises:
      ValueError: for a dtype that is not floating.

    >>> s = cast_bases(empty_subspace({"w": jnp.zeros((3, 2))}), jnp.bfloat16)
    >>> s.bases[0].dtype
    dtype(bfloat16)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}, expected a floating one.")
    return Subspace(
        tuple(b if b is None else b.astype(dtype) for b in subspace.bases),
        subspace.weights,
    )


def empty_subspace(
    params: Any,
    *,
    axes: Any = None,
    max_rank: int | None = None,
    unprotected: Sequence[str] = (),
    max_fan_in: int | None = MAX_FAN_IN,
) -> Subspace:
    """Subspace of rank 0 with room to grow, for a stream's first task.

    Args:
      params: the parameters (arrays or `ShapeDtypeStruct`s; other leaves are left
        alone).
      axes: tree like `params` of `Axes` or None, as `capture.contracted_axes` gives, or
        a rule `(path, shape) -> Axes | None`; None: `default_axes`.
      max_rank: room for directions per leaf, at most the fan-in; None: the fan-in.
      unprotected: parts of leaf names to leave alone, such as `"embedding"`.
      max_fan_in: a leaf of larger fan-in (the vocabulary of an embedding, as a rule) is
        refused unless it is in `unprotected`; None: no limit.

    Returns:
      A `Subspace` that protects nothing yet.

    Raises:
      ValueError: if a name in `unprotected` matches no leaf; for a fan-in above
        `max_fan_in`.

    Warns:
      UserWarning: names the leaves that `contracted_axes` could not read, and why, if
        they are not in `unprotected`.

    >>> params = {"head": jnp.zeros((3, 2)), "mlp": jnp.zeros((3, 3))}
    >>> s = empty_subspace(params, max_rank=2, unprotected=("head",))
    >>> [b if b is None else b.shape for b in s.bases]
    [None, (3, 1, 2)]
    """
    _check_room(max_rank)
    leaves = _tree.flatten(params)[0]
    entries = []
    for leaf, spec in zip(
        leaves, leaf_axes(params, axes, unprotected, max_fan_in), strict=True
    ):
        if spec is None:
            entries.append((None, None))
            continue
        room = _capacity(max_rank, fan_in(spec, leaf.shape))
        shapes = stored_shapes(leaf.shape, spec, room)
        entries.append(tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))
    return Subspace(*zip(*entries, strict=True)) if entries else Subspace((), ())
