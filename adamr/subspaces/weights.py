"""The directions in which the weights themselves are large, on both of their sides.

A pretrained kernel W = U Σ Vᵀ says what it knows by its singular values, without any
data. OSFT and OPLoRA protect its top k directions: columns of U over the fan-in axes,
columns of V over the output axes. With Uᵀ Δ = 0 and Δ V = 0 for every step Δ, the part
U_k Σ_k V_kᵀ of the kernel stays what it was, and so do its singular triples.
"""

import functools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamr import _tree
from adamr.sharding import replicated
from adamr.subspaces.axes import Axes, fan_in, leaf_axes
from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    at_least_float32,
    column_numbers,
    matmul,
    on_host,
    spectrum,
    to_storage,
    transpose,
)
from adamr.subspaces.make import stored_shapes
from adamr.subspaces.matrices import outputs
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["layer_budget", "weight_subspaces"]

Ratio = jax.typing.ArrayLike
Keep = Ratio | Callable[[str, tuple[int, ...]], Ratio | None] | Any


@functools.partial(jax.jit, static_argnames="axes")
def _top_directions(inside, lam_inside, outside, lam_outside, kernel, count, axes):
    """Both bases and their weights, in the shapes of those that are given.

    The Gram matrix is that of the shorter side. The other side follows from it up to
    rounding that grows as the singular value falls, which QR removes.
    """
    order = (*axes.batch, *axes.protected, *outputs(axes, kernel.ndim))
    sizes = layout(inside, lam_inside).fan_in, layout(outside, lam_outside).fan_in
    kernel = kernel.transpose(order).reshape(*count.shape, *sizes)
    kernel = at_least_float32(kernel)
    peak = _tree.largest(kernel, (-1, -2), keepdims=True)
    # NaN must not reach `eigh`, which may not return.
    usable = jnp.isfinite(peak) & (peak > 0)
    kernel = jnp.where(usable, kernel / jnp.where(usable, peak, 1.0), 0.0)
    tall = kernel.shape[-2] > kernel.shape[-1]
    short_first = transpose(kernel) if tall else kernel
    energy, short = spectrum(matmul(short_first, transpose(short_first)))
    room = inside.shape[-1]
    energy, short = energy[..., :room], short[..., :room]
    number = column_numbers(room, energy.shape[:-1])
    chosen = (number < count[..., None]) & usable[..., 0]
    chosen &= energy > ENERGY_FLOOR[str(kernel.dtype)] * energy[..., :1]
    short = jnp.where(chosen[..., None, :], short, 0.0)
    long = matmul(transpose(short_first), short)
    long = long / jnp.sqrt(jnp.where(chosen, energy, 1.0))[..., None, :]
    long = jnp.where(chosen[..., None, :], jnp.linalg.qr(long).Q, 0.0)
    u, v = (long, short) if tall else (short, long)
    lam = chosen.astype(kernel.dtype)
    return (
        *to_storage(u, lam, inside, lam_inside),
        *to_storage(v, lam, outside, lam_outside),
    )


def _as_written(shares: np.ndarray) -> np.ndarray:
    """In float64: 0.7 in float32 is less, and is written as 0.7."""
    return np.array([float(str(x)) for x in shares.flat]).reshape(shares.shape)


def _check_ratio(argument: str, name: str, ratio: Ratio, batch: tuple[int, ...]) -> Any:
    """The ratio as an array of shape () or (*batch,); its values unless traced."""
    array = ratio if _tree.is_traced(ratio) else _as_written(np.asarray(ratio))
    if jnp.shape(array) not in ((), batch):
        raise ValueError(
            f"{argument} has shape {jnp.shape(array)} at {name}, expected a number"
            + (f" or one per slice, {batch}." if batch else ".")
        )
    if isinstance(array, np.ndarray) and not np.all((array >= 0) & (array <= 1)):
        raise ValueError(
            f"{argument} is {ratio} at {name}, expected a share in [0, 1]."
        )
    return array


def _whole(share: Any, n: int) -> Any:
    """⌊share · n⌋; of a share as it is written, too: .29 * 100 is less than 29."""
    if _tree.is_traced(share):
        share = share.astype(jnp.promote_types(share.dtype, jnp.float32))
        return jnp.floor(n * share * (1 + 4 * jnp.finfo(share.dtype).eps))

    def count(x):
        return max(math.floor(x * n), math.floor(Decimal(str(x)) * n))

    return np.vectorize(count, otypes=[np.int64])(share)


def _counts(
    name: str, smaller: int, ratio: Ratio, room: float | None, batch: tuple[int, ...]
) -> tuple[jax.Array, int]:
    """k per slice, and the room for directions."""
    ratio = _check_ratio("keep", name, ratio, batch)
    if room is not None:
        most = int(_whole(_check_ratio("room", name, room, ()), smaller))
    elif isinstance(ratio, np.ndarray):
        most = int(_whole(ratio.max(initial=0.0), smaller))
    else:
        raise ValueError(
            f"keep is traced at {name}, expected numbers, or room= for the largest: "
            "the capacity of a Subspace is fixed."
        )
    counts = _whole(ratio, smaller)
    if not _tree.is_traced(counts) and np.max(counts, initial=0) > most:
        raise ValueError(f"keep is {ratio} at {name}, expected at most room = {room}.")
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), batch)
    return counts, max(most, 1)


def _sides(
    name: str, kernel: Any, axes: Axes, ratio: Ratio, room: float | None
) -> tuple[jax.Array, ...] | None:
    """Basis and weights of the fan-in side, then of the output side."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise TypeError(
            f"params has a ShapeDtypeStruct at {name}, expected an array, whose values "
            "are decomposed; in init, a function of the parameters gets them."
        )
    kernel = jnp.asarray(kernel)
    if jnp.iscomplexobj(kernel):
        raise TypeError(f"params is complex at {name}, expected a floating kernel.")
    fan_out = outputs(axes, kernel.ndim)
    if not fan_out:  # a vector has one side
        return None
    finite = jnp.all(jnp.isfinite(kernel))
    if not _tree.is_traced(finite) and not finite:
        raise ValueError(f"params has NaN or infinite entries at {name}.")
    batch = tuple(kernel.shape[d] for d in axes.batch)
    smaller = min(fan_in(axes, kernel.shape), fan_in(Axes(fan_out), kernel.shape))
    count, capacity = _counts(name, smaller, ratio, room, batch)
    shapes = (
        *stored_shapes(kernel.shape, axes, capacity),
        *stored_shapes(kernel.shape, Axes(fan_out, axes.batch), capacity),
    )
    likes = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    return on_host(_top_directions, *likes, replicated(kernel), count, axes=axes)


def _ratios(keep: Keep, params: Any) -> list[Any]:
    """The ratio of each leaf."""
    names, leaves = _tree.flatten_with_names(params)
    if callable(keep):
        pairs = zip(names, leaves, strict=True)
        return [keep(n, x.shape) if hasattr(x, "shape") else None for n, x in pairs]
    if _tree.is_known(keep) or (_tree.is_traced(keep) and jnp.ndim(keep) == 0):
        return [keep] * len(leaves)
    return _tree.flatten_like(keep, "keep", params)


def weight_subspaces(
    params: Any,
    axes: Any,
    *,
    keep: Keep = 0.5,
    room: float | None = None,
    unprotected: Sequence[str] = (),
) -> tuple[Subspace, Subspace]:
    """The top singular directions of every kernel, on its fan-in and its output side.

        W = U Σ Vᵀ,   k = ⌊min(n, m) · keep⌋,   inside: U_k,   outside: V_k

    n is the fan-in of a kernel and m its number of outputs, heads and all. Slices along
    batch axes (scanned layers, experts) are decomposed one by one. Both bases come from
    one symmetric eigenproblem of size min(n, m), in float64 on the host; under jit in
    float32. Directions whose singular value is below 1e-6 of the largest (under jit
    1e-3) hold nothing and stay free.

    Args:
      params: the parameters, arrays of any float dtype.
      axes: tree like `params` of `Axes` or None, as `contracted_axes` gives, or a rule
        `(path, shape) -> Axes | None`, such as `default_axes`.
      keep: the share to protect, in [0, 1]; or a tree like `params` of shares, one
        number or one per slice of a stacked kernel, and None for an unprotected leaf;
        or a rule `(path, shape) -> share`. `subspaces.layer_budget` computes shares.
      room: the share for which the subspaces have room, so that a later `keep` fits
        into the same optimizer; a traced `keep` needs it, and is cut to it. None: the
        largest `keep` of the leaf.
      unprotected: parts of leaf names to leave alone, such as `"embedding"`.

    Returns:
      (inside, outside): for `osft` and `set_subspace`. Weights are λ = 1, bases
      float32, and shapes depend on `room`, or on `keep` without it, alone.

    Raises:
      ValueError: for a share outside [0, 1] or above `room`, a tree of other leaves, a
        name in `unprotected` that matches no leaf, or, outside jit, a kernel that is
        not finite (inside, it is left unprotected).
      TypeError: for a `ShapeDtypeStruct` or a complex kernel.

    >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0, 2.0, 0.5]))}
    >>> inside, outside = weight_subspaces(params, {"w": Axes((0,))})
    >>> inside.bases[0].shape, outside.bases[0].shape
    ((4, 1, 2), (1, 4, 2))
    >>> print(jnp.diagonal(inside.project(params)["w"]))
    [0.  1.  0.  0.5]

    References:
      Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for
      Continual Learning (OSFT), arXiv:2504.07097. Xiong, Xie, OPLoRA, arXiv:2510.13003.
    """
    names, leaves = _tree.flatten_with_names(params)
    how = leaf_axes(params, axes, unprotected, max_fan_in=None)
    nothing = (None, None, None, None)
    entries = []
    for name, leaf, spec, ratio in zip(
        names, leaves, how, _ratios(keep, params), strict=True
    ):
        if spec is None or ratio is None:
            entries.append(nothing)
            continue
        entries.append(_sides(name, leaf, spec, ratio, room) or nothing)
    fields = tuple(zip(*entries, strict=True)) if entries else ((),) * 4
    return Subspace(*fields[:2]), Subspace(*fields[2:])


def _mean_cosine(name: str, x: Any, y: Any) -> jax.Array | np.ndarray:
    """⟨x, y⟩ / (‖x‖ ‖y‖), averaged over all rows; 0 for a row of zeros."""
    if jnp.shape(x) != jnp.shape(y) or jnp.ndim(x) < 1:
        raise ValueError(
            f"outputs has shape {jnp.shape(y)} at {name}, expected that of the inputs, "
            f"{jnp.shape(x)}: rows (..., d) of what a layer takes and gives."
        )
    traced = _tree.is_traced(x) or _tree.is_traced(y)
    xp, dtype = (jnp, jnp.float32) if traced else (np, np.float64)
    x, y = xp.asarray(x, dtype), xp.asarray(y, dtype)
    lengths = xp.linalg.norm(x, axis=-1) * xp.linalg.norm(y, axis=-1)
    inner = xp.sum(x * y, axis=-1)
    return xp.mean(xp.where(lengths > 0, inner / xp.where(lengths > 0, lengths, 1), 0))


def layer_budget(
    inputs: Any, outputs: Any, *, least: float = 0.1, target: float = 0.8
) -> Any:
    """OSFT's share to keep per layer: more where a layer changes its input less.

        I_l = mean cosine of x and y over the rows,    I_l <- I_l / mean_l I_l
        keep_l = least + I_l (target − least),         clipped to [least, 1]

    So the shares are `target` on average, or less where some are clipped. A layer is
    what keeps the width d, such as a transformer block; all its kernels get its share:

        budget = layer_budget(inputs, outputs)  # by block
        weight_subspaces(params, axes, keep=lambda path, shape: budget[block(path)])

    Args:
      inputs: tree with one array (..., d) of rows per layer.
      outputs: the same tree of what the layers make of them.
      least: the least share, mrr in the paper.
      target: the mean share, trr in the paper.

    Returns:
      A tree like `inputs` of shares for `keep`: floats, computed in float64; under jit
      float32 scalars.

    Raises:
      ValueError: for trees or shapes that differ, or shares out of 0 ≤ least ≤ target
        ≤ 1.

    >>> x = jnp.eye(2)
    >>> layer_budget({"a": x, "b": x}, {"a": x, "b": x[::-1] + x})
    {'a': 0.92..., 'b': 0.67...}

    References:
      Nayak et al., arXiv:2504.07097. The rule and its normalisation are those of AdaSVD
      (arXiv:2502.01403).
    """
    if not 0 <= least <= target <= 1:
        raise ValueError(
            f"least is {least} and target {target}, expected 0 ≤ least ≤ target ≤ 1."
        )
    names, rows = _tree.flatten_with_names(inputs)
    made = _tree.flatten_like(outputs, "outputs", inputs)
    cosines = [_mean_cosine(*each) for each in zip(names, rows, made, strict=True)]
    traced = any(map(_tree.is_traced, cosines))
    xp = jnp if traced else np
    importance = xp.maximum(xp.stack(cosines), 0.0)
    mean = xp.mean(importance)
    importance = importance / xp.where(mean > 0, mean, 1.0)
    shares = xp.clip(least + importance * (target - least), least, 1.0)
    each = list(shares) if traced else shares.tolist()
    return jax.tree.unflatten(jax.tree.structure(inputs), each)
