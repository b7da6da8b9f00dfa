"""Growing a subspace at a task boundary, from samples of what it must protect.

The functions are pure, run under jit, and keep every shape; outside jit they compute in
float64 on the host.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    at_least_float32,
    extend_by_samples,
    extend_by_spectrum,
    matmul,
    normalized_samples,
    residual_columns,
    spectrum,
    transpose,
    used_columns,
)
from adamr.subspaces.covariance import Covariance, check_moment, checked_rows
from adamr.subspaces.subspace import Subspace, layout
from adamr.subspaces.together import Evidence, Grow, grow_together

__all__ = ["gradient_samples", "grow_subspace"]


def _scaled_weights(energy: jax.Array, scaling: float) -> jax.Array:
    """(α + 1) σ_i / (α σ_i + σ_max), with α = `scaling` and σ_i² = `energy`."""
    sigma = jnp.sqrt(jnp.maximum(energy, 0.0))
    below = scaling * sigma + jnp.max(sigma, axis=-1, keepdims=True)
    return (scaling + 1.0) * sigma / jnp.where(below > 0, below, 1.0)


def _grown_weights(
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


def _unit_trace(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Like `normalized_samples`, for the Gram matrix of the samples."""
    gram = at_least_float32(gram)
    peak = _tree.largest(gram, (-1, -2), keepdims=True)
    usable = jnp.isfinite(peak) & (peak > 0)
    gram = jnp.where(usable, gram / jnp.where(usable, peak, 1.0), 0.0)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    return gram / jnp.where(trace > 0, trace, 1.0), usable & (trace > 0)


def _by_samples(
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
    return grown, _grown_weights(columns, lam, grown, usable, energy, scaling)


def _by_gram(
    columns: jax.Array,
    lam: jax.Array,
    gram: jax.Array,
    *,
    threshold: float,
    scaling: float | None,
    rounding: float,
) -> tuple[jax.Array, jax.Array]:
    """The same from the samples' Gram matrix over the fan-in, (*batch, n, n)."""
    gram, usable = _unit_trace(gram)
    rest = residual_columns(columns, transpose(residual_columns(columns, gram)))
    rest = (rest + transpose(rest)) / 2
    floor = jnp.maximum(ENERGY_FLOOR["float32"], rounding)
    grown = extend_by_spectrum(columns, *spectrum(rest), threshold, floor)
    grown = jnp.where(usable, grown, columns)
    energy = jnp.sum(grown * matmul(gram, grown), axis=-2)
    return grown, _grown_weights(columns, lam, grown, usable, energy, scaling)


@jax.jit
def _gram(rows):
    """RᵀR of rows R of energy 1: one sum over devices where they are sharded."""
    rows, _ = normalized_samples(rows)
    return matmul(transpose(rows), rows)


def sample_rows(
    name: str, samples: jax.Array, basis: jax.Array, weights: jax.Array
) -> jax.Array:
    """Checks the samples of leaf `name` and shapes them (*batch, num_samples, n)."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    fan_in = tuple(basis.shape[d] for d in how.protected)
    at = len(batch)
    inner = samples.shape[at + 1 :]
    fits = samples.shape[:at] == batch and inner in ((how.fan_in,), fan_in)
    return checked_rows(name, samples, (*batch, "num_samples", how.fan_in), fits)


def _evidence(
    name: str, x: jax.Array, basis: jax.Array, weights: jax.Array, by_gram: bool
) -> tuple[jax.Array, Grow]:
    """Checked samples or Gram matrix, and how a basis grows by it."""
    if by_gram:
        check_moment(x, name, basis, weights)
        return x, _by_gram
    rows = sample_rows(name, x, basis, weights)
    whole = _tree.is_traced(rows) or rows.is_fully_addressable
    return (rows, _by_samples) if whole else (_gram(rows), _by_gram)


def grow_subspace(
    subspace: Subspace,
    samples: Any,
    *,
    threshold: float = 0.97,
    scaling: float | None = None,
) -> Subspace:
    """Adds the fewest directions that reach the energy share `threshold`.

    With U the basis of a leaf, R its `samples` as columns, R̂ = R − U Uᵀ R and σ̂ the
    singular values of R̂, appends the k leading left vectors of R̂, k the smallest with

        ‖R‖² − ‖R̂‖² + Σ_{i≤k} σ̂_i²  ≥  threshold · ‖R‖²        (GPM, eq. 5 and 9)

    New directions get λ = 1. With `scaling` = α (Scaled Gradient Projection), σ_i the
    singular value of the samples along direction i and σ_max the largest of them, every
    direction gets

        λ_i ← min(1, λ_i + (α + 1) σ_i / (α σ_i + σ_max)).

    A full basis stays full: where there is too little room, the strongest directions
    are added. Samples that are zero change nothing. Directions with less than 1e-12 of
    the energy (1e-6 inside jit) count as noise. With threshold = 1 all samples are
    protected to 1e-6 of ‖R‖, however badly they are conditioned; inside jit, to 1e-6
    times their condition number.

    A `Covariance` replaces all the samples it has seen, because growing needs only
    their Gram matrix G = R Rᵀ: (I − UUᵀ) G (I − UUᵀ) replaces R̂ R̂ᵀ. Its size is n × n
    for any number of samples, and devices that saw different parts of them add their
    matrices (`merge_covariance`) instead of gathering the samples. Its float32 sums
    leave 1e-6 of the energy as noise. Samples that lie on several processes are reduced
    to a Gram matrix in the same way. Samples that are sharded inside jit cost one sum
    over devices, or a gather where there are fewer than n of them.

    Args:
      subspace: what is protected so far.
      samples: a `Covariance`, or a tree like the parameters (or a tuple in leaf order).
        Per leaf: a float array (num_samples, n) of layer inputs or of gradient columns,
        n the fan-in; (layers, num_samples, n) for stacked kernels; or None to leave the
        leaf unchanged. Samples of an unprotected leaf are ignored.
      threshold: energy share in [0, 1].
      scaling: α > 0 of Scaled Gradient Projection, or None for λ = 1.

    Returns:
      A `Subspace` of the same shapes. Inside jit, a leaf whose samples are not finite
      is unchanged.

    Raises:
      ValueError: for samples of the wrong shape, empty or (outside jit) not finite, a
        threshold outside [0, 1], or a scaling that is not positive and finite.
      TypeError: for complex samples.

    >>> from adamr import empty_subspace
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> s = empty_subspace(params)
    >>> s = grow_subspace(s, {"w": jnp.array([[0.0, 2.0, 0.0]])})
    >>> jnp.abs(s.bases[0][:, 0, 0])
    Array([0., 1., 0.], dtype=float32)

    References:
      Saha, Garg, Roy, Gradient Projection Memory for Continual Learning,
      arXiv:2103.09762. Saha, Roy, Continual Learning with Scaled Gradient Projection,
      arXiv:2302.01386.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
    if scaling is not None and not 0.0 < scaling < math.inf:
        raise ValueError(
            f"scaling must be positive and finite, or None; got {scaling}."
        )
    threshold = float(threshold)  # static in the compiled growth, as is scaling
    scaling = scaling if scaling is None else float(scaling)
    by_gram = isinstance(samples, Covariance)
    entries = samples.moments if by_gram else samples
    names, leaves = _tree.flatten_with_names(entries)
    if len(leaves) != len(subspace.bases):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} {names}, expected {len(subspace.bases)}."
        )
    evidence: list[Evidence] = []
    checked: dict[Any, tuple[jax.Array, Grow]] = {}  # shared arrays stay shared
    for i, (name, x) in enumerate(zip(names, leaves, strict=True)):
        basis, weights = subspace.bases[i], subspace.weights[i]
        if basis is None or weights is None or _tree.is_hole(x):
            continue
        key = id(x), layout(basis, weights)
        if key not in checked:
            checked[key] = _evidence(name, jnp.asarray(x), basis, weights, by_gram)
        evidence.append(Evidence(i, *checked[key], basis, weights))
    grown = grow_together(evidence, threshold=threshold, scaling=scaling)
    pairs = enumerate(zip(*subspace, strict=True))
    return Subspace(*zip(*(grown.get(i, pair) for i, pair in pairs), strict=True))


def gradient_rows(g: jax.Array, basis: jax.Array, weights: jax.Array) -> jax.Array:
    """The columns of one gradient as rows (*batch, num_samples, n)."""
    how = layout(basis, weights)
    outputs = [d for d in range(g.ndim) if d not in how.batch + how.protected]
    rows = jnp.transpose(g, (*how.batch, *outputs, *how.protected))
    return rows.reshape(*(g.shape[d] for d in how.batch), -1, how.fan_in)


def gradient_samples(subspace: Subspace, gradient: Any) -> tuple[jax.Array | None, ...]:
    """The columns of a gradient as samples of the fan-in space.

    A gradient of shape (in, out) gives `out` samples of length `in`. Pass the result to
    `grow_subspace` or, step by step, to `update_sketch`.

    Args:
      subspace: says which axes of each leaf are protected; its bases are not read.
      gradient: tree like the parameters.

    Returns:
      A tuple in leaf order: (*batch, num_samples, fan_in) in the gradient's dtype, or
      None where a leaf is unprotected or missing.

    >>> from adamr import empty_subspace
    >>> g = {"w": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    >>> gradient_samples(empty_subspace(g), g)[0].shape
    (3, 2)
    """

    def leaf(g, basis, weights):
        if _tree.is_hole(g) or basis is None:
            return None
        return gradient_rows(g, basis, weights)

    return tuple(map(leaf, _tree.flatten(gradient)[0], *subspace))
