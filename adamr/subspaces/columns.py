"""Linear algebra of bases as matrices of columns, shared by all that grows them.

Everything works on symmetric Gram matrices and `eigh`: an SVD of the samples does not
always converge on rank-deficient activations. A Gram matrix squares the condition
number, so outside jit the arithmetic is float64 on the host (`on_host`); inside jit it
is float32.

Shapes: a basis is (*batch, fan_in, capacity) with zero columns where it is unused, its
λ are (*batch, capacity), samples are (*batch, num_samples, fan_in).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from adamr import _processes, _tree
from adamr.subspaces.subspace import layout

# Energy shares below these are rounding noise: of a Gram matrix summed in float32, and
# of float32 samples in float64 arithmetic.
ENERGY_FLOOR = {"float32": 1e-6, "float64": 1e-12}

# Slack in the comparison of an energy share with a threshold below 1.
THRESHOLD_SLACK = 1e-6


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product at the highest precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transpose(a: jax.Array) -> jax.Array:
    """The last two axes swapped."""
    return jnp.swapaxes(a, -1, -2)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def to_columns(basis: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Storage shape to columns: (*batch, fan_in, capacity) and λ (*batch, capacity)."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    columns = at_least_float32(basis).transpose(_column_order(basis, weights))
    columns = columns.reshape(*batch, how.fan_in, how.capacity)
    return columns, at_least_float32(weights).reshape(*batch, how.capacity)


def to_storage(
    columns: jax.Array, lam: jax.Array, basis: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `to_columns`, with the shapes and dtypes of `basis`, `weights`."""
    order = _column_order(basis, weights)
    back = [order.index(d) for d in range(basis.ndim)]
    stored = columns.reshape([basis.shape[d] for d in order]).transpose(back)
    return stored.astype(basis.dtype), lam.reshape(weights.shape).astype(weights.dtype)


def _column_order(basis: jax.Array, weights: jax.Array) -> tuple[int, ...]:
    """Axes of a stored basis: batch, protected, outputs (of size 1), directions."""
    how, directions = layout(basis, weights), basis.ndim - 1
    outputs = [d for d in range(directions) if d not in how.batch + how.protected]
    return (*how.batch, *how.protected, *outputs, directions)


def used_columns(columns: jax.Array) -> jax.Array:
    """Which columns hold a direction, bool (*batch, capacity); the others are zero."""
    return jnp.sum(jnp.square(columns), axis=-2) > 0.5


def residual_columns(columns: jax.Array, x: jax.Array) -> jax.Array:
    """(I − U Uᵀ) x, with U = `columns`."""
    return x - matmul(columns, matmul(transpose(columns), x))


def residual_gram(columns: jax.Array, gram: jax.Array) -> jax.Array:
    """(I − U Uᵀ) G (I − U Uᵀ): the Gram matrix of what lies outside `columns`."""
    rest = residual_columns(columns, transpose(residual_columns(columns, gram)))
    return (rest + transpose(rest)) / 2


def column_numbers(size: int, batch: tuple[int, ...]) -> jax.Array:
    """0, 1, …, size − 1 along the last axis of an int32 array (*batch, size)."""
    return jax.lax.broadcasted_iota(jnp.int32, (*batch, size), len(batch))


def append_columns(columns: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """`columns` with the first `count` columns of `new` after the used ones."""
    start = jnp.sum(used_columns(columns), axis=-1, keepdims=True, dtype=jnp.int32)
    place = column_numbers(columns.shape[-1], columns.shape[:-2]) - start
    source = jnp.clip(place, 0, new.shape[-1] - 1)
    moved = jnp.take_along_axis(new, source[..., None, :], axis=-1)
    fresh = (place >= 0) & (place < count[..., None])
    return jnp.where(fresh[..., None, :], moved, columns)


def spectrum(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a Gram matrix, largest first, and eigenvectors as columns."""
    energy, vectors = jnp.linalg.eigh(gram)
    return jnp.maximum(energy[..., ::-1], 0.0), vectors[..., ::-1]


def left_singular_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """σ² of x, largest first, and its left singular vectors; those of σ = 0 are 0."""
    n, samples = x.shape[-2:]
    if n <= samples:
        return spectrum(matmul(x, transpose(x)))
    energy, right = spectrum(matmul(transpose(x), x))
    inverse = jnp.where(energy > 0, jax.lax.rsqrt(jnp.where(energy > 0, energy, 1)), 0)
    return energy, matmul(x, right) * inverse[..., None, :]


def extend_by_samples(
    columns: jax.Array, samples: jax.Array, threshold: float, least: ArrayLike = 0.0
) -> jax.Array:
    """`columns` and the fewest directions that reach the energy share `threshold`.

    `samples` have energy 1 (`normalized_samples`); energy up to `least` is noise.
    """
    residual = residual_columns(columns, transpose(samples))
    floor = jnp.maximum(ENERGY_FLOOR[str(residual.dtype)], least)
    energy, vectors = left_singular_vectors(residual)
    return extend_by_spectrum(columns, energy, vectors, threshold, floor)


def extend_by_spectrum(
    columns: jax.Array,
    energy: jax.Array,
    vectors: jax.Array,
    threshold: float,
    floor: ArrayLike,
) -> jax.Array:
    """The same from the spectrum of the part of the samples outside `columns`."""
    capacity = columns.shape[-1]
    have = 1.0 - jnp.sum(energy, axis=-1, keepdims=True)
    before = have + jnp.cumsum(energy, axis=-1) - energy
    short = before < threshold - (THRESHOLD_SLACK if threshold < 1 else 0.0)
    wanted = short & (energy > floor)
    free = capacity - jnp.sum(used_columns(columns), axis=-1, dtype=jnp.int32)
    count = jnp.minimum(jnp.sum(wanted, axis=-1, dtype=jnp.int32), free)
    return append_columns(columns, orthonormal_new(columns, vectors, count), count)


def orthonormal_new(
    columns: jax.Array, vectors: jax.Array, count: jax.Array
) -> jax.Array:
    """The first `count` of `vectors`, orthonormal and orthogonal to `columns`.

    A QR of all vectors would cost most of the time where few are chosen: the narrowest
    of a few widths that holds them is taken.
    """
    vectors = vectors[..., : columns.shape[-1]]
    width = vectors.shape[-1]
    widths = sorted({min(width, max(64, width // part)) for part in (8, 4, 2, 1)})

    def within(narrow: int) -> Callable[[], jax.Array]:
        def orthonormal() -> jax.Array:
            chosen = column_numbers(narrow, count.shape) < count[..., None]
            new = jnp.where(chosen[..., None, :], vectors[..., :narrow], 0.0)
            # Twice is enough. QR turns zero columns into arbitrary ones: mask after it.
            for _ in range(2):
                new = jnp.linalg.qr(residual_columns(columns, new)).Q
                new = jnp.where(chosen[..., None, :], new, 0.0)
            return jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(0, width - narrow)])

        return orthonormal

    if len(widths) == 1:
        return within(width)()
    most = jnp.max(count, initial=0)
    which = jnp.sum(most > jnp.array(widths[:-1]), dtype=jnp.int32)
    return jax.lax.switch(which, [within(narrow) for narrow in widths])


def normalized_samples(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples scaled to energy 1, and whether they are usable, bool (*batch, 1, 1).

    Samples that are zero or not finite are not usable and become zeros: NaN must not
    reach `eigh`, which may not return.
    """
    samples = at_least_float32(samples)
    # First by the peak: squares of tiny or huge entries leave the range of float32.
    peak = jnp.max(jnp.abs(samples), axis=(-1, -2), keepdims=True, initial=0.0)
    samples = samples / jnp.where(peak > 0, peak, 1.0)
    total = jnp.sum(jnp.square(samples), axis=(-1, -2), keepdims=True)
    usable = jnp.isfinite(total) & jnp.isfinite(peak) & (total > 0)
    safe = jnp.sqrt(jnp.where(usable, total, 1.0))
    return jnp.where(usable, samples / safe, 0.0), usable


def unit_trace(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Like `normalized_samples`, for the Gram matrix of the samples."""
    gram = at_least_float32(gram)
    peak = _tree.largest(gram, (-1, -2), keepdims=True)
    usable = jnp.isfinite(peak) & (peak > 0)
    gram = jnp.where(usable, gram / jnp.where(usable, peak, 1.0), 0.0)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    return gram / jnp.where(trace > 0, trace, 1.0), usable & (trace > 0)


def _host() -> Any:
    """The CPU of this process, or None where JAX runs without one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names only an accelerator
        return None


def _gathered(x: jax.Array) -> np.ndarray:
    """The whole array, including the parts that other processes hold."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # pyright: ignore
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)


def on_host(
    function: Callable[..., Any], *arrays: jax.Array, **options: Any
) -> tuple[jax.Array, ...]:
    """`function(*arrays, **options)` in float64 on the host.

    The first results get the dtypes and the placement of the first `arrays`. With
    arrays over several processes all of them compute, and the results of the first
    process count: eigenvectors may differ between machines. Under a trace `function`
    runs unchanged; where JAX runs without a CPU, nothing is widened.
    """
    if any(map(_tree.is_traced, arrays)):
        return function(*arrays, **options)
    arrays = tuple(map(jnp.asarray, arrays))  # NumPy's, from a restored state
    host, whole = _host(), map(_gathered, arrays)
    if host is None:
        results = function(*whole, **options)
    else:
        with jax.enable_x64(True), jax.default_device(host):
            doubles = (x.astype(np.float64) for x in whole)
            results = [np.asarray(x) for x in function(*doubles, **options)]
    like = arrays[: len(results)]
    rounded = [new.astype(old.dtype) for old, new in zip(like, results, strict=True)]
    if not all(x.is_fully_addressable for x in arrays):
        rounded = _processes.agreed_arrays(rounded)
    pairs = zip(like, rounded, strict=True)
    return tuple(_tree.placed_like(old, new) for old, new in pairs)
