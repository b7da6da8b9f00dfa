"""Several gradients as the rows of a matrix M: trees like the gradient, leading axes.

A leaf of shape (T, *shape) holds T gradients. Contractions run leaf by leaf over the
axes of the leaf, so that a sharded leaf is never flattened.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamr import _tree

__all__ = [
    "Blocks",
    "Rows",
    "align",
    "blocks_of",
    "combine",
    "gram",
    "inner",
    "read_rows",
    "squares",
]


# Positions of the leaves of each block of parameters that is treated on its own.
Blocks = tuple[tuple[int, ...], ...]


class Rows(NamedTuple):
    """The matrix M, leaf by leaf.

    Attributes:
      leaves: one float32 array (T, *shape) per leaf of the gradient, in order.
      mask: bool (T,), False for rows that do not count; they may hold anything.
    """

    leaves: list[jax.Array]
    mask: jax.Array


def align(updates: Any, tree: Any, argument: str) -> list[Any]:
    """The leaves of `tree` that belong to the leaves of `updates`, without the holes.

    `optax.masked` puts holes into the updates but not into extra arguments. A hole in
    `tree` alone is an error: whether it means zero is not for this function to guess.
    """
    here, there = _tree.flatten(updates)[0], _tree.positions_like(tree, updates)
    if there is None:
        names = [_tree.flatten_with_names(x)[0] for x in (tree, updates)]
        raise ValueError(
            f"{argument} must be a tree like the gradient, got leaves {names[0]}, "
            f"expected {names[1]}."
        )
    pairs = zip(here, there, strict=True)
    found = [x for u, x in pairs if not _tree.is_hole(u)]
    for name, x in zip(_names(updates), found, strict=True):
        if _tree.is_hole(x):
            raise ValueError(
                f"{argument} at {name!r} is {x}, expected an array: zeros where the "
                "leaf has no part in the loss, or optax.masked around the link, which "
                "leaves the leaf out."
            )
    return found


def read_rows(
    updates: Any, tree: Any, mask: Any, *, argument: str, mask_argument: str, link: str
) -> Rows:
    """Checks a tree of gradients and makes it rows; all leading axes become one."""
    if tree is None:
        raise ValueError(
            f"{link} needs {argument}: pass update(gradient, state, params, "
            f"{argument}=tree) with a tree like the gradient whose leaves have a "
            "leading axis, one entry per task: jax.vmap(jax.grad(loss), (None, 0))"
            "(params, batches)."
        )
    leaves = jax.tree.leaves(updates)
    found = align(updates, tree, argument)
    lead = jnp.shape(found[0])[: jnp.ndim(found[0]) - leaves[0].ndim] if found else (0,)
    for name, g, x in zip(_names(updates), leaves, found, strict=True):
        if not lead or jnp.shape(x) != (*lead, *g.shape):
            wanted = (*(lead or ("tasks",)), *g.shape)
            raise ValueError(
                f"{argument} at {name!r} has shape {jnp.shape(x)}, expected {wanted}: "
                "leading axes (the same for every leaf, one entry per task), then the "
                "gradient's shape. Stack a list of gradients with "
                "jax.tree.map(lambda *x: jnp.stack(x), *gradients)."
            )
    count = math.prod(lead)
    mask = jnp.ones(lead, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.ndim == 0 or mask.shape != lead[: mask.ndim]:
        raise ValueError(
            f"{mask_argument} has shape {mask.shape}, expected {lead[:1]}: one entry "
            f"per task, as the leading axis of {argument}. More tasks than that axis "
            "holds need a larger one from the start."
        )
    mask = mask.reshape(mask.shape + (1,) * (len(lead) - mask.ndim))
    mask = jnp.broadcast_to(mask, lead).reshape(count)

    def matrix(x, g):
        x = jnp.asarray(x, jnp.float32)
        return x if len(lead) == 1 else x.reshape(count, *g.shape)

    return Rows([matrix(x, g) for x, g in zip(found, leaves, strict=True)], mask)


def _names(updates: Any) -> list[str]:
    """Names of the leaves without the holes."""
    names, nodes = _tree.flatten_with_names(updates)
    return [n for n, x in zip(names, nodes, strict=True) if not _tree.is_hole(x)]


def blocks_of(updates: Any, partition: Any) -> Blocks:
    """The blocks that `partition` asks for.

    None: one block of all leaves; "leaf": one per leaf; or a function (name, shape) ->
    label, one block per label.
    """
    leaves = jax.tree.leaves(updates)
    if partition is None:
        return (tuple(range(len(leaves))),)
    if partition == "leaf":
        return tuple((i,) for i in range(len(leaves)))
    blocks: dict[Any, list[int]] = {}
    for i, (name, g) in enumerate(zip(_names(updates), leaves, strict=True)):
        blocks.setdefault(partition(name, g.shape), []).append(i)
    return tuple(map(tuple, blocks.values()))


def _contract(left: str, a: jax.Array, right: str, b: jax.Array) -> jax.Array:
    """Sums over all axes of the leaf; the small result lies on every device."""
    mesh = jax.typeof(a).sharding.mesh
    explicit = AxisType.Explicit in mesh.axis_types
    axes = "abcdefghij"[: a.ndim - len(left)]
    return jnp.einsum(
        f"{left}{axes},{right}{axes}->{left}{right}",
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=NamedSharding(mesh, PartitionSpec()) if explicit else None,
    )


def _over_blocks(per_leaf: list[jax.Array], blocks: Blocks) -> jax.Array:
    """Sums over the leaves of each block, along a new leading axis."""
    return jnp.stack([sum(per_leaf[i] for i in block) for block in blocks])


def inner(rows: Rows, vector: list[jax.Array], blocks: Blocks) -> jax.Array:
    """M g, (blocks, T)."""
    pairs = zip(rows.leaves, vector, strict=True)
    return _over_blocks([_contract("k", m, "", g) for m, g in pairs], blocks)


def gram(rows: Rows, blocks: Blocks) -> jax.Array:
    """M Mᵀ, (blocks, T, T)."""
    return _over_blocks([_contract("k", m, "l", m) for m in rows.leaves], blocks)


def squares(rows: Rows, blocks: Blocks) -> jax.Array:
    """The diagonal of M Mᵀ, (blocks, T)."""

    def leaf(m):
        return jnp.sum(m * m, axis=tuple(range(1, m.ndim)))

    return _over_blocks([leaf(m) for m in rows.leaves], blocks)


def combine(
    rows: Rows, weights: jax.Array, blocks: Blocks, *, clean: bool = False
) -> list[jax.Array]:
    """Mᵀ v per leaf, v = `weights` (blocks, T).

    With `clean`, rows of weight 0 contribute 0 even where they are not finite, at the
    cost of a pass over M.
    """
    block_of = {i: b for b, block in enumerate(blocks) for i in block}

    def leaf(i, m):
        v = weights[block_of[i]]
        if clean:
            used = (v != 0).reshape(-1, *[1] * (m.ndim - 1))
            m = jnp.where(used, m, 0.0)
        return jnp.einsum("k,k...->...", v, m, precision=jax.lax.Precision.HIGHEST)

    return [leaf(i, m) for i, m in enumerate(rows.leaves)]
