"""Feature covariance and its null space: what Adam-NSCL protects.

Where GPM grows a basis from a sample of layer inputs, Adam-NSCL keeps the second moment
X̄ of all inputs so far (n × n per kernel, no rank to choose) and lets a kernel move only
where the inputs have hardly any energy.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _trees
from adamr._columns import _matmul, _on_host, _to_columns, _to_storage, _transpose
from adamr.subspace import Subspace, layout

__all__ = [
    "Covariance",
    "empty_covariance",
    "merge_covariance",
    "null_space_complement",
    "update_covariance",
]

_MOST = jnp.iinfo(jnp.int32).max


class Covariance(NamedTuple):
    """Uncentred second moments in leaf order; None where nothing is protected.

    Attributes:
      moments: X̄, float32 (*batch, n, n), n the fan-in.
      counts: n̄, int32 (*batch), samples taken in so far; saturates.
    """

    moments: tuple[jax.Array | None, ...]
    counts: tuple[jax.Array | None, ...]


def check_moment(moment, where: str, basis, weights) -> None:
    """Raises unless a moment has the shape for a basis."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    expected = (*batch, how.fan_in, how.fan_in)
    if moment.shape != expected:
        text = f"covariance has shape {moment.shape} at {where}, expected {expected}"
        in_parts = moment.shape[1:] == expected
        hint = ": add its parts up with merge_covariance" if in_parts else ""
        raise ValueError(f"{text}{hint}.")


def empty_covariance(subspace: Subspace, *, parts: int | None = None) -> Covariance:
    """Zero moments and counts for every protected leaf.

    Args:
      subspace: says which leaves and axes are protected; its bases do not matter.
      parts: for samples that are sharded over devices, how many sums to keep apart, so
        that taking samples in sends nothing: a leading axis of this size, to be placed
        like the samples (`jax.device_put(covariance, NamedSharding(mesh, P("data")))`)
        and added up once by `merge_covariance`.

    Raises:
      ValueError: for parts below 1.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((4, 2))}))
    >>> c.moments[0].shape
    (4, 4)
    """

    if parts is not None and parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}.")

    def leaf(basis, weights):
        if basis is None:
            return None, None
        how = layout(basis, weights)
        batch = tuple(basis.shape[d] for d in how.batch)
        batch = batch if parts is None else (parts, *batch)
        moment = jnp.zeros((*batch, how.fan_in, how.fan_in), jnp.float32)
        return moment, jnp.zeros(batch, jnp.int32)

    return Covariance(*zip(*map(leaf, *subspace), strict=True))


def _fits(samples: jax.Array, batch: list[int], fan_in: int) -> bool:
    at = len(batch)
    inner = samples.shape[at + 1 :]
    same = list(samples.shape[:at]) == batch
    return same and bool(inner) and math.prod(inner) == fan_in


def _dealt(name: str, samples: jax.Array, batch: list[int]) -> jax.Array:
    """Equal blocks of the rows for the parts, in order, as devices hold them."""
    parts, at = batch[0], len(batch) - 1
    number = samples.shape[at]
    if number % parts:
        raise ValueError(
            f"samples has {number} rows at {name}, expected a multiple of {parts}, the "
            "parts of the covariance."
        )
    shape = (*samples.shape[:at], parts, number // parts, *samples.shape[at + 1 :])
    return jnp.moveaxis(samples.reshape(shape), at, 0)


def _rows(name: str, samples: jax.Array, moment: jax.Array) -> jax.Array:
    """Checks samples and brings them to (*batch, num_samples, n)."""
    *batch, fan_in, _ = moment.shape
    if (
        batch
        and _fits(samples, batch[1:], fan_in)
        and not _fits(samples, batch, fan_in)
    ):
        samples = _dealt(name, samples, batch)
    at = len(batch)
    inner = samples.shape[at + 1 :]
    if list(samples.shape[:at]) != batch or not inner or math.prod(inner) != fan_in:
        raise ValueError(
            f"samples has shape {samples.shape} at {name}, expected "
            f"{(*batch, 'num_samples', fan_in)}."
        )
    if samples.shape[at] == 0:
        raise ValueError(f"samples is empty at {name}: shape {samples.shape}.")
    if not _trees.is_traced(samples) and not jnp.all(jnp.isfinite(samples)):
        raise ValueError(f"samples has NaN or infinite entries at {name}.")
    return samples.reshape(*batch, -1, fan_in)


@jax.jit
def _averaged(moment, count, rows):
    number = rows.shape[-2]
    rows = rows.astype(jnp.float32)
    new = _matmul(_transpose(rows), rows) / number
    usable = jnp.all(jnp.isfinite(new), axis=(-1, -2))
    total = jnp.where(count > _MOST - number, _MOST, count + number)
    share = (number / total.astype(jnp.float32))[..., None, None]
    averaged = moment + share * (new - moment)
    averaged = jnp.where(usable[..., None, None], averaged, moment)
    return averaged, jnp.where(usable, total, count)


def update_covariance(covariance: Covariance, samples: Any) -> Covariance:
    """Takes in a batch of layer inputs; one call per batch, under jit or scan.

        X̄ <- (n̄ X̄ + XᵀX) / (n̄ + n),   n̄ <- n̄ + n

    so that after any split into batches X̄ is the mean of x xᵀ over all samples
    (`test_covariance_of_batches_equals_that_of_all`). The authors' code averages each
    batch to one vector first and adds the products up; pass such means as samples for
    that.

    Args:
      covariance: so far; one in parts deals the rows to them in equal blocks.
      samples: as for `grow_subspace`: tree like the parameters or a tuple in leaf
        order, (num_samples, n), (layers, num_samples, n) for stacked kernels, or None.

    Returns:
      A `Covariance` of the same shapes. Samples that are not finite, or whose squares
      are not, raise outside jit or leave the slice as it was.

    Raises:
      ValueError: for samples of the wrong shape, empty or not finite.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((2, 1))}))
    >>> c = update_covariance(c, {"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])})
    >>> c.moments[0]
    Array([[2., 0.],
           [0., 0.]], dtype=float32)
    """
    names, leaves = _trees.flatten_with_names(samples)
    if len(leaves) != len(covariance.moments):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} {names}, expected {len(covariance.moments)}."
        )

    def leaf(name, x, moment, count):
        if moment is None or _trees.is_hole(x):
            return moment, count
        return _averaged(moment, count, _rows(name, jnp.asarray(x), moment))

    return Covariance(*zip(*map(leaf, names, leaves, *covariance), strict=True))


@jax.jit
def _merged(moments, counts):
    counts = counts.astype(jnp.float32)
    total = jnp.sum(counts, axis=0, keepdims=True)
    share = (counts / jnp.where(total > 0, total, 1.0))[..., None, None]
    count = jnp.where(total < _MOST, total.astype(jnp.int32), _MOST)[0]
    return jnp.sum(share * moments, axis=0), count


def merge_covariance(covariance: Covariance) -> Covariance:
    """That of all samples, from the parts along the leading axis.

        X̄ = Σ n̄_i X̄_i / Σ n̄_i,   n̄ = Σ n̄_i

    Where the parts lie on different devices, one sum of n × n numbers per kernel is all
    that is ever sent (`test_bases_without_gathering`).

    Args:
      covariance: from `empty_covariance(..., parts=...)`.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((2, 1))}), parts=2)
    >>> c = update_covariance(c, {"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])})
    >>> c.moments[0][:, 0, 0], merge_covariance(c).moments[0][0, 0]
    (Array([4., 0.], dtype=float32), Array(2., dtype=float32))
    """

    def leaf(moment, count):
        return (None, None) if moment is None else _merged(moment, count)

    return Covariance(*zip(*map(leaf, *covariance), strict=True))


@jax.jit
def _complement(basis, weights, moment, ratio, floor):
    columns, lam = _to_columns(basis, weights)
    moment = moment.astype(columns.dtype)
    peak = _trees.largest(moment, (-1, -2), keepdims=True)
    usable = jnp.isfinite(peak)
    # NaN must not reach `eigh`, which may not return.
    moment = jnp.where(usable, moment / jnp.where(peak > 0, peak, 1.0), 0.0)
    energy, vectors = jnp.linalg.eigh(moment)
    energy = jnp.maximum(energy, 0.0)
    least = jnp.maximum(energy[..., :1], floor * energy[..., -1:])
    above = energy > ratio * least
    strongest_first = jnp.where(above[..., None, :], vectors, 0.0)[..., ::-1]
    columns = jnp.where(usable, strongest_first, columns)
    lam = jnp.where(usable[..., 0], above[..., ::-1].astype(lam.dtype), lam)
    return _to_storage(columns, lam, basis, weights)


def null_space_complement(
    covariance: Covariance,
    subspace_like: Subspace,
    *,
    ratio: float = 10.0,
    floor: float = 1e-6,
) -> Subspace:
    """What lies outside the approximate null space of the feature covariance.

    With λ_i, u_i the eigenpairs of X̄, protects every u_i with

        λ_i > ratio · max(λ_min, floor · λ_max)

    so that projecting it out is P = U2 U2ᵀ, U2 the eigenvectors up to this bound.
    Guarantee: for a step Δ = P Δ' of a kernel, the mean of ‖xᵀΔ‖² over all samples is
    at most ratio · max(λ_min, floor · λ_max) · ‖Δ‖², the approximation that the method
    makes (`test_mean_response_changes_by_at_most_the_bound`). At least one direction
    stays free.

    Without a floor (the paper: 0) an input that never fires makes λ_min = 0, and then
    only exact zeros are free; the eigenvalues of a float32 matrix are noise below
    ~1e-7 λ_max. A larger floor leaves more room to learn and protects less.

    Args:
      covariance: of all tasks so far.
      subspace_like: gives shapes and dtypes; what it protects is replaced. Its capacity
        must be the fan-in (`max_rank=None`).
      ratio: a ≥ 1; the authors use 10 for ten tasks and 30 for twenty.
      floor: smallest λ_min believed, as a share of λ_max.

    Returns:
      A `Subspace` with λ = 1, strongest direction first. Where no sample has been seen
      nothing is protected; a moment that is not finite leaves the leaf as it was.

    Raises:
      ValueError: for ratio < 1, a negative floor, a capacity below the fan-in, or a
        covariance made for other leaves.

    >>> from adamr import empty_subspace, project
    >>> kernel = jnp.ones((4, 1))
    >>> s = empty_subspace(kernel)
    >>> c = update_covariance(empty_covariance(s), jnp.diag(jnp.array([4.0, 2, 0, 0])))
    >>> project(null_space_complement(c, s), kernel)[:, 0]
    Array([0., 0., 1., 1.], dtype=float32)

    References:
      Wang, Li, Sun, Xu, Training Networks in Null Space of Feature Covariance for
      Continual Learning, arXiv:2103.07113.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}.")
    if not floor >= 0:
        raise ValueError(f"floor must not be negative, got {floor}.")
    if len(covariance.moments) != len(subspace_like.bases):
        raise ValueError(
            f"covariance was made for {len(covariance.moments)} leaves, subspace_like "
            f"for {len(subspace_like.bases)}."
        )

    def leaf(position, basis, weights, moment):
        if basis is None or moment is None:
            return basis, weights
        check_moment(moment, f"leaf {position}", basis, weights)
        how = layout(basis, weights)
        if how.capacity < how.fan_in:
            raise ValueError(
                f"subspace_like has room for {how.capacity} directions at leaf "
                f"{position}, expected its fan-in {how.fan_in}: make it with "
                "max_rank=None."
            )
        return _on_host(_complement, basis, weights, moment, ratio=ratio, floor=floor)

    positions = range(len(covariance.moments))
    pairs = map(leaf, positions, *subspace_like, covariance.moments)
    return Subspace(*zip(*pairs, strict=True))
