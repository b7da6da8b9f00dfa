"""Fresh A's inside the complement of what is protected."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from adamr._tree import is_traced, placed_like
from adamr.lora.pairs import Halves
from adamr.lora.shapes import Factors, Shape
from adamr.subspaces.subspace import Subspace, layout, project_leaf, used

__all__ = ["Init", "he_uniform", "outside", "redrawn"]

# (key, (n, r), dtype) -> A₀, as the initializers of JAX.
Init = Callable[..., jax.Array]

he_uniform: Init = jax.nn.initializers.he_uniform()

# A column that keeps less of its length than this lies inside the protected space, and
# what is left of it is rounding.
_LEAST = 1e-5


def _placed(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` with dtype and placement of `old`, also along explicit axes in a trace."""
    new = placed_like(old, new)
    if is_traced(new):
        where = jax.typeof(old).sharding
        if AxisType.Explicit in where.mesh.axis_types:
            return jax.sharding.reshard(new, where)
    return new


@jax.jit
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


@functools.partial(jax.jit, static_argnames=("shape", "how", "init", "dtype"))
def _fresh(
    key: jax.Array, shape: Shape, how: Factors, init: Init, dtype: Any
) -> jax.Array:
    """A₀ of this shape, one draw of (n, r) for each stacked layer."""
    keys = jax.random.split(key, math.prod(shape[: how.lead]))
    one = math.prod(how.fan_in), how.rank
    columns = jax.vmap(lambda key: init(key, one, dtype))(keys)
    return how.from_columns(columns, shape)


def redrawn(
    key: jax.Array,
    leaves: Sequence[Any],
    pairs: Sequence[Halves],
    here: Subspace,
    init: Init,
) -> dict[int, jax.Array]:
    """A fresh A for every pair, by its position in `leaves`."""
    fresh = {}
    for one, each in zip(jax.random.split(key, len(pairs)), pairs, strict=True):
        i = each.a
        old, basis, weights = leaves[i], here.bases[i], here.weights[i]
        dtype = jnp.promote_types(old.dtype, jnp.float32)
        new = _placed(old, _fresh(one, old.shape, each.factors, init, dtype))
        if basis is not None and weights is not None:
            new = outside(basis, weights, new)
        fresh[i] = new
    return fresh
