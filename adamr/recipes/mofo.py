"""MoFO: Adam moves only the entries with the largest momentum."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.routing.carrier import Routed, plain_gradient
from adamr.routing.merge import (
    FaithfulSecondMomentState,
    MomentOptions,
    advance_moments,
    init_moments,
)
from adamr.subspaces.axes import Axes, default_axes
from adamr.subspaces.make import flatten_axes

__all__ = ["MofoState", "among_largest", "mofo"]


class MofoState(NamedTuple):
    """AdamW's moments, which no boundary projects: mofo protects no subspace."""

    count: jax.typing.ArrayLike
    mu: Any
    nu: Any


def _count(share: float, n: int) -> jax.typing.ArrayLike:
    """max(1, ⌊share · n⌋), where share · n may have been rounded off a whole number."""
    if _tree.is_known(share):
        return max(1, math.floor(float(share) * n + 1e-3))
    wide = jnp.asarray(share, jnp.promote_types(jnp.result_type(share), jnp.float32))
    return jnp.maximum(1, jnp.floor(wide * n + 1e-3)).astype(jnp.uint32)


def among_largest(x: jax.Array, share: float, batch: Sequence[int] = ()) -> jax.Array:
    """Whether an entry is among the largest of its slice by |x|.

    k = max(1, ⌊share · n⌋) of the n entries are, and whatever is as large as the last
    of them. Exact, without sorting: floats that are not negative have the order of
    their bits, so the k-th largest is found bit by bit from counts alone. A sharded
    leaf is not gathered: one number per slice and bit crosses devices.

    Args:
      x: floats; NaN counts as larger than all numbers.
      share: in (0, 1].
      batch: axes along which every slice is on its own.

    Returns:
      Bools of the shape of `x`.

    >>> print(among_largest(jnp.array([0.5, -3.0, 2.0, 2.0]), 0.5))
    [False  True  True  True]
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kind = jnp.uint64 if wide == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(wide), kind)
    axes = tuple(d for d in range(x.ndim) if d not in batch)
    n = math.prod(x.shape[d] for d in axes)
    k = _count(share, n)

    def try_bit(i, threshold):
        higher = threshold | (jnp.ones([], kind) << (8 * kind.dtype.itemsize - 2 - i))
        count = jnp.sum(bits >= higher, axis=axes, keepdims=True, dtype=jnp.uint32)
        return jnp.where(count >= k, higher, threshold)

    lowest = jnp.zeros_like(jnp.sum(bits, axis=axes, keepdims=True, dtype=kind))
    return bits >= jax.lax.fori_loop(0, 8 * kind.dtype.itemsize - 1, try_bit, lowest)


def _filtered_adam(
    share: float, axes: Any, options: MomentOptions
) -> optax.GradientTransformationExtraArgs:
    """Adam's step where |m| is among the largest of its slice, else 0."""

    def init_fn(params):
        _tree.require_arrays(params, "mofo")
        if not _tree.is_placeholder(params):
            flatten_axes(axes, params)  # raises for a tree with other leaves
        return MofoState(*init_moments(options, params))

    def update_fn(updates, state, params=None, **extra_args):
        g = plain_gradient(updates, "mofo", params)
        del params, extra_args
        how = flatten_axes(axes, g)
        pairs = zip(_tree.flatten(g)[0], how, strict=True)
        how = [a for x, a in pairs if not _tree.is_hole(x)]
        (mu_hat, denominator), state = advance_moments(
            options, Routed(g, g, g), FaithfulSecondMomentState(*state)
        )

        def step(x, m, d, a):
            moved = m / d
            if a is not None and x.size:
                batch = Axes(*a).normalized(x.ndim).batch
                moved = jnp.where(among_largest(m, share, batch), moved, 0.0)
            return moved.astype(x.dtype)

        leaves, treedef = jax.tree.flatten(g)
        steps = map(step, leaves, mu_hat, denominator, how)
        return treedef.unflatten(steps), MofoState(*state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mofo(
    learning_rate: optax.ScalarOrSchedule,
    share: float = 0.1,
    *,
    axes: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum-Filtered Optimizer: AdamW that moves the entries of largest momentum.

        m_t = b1 m_{t−1} + (1 − b1) g
        v_t = b2 v_{t−1} + (1 − b2) g²
        Δ_t = F_t ∘ m̂_t / (√(v̂_t + eps_root) + eps)
        θ_t = θ_{t−1} − η (Δ_t + weight_decay · θ_{t−1})

    F is 1 where |m_t| is among the largest of its tensor, and 0 elsewhere; `share` says
    how many of the entries that is (v is not shared here). The moments see the whole
    gradient and decay reaches every entry. The weights stay nearer to those that
    training started from than under AdamW; nothing is promised about old tasks, and no
    data of them is needed.

    Of the n entries of a tensor max(1, ⌊share · n⌋) move, and those as large as the
    last of them. Leaves without a fan-in (biases, scales, norms) move as under AdamW.
    The authors have one tensor per layer, so stacked kernels are filtered slice by
    slice along their batch axes. Their weight decay is .1, and 0 for norms: see `mask`.

    Args:
      learning_rate: η, a number or a schedule.
      share: in (0, 1]; the authors use .05 to .2. 1 is AdamW.
      axes: which leaves are filtered, and along which batch axes they are stacked: a
        tree like the parameters of `Axes` or None (not filtered), or a rule (path,
        shape) -> `Axes` or None. None: `default_axes`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.
      eps_root: inside the root.
      mu_dtype: dtype of m; None: the parameter's.
      nu_dtype: dtype of v; None: the parameter's.
      weight_decay: decoupled, scaled by η.
      mask: tree of bools or a function of the parameters: which leaves decay.

    Returns:
      An optimizer. Where m is 0 nothing moves.

    Raises:
      ValueError: for a share outside (0, 1]; at update, for weight decay without
        `params`.
      TypeError: at init, for a leaf that is neither an array nor a number.

    >>> params = {"w": jnp.ones((2, 2))}
    >>> tx = mofo(0.1, share=0.5)
    >>> g = {"w": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
    >>> print(tx.update(g, tx.init(params), params)[0]["w"].round(3) + 0.0)
    [[-0.1  0. ]
     [ 0.1  0. ]]

    References:
      Chen et al., MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM
      Fine-Tuning, arXiv:2407.20999.
    """
    if _tree.is_known(share) and not 0.0 < float(share) <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}.")
    options = MomentOptions(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    rule = default_axes if axes is None else axes
    return optax.chain(
        _filtered_adam(share, rule, options),
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
