"""Growing, merging and truncating subspaces at task boundaries.

Everything goes through the symmetric Gram matrix of the samples and `eigh`: an SVD of
the samples does not always converge on rank-deficient activations. All functions are
pure, run under jit, and keep every shape. A Gram matrix squares the condition number,
so outside jit the arithmetic is float64, on the host; inside it is float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamr import _trees
from adamr.subspace import Subspace, layout

__all__ = [
    "gradient_samples",
    "grow_subspace",
    "merge_subspaces",
    "truncate_subspace",
]

# Share of the energy that is rounding noise: of the Gram matrix in float32, of float32
# samples in float64.
_FLOOR = {"float32": 1e-6, "float64": 1e-12}
_TOLERANCE = 1e-6  # of the comparison with the threshold


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _transpose(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _to_columns(basis: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Storage shape -> (*batch, fan_in, r) and (*batch, r)."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    outputs = [d for d in range(basis.ndim - 1) if d not in how.batch + how.protected]
    order = (*how.batch, *how.protected, *outputs, basis.ndim - 1)
    columns = _wide(basis).transpose(order)
    columns = columns.reshape(*batch, how.fan_in, how.capacity)
    return columns, _wide(weights).reshape(*batch, how.capacity)


def _to_storage(columns, lam, basis, weights) -> tuple[jax.Array, jax.Array]:
    """Inverse of `_to_columns`, with the shapes and dtypes of `basis`, `weights`."""
    how = layout(basis, weights)
    outputs = [d for d in range(basis.ndim - 1) if d not in how.batch + how.protected]
    order = (*how.batch, *how.protected, *outputs, basis.ndim - 1)
    back = [order.index(d) for d in range(basis.ndim)]
    stored = columns.reshape([basis.shape[d] for d in order]).transpose(back)
    return stored.astype(basis.dtype), lam.reshape(weights.shape).astype(weights.dtype)


def _used(columns: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(columns), axis=-2) > 0.5


def _residual(columns: jax.Array, x: jax.Array) -> jax.Array:
    """(I − U Uᵀ) x."""
    return x - _matmul(columns, _matmul(_transpose(columns), x))


def _places(size: int, batch: tuple[int, ...]) -> jax.Array:
    """0, 1, …, size − 1 along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, (*batch, size), len(batch))


def _append(columns: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """Writes the first `count` columns of `new` behind the used ones of `columns`."""
    start = jnp.sum(_used(columns), axis=-1, keepdims=True, dtype=jnp.int32)
    place = _places(columns.shape[-1], columns.shape[:-2]) - start
    source = jnp.clip(place, 0, new.shape[-1] - 1)
    moved = jnp.take_along_axis(new, source[..., None, :], axis=-1)
    fresh = (place >= 0) & (place < count[..., None])
    return jnp.where(fresh[..., None, :], moved, columns)


def _importance(energy: jax.Array, alpha: float) -> jax.Array:
    """λ_i = (α+1) σ_i / (α σ_i + σ_max), with σ_i² = `energy`."""
    sigma = jnp.sqrt(jnp.maximum(energy, 0.0))
    below = alpha * sigma + jnp.max(sigma, axis=-1, keepdims=True)
    return (alpha + 1.0) * sigma / jnp.where(below > 0, below, 1.0)


def _extend(columns: jax.Array, samples: jax.Array, threshold: float) -> jax.Array:
    """The fewest directions that reach the energy share, appended to `columns`."""
    fan_in, capacity = columns.shape[-2:]
    residual = _residual(columns, _transpose(samples))
    gram = _matmul(residual, _transpose(residual))
    energy, vectors = jnp.linalg.eigh(gram)
    energy = jnp.maximum(energy[..., ::-1], 0.0)
    vectors = vectors[..., ::-1]
    have = 1.0 - jnp.sum(energy, axis=-1, keepdims=True)
    before = have + jnp.cumsum(energy, axis=-1) - energy
    short = before < threshold - (_TOLERANCE if threshold < 1 else 0.0)
    wanted = short & (energy > _FLOOR[str(energy.dtype)])
    free = capacity - jnp.sum(_used(columns), axis=-1, dtype=jnp.int32)
    count = jnp.minimum(jnp.sum(wanted, axis=-1, dtype=jnp.int32), free)

    most = min(capacity, fan_in)
    chosen = _places(most, count.shape) < count[..., None]
    new = jnp.where(chosen[..., None, :], vectors[..., :most], 0.0)
    # Twice is enough; QR fills zero columns with anything: mask after it.
    for _ in range(2):
        new = jnp.linalg.qr(_residual(columns, new)).Q
        new = jnp.where(chosen[..., None, :], new, 0.0)
    return _append(columns, new, count)


def _normalized(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples (…, num_samples, n) of energy 1, and (…, 1, 1) whether they are evidence.

    Zeros, or what is not finite, is none and becomes zeros: NaN must not reach `eigh`,
    which may not return.
    """
    samples = _wide(samples)
    # First by the peak: squares of tiny or huge entries leave the range of float32.
    peak = jnp.max(jnp.abs(samples), axis=(-1, -2), keepdims=True, initial=0.0)
    samples = samples / jnp.where(peak > 0, peak, 1.0)
    total = jnp.sum(jnp.square(samples), axis=(-1, -2), keepdims=True)
    usable = jnp.isfinite(total) & jnp.isfinite(peak) & (total > 0)
    safe = jnp.sqrt(jnp.where(usable, total, 1.0))
    return jnp.where(usable, samples / safe, 0.0), usable


@functools.partial(jax.jit, static_argnames=("threshold", "importance"))
def _grow_leaf(basis, weights, samples, threshold, importance):
    columns, lam = _to_columns(basis, weights)
    samples, usable = _normalized(samples)
    grown = _extend(columns, samples, threshold)
    grown = jnp.where(usable, grown, columns)
    if importance is None:
        lam_new = jnp.where(_used(columns), lam, _used(grown).astype(jnp.float32))
    else:
        energy = jnp.sum(jnp.square(_matmul(samples, grown)), axis=-2)
        lam_new = jnp.minimum(1.0, lam + _importance(energy, importance))
        lam_new = jnp.where(_used(grown) & usable[..., 0], lam_new, lam)
    return _to_storage(grown, lam_new, basis, weights)


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return None


def _on_host(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """`function` in float64 on the host; results in dtype and place of `arrays`.

    Where that cannot be (under a trace, parts of an array elsewhere): as it is.
    """
    host = _host()
    here = all(not _trees.is_traced(x) and x.is_fully_addressable for x in arrays)
    if host is None or not here:
        return function(*arrays, **options)
    with jax.enable_x64(True), jax.default_device(host):
        wide = [np.asarray(x, np.float64) for x in arrays]
        results = [np.asarray(x) for x in function(*wide, **options)]
    pairs = zip(arrays, results, strict=False)
    return tuple(_trees.placed_like(old, jnp.asarray(new)) for old, new in pairs)


def _sample_rows(name, samples, basis, weights) -> jax.Array:
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
    if not _trees.is_traced(samples) and not jnp.all(jnp.isfinite(samples)):
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

    Args:
      subspace: what is protected so far.
      samples: tree like the parameters (or a tuple in leaf order): an array
        (num_samples, n) of layer inputs or of gradient columns, (layers, num_samples,
        n) for stacked kernels, or None where nothing is to be learnt; samples of an
        unprotected leaf are ignored, so that `capture_inputs` fits any subspace.
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
    names, leaves = _trees.flatten_with_names(samples)
    if len(leaves) != len(subspace.bases):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} {names}, expected {len(subspace.bases)}."
        )
    grown = []
    for name, x, basis, weights in zip(names, leaves, *subspace, strict=True):
        if basis is None or _trees.is_hole(x):
            grown.append((basis, weights))
            continue
        rows = _sample_rows(name, jnp.asarray(x), basis, weights)
        options = dict(threshold=threshold, importance=importance)
        grown.append(_on_host(_grow_leaf, basis, weights, rows, **options))
    return Subspace(*zip(*grown, strict=True))


def gradient_samples(subspace: Subspace, gradient: Any) -> tuple:
    """The columns of a gradient as samples of the fan-in space, in leaf order.

    A gradient of shape (in, out) is `out` samples of length `in`. Pass the result to
    `grow_subspace` or, step by step, to `update_sketch`.
    """

    def leaf(g, basis, weights):
        if _trees.is_hole(g) or basis is None:
            return None
        how = layout(basis, weights)
        outputs = [d for d in range(g.ndim) if d not in how.batch + how.protected]
        rows = jnp.transpose(g, (*how.batch, *outputs, *how.protected))
        return rows.reshape(*(g.shape[d] for d in how.batch), -1, how.fan_in)

    return tuple(map(leaf, _trees.flatten(gradient)[0], *subspace))


@jax.jit
def _merge_leaf(basis, weights, other, other_weights):
    columns, lam = _to_columns(basis, weights)
    guest, guest_lam = _to_columns(other, other_weights)
    guests = jnp.maximum(jnp.sum(_used(guest), axis=-1)[..., None, None], 1)
    merged = _extend(columns, _transpose(guest) / jnp.sqrt(guests), 1.0)
    overlap = jnp.square(_matmul(_transpose(merged), guest))
    wanted = jnp.sum(overlap * guest_lam[..., None, :], axis=-1)
    lam = jnp.where(_used(merged), jnp.clip(jnp.maximum(lam, wanted), 0.0, 1.0), 0.0)
    return _to_storage(merged, lam, basis, weights)


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
        return _on_host(_merge_leaf, basis, weights, guest, guest_weights)

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
        columns, lam = _to_columns(basis, weights)
        order = jnp.argsort(-jnp.where(_used(columns), lam, -1.0), axis=-1, stable=True)
        keep = _places(lam.shape[-1], lam.shape[:-1]) < max_rank
        columns = jnp.take_along_axis(columns, order[..., None, :], axis=-1)
        columns = jnp.where(keep[..., None, :], columns, 0.0)
        lam = jnp.where(keep, jnp.take_along_axis(lam, order, axis=-1), 0.0)
        return _to_storage(columns, lam, basis, weights)

    return Subspace(*zip(*map(leaf, *subspace), strict=True))
