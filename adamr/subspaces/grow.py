"""Growing a subspace at a task boundary, from samples of what it must protect.

The functions are pure, run under jit, and keep every shape; outside jit they compute in
float64 on the host.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import matmul, normalized_samples, transpose
from adamr.subspaces.covariance import (
    Covariance,
    check_leaves,
    check_moment,
    checked_rows,
    require_finite,
)
from adamr.subspaces.subspace import Subspace, layout
from adamr.subspaces.together import Evidence, grow_together

__all__ = ["gradient_samples", "grow_subspace"]


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


def entries(samples: Any, subspace: Subspace) -> tuple[list[str], list[Any], bool]:
    """Names and entries of `samples` per leaf, and whether they are Gram matrices."""
    by_gram = isinstance(samples, Covariance)
    names, leaves = _tree.flatten_with_names(samples.moments if by_gram else samples)
    expected = len(subspace.bases)
    if by_gram:
        check_leaves("samples", samples, expected)
    if len(leaves) != expected:
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf, as "
            f"layer_inputs(forward, params, x) returns them: got {len(leaves)} "
            f"({_tree.listed(names)}), expected {expected}."
        )
    return names, leaves, by_gram


def evidence_of(
    name: str, x: jax.Array, basis: jax.Array, weights: jax.Array, by_gram: bool
) -> tuple[jax.Array, bool]:
    """Checked samples or Gram matrix, and whether it is the second."""
    if by_gram:
        check_moment(x, name, basis, weights)
        require_finite(x, f"at {name}")
        return x, True
    rows = sample_rows(name, x, basis, weights)
    whole = _tree.is_traced(rows) or rows.is_fully_addressable
    return (rows, False) if whole else (_gram(rows), True)


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
    names, leaves, by_gram = entries(samples, subspace)
    evidence: list[Evidence] = []
    checked: dict[Any, tuple[jax.Array, bool]] = {}  # shared arrays stay shared
    for i, (name, x) in enumerate(zip(names, leaves, strict=True)):
        basis, weights = subspace.bases[i], subspace.weights[i]
        if basis is None or weights is None or _tree.is_hole(x):
            continue
        key = id(x), layout(basis, weights)
        if key not in checked:
            checked[key] = evidence_of(name, jnp.asarray(x), basis, weights, by_gram)
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
