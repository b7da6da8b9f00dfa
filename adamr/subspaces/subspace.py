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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.sharding import copied_beside, einsum_sharding

__all__ = ["Subspace", "coordinates", "rank", "reconstruct"]


class Subspace(NamedTuple):
    """Orthonormal bases and the strength with which each direction is protected.

    Attributes:
      bases: one entry per parameter leaf, in leaf order: an array as in the module's
        docstring, or None for an unprotected leaf.
      weights: λ ∈ [0, 1] per direction, shaped to broadcast against `bases`, or None.
    """

    bases: tuple[jax.Array | None, ...]
    weights: tuple[jax.Array | None, ...]

    def project(self, tree: Any) -> Any:
        """g − U diag(λ) Uᵀ g on every protected leaf, the others unchanged."""
        _tree.require_real(tree, "project")

        def leaf(g, basis, weights):
            return g if basis is None else project_leaf(basis, weights, g)

        return _tree.map_positions(leaf, tree, *self.at(tree))

    def measured_project(self, tree: Any) -> tuple[Any, _tree.Distances]:
        """`project(tree)`, and ‖g − g̃‖² = ‖λ ∘ Uᵀg‖² per leaf that is there, as a
        function of the unit of g.

        Both come from the same coordinates, which cross devices once where g is sharded
        along its fan-in.
        """
        positions, treedef = _tree.flatten(tree)
        removed: list[jax.Array | None] = []
        here = self.at(tree)
        for i, (g, basis, weights) in enumerate(zip(positions, *here, strict=True)):
            if _tree.is_hole(g):
                continue
            if basis is None or weights is None:
                removed.append(None)
                continue
            positions[i], coords = split_leaf(basis, weights, g)
            removed.append(coords)

        def distances(unit):
            return [
                jnp.zeros([], jnp.float32)
                if x is None
                else _tree.squared_norm(x / unit)
                for x in removed
            ]

        return jax.tree.unflatten(treedef, positions), distances

    def check(self, tree: Any, argument: str) -> None:
        """Raises unless `tree` has the leaves it was made for; a hole fits any."""
        self.at(tree, argument)

    def at(self, tree: Any, argument: str = "subspace") -> "Subspace":
        """The bases at the positions of `tree`.

        Under `optax.masked` and `optax.partition` with prefix labels one hole stands
        for a whole subtree, and the bases of its leaves have no position.

        Raises:
          ValueError: if `tree` has other leaves than it was made for.
        """
        names, leaves = _tree.flatten_with_names(tree)
        if len(leaves) != len(self.bases):
            count = len(self.bases)
            places = _tree.places_in(tree, argument, count, self._fits)
            found = [(None, None) if i is None else self._entry(i) for i in places]
            return Subspace(*zip(*found, strict=True))
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            basis = self.bases[i]
            if basis is None or _tree.is_hole(leaf) or self._fits(leaf, i):
                continue
            raise ValueError(
                f"{argument} has a basis of shape {basis.shape[:-1]} (1 = free axis) "
                f"at {name}, which does not fit a leaf of shape {leaf.shape}."
            )
        return self

    def _entry(self, i: int) -> tuple[jax.Array | None, jax.Array | None]:
        return self.bases[i], self.weights[i]

    def _fits(self, leaf: jax.Array, i: int) -> bool:
        """Whether the i-th basis fits a leaf; an unprotected one fits any."""
        basis = self.bases[i]
        return basis is None or (
            basis.ndim == leaf.ndim + 1
            and all(b in (1, n) for b, n in zip(basis.shape, leaf.shape, strict=False))
        )

    def restrict(self, tree: Any) -> "Subspace":
        """Itself: the bases of leaves that `tree` leaves out do no harm."""
        del tree
        return self

    def beside(self, params: Any) -> "Subspace":
        """Fresh buffers, each placed beside its parameter."""
        count = len(self.bases)
        leaves = _tree.leaf_of_each(params, count, self._fits) or [None] * count
        return Subspace(*(copied_beside(leaves, field) for field in self))

    def ranks(self) -> tuple[jax.Array, ...]:
        """The number of directions of every protected leaf."""
        return tuple(r for r in rank(self) if r is not None)


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


def weighted(
    weights: jax.Array, coords: jax.Array, axis: int | None = None
) -> jax.Array:
    """λ ∘ c, the directions of c along `axis`; None: where `coordinates` has them."""
    batch = [n for n in weights.shape[:-1] if n > 1]
    shape = batch + [1] * (coords.ndim - len(batch))
    shape[len(batch) if axis is None else axis] = weights.shape[-1]
    return coords * weights.reshape(shape)


def used(basis: jax.Array, weights: jax.Array) -> jax.Array:
    """1 for directions in use, 0 for padding; float32, shaped like `weights`."""
    axes = layout(basis, weights).protected
    length = jnp.sum(jnp.square(basis.astype(jnp.float32)), axis=axes, keepdims=True)
    return (length > 0.5).astype(jnp.float32)


def _lets_nothing_through(basis: jax.Array, weights: jax.Array) -> jax.Array:
    """Whether directions of full weight span the fan-in; broadcasts to the leaf."""
    return jnp.sum(weights >= 1.0, axis=-1) == layout(basis, weights).fan_in


def without(basis, weights, leaf, removed) -> jax.Array:
    """g − `removed`, which is U diag(λ) Uᵀ g; exactly 0 where the basis is full.

    A full basis would leave the rounding error of the subtraction, which Adam would
    then blow up to full-size steps.
    """
    kept = leaf.astype(jnp.float32) - removed
    how = layout(basis, weights)
    if how.capacity >= how.fan_in:
        kept = jnp.where(_lets_nothing_through(basis, weights), 0.0, kept)
    return kept.astype(leaf.dtype)


def split_leaf(
    basis: jax.Array, weights: jax.Array, leaf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """g − U c and c = diag(λ) Uᵀ g, with the longer of r and the outputs last in c.

    A matrix product is slow where the last axis of its result is short. A low-rank
    adapter has 8 outputs: with coordinates (r, 8) instead of (8, r), r = 256, its
    projection takes two to three times as long on a CPU.
    """
    whole, inner, along = _letters(basis, weights)
    u, g = _squeezed(basis, weights), leaf.astype(jnp.float32)
    shape = dict(zip(whole, g.shape, strict=True))
    if basis.shape[-1] > math.prod(shape[a] for a in whole if a not in inner):
        along = along.replace("z", "") + "z"
    coords = einsum(f"{whole},{inner}->{along}", g, u)
    coords = weighted(weights, coords, along.index("z"))
    removed = einsum(f"{along},{inner}->{whole}", coords, u)
    return without(basis, weights, leaf, removed), coords


def project_leaf(basis: jax.Array, weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """g − U diag(λ) Uᵀ g."""
    return split_leaf(basis, weights, leaf)[0]


def rank(subspace: Subspace) -> tuple[jax.Array | None, ...]:
    """Number of used directions per leaf (int32, shape of the batch axes), or None."""

    def leaf(basis, weights):
        count = jnp.sum(used(basis, weights), axis=-1)
        return jnp.squeeze(count.astype(jnp.int32))

    return tuple(
        None if b is None else leaf(b, w) for b, w in zip(*subspace, strict=True)
    )
