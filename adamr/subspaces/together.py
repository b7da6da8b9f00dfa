"""Growing many leaves at once: equal sizes by one program, equal evidence only once.

Leaves that met the same rows (query, key and value; gate and up) and had the same basis
so far have the same eigenproblem. Leaves of equal sizes differ in their numbers alone,
so one compiled loop serves all layers of a network.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr.subspaces.columns import on_host, to_columns, to_storage

__all__ = ["Evidence", "Grow", "grow_together"]

Grow = Callable[..., tuple[jax.Array, jax.Array]]

MOST_BYTES = 2**30  # of float64 bases and evidence that are stacked at a time


class Evidence(NamedTuple):
    """What one leaf is grown by.

    Attributes:
      leaf: its position.
      array: samples or a Gram matrix; one and the same array for leaves that share it.
      grow: `(columns, lam, array, **options) -> (columns, lam)`.
      basis, weights: what is protected so far, in storage shape.
    """

    leaf: int
    array: jax.Array
    grow: Grow
    basis: jax.Array
    weights: jax.Array


def _described(x: jax.Array) -> tuple[Any, ...]:
    return x.shape, x.dtype, getattr(jax.typeof(x), "sharding", None)


@functools.partial(jax.jit, static_argnames=("grow", "sharing", "options"))
def _grow_kind(
    *arrays: jax.Array, grow: Grow, sharing: int, options: tuple[Any, ...]
) -> list[jax.Array]:
    """Bases, weights and evidence of all leaves of a kind -> their bases and weights.

    `sharing` leaves in a row share one array of evidence.
    """
    groups = len(arrays) // (2 * sharing + 1)
    leaves = groups * sharing
    bases, weights = arrays[:leaves], arrays[leaves : 2 * leaves]
    evidence = arrays[2 * leaves :]
    before = [to_columns(b, w) for b, w in zip(bases, weights, strict=True)]

    def grown(one):
        return grow(*one, **dict(options))

    if leaves == 1:
        after = [grown((*before[0], evidence[0]))]
    else:
        columns, lam = (jnp.stack(each) for each in zip(*before, strict=True))
        met = jnp.stack(evidence)

        def apart():
            each = jnp.repeat(met, sharing, axis=0)
            return jax.lax.map(grown, (columns, lam, each))

        def once():
            firsts = jax.lax.map(grown, (columns[::sharing], lam[::sharing], met))
            return jax.tree.map(lambda x: jnp.repeat(x, sharing, axis=0), firsts)

        if sharing == 1:
            found = apart()
        else:
            first = jnp.repeat(columns[::sharing], sharing, axis=0)
            same = jnp.all(columns == first)
            same = same & jnp.all(lam == jnp.repeat(lam[::sharing], sharing, axis=0))
            found = jax.lax.cond(same, once, apart)
        after = [tuple(x[i] for x in found) for i in range(leaves)]
    pairs = zip(after, bases, weights, strict=True)
    stored = [to_storage(*new, basis, weight) for new, basis, weight in pairs]
    return [basis for basis, _ in stored] + [weight for _, weight in stored]


def _portions(groups: list[list[Evidence]]) -> list[list[list[Evidence]]]:
    """Groups of one kind in equal parts (the last may be smaller) of bounded memory."""
    first = groups[0]
    size = 8 * (3 * len(first) * first[0].basis.size + first[0].array.size)
    parts = -(-len(groups) * size // MOST_BYTES)
    count = -(-len(groups) // min(parts, len(groups)))
    return [groups[i : i + count] for i in range(0, len(groups), count)]


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
    kinds: dict[Any, list[list[Evidence]]] = {}
    for group in shared.values():
        first = group[0]
        arrays = (first.basis, first.weights, first.array)
        kind = (len(group), first.grow, *map(_described, arrays))
        kinds.setdefault(kind, []).append(group)
    grown = {}
    portions = [(kind, some) for kind, all in kinds.items() for some in _portions(all)]
    for (sharing, grow, *_), groups in portions:
        leaves = [each for group in groups for each in group]
        rounding = float(jnp.finfo(leaves[0].basis.dtype).eps) ** 2
        found = on_host(
            _grow_kind,
            *[each.basis for each in leaves],
            *[each.weights for each in leaves],
            *[group[0].array for group in groups],
            grow=grow,
            sharing=sharing,
            options=tuple(sorted({**options, "rounding": rounding}.items())),
        )
        for i, each in enumerate(leaves):
            grown[each.leaf] = found[i], found[len(leaves) + i]
    return grown
