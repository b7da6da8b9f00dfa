"""Protected subspaces: a pytree of fixed capacity, and projection onto it.

A basis is stored in the shape of the leaf it protects, with one trailing axis for its
directions; an axis of the leaf along which nothing is contracted has size 1:

    leaf (in, out)           basis (in, 1, r)          weights (1, 1, r)
    leaf (layers, in, out)   basis (layers, in, 1, r)  weights (layers, 1, 1, r)
    leaf (h, w, in, out)     basis (h, w, in, 1, r)    weights (1, 1, 1, 1, r)

So the shapes alone say which axes are protected, no leaf is ever flattened, and a basis
is sharded like its leaf. Unused directions are zero columns: a new task changes values,
never shapes, and nothing recompiles.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.sharding import einsum_sharding
from adamr.subspaces.directions import Directions, project_off

__all__ = [
    "Subspace",
    "coordinates",
    "project",
    "rank",
    "reconstruct",
]


class Subspace(NamedTuple):
    """Orthonormal bases and the strength with which each direction is protected.

    Attributes:
      bases: one entry per parameter leaf, in leaf order: an array as in the module's
        docstring, or None for an unprotected leaf.
      weights: λ ∈ [0, 1] per direction, shaped to broadcast against `bases`, or None.
    """

    bases: tuple[jax.Array | None, ...]
    weights: tuple[jax.Array | None, ...]


class Layout(NamedTuple):
    """What the shapes of one basis say about its leaf."""

    protected: tuple[int, ...]
    batch: tuple[int, ...]
    fan_in: int
    capacity: int


def layout(basis: jax.Array, weights: jax.Array) -> Layout:
    """Reads the axes back from the shapes; an axis of size 1 contracts to itself."""
    sizes = list(zip(basis.shape[:-1], weights.shape[:-1], strict=True))
    batch = tuple(d for d, (_, w) in enumerate(sizes) if w > 1)
    protected = tuple(d for d, (b, w) in enumerate(sizes) if b > 1 and w == 1)
    fan_in = math.prod(basis.shape[d] for d in protected)
    return Layout(protected, batch, fan_in, basis.shape[-1])


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(
        subscripts,
        *operands,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=einsum_sharding(subscripts, *operands),
    )


def _letters(basis: jax.Array, weights: jax.Array) -> tuple[str, str, str]:
    """Einsum subscripts of the leaf, of the squeezed basis and of the coordinates."""
    how, ndim = layout(basis, weights), basis.ndim - 1
    leaf = "abcdefghijklmnop"[:ndim]
    outputs = [d for d in range(ndim) if d not in how.protected + how.batch]
    inner = "".join(leaf[d] for d in range(ndim) if d not in outputs) + "z"
    coords = "".join([leaf[d] for d in how.batch] + ["z"] + [leaf[d] for d in outputs])
    return leaf, inner, coords


def _squeezed(basis: jax.Array, weights: jax.Array) -> jax.Array:
    how = layout(basis, weights)
    outputs = set(range(basis.ndim - 1)) - set(how.protected) - set(how.batch)
    return jnp.squeeze(basis, axis=tuple(outputs)).astype(jnp.float32)


def coordinates(basis: jax.Array, weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """c = Uᵀ g in float32, of shape (*batch, r, *outputs)."""
    whole, inner, coords = _letters(basis, weights)
    leaf = leaf.astype(jnp.float32)
    return einsum(f"{whole},{inner}->{coords}", leaf, _squeezed(basis, weights))


def reconstruct(basis: jax.Array, weights: jax.Array, coords: jax.Array) -> jax.Array:
    """U c in float32, of the leaf's shape."""
    whole, inner, kept = _letters(basis, weights)
    return einsum(f"{kept},{inner}->{whole}", coords, _squeezed(basis, weights))


def weighted(weights: jax.Array, coords: jax.Array) -> jax.Array:
    """λ ∘ c, where `coords` is what `coordinates` returned."""
    batch = [n for n in weights.shape[:-1] if n > 1]
    outputs = coords.ndim - len(batch) - 1
    return coords * weights.reshape(*batch, weights.shape[-1], *[1] * outputs)


def used(basis: jax.Array, weights: jax.Array) -> jax.Array:
    """1 for directions in use, 0 for padding; float32, shaped like `weights`."""
    axes = layout(basis, weights).protected
    length = jnp.sum(jnp.square(basis.astype(jnp.float32)), axis=axes, keepdims=True)
    return (length > 0.5).astype(jnp.float32)


def _lets_nothing_through(basis: jax.Array, weights: jax.Array) -> jax.Array:
    """Whether directions of full weight span the fan-in; broadcasts to the leaf."""
    return jnp.sum(weights >= 1.0, axis=-1) == layout(basis, weights).fan_in


def without(basis, weights, leaf, coords) -> jax.Array:
    """g − U c, c = diag(λ) Uᵀ g; exactly 0 where the basis is full.

    A full basis would leave the rounding error of the subtraction, which Adam would
    then blow up to full-size steps.
    """
    kept = leaf.astype(jnp.float32) - reconstruct(basis, weights, coords)
    how = layout(basis, weights)
    if how.capacity >= how.fan_in:
        kept = jnp.where(_lets_nothing_through(basis, weights), 0.0, kept)
    return kept.astype(leaf.dtype)


def project_leaf(basis: jax.Array, weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """g − U diag(λ) Uᵀ g."""
    coords = weighted(weights, coordinates(basis, weights, leaf))
    return without(basis, weights, leaf, coords)


def project(subspace: Subspace | Directions, tree: Any) -> Any:
    """g − U diag(λ) Uᵀ g on every protected leaf, the others unchanged.

    Args:
      subspace: from `make_subspace`, `empty_subspace` or `grow_subspace`; or
        `Directions` of the whole vector, g − Σ ⟨g, v⟩ v.
      tree: a tree like the parameters the subspace was made for, any float dtype; the
        contraction runs in float32 at the highest precision.

    Returns:
      A tree like `tree`, same dtypes.

    Raises:
      ValueError: if `tree` does not have the leaves the subspace was made for.

    >>> from adamr import make_subspace
    >>> params = {"w": jnp.ones((2, 3))}
    >>> s = make_subspace(params, {"w": jnp.array([[1.0], [0.0]])}, max_rank=1)
    >>> project(s, params)["w"]
    Array([[0., 0., 0.],
           [1., 1., 1.]], dtype=float32)
    """
    if isinstance(subspace, Directions):
        return project_off(subspace, tree)
    check_leaves(subspace, tree, "subspace")

    def leaf(g, basis, weights):
        return g if basis is None else project_leaf(basis, weights, g)

    return _tree.map_positions(leaf, tree, *subspace)


def measured_projection(
    subspace: Subspace, tree: Any
) -> tuple[Any, Callable[[], list[jax.Array]]]:
    """`project(subspace, tree)`, and how to get ‖g − g̃‖² = ‖λ ∘ Uᵀg‖² per leaf.

    Both from the same coordinates, which cross devices once where g is sharded along
    its fan-in.
    """
    check_leaves(subspace, tree, "subspace")
    taken: list[jax.Array | None] = []

    def leaf(g, basis, weights):
        if basis is None:
            taken.append(None)
            return g
        coords = weighted(weights, coordinates(basis, weights, g))
        taken.append(coords)
        return without(basis, weights, g, coords)

    def distances():
        return [jnp.zeros([]) if c is None else _tree.squared_norm(c) for c in taken]

    return _tree.map_positions(leaf, tree, *subspace), distances


def check_leaves(subspace: Subspace, tree: Any, argument: str) -> None:
    """Raises unless `tree` has the leaves `subspace` was made for (holes fit any)."""
    names, leaves = _tree.flatten_with_names(tree)
    if len(leaves) != len(subspace.bases):
        raise ValueError(
            f"{argument} was made for {len(subspace.bases)} parameter leaves, but the "
            f"tree it meets has {len(leaves)}: {names}."
        )
    for name, leaf, basis in zip(names, leaves, subspace.bases, strict=True):
        if basis is None or _tree.is_hole(leaf):
            continue
        fits = basis.ndim == leaf.ndim + 1 and all(
            b in (1, n) for b, n in zip(basis.shape, leaf.shape, strict=False)
        )
        if not fits:
            raise ValueError(
                f"{argument} has a basis of shape {basis.shape[:-1]} (1 = free axis) "
                f"at {name}, which does not fit a leaf of shape {leaf.shape}."
            )


def rank(subspace: Subspace) -> tuple[jax.Array | None, ...]:
    """Number of used directions per leaf (int32, shape of the batch axes), or None."""

    def leaf(basis, weights):
        count = jnp.sum(used(basis, weights), axis=-1)
        return jnp.squeeze(count.astype(jnp.int32))

    return tuple(
        None if b is None else leaf(b, w) for b, w in zip(*subspace, strict=True)
    )
