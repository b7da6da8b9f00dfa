"""Growing one basis inside jit: every shape fixed, in float32."""

import jax
import jax.numpy as jnp

from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    extend_by_samples,
    extend_by_spectrum,
    matmul,
    normalized_samples,
    residual_gram,
    spectrum,
    unit_trace,
    used_columns,
)

__all__ = ["by_gram", "by_samples", "grown_weights"]


def _scaled_weights(energy: jax.Array, scaling: float) -> jax.Array:
    """(α + 1) σ_i / (α σ_i + σ_max), with α = `scaling` and σ_i² = `energy`."""
    sigma = jnp.sqrt(jnp.maximum(energy, 0.0))
    below = scaling * sigma + jnp.max(sigma, axis=-1, keepdims=True)
    return (scaling + 1.0) * sigma / jnp.where(below > 0, below, 1.0)


def grown_weights(
    columns: jax.Array,
    lam: jax.Array,
    grown: jax.Array,
    usable: jax.Array,
    energy: jax.Array,
    scaling: float | None,
) -> jax.Array:
    """λ of the columns `grown`, along which the samples have `energy`."""
    if scaling is None:
        return jnp.where(
            used_columns(columns), lam, used_columns(grown).astype(jnp.float32)
        )
    new = jnp.minimum(1.0, lam + _scaled_weights(energy, scaling))
    return jnp.where(used_columns(grown) & usable[..., 0], new, lam)


def by_samples(
    columns: jax.Array,
    lam: jax.Array,
    samples: jax.Array,
    *,
    threshold: float,
    scaling: float | None,
    rounding: float,
) -> tuple[jax.Array, jax.Array]:
    """One basis grown by samples.

    Energy up to `rounding` is noise: a rounded basis leaves it outside its span of what
    lies inside.
    """
    samples, usable = normalized_samples(samples)
    grown = extend_by_samples(columns, samples, threshold, rounding)
    grown = jnp.where(usable, grown, columns)
    energy = jnp.sum(jnp.square(matmul(samples, grown)), axis=-2)
    return grown, grown_weights(columns, lam, grown, usable, energy, scaling)


def by_gram(
    columns: jax.Array,
    lam: jax.Array,
    gram: jax.Array,
    *,
    threshold: float,
    scaling: float | None,
    rounding: float,
) -> tuple[jax.Array, jax.Array]:
    """The same from the samples' Gram matrix over the fan-in, (*batch, n, n)."""
    gram, usable = unit_trace(gram)
    rest = residual_gram(columns, gram)
    floor = jnp.maximum(ENERGY_FLOOR["float32"], rounding)
    grown = extend_by_spectrum(columns, *spectrum(rest), threshold, floor)
    grown = jnp.where(usable, grown, columns)
    energy = jnp.sum(grown * matmul(gram, grown), axis=-2)
    return grown, grown_weights(columns, lam, grown, usable, energy, scaling)
