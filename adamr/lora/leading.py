"""The leading directions of what a new task brings, outside the protected space."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    matmul,
    normalized_samples,
    residual_columns,
    spectrum,
    transpose,
)

__all__ = ["EXACT", "MORE", "ROUNDS", "floor_of", "leading"]

EXACT = 256  # the largest fan-in of which all eigenvectors are computed
ROUNDS = 8
MORE = 16  # vectors iterated besides twice those that are wanted


def _gram(evidence: jax.Array, rows: bool) -> jax.Array:
    if rows:
        evidence, _ = normalized_samples(evidence)
        return matmul(transpose(evidence), evidence)
    top = _tree.largest(evidence, (-1, -2), keepdims=True)
    usable = jnp.isfinite(top) & (top > 0)
    return jnp.where(usable, evidence / jnp.where(usable, top, 1.0), 0.0)


def _iterated(
    gram: jax.Array, columns: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """Energies and vectors by block iteration, a fraction of the cost of `eigh`.

    After q rounds an eigenvector of eigenvalue λ is off by (μ/λ)^q, μ the largest one
    that the block leaves out: directions that are mixed have nearly equal energy.
    """
    start = jax.random.normal(
        jax.random.key(0), (*gram.shape[:-1], width), dtype=gram.dtype
    )

    def once(_, block):
        return jnp.linalg.qr(residual_columns(columns, matmul(gram, block))).Q

    block = jax.lax.fori_loop(0, ROUNDS, once, residual_columns(columns, start))
    # QR fills what is missing with arbitrary columns: those inside U vanish here.
    block = residual_columns(columns, block)
    energy, mixed = spectrum(matmul(transpose(block), matmul(gram, block)))
    return energy, matmul(block, mixed)


def floor_of(dtype: Any, rows: bool, squared: bool) -> float:
    """The share of the energy below which a direction is rounding noise."""
    noise = ENERGY_FLOOR[str(dtype)]
    floor = noise if rows else ENERGY_FLOOR["float32"]
    return max(floor**2, noise) if squared else floor


@functools.partial(jax.jit, static_argnames=("rows", "squared"))
def leading(
    like: jax.Array,
    columns: jax.Array,
    evidence: jax.Array,
    *,
    rows: bool,
    squared: bool,
) -> tuple[jax.Array]:
    """The leading eigenvectors of (I − UUᵀ) G (I − UUᵀ), as many as `like` has columns.

    G is the Gram matrix in `evidence`, or that of its rows; or its square. Where no
    energy is left, a column is 0.
    """
    gram, count = _gram(evidence, rows), like.shape[-1]
    floor = floor_of(gram.dtype, rows, squared)
    if squared:
        gram = matmul(gram, transpose(gram))
    if gram.shape[-1] > EXACT:
        width = min(2 * count + MORE, gram.shape[-1])
        energy, vectors = _iterated(gram, columns, width)
    else:
        rest = residual_columns(columns, transpose(residual_columns(columns, gram)))
        energy, vectors = spectrum((rest + transpose(rest)) / 2)
    total = jnp.trace(gram, axis1=-2, axis2=-1)[..., None]
    chosen = (energy > floor * total)[..., None, :count]
    new = jnp.where(chosen, vectors[..., :count], 0.0)
    # QR turns zero columns into arbitrary ones: mask after it.
    for _ in range(2):
        new = jnp.linalg.qr(residual_columns(columns, new)).Q
        new = jnp.where(chosen, new, 0.0)
    return (jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(0, count - new.shape[-1])]),)
