"""The shape of a step: what norms and radial parts make of the learning rate.

    normalize_and_project  w + Δ is rescaled to the norm that w had at the start
    remove_radial, adamp   Δ loses its part along w where w is scale-invariant

Before a normalisation layer a kernel's scale has no effect, but its norm divides the
effective learning rate: a network that learns for a long time slows down as its weights
grow. The first holds the norm, the second stops its growth.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.modifiers.penalty import need_params
from adamr.routing.carrier import plain_gradient

__all__ = [
    "NormalizeAndProjectState",
    "RemoveRadialState",
    "adamp",
    "normalize_and_project",
    "remove_radial",
]


class NormalizeAndProjectState(NamedTuple):
    count: jax.typing.ArrayLike
    norms: Any  # ‖w_0‖ in leaf order, float32; None where nothing is projected


def normalize_and_project(every: int = 1) -> optax.GradientTransformationExtraArgs:
    """NaP's projection: kernels keep the Frobenius norm that they started with.

        Δ <- ‖w_0‖ (w + Δ) / ‖w + Δ‖ − w      after every `every`-th step, else Δ

    Leaves with two axes or more are projected, each as a whole; use `optax.masked` to
    leave out embeddings or heads. The method also asks for a LayerNorm before each
    nonlinearity, so that the projection does not change the function, and for a
    learning rate schedule, since growing weights no longer slow learning down.

    Args:
      every: k ≥ 1.

    Returns:
      The last link of a chain, after the learning rate. A leaf that starts at zero or
      would become zero or not finite keeps its Δ. In bf16 norms hold to rounding.

    Raises:
      ValueError: for `every` below 1; at update, without `params`.

    >>> w = jnp.array([[3.0], [4.0]])
    >>> tx = optax.chain(optax.sgd(1.0), normalize_and_project())
    >>> step, _ = tx.update(jnp.array([[3.0], [-4.0]]), tx.init(w), w)
    >>> print((w + step)[:, 0])
    [0. 5.]

    References:
      Lyle et al., Normalization and Effective Learning Rates in Reinforcement Learning,
      arXiv:2407.01800.
    """
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")

    def init_fn(params):
        def norm(w):
            return jnp.sqrt(_tree.squared_norm(w)) if w.ndim > 1 else None

        norms = _tree.in_leaf_order(params, norm)
        return NormalizeAndProjectState(jnp.zeros([], jnp.int32), norms)

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "normalize_and_project", params)
        del extra_args
        need_params(params, "normalize_and_project")
        count = optax.safe_increment(state.count)
        due = jnp.asarray(count) % every == 0

        def project(step, w, norm):
            if norm is None:
                return step
            wide = w.astype(jnp.float32)
            moved = wide + step.astype(jnp.float32)
            length = jnp.sqrt(_tree.squared_norm(moved))
            usable = due & (norm > 0) & (length > 0) & jnp.isfinite(length)
            scale = norm / jnp.where(usable, length, 1.0)
            return jnp.where(usable, (scale * moved - wide).astype(step.dtype), step)

        steps, treedef = jax.tree.flatten(updates)
        leaves = zip(steps, jax.tree.leaves(params), state.norms, strict=True)
        steps = [project(*each) for each in leaves]
        state = NormalizeAndProjectState(count, state.norms)
        return jax.tree.unflatten(treedef, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RemoveRadialState(NamedTuple):
    inner: Any


def _without_radial(u, g, w, delta):
    """u without its part along w, and whether w counted as scale-invariant."""
    u, g, w = (x.astype(jnp.float32) for x in (u, g, w))
    result, found = u, jnp.zeros([], bool)
    # The whole tensor first: the channels, if they qualify, have the last word.
    for axes in (tuple(range(w.ndim)), tuple(range(w.ndim - 1))):

        def inner(x, y, axes=axes):
            return jnp.sum(x * y, axis=axes, keepdims=True)

        size = math.prod(w.shape[d] for d in axes)
        square = inner(w, w)
        norms = jnp.sqrt(inner(g, g)) * jnp.sqrt(square)
        cosine = jnp.abs(inner(g, w)) / jnp.where(norms > 0, norms, 1.0)
        invariant = jnp.max(cosine) < delta / math.sqrt(size)
        part = inner(u, w) / jnp.where(square > 0, square, 1.0)
        result = jnp.where(invariant, u - part * w, result)
        found = found | invariant
    return result, found


def remove_radial(
    preconditioner: optax.GradientTransformation,
    delta: float = 0.1,
    weight_decay: float = 0.0,
    wd_ratio: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """AdamP's projection: no growth of weights whose scale has no effect.

    u is what the preconditioner makes of g. For a leaf w with two axes or more, first
    with one c per output channel (the last axis, as in Flax), then with one c for all:

        if max_c |cos(g_c, w_c)| < delta / √dim:      w is scale-invariant
            u_c <- u_c − ⟨u_c, w_c⟩ w_c / ‖w_c‖²       and the search ends
        step = u + weight_decay · (wd_ratio if scale-invariant, else 1) · w

    dim is the number of entries of a w_c. The gradient of a loss that does not depend
    on the scale of w is orthogonal to it; momentum is not, and lets ‖w‖ grow.

    Args:
      preconditioner: g -> u, such as `optax.scale_by_adam()` or a chain that ends with
        `faithful_second_moment()`; the cosine needs the g that went in, which a later
        link would not see.
      delta: ≥ 0; 0 turns the projection off.
      weight_decay: decoupled, for all leaves.
      wd_ratio: weaker decay for leaves whose growth is stopped.

    Returns:
      A link to be followed by `optax.scale_by_learning_rate`. A gradient of zero counts
      as orthogonal.

    Raises:
      ValueError: at update, without `params`.

    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = remove_radial(optax.stateless(lambda u, _: u + 5 * w))
    >>> print(tx.update(g, tx.init(w), w)[0][:, 0])
    [0. 1.]

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on
      Scale-invariant Weights, arXiv:2006.08217.
    """
    inner = optax.with_extra_args_support(preconditioner)

    def init_fn(params):
        return RemoveRadialState(inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "remove_radial", params)
        need_params(params, "remove_radial")
        u, new = inner.update(updates, state.inner, params, **extra_args)

        def leaf(u, g, w):
            step, invariant = u.astype(jnp.float32), jnp.zeros([], bool)
            if w.ndim > 1 and w.size:
                step, invariant = _without_radial(u, g, w, delta)
            decay = weight_decay * jnp.where(invariant, wd_ratio, 1.0)
            return (step + decay * w.astype(jnp.float32)).astype(u.dtype)

        return jax.tree.map(leaf, u, updates, params), RemoveRadialState(new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamP: `remove_radial` around Adam's direction, then the learning rate.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.
      delta: as for `remove_radial`, like the two below.
      wd_ratio: of scale-invariant leaves.
      weight_decay: decoupled, scaled by the learning rate.

    Returns:
      An optimizer; `update` needs `params`.

    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    >>> tx = adamp(0.1)
    >>> steps, _ = tx.update(params, tx.init(params), params)
    >>> print([f"{x:.3f}" for x in steps["kernel"][0]])
    ['-0.100', '-0.100']

    References: Heo et al., AdamP, arXiv:2006.08217.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    return optax.chain(
        remove_radial(adam, delta, weight_decay, wd_ratio),
        optax.scale_by_learning_rate(learning_rate),
    )
