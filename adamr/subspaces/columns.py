"""Bases as matrices of columns: the algebra of growing them.

Everything goes through symmetric Gram matrices and `eigh`: an SVD of the samples does
not always converge on rank-deficient activations. A Gram matrix squares the condition
number, so outside jit the arithmetic is float64, on the host; inside it is float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adamr import _processes, _tree
from adamr.subspaces.subspace import layout

# Share of the energy that is rounding noise: of the Gram matrix in float32, of float32
# samples in float64.
FLOOR = {"float32": 1e-6, "float64": 1e-12}
TOLERANCE = 1e-6  # of the comparison with the threshold


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transpose(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def to_columns(basis: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Storage shape -> (*batch, fan_in, r) and (*batch, r)."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    outputs = [d for d in range(basis.ndim - 1) if d not in how.batch + how.protected]
    order = (*how.batch, *how.protected, *outputs, basis.ndim - 1)
    columns = wide(basis).transpose(order)
    columns = columns.reshape(*batch, how.fan_in, how.capacity)
    return columns, wide(weights).reshape(*batch, how.capacity)


def to_storage(columns, lam, basis, weights) -> tuple[jax.Array, jax.Array]:
    """Inverse of `to_columns`, with the shapes and dtypes of `basis`, `weights`."""
    how = layout(basis, weights)
    outputs = [d for d in range(basis.ndim - 1) if d not in how.batch + how.protected]
    order = (*how.batch, *how.protected, *outputs, basis.ndim - 1)
    back = [order.index(d) for d in range(basis.ndim)]
    stored = columns.reshape([basis.shape[d] for d in order]).transpose(back)
    return stored.astype(basis.dtype), lam.reshape(weights.shape).astype(weights.dtype)


def used_columns(columns: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(columns), axis=-2) > 0.5


def residual_columns(columns: jax.Array, x: jax.Array) -> jax.Array:
    """(I − U Uᵀ) x."""
    return x - matmul(columns, matmul(transpose(columns), x))


def places(size: int, batch: tuple[int, ...]) -> jax.Array:
    """0, 1, …, size − 1 along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, (*batch, size), len(batch))


def append(columns: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """Writes the first `count` columns of `new` behind the used ones of `columns`."""
    start = jnp.sum(used_columns(columns), axis=-1, keepdims=True, dtype=jnp.int32)
    place = places(columns.shape[-1], columns.shape[:-2]) - start
    source = jnp.clip(place, 0, new.shape[-1] - 1)
    moved = jnp.take_along_axis(new, source[..., None, :], axis=-1)
    fresh = (place >= 0) & (place < count[..., None])
    return jnp.where(fresh[..., None, :], moved, columns)


def spectrum(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a Gram matrix, largest first, and eigenvectors as columns."""
    energy, vectors = jnp.linalg.eigh(gram)
    return jnp.maximum(energy[..., ::-1], 0.0), vectors[..., ::-1]


def left_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """σ², largest first, and the left singular vectors of x; those of σ = 0 are 0."""
    n, samples = x.shape[-2:]
    if n <= samples:
        return spectrum(matmul(x, transpose(x)))
    energy, right = spectrum(matmul(transpose(x), x))
    inverse = jnp.where(energy > 0, jax.lax.rsqrt(jnp.where(energy > 0, energy, 1)), 0)
    return energy, matmul(x, right) * inverse[..., None, :]


def extend(columns, samples, threshold: float, least: float = 0.0) -> jax.Array:
    """The fewest directions that reach the energy share, appended to `columns`."""
    residual = residual_columns(columns, transpose(samples))
    floor = jnp.maximum(FLOOR[str(residual.dtype)], least)
    return extend_by(columns, *left_vectors(residual), threshold, floor)


def extend_by(columns, energy, vectors, threshold: float, floor: Any) -> jax.Array:
    """The same from the spectrum of what `columns` leave over."""
    capacity = columns.shape[-1]
    have = 1.0 - jnp.sum(energy, axis=-1, keepdims=True)
    before = have + jnp.cumsum(energy, axis=-1) - energy
    short = before < threshold - (TOLERANCE if threshold < 1 else 0.0)
    wanted = short & (energy > floor)
    free = capacity - jnp.sum(used_columns(columns), axis=-1, dtype=jnp.int32)
    count = jnp.minimum(jnp.sum(wanted, axis=-1, dtype=jnp.int32), free)

    most = min(capacity, vectors.shape[-1])
    chosen = places(most, count.shape) < count[..., None]
    new = jnp.where(chosen[..., None, :], vectors[..., :most], 0.0)
    # Twice is enough; QR fills zero columns with anything: mask after it.
    for _ in range(2):
        new = jnp.linalg.qr(residual_columns(columns, new)).Q
        new = jnp.where(chosen[..., None, :], new, 0.0)
    return append(columns, new, count)


def normalized(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples (…, num_samples, n) of energy 1, and (…, 1, 1) whether they are evidence.

    Zeros, or what is not finite, is none and becomes zeros: NaN must not reach `eigh`,
    which may not return.
    """
    samples = wide(samples)
    # First by the peak: squares of tiny or huge entries leave the range of float32.
    peak = jnp.max(jnp.abs(samples), axis=(-1, -2), keepdims=True, initial=0.0)
    samples = samples / jnp.where(peak > 0, peak, 1.0)
    total = jnp.sum(jnp.square(samples), axis=(-1, -2), keepdims=True)
    usable = jnp.isfinite(total) & jnp.isfinite(peak) & (total > 0)
    safe = jnp.sqrt(jnp.where(usable, total, 1.0))
    return jnp.where(usable, samples / safe, 0.0), usable


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return None


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, parts of which may lie on other hosts."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # pyright: ignore
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)


def on_host(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """`function` in float64 on the host; results in dtype and place of `arrays`.

    With arrays over several processes all compute it and the first one's word counts:
    eigenvectors may differ between machines. Under a trace: `function` as it is.
    """
    host = _host()
    if host is None or any(map(_tree.is_traced, arrays)):
        return function(*arrays, **options)
    wide = [whole(x).astype(np.float64) for x in arrays]
    with jax.enable_x64(True), jax.default_device(host):
        results = [np.asarray(x) for x in function(*wide, **options)]
    pairs = zip(arrays, results, strict=False)
    rounded = [new.astype(old.dtype) for old, new in pairs]
    if not all(x.is_fully_addressable for x in arrays):
        rounded = _processes.agreed_arrays(rounded)
    pairs = zip(arrays, rounded, strict=False)
    return tuple(_tree.placed_like(old, new) for old, new in pairs)
