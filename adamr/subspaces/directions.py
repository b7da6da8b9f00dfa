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

from adamr import _rows as matrix
from adamr import _tree

__all__ = [
    "Directions",
    "coordinates",
    "empty_directions",
    "project_off",
]


class Directions(NamedTuple):
    """Vectors over all parameters, orthonormal as whole vectors, with room for more.

    Attributes:
      rows: one entry per parameter leaf, in leaf order: a float32 array
        (capacity, *leaf.shape), or None for a leaf that is left out.
      used: int32: rows 0 … used − 1 hold directions, the others are zero.
    """

    rows: tuple[jax.Array | None, ...]
    used: jax.Array


def held(rows: Sequence[Any]) -> list[jax.Array]:
    return [r for r in rows if r is not None]


def as_matrix(leaves: list[jax.Array]) -> tuple[matrix.Rows, matrix.Blocks]:
    mask = jnp.ones(leaves[0].shape[:1], bool)
    return matrix.Rows(leaves, mask), (tuple(range(len(leaves))),)


def inner(rows: list[jax.Array], vector: list[jax.Array]) -> jax.Array:
    """(k,): ⟨v_i, x⟩ in float32, a sum over leaves."""
    m, block = as_matrix(rows)
    return matrix.inner(m, [x.astype(jnp.float32) for x in vector], block)[0]


def combine(rows: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """Σ_i w_i v_i per leaf."""
    m, block = as_matrix(rows)
    return matrix.combine(m, weights[None], block)


def norm(vector: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(map(_tree.squared_norm, vector), jnp.zeros([])))


def residual(rows: list[jax.Array], vector: list[jax.Array]) -> list[jax.Array]:
    """x − Σ_i ⟨x, v_i⟩ v_i in float32."""
    taken = combine(rows, inner(rows, vector))
    return [x.astype(jnp.float32) - y for x, y in zip(vector, taken, strict=True)]


def check_directions(directions: Directions, tree: Any, argument: str) -> None:
    """Raises unless `tree` has the leaves the directions were made for."""
    names, leaves = _tree.flatten_with_names(tree)
    if len(leaves) != len(directions.rows):
        raise ValueError(
            f"{argument} was made for {len(directions.rows)} parameter leaves, but the "
            f"tree it meets has {len(leaves)}: {names}."
        )
    for name, leaf, rows in zip(names, leaves, directions.rows, strict=True):
        if rows is None:
            continue
        if _tree.is_hole(leaf):
            raise ValueError(
                f"{argument} has directions over {name}, which the tree leaves out: "
                "without it they are no longer orthonormal; restrict them first."
            )
        if rows.shape[1:] != leaf.shape:
            raise ValueError(
                f"{argument} has directions of shape {rows.shape[1:]} at {name}, which "
                f"do not fit a leaf of shape {leaf.shape}."
            )


def _over(directions: Directions, tree: Any) -> list[jax.Array]:
    """The leaves of `tree` that the directions cover."""
    pairs = zip(_tree.flatten(tree)[0], directions.rows, strict=True)
    return [x for x, rows in pairs if rows is not None]


def coordinates(directions: Directions, tree: Any) -> jax.Array:
    """⟨v_i, x⟩ for every direction, float32 (capacity,); 0 for unused ones.

    Its norm over that of a step is the step's leak.
    """
    check_directions(directions, tree, "directions")
    rows = held(directions.rows)
    return inner(rows, _over(directions, tree)) if rows else jnp.zeros([0])


def project_off(directions: Directions, tree: Any) -> Any:
    """g − Σ_i ⟨g, v_i⟩ v_i in the dtypes of `tree`; leaves left out unchanged.

    Exactly 0 where the directions span the whole space, as Adam would blow rounding up.
    """
    check_directions(directions, tree, "directions")
    rows = held(directions.rows)
    if not rows:
        return tree
    full = directions.used >= sum(r[0].size for r in rows)
    kept = iter(residual(rows, _over(directions, tree)))

    def leaf(g, rows):
        if rows is None:
            return g
        return jnp.where(full, 0.0, next(kept)).astype(g.dtype)

    return _tree.map_positions(leaf, tree, directions.rows)


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

    >>> params = {"body": jnp.zeros((3, 2)), "head": jnp.zeros(2)}
    >>> d = empty_directions(params, 4, exclude=["head"])
    >>> [r if r is None else r.shape for r in d.rows]
    [(4, 3, 2), None]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}.")
    names, leaves = _tree.flatten_with_names(params)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of str, got {exclude!r}.")
    if exclude is None or callable(exclude):
        skip = exclude
    else:
        parts = tuple(exclude)
        for part in parts:
            if not any(part in name for name in names):
                raise ValueError(
                    f"exclude names {part!r}, which no leaf of {names} has."
                )
        skip = lambda name, shape: any(part in name for part in parts)  # noqa: E731

    def leaf(name, x):
        if _tree.is_hole(x) or (skip is not None and skip(name, x.shape)):
            return None
        place = None
        like = None if _tree.is_traced(x) else getattr(x, "sharding", None)
        if isinstance(like, NamedSharding):
            place = NamedSharding(like.mesh, PartitionSpec(None, *like.spec))
        return jnp.zeros((capacity, *x.shape), jnp.float32, device=place)

    rows = tuple(map(leaf, names, leaves))
    return Directions(rows, jnp.zeros([], jnp.int32))
