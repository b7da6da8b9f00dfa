"""Growing, merging and truncating subspaces at task boundaries.

All functions are pure, run under jit, and keep every shape; outside jit they compute in
float64 on the host (`_columns.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import (
    FLOOR,
    extend,
    extend_by,
    matmul,
    normalized,
    on_host,
    places,
    residual_columns,
    spectrum,
    to_columns,
    to_storage,
    transpose,
    used_columns,
    wide,
)
from adamr.subspaces.covariance import Covariance, check_moment
from adamr.subspaces.subspace import Subspace, layout

__all__ = [
    "gradient_samples",
    "grow_subspace",
    "merge_subspaces",
    "truncate_subspace",
]


def _importance(energy: jax.Array, alpha: float) -> jax.Array:
    """λ_i = (α+1) σ_i / (α σ_i + σ_max), with σ_i² = `energy`."""
    sigma = jnp.sqrt(jnp.maximum(energy, 0.0))
    below = alpha * sigma + jnp.max(sigma, axis=-1, keepdims=True)
    return (alpha + 1.0) * sigma / jnp.where(below > 0, below, 1.0)


def _weights(columns, lam, grown, usable, energy, importance) -> jax.Array:
    """λ of `grown`, whose directions have this energy of the samples."""
    if importance is None:
        return jnp.where(
            used_columns(columns), lam, used_columns(grown).astype(jnp.float32)
        )
    new = jnp.minimum(1.0, lam + _importance(energy, importance))
    return jnp.where(used_columns(grown) & usable[..., 0], new, lam)


def _unit_trace(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `normalized`, for the Gram matrix of samples."""
    gram = wide(gram)
    peak = _tree.largest(gram, (-1, -2), keepdims=True)
    usable = jnp.isfinite(peak) & (peak > 0)
    gram = jnp.where(usable, gram / jnp.where(usable, peak, 1.0), 0.0)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    return gram / jnp.where(trace > 0, trace, 1.0), usable & (trace > 0)


@functools.partial(jax.jit, static_argnames=("threshold", "importance"))
def _grow_leaf(basis, weights, samples, threshold, importance, rounding=0.0):
    columns, lam = to_columns(basis, weights)
    samples, usable = normalized(samples)
    grown = extend(columns, samples, threshold, rounding)
    grown = jnp.where(usable, grown, columns)
    energy = jnp.sum(jnp.square(matmul(samples, grown)), axis=-2)
    lam = _weights(columns, lam, grown, usable, energy, importance)
    return to_storage(grown, lam, basis, weights)


@functools.partial(jax.jit, static_argnames=("threshold", "importance"))
def _grow_leaf_by(basis, weights, gram, threshold, importance, rounding=0.0):
    columns, lam = to_columns(basis, weights)
    gram, usable = _unit_trace(gram)
    rest = residual_columns(columns, transpose(residual_columns(columns, gram)))
    rest = (rest + transpose(rest)) / 2
    floor = jnp.maximum(FLOOR["float32"], rounding)
    grown = extend_by(columns, *spectrum(rest), threshold, floor)
    grown = jnp.where(usable, grown, columns)
    energy = jnp.sum(grown * matmul(gram, grown), axis=-2)
    lam = _weights(columns, lam, grown, usable, energy, importance)
    return to_storage(grown, lam, basis, weights)


@jax.jit
def _gram(rows):
    """RᵀR of rows of energy 1: where they are sharded, one sum over devices."""
    rows, _ = normalized(rows)
    return matmul(transpose(rows), rows)


def sample_rows(name, samples, basis, weights) -> jax.Array:
    """Checks samples and brings them to (*batch, num_samples, fan_in)."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    fan_in = tuple(basis.shape[d] for d in how.protected)
    at = len(batch)
    inner = samples.shape[at + 1 :]
    if samples.shape[:at] != batch or inner not in ((how.fan_in,), fan_in):
        raise ValueError(
            f"samples has shape {samples.shape} at {name}, expected "
            f"{(*batch, 'num_samples', how.fan_in)}."
        )
    if samples.shape[at] == 0:
        raise ValueError(f"samples is empty at {name}: shape {samples.shape}.")
    if not _tree.is_traced(samples) and not jnp.all(jnp.isfinite(samples)):
        raise ValueError(f"samples has NaN or infinite entries at {name}.")
    return jnp.reshape(samples, (*batch, -1, how.fan_in))


def grow_subspace(
    subspace: Subspace,
    samples: Any,
    *,
    threshold: float = 0.97,
    importance: float | None = None,
) -> Subspace:
    """Adds the fewest directions that reach the energy share `threshold`.

    With U the basis of a leaf, R its `samples` as columns, R̂ = R − U Uᵀ R and σ̂ the
    singular values of R̂, appends the k leading left vectors of R̂, k the smallest with

        ‖R‖² − ‖R̂‖² + Σ_{i≤k} σ̂_i²  ≥  threshold · ‖R‖²        (GPM, eq. 5 and 9)

    and, with `importance` = α (Scaled Gradient Projection), σ_i the singular value of
    the samples along direction i and σ_max the largest of them,

        λ_i ← min(1, λ_i + (α + 1) σ_i / (α σ_i + σ_max)).

    A full basis stays full: when room ends, the strongest directions are in. Samples
    that are zero change nothing; NaN raises outside jit and changes nothing inside.
    Directions with less than 1e-12 of the energy (1e-6 inside jit) count as noise. With
    threshold = 1 what was sampled is protected to 1e-6 of ‖R‖ however badly it is
    conditioned (`test_threshold_one_spans_badly_conditioned_samples`); inside jit, to
    1e-6 times the condition number.

    A `Covariance` stands for all the samples it has seen, G = RᵀR being all that is
    asked of them: (I − UUᵀ) G (I − UUᵀ) replaces R̂ᵀR̂. It is n × n however many they
    were, and devices that saw parts of them need one sum (`merge_covariance`), no
    gather. Its float32 sums leave 1e-6 of the energy as noise. Samples over several
    processes take this way by themselves; sharded samples inside jit cost one sum, too
    (fewer than n: the samples are gathered).

    Args:
      subspace: what is protected so far.
      samples: a `Covariance`, or a tree like the parameters (or a tuple in leaf order):
        an array (num_samples, n) of layer inputs or of gradient columns, (layers,
        num_samples, n) for stacked kernels, or None where nothing is to be learnt;
        samples of an unprotected leaf are ignored, so that `capture_inputs` fits any
        subspace.
      threshold: energy share in [0, 1].
      importance: α > 0 of Scaled Gradient Projection; None gives λ = 1.

    Returns:
      A `Subspace` of the same shapes.

    Raises:
      ValueError: for samples of the wrong shape, empty or not finite, or a threshold
        outside [0, 1].

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
    if importance is not None and importance <= 0:
        raise ValueError(f"importance must be positive, got {importance}.")
    by_gram = isinstance(samples, Covariance)
    entries = samples.moments if by_gram else samples
    names, leaves = _tree.flatten_with_names(entries)
    if len(leaves) != len(subspace.bases):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} {names}, expected {len(subspace.bases)}."
        )
    grown = []
    for name, x, basis, weights in zip(names, leaves, *subspace, strict=True):
        if basis is None or _tree.is_hole(x):
            grown.append((basis, weights))
            continue
        # Energy that rounded bases leave over of what they span.
        rounding = float(jnp.finfo(basis.dtype).eps) ** 2
        options = dict(threshold=threshold, importance=importance, rounding=rounding)
        evidence, grow = jnp.asarray(x), _grow_leaf_by
        if by_gram:
            check_moment(evidence, name, basis, weights)
        else:
            evidence = sample_rows(name, evidence, basis, weights)
            if _tree.is_traced(evidence) or evidence.is_fully_addressable:
                grow = _grow_leaf
            else:
                evidence = _gram(evidence)
        grown.append(on_host(grow, basis, weights, evidence, **options))
    return Subspace(*zip(*grown, strict=True))


def gradient_samples(subspace: Subspace, gradient: Any) -> tuple:
    """The columns of a gradient as samples of the fan-in space, in leaf order.

    A gradient of shape (in, out) is `out` samples of length `in`. Pass the result to
    `grow_subspace` or, step by step, to `update_sketch`.
    """

    def leaf(g, basis, weights):
        if _tree.is_hole(g) or basis is None:
            return None
        how = layout(basis, weights)
        outputs = [d for d in range(g.ndim) if d not in how.batch + how.protected]
        rows = jnp.transpose(g, (*how.batch, *outputs, *how.protected))
        return rows.reshape(*(g.shape[d] for d in how.batch), -1, how.fan_in)

    return tuple(map(leaf, _tree.flatten(gradient)[0], *subspace))


@jax.jit
def _merge_leaf(basis, weights, other, other_weights):
    columns, lam = to_columns(basis, weights)
    guest, guest_lam = to_columns(other, other_weights)
    guests = jnp.maximum(jnp.sum(used_columns(guest), axis=-1)[..., None, None], 1)
    merged = extend(columns, transpose(guest) / jnp.sqrt(guests), 1.0)
    overlap = jnp.square(matmul(transpose(merged), guest))
    wanted = jnp.sum(overlap * guest_lam[..., None, :], axis=-1)
    lam = jnp.where(
        used_columns(merged), jnp.clip(jnp.maximum(lam, wanted), 0.0, 1.0), 0.0
    )
    return to_storage(merged, lam, basis, weights)


def merge_subspaces(subspace: Subspace, other: Subspace) -> Subspace:
    """The span of both, in the shapes of the first.

    Directions of `other` outside `subspace` are appended while there is room; a
    direction u gets λ = max(its own, uᵀ U' diag(λ') U'ᵀ u), primes for `other`.

    Raises:
      ValueError: if the two were made for different leaves or axes.
    """
    if len(subspace.bases) != len(other.bases):
        raise ValueError(
            f"other has {len(other.bases)} leaves, expected {len(subspace.bases)}."
        )

    def leaf(position, basis, weights, guest, guest_weights):
        if guest is None:
            return basis, weights
        if basis is None or basis.shape[:-1] != guest.shape[:-1]:
            mine = None if basis is None else basis.shape
            raise ValueError(
                f"other has a basis of shape {guest.shape} at leaf {position}, "
                f"expected {mine} up to the rank."
            )
        return on_host(_merge_leaf, basis, weights, guest, guest_weights)

    positions = range(len(subspace.bases))
    return Subspace(*zip(*map(leaf, positions, *subspace, *other), strict=True))


def truncate_subspace(subspace: Subspace, max_rank: int) -> Subspace:
    """Keeps the `max_rank` directions of largest λ per leaf, older ones first.

    The room stays as it was; what is freed can be used by the next task.
    """
    if max_rank < 0:
        raise ValueError(f"max_rank must be at least 0, got {max_rank}.")

    def leaf(basis, weights):
        if basis is None:
            return None, None
        columns, lam = to_columns(basis, weights)
        order = jnp.argsort(
            -jnp.where(used_columns(columns), lam, -1.0), axis=-1, stable=True
        )
        keep = places(lam.shape[-1], lam.shape[:-1]) < max_rank
        columns = jnp.take_along_axis(columns, order[..., None, :], axis=-1)
        columns = jnp.where(keep[..., None, :], columns, 0.0)
        lam = jnp.where(keep, jnp.take_along_axis(lam, order, axis=-1), 0.0)
        return to_storage(columns, lam, basis, weights)

    return Subspace(*zip(*map(leaf, *subspace), strict=True))
