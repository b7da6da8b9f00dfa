"""Algebra of columns outside jit: NumPy in float64."""

import numpy as np

__all__ = ["Array", "in_use", "of_energy_one", "outside"]

Array = np.ndarray


def of_energy_one(x: Array, by_gram: bool) -> Array | None:
    """Samples or a Gram matrix, scaled; None where there is nothing to learn from."""
    peak = np.max(np.abs(x), initial=0.0)  # squares may leave the range of numbers
    if not (np.isfinite(peak) and peak > 0):
        return None
    x = x / peak
    total = np.trace(x) if by_gram else np.linalg.norm(x)
    return x / total if total > 0 else None


def in_use(columns: Array) -> Array:
    """The columns that are not zero, of orthonormal ones with zeros between them."""
    return columns[:, np.sum(np.square(columns), axis=0) > 0.5]


def outside(known: Array, x: Array) -> Array:
    """What of x lies outside the span of orthonormal columns."""
    return x - known @ (known.T @ x)
