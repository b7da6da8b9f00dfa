"""Fresh A's inside the complement of what is protected."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from adamr._tree import is_traced, placed_like
from adamr.lora.pairs import Halves
from adamr.lora.shapes import Factors
from adamr.subspaces.subspace import Subspace, layout, project_leaf, used

__all__ = ["Init", "he_uniform", "outside", "redrawn"]

# (key, (n, r), dtype) -> A₀, as the initializers of JAX.
Init = Callable[..., jax.Array]

he_uniform: Init = jax.nn.initializers.he_uniform()

# A column that keeps less of its length than this lies inside the protected space, and
# what is left of it is rounding.
_LEAST = 1e-5


def placed(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` with dtype and placement of `old`, also along explicit axes in a trace."""
    new = placed_like(old, new)
    if is_traced(new):
        where = jax.typeof(old).sharding
        if AxisType.Explicit in where.mesh.axis_types:
            return jax.sharding.reshard(new, where)
    return new


def outside(basis: jax.Array, weights: jax.Array, a: jax.Array) -> jax.Array:
    """(I − UUᵀ) A, each column scaled back to the length that it had.

    Exactly 0 where nothing is left: in a column inside span U, and where U is full.
    """
    whole = used(basis, weights)  # λ < 1 would let a part of U through

    def length(x):
        axes = layout(basis, weights).protected
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    before = length(a)
    a = project_leaf(basis, whole, a)
    after = length(a)
    left = after > _LEAST * before
    a = a * jnp.where(left, before / jnp.where(left, after, 1.0), 0.0)
    # Where little was left, the scale has magnified the rounding of the first time.
    return project_leaf(basis, whole, a)


def _drawn(
    key: jax.Array,
    like: jax.Array,
    how: Factors,
    basis: jax.Array | None,
    weights: jax.Array | None,
    init: Init,
) -> jax.Array:
    """A fresh A in float32 or wider: A₀ from `init`, moved outside U."""
    slices = math.prod(like.shape[: how.lead])
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    shape = (math.prod(how.fan_in), how.rank)
    keys = jax.random.split(key, slices)
    columns = jax.vmap(lambda one: init(one, shape, dtype))(keys)
    fresh = placed(like, how.from_columns(columns, like.shape))
    if basis is None or weights is None:
        return fresh
    return outside(basis, weights, fresh)


def redrawn(
    key: jax.Array,
    leaves: Sequence[Any],
    pairs: Sequence[Halves],
    here: Subspace,
    init: Init,
) -> dict[int, jax.Array]:
    """A fresh A for every pair, by its position in `leaves`."""
    keys = jax.random.split(key, len(pairs))
    return {
        each.a: _drawn(
            one,
            leaves[each.a],
            each.factors,
            here.bases[each.a],
            here.weights[each.a],
            init,
        )
        for one, each in zip(keys, pairs, strict=True)
    }
