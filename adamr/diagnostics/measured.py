"""Results of the diagnostics: one number over all leaves, and one per leaf."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Measured", "measure", "ratio", "same"]


class Measured(NamedTuple):
    """One number over all leaves, and one per leaf.

    Attributes:
      total: float32 scalar over all measured leaves; 0 if there are none.
      per_leaf: float32 scalars in leaf order, None for a leaf that is not measured.
    """

    total: jax.Array
    per_leaf: tuple[jax.Array | None, ...]


def ratio(pair: Any) -> jax.Array:
    """part / whole of a pair, with 0 / 0 = 0."""
    part, whole = pair
    nothing = (part == 0) & (whole == 0)
    return jnp.where(nothing, 0.0, part / jnp.where(nothing, 1.0, whole))


def same(x: jax.Array) -> jax.Array:
    """`x` unchanged."""
    return x


def measure(
    leaves: Sequence[Sequence[Any]],
    function: Callable[[Any], jax.Array],
    combine: Callable[[Any, Any], jax.Array] = jnp.add,
    finish: Callable[[jax.Array], jax.Array] = same,
) -> Measured:
    """`finish` of the combined values of `function` over the parts of each leaf."""
    reduce = functools.partial(functools.reduce, combine)
    per_leaf = [reduce(map(function, parts)) if parts else None for parts in leaves]
    there = [x for x in per_leaf if x is not None]
    total = finish(reduce(there)) if there else jnp.zeros([], jnp.float32)
    return Measured(total, tuple(None if x is None else finish(x) for x in per_leaf))
