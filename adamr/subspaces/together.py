"""Growing many leaves at once: equal evidence only once.

Leaves that met the same rows (query, key and value; gate and up) and had the same basis
so far have the same eigenproblem. Inside jit, leaves of equal sizes differ in their
numbers alone, so one compiled loop serves all layers of a network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import on_host, to_columns, to_storage
from adamr.subspaces.grow_on_host import grow_group
from adamr.subspaces.grow_traced import by_gram, by_samples

__all__ = ["Evidence", "grow_together"]

MOST_BYTES = 2**30  # of bases and evidence that are stacked at a time inside jit


class Evidence(NamedTuple):
    """What one leaf is grown by.

    Attributes:
      leaf: its position.
      array: samples or a Gram matrix; one and the same array for leaves that share it.
      by_gram: whether it is a Gram matrix.
      basis, weights: what is protected so far, in storage shape.
    """

    leaf: int
    array: jax.Array
    by_gram: bool
    basis: jax.Array
    weights: jax.Array


def _described(x: jax.Array) -> tuple[Any, ...]:
    return x.shape, x.dtype, getattr(jax.typeof(x), "sharding", None)


def _grow_kind(
    groups: Sequence[Sequence[Evidence]], **options: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """Bases and weights of groups of leaves of equal sizes, in order; inside jit.

    The leaves of a group, as many in each, share their evidence.
    """
    leaves, sharing = [each for group in groups for each in group], len(groups[0])
    grow = by_gram if leaves[0].by_gram else by_samples
    before = [to_columns(each.basis, each.weights) for each in leaves]

    def grown(one):
        return grow(*one, **options)

    if len(leaves) == 1:
        after = [grown((*before[0], leaves[0].array))]
    else:
        columns, lam = (jnp.stack(each) for each in zip(*before, strict=True))
        met = jnp.stack([group[0].array for group in groups])

        def repeated(x):
            return jnp.repeat(x, sharing, axis=0)

        def apart():
            return jax.lax.map(grown, (columns, lam, repeated(met)))

        def once():
            firsts = jax.lax.map(grown, (columns[::sharing], lam[::sharing], met))
            return jax.tree.map(repeated, firsts)

        if sharing == 1:
            found = apart()
        else:
            same = jnp.all(columns == repeated(columns[::sharing]))
            same = same & jnp.all(lam == repeated(lam[::sharing]))
            found = jax.lax.cond(same, once, apart)
        after = [tuple(x[i] for x in found) for i in range(len(leaves))]
    pairs = zip(after, leaves, strict=True)
    return [to_storage(*new, each.basis, each.weights) for new, each in pairs]


def _grow_on_host(
    groups: Sequence[Sequence[Evidence]], **options: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """The same of one group, outside jit."""
    (group,) = groups
    found = on_host(
        grow_group,
        *[each.basis for each in group],
        *[each.weights for each in group],
        group[0].array,
        by_gram=group[0].by_gram,
        **options,
    )
    return list(zip(found[: len(group)], found[len(group) :], strict=True))


def _portions(groups: list[list[Evidence]]) -> list[list[list[Evidence]]]:
    """Groups of one kind in equal parts (the last may be smaller) of bounded memory."""
    first = groups[0]
    size = 4 * (3 * len(first) * first[0].basis.size + first[0].array.size)
    parts = -(-len(groups) * size // MOST_BYTES)
    count = -(-len(groups) // min(parts, len(groups)))
    return [groups[i : i + count] for i in range(0, len(groups), count)]


def _of_kinds(groups: Sequence[list[Evidence]]) -> list[list[list[Evidence]]]:
    """Groups whose leaves have equal sizes together."""
    kinds: dict[Any, list[list[Evidence]]] = {}
    for group in groups:
        first = group[0]
        arrays = (first.basis, first.weights, first.array)
        kind = (len(group), first.by_gram, *map(_described, arrays))
        kinds.setdefault(kind, []).append(group)
    return list(kinds.values())


def grow_together(
    evidence: Sequence[Evidence], **options: Any
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """The grown basis and weights of every leaf, by its position.

    Outside jit in float64 on the host; inside, where leaves of equal sizes run one
    after the other, so that the working memory is that of one.
    """
    shared: dict[Any, list[Evidence]] = {}
    for each in evidence:
        same = (id(each.array), _described(each.basis), _described(each.weights))
        shared.setdefault(same, []).append(each)
    grown: dict[int, tuple[jax.Array, jax.Array]] = {}

    def solve(function, groups):
        leaves = [each for group in groups for each in group]
        rounding = float(jnp.finfo(leaves[0].basis.dtype).eps) ** 2
        found = function(groups, rounding=rounding, **options)
        grown.update(zip((each.leaf for each in leaves), found, strict=True))

    groups = list(shared.values())
    arrays = (x for e in evidence for x in (e.array, e.basis, e.weights))
    if any(map(_tree.is_traced, arrays)):
        for kind in _of_kinds(groups):
            for portion in _portions(kind):
                solve(_grow_kind, portion)
    else:
        for group in groups:
            solve(_grow_on_host, [group])
    return grown
