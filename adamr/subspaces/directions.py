"""Protected directions of the whole parameter vector, and projection off them.

A `Subspace` protects axes of single leaves; `Directions` protects vectors v over all
leaves together, as Orthogonal Gradient Descent does:

    g̃ = g − Σ_i ⟨g, v_i⟩ v_i         ⟨g, v⟩ = Σ over leaves Σ over entries

Both are what `project_out`, `protect_update`, `two_sided` and `set_subspace` take. The
methods differ in the vectors only: logit gradients (OGD), all of them again at the
newest parameters (OGD+), their principal directions (PCA-OGD).

Leaves are never flattened or concatenated: a vector lies as its leaves lie. k
directions cost k times the parameters in memory and 4 k flops per parameter and step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adamr import _tree
from adamr.sharding import copied_beside
from adamr.subspaces.vectors import held, inner, orthonormalize, residual

__all__ = ["Directions", "coordinates", "empty_directions"]


class Directions(NamedTuple):
    """Vectors over all parameters, orthonormal as whole vectors, with room for more.

    Attributes:
      rows: one entry per parameter leaf, in leaf order: a float32 array
        (capacity, *leaf.shape), or None for a leaf that is left out.
      used: int32: rows 0 … used − 1 hold directions, the others are zero.
    """

    rows: tuple[jax.Array | None, ...]
    used: jax.Array

    def project(self, tree: Any) -> Any:
        """g − Σ_i ⟨g, v_i⟩ v_i in the dtypes of `tree`; leaves left out unchanged.

        Exactly 0 where the directions span the whole space: Adam would scale rounding
        up.
        """
        _tree.require_real(tree, "project")
        here = self.at(tree)
        rows = held(here.rows)
        if not rows:
            return tree
        full = self.used >= sum(r[0].size for r in rows)
        kept = _tree.spread(residual(rows, _covered(here, tree)), here.rows)

        def leaf(g, rest):
            return g if rest is None else jnp.where(full, 0.0, rest).astype(g.dtype)

        return _tree.map_positions(leaf, tree, kept)

    def measured_project(self, tree: Any) -> tuple[Any, _tree.Distances]:
        """`project(tree)`, and ‖g − g̃‖² per leaf, as a function of the unit of g."""
        projected = self.project(tree)

        def distances(unit):
            def distance(g, kept):
                g, kept = g.astype(jnp.float32), kept.astype(jnp.float32)
                return _tree.squared_norm((g - kept) / unit)

            return jax.tree.leaves(jax.tree.map(distance, tree, projected))

        return projected, distances

    def check(self, tree: Any, argument: str) -> None:
        """Raises unless `tree` has the leaves that the directions were made for."""
        self.at(tree, argument)

    def at(self, tree: Any, argument: str = "directions") -> "Directions":
        """The rows at the positions of `tree`, where one hole may hide several leaves.

        Raises:
          ValueError: if `tree` lacks a leaf with rows, or has others.
        """
        names, leaves = _tree.flatten_with_names(tree)
        if len(leaves) != len(self.rows):
            count = len(self.rows)
            places = _tree.places_in(tree, argument, count, self._fits, self._is_free)
            found = (None if i is None else self.rows[i] for i in places)
            return Directions(tuple(found), self.used)
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            rows = self.rows[i]
            if rows is None:
                continue
            if _tree.is_hole(leaf):
                raise ValueError(
                    f"{argument} has directions over {name}, which the tree leaves "
                    "out: without it they are no longer orthonormal; restrict them "
                    "first."
                )
            if rows.shape[1:] != leaf.shape:
                raise ValueError(
                    f"{argument} has directions of shape {rows.shape[1:]} at {name}, "
                    f"which do not fit a leaf of shape {leaf.shape}."
                )
        return self

    def _is_free(self, i: int) -> bool:
        """Whether the i-th leaf is left out."""
        return self.rows[i] is None

    def _fits(self, leaf: jax.Array, i: int) -> bool:
        rows = self.rows[i]
        return rows is None or rows.shape[1:] == leaf.shape

    def restrict(self, tree: Any) -> "Directions":
        """The directions over fewer leaves: those that are not holes in `tree`.

        What remains is made orthonormal again, so that projecting it alone, as under
        `optax.masked`, is a projection. A tree with other leaves changes nothing.
        """
        leaves = _tree.leaf_of_each(tree, len(self.rows), self._fits)
        if leaves is None:
            return self
        pairs = zip(self.rows, leaves, strict=True)
        rows = tuple(None if _tree.is_hole(x) else r for r, x in pairs)
        left = held(rows)
        if len(left) == len(held(self.rows)):
            return self
        none = jnp.zeros_like(self.used)
        if not left:
            return Directions(rows, none)
        zeros = [jnp.zeros_like(r) for r in left]
        kept, used, _ = orthonormalize(zeros, none, left, left[0].shape[0], 1e-5)
        return Directions(tuple(_tree.spread(kept, rows)), used)

    def beside(self, params: Any) -> Any:
        """Fresh buffers, each placed beside its parameter.

        `optax.tree.map_params` passes a placeholder without leaves; one opaque leaf
        then stands for the directions, since their leaves depend on the parameters.
        """
        if _tree.is_placeholder(params):
            return jnp.zeros([])
        count = len(self.rows)
        leaves = _tree.leaf_of_each(params, count, self._fits, self._is_free)
        leaves = leaves or [None] * count
        rows = copied_beside(leaves, self.rows, lead=1)
        return Directions(rows, jnp.array(self.used, copy=True))

    def ranks(self) -> tuple[jax.Array, ...]:
        """The number of directions."""
        return (self.used,)


def _covered(directions: Directions, tree: Any) -> list[jax.Array]:
    """The leaves of `tree` that the directions cover."""
    pairs = zip(_tree.flatten(tree)[0], directions.rows, strict=True)
    return [x for x, rows in pairs if rows is not None]


def coordinates(directions: Directions, tree: Any) -> jax.Array:
    """⟨v_i, x⟩ for every direction, float32 (capacity,); 0 for unused ones.

    Its norm over that of a step is the step's leak.

    Args:
      directions: from `empty_directions` or `grow_directions`.
      tree: like the parameters that the directions were made for.

    Raises:
      ValueError: if `tree` does not have the leaves they were made for.
    """
    here = directions.at(tree)
    rows = held(here.rows)
    return inner(rows, _covered(here, tree)) if rows else jnp.zeros([0], jnp.float32)


def empty_directions(
    params: Any,
    capacity: int,
    *,
    exclude: Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None = None,
) -> Directions:
    """No directions yet, and room for `capacity` of them.

    Args:
      params: the parameters (arrays or `ShapeDtypeStruct`s); rows are sharded as they
        are.
      capacity: at least 1; memory is capacity float32 copies of the parameters.
      exclude: leaves to leave unprotected, such as the heads of a multi-head network:
        parts of leaf names, or a function (name, shape) -> bool.

    Returns:
      `Directions` that protect nothing. `jax.tree.map(jnp.zeros_like, directions)`
      empties a set again.

    Raises:
      ValueError: for a capacity below 1, or a name in `exclude` that no leaf has.
      TypeError: for a leaf that is neither an array nor a number.

    >>> params = {"body": jnp.zeros((3, 2)), "head": jnp.zeros(2)}
    >>> d = empty_directions(params, 4, exclude=["head"])
    >>> [r if r is None else r.shape for r in d.rows]
    [(4, 3, 2), None]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}.")
    _tree.require_arrays(params, "params")
    names, leaves = _tree.flatten_with_names(params)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of str, got {exclude!r}.")
    parts = () if exclude is None or callable(exclude) else tuple(exclude)
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(
                f"exclude names {part!r}, which no leaf has: {_tree.listed(names)}."
            )

    def excluded(name, shape):
        if callable(exclude):
            return exclude(name, shape)
        return any(part in name for part in parts)

    def leaf(name, x):
        if _tree.is_hole(x) or excluded(name, jnp.shape(x)):
            return None
        place = None
        like = None if _tree.is_traced(x) else getattr(x, "sharding", None)
        if isinstance(like, NamedSharding):
            place = NamedSharding(like.mesh, PartitionSpec(None, *like.spec))
        return jnp.zeros((capacity, *jnp.shape(x)), jnp.float32, device=place)

    rows = tuple(map(leaf, names, leaves))
    return Directions(rows, jnp.zeros([], jnp.int32))
