"""Algebra of vectors that lie over several arrays, one part in each.

A vector is a list of arrays; `rows` hold k of them, as a list of arrays (k, *shape).
Sums run over the arrays, which are never flattened or concatenated.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _rows as matrix
from adamr import _tree


def held(rows: Sequence[Any]) -> list[jax.Array]:
    """The rows of the leaves that are not left out."""
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
    """‖x‖ in float32."""
    return jnp.sqrt(sum(map(_tree.squared_norm, vector), jnp.zeros([], jnp.float32)))


def residual(rows: list[jax.Array], vector: list[jax.Array]) -> list[jax.Array]:
    """x − Σ_i ⟨x, v_i⟩ v_i in float32."""
    taken = combine(rows, inner(rows, vector))
    return [x.astype(jnp.float32) - y for x, y in zip(vector, taken, strict=True)]


def _unit(samples: list[jax.Array], i: jax.Array) -> list[jax.Array]:
    """Sample i at length 1; 0 if it is zero or not finite."""
    at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
    v = [at(x).astype(jnp.float32) for x in samples]
    peaks = [_tree.largest(x) for x in v]
    peak = functools.reduce(jnp.maximum, peaks)
    usable = jnp.isfinite(peak) & (peak >= jnp.finfo(jnp.float32).tiny)
    # First by the peak: squares of tiny or huge entries leave the range of float32.
    v = [jnp.where(usable, x / jnp.where(usable, peak, 1.0), 0.0) for x in v]
    length = norm(v)
    return [x / jnp.where(length > 0, length, 1.0) for x in v]


class _Walk(NamedTuple):
    """Where Gram-Schmidt is: at sample `i`, with `used` rows filled."""

    i: jax.Array
    rows: list[jax.Array]
    used: jax.Array
    overflow: jax.Array


@jax.jit
def orthonormalize(
    rows: list[jax.Array],
    used: jax.Array,
    samples: list[jax.Array],
    max_new: jax.typing.ArrayLike,
    tolerance: jax.typing.ArrayLike,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Gram-Schmidt of the samples after the used rows.

    Returns:
      The rows, how many are used, and whether a new direction did not fit.
    """
    capacity, total = rows[0].shape[0], samples[0].shape[0]

    def more(at):
        return (at.i < total) & (at.used - used < max_new) & ~at.overflow

    def take_next(at):
        r = _unit(samples, at.i)
        for _ in range(2):  # twice is enough in float32
            r = residual(at.rows, r)
        length = norm(r)
        new = length > tolerance
        accept = new & (at.used < capacity)
        slot = jnp.minimum(at.used, capacity - 1)
        scale = 1.0 / jnp.where(new, length, 1.0)

        def write(row, x):
            old = jax.lax.dynamic_index_in_dim(row, slot, keepdims=False)
            return row.at[slot].set(jnp.where(accept, x * scale, old))

        rows = [write(row, x) for row, x in zip(at.rows, r, strict=True)]
        now = at.used + accept.astype(at.used.dtype)
        return _Walk(at.i + 1, rows, now, new & ~accept)

    start = _Walk(jnp.zeros([], jnp.int32), rows, used, jnp.zeros([], bool))
    end = jax.lax.while_loop(more, take_next, start)
    return end.rows, end.used, end.overflow
