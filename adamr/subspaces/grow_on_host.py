"""Growing bases outside jit: NumPy in float64, with as many columns as are in use.

With Q an orthonormal basis of the complement of U, what samples of Gram matrix G have
outside U is QQᵀGQQᵀ. Its eigenvectors are Q times those of QᵀGQ: the more is protected,
the smaller is the problem, and what is found is orthogonal to U without further work.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    THRESHOLD_SLACK,
    to_columns,
    to_storage,
)
from adamr.subspaces.grow_traced import grown_weights
from adamr.subspaces.host import Array, in_use, of_energy_one, outside

__all__ = ["grow_group"]

# Energies, largest first, and the vectors of the first so many.
Spectrum = tuple[Array, Callable[[int], Array]]


def _of_gram(known: Array, gram: Array) -> Spectrum:
    """Of the part of a Gram matrix outside the columns `known`."""
    used = known.shape[1]
    free = np.linalg.qr(known, mode="complete").Q[:, used:] if used else None
    energy, vectors = np.linalg.eigh(gram if free is None else free.T @ gram @ free)

    def first(count: int) -> Array:
        chosen = vectors[:, ::-1][:, :count]
        return chosen if free is None else free @ chosen

    return np.maximum(energy[::-1], 0.0), first


def _of_rows(known: Array, rows: Array) -> Spectrum:
    """The same of fewer samples than the fan-in."""

    rest = outside(known, rows.T)
    energy, right = np.linalg.eigh(rest.T @ rest)

    def first(count: int) -> Array:
        new = rest @ right[:, ::-1][:, :count]
        for _ in range(2):  # twice is enough
            new = np.linalg.qr(outside(known, new)).Q
        return new

    return np.maximum(energy[::-1], 0.0), first


def _wanted(energy: Array, threshold: float, floor: float) -> int:
    """How many directions reach the energy share `threshold`."""
    before = 1.0 - np.sum(energy) + np.cumsum(energy) - energy
    short = before < threshold - (THRESHOLD_SLACK if threshold < 1 else 0.0)
    return int(np.sum(short & (energy > floor)))


def _grown(
    columns: Array,
    lam: Array,
    met: Array,
    *,
    by_gram: bool,
    threshold: float,
    scaling: float | None,
    rounding: float,
) -> tuple[Array, Array]:
    """One basis (n, capacity) and its λ, grown by samples or their Gram matrix."""
    scaled = of_energy_one(met, by_gram)
    if scaled is None:
        return columns, lam
    floor = max(ENERGY_FLOOR["float32" if by_gram else "float64"], rounding)
    fan_in, capacity = columns.shape
    known = in_use(columns)  # the first ones
    used = known.shape[1]
    if not by_gram and len(scaled) < fan_in:
        energy, first = _of_rows(known, scaled)
    else:
        energy, first = _of_gram(known, scaled if by_gram else scaled.T @ scaled)
    count = min(_wanted(energy, threshold, floor), capacity - used)
    grown = columns.copy()
    grown[:, used : used + count] = first(count)
    if scaling is None:
        lam = lam.copy()
        lam[used : used + count] = 1.0
        return grown, lam
    along = scaled @ grown
    energy = np.sum(grown * along if by_gram else np.square(along), axis=0)
    usable = np.ones((1, 1), bool)
    arrays = map(jnp.asarray, (columns, lam, grown, usable, energy))
    return grown, np.asarray(grown_weights(*arrays, scaling=scaling))


def _stacked(columns: Array, lam: Array, met: Array, **options: Any) -> Any:
    """`_grown` for each slice (*batch, …)."""
    grown, weights = np.empty_like(columns), np.empty_like(lam)
    for i in np.ndindex(lam.shape[:-1]):
        grown[i], weights[i] = _grown(columns[i], lam[i], met[i], **options)
    return grown, weights


def grow_group(*arrays: Any, **options: Any) -> list[Array]:
    """Bases, weights and the evidence that their leaves share -> bases, weights.

    Leaves with the same basis have the same result, which is computed once.
    """
    pairs: list[Any] = [np.asarray(x, np.float64) for x in arrays]
    met, half = pairs.pop(), len(arrays) // 2
    done: list[tuple[Array, Array, Any]] = []

    def grown(columns, lam):
        for known, known_lam, after in done:
            if np.array_equal(known, columns) and np.array_equal(known_lam, lam):
                return after
        after = _stacked(columns, lam, met, **options)
        done.append((columns, lam, after))
        return after

    stored = []
    for basis, weights in zip(pairs[:half], pairs[half:], strict=True):
        columns, lam = grown(*to_columns(basis, weights))
        stored.append(to_storage(columns, lam, basis, weights))
    return [basis for basis, _ in stored] + [weights for _, weights in stored]
