"""Gradient surgery: one direction from the gradients of several tasks.

Both methods need only the Gram matrix G of the task gradients g_i: the result is a
combination of them, and its coefficients follow from G.

    pcgrad    g_i <- g_i − min(0, ⟨g_i, g_j⟩ / ‖g_j‖²) g_j for j in turn, then the sum
    cagrad    d = argmax min_i ⟨g_i, d⟩  over  ‖d − g_0‖ ≤ c ‖g_0‖,  g_0 the mean
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _rows as evidence
from adamr import _tree
from adamr.modifiers.dual import box_program, unit_rows
from adamr.routing.carrier import plain_gradient

__all__ = ["PCGradState", "cagrad", "pcgrad"]

_BISECTIONS = 26


class PCGradState(NamedTuple):
    key: Any  # uint32, typed for another implementation, or None for a fixed order


def _combined(updates, task_gradients, task_mask, link, coefficients):
    """Σ_i w_i g_i with w = `coefficients(G, mask)`, like `updates`."""
    rows = evidence.read_rows(
        updates,
        task_gradients,
        task_mask,
        link=link,
        argument="task_gradients",
        mask_argument="task_mask",
    )
    leaves, treedef = jax.tree.flatten(updates)
    if not leaves or not rows.mask.size:
        return updates
    blocks = evidence.blocks_of(updates, None)
    pairs = rows.mask[:, None] & rows.mask[None, :]
    gram = jnp.where(pairs, evidence.gram(rows, blocks)[0], 0.0)
    weights = jnp.where(rows.mask, coefficients(gram, rows.mask), 0.0)
    # Masked rows may hold anything; without a mask there are none to clear.
    clean = task_mask is not None
    total = evidence.combine(rows, weights[None, :], blocks, clean=clean)
    total = [x.astype(g.dtype) for x, g in zip(total, leaves, strict=True)]
    return jax.tree.unflatten(treedef, total)


@jax.jit
def _surgery_weights(gram, mask, order):
    """Row i of C holds the coefficients of the i-th gradient after its projections."""
    size = mask.shape[0]
    squares = jnp.diagonal(gram)

    def task(start, order):
        def project(row, j):
            inner = jnp.dot(row, gram[j], precision=jax.lax.Precision.HIGHEST)
            scale = jnp.where(squares[j] > 0, squares[j], 1.0)
            conflict = jnp.where(start[j] > 0, 0.0, jnp.minimum(inner, 0.0) / scale)
            return row.at[j].add(-conflict), None

        return jax.lax.scan(project, start, order)[0]

    rows = jax.vmap(task)(jnp.eye(size, dtype=gram.dtype), order)
    return jnp.sum(jnp.where(mask[:, None], rows, 0.0), axis=0)


def pcgrad(
    *, key: jax.Array | None = None, reduction: Literal["sum", "mean"] = "sum"
) -> optax.GradientTransformationExtraArgs:
    """PCGrad: every task gradient is projected off those it conflicts with.

        g_i <- g_i − min(0, ⟨g_i, g_j⟩ / ‖g_j‖²) g_j,  j ≠ i in turn, original g_j
        g̃ = Σ_i g_i                                   (or the mean)

    Extra arguments of `update`:
      task_gradients: tree like the gradient, leaves (T, *shape). The current task is
        one of them.
      task_mask: (T,) bool, optional: tasks that count.

    Args:
      key: a PRNG key, typed or uint32, for a new random order of the j at every step
        and for every i, as in the paper; None: their index order, as in its code.
      reduction: "sum" as in the authors' code, "mean" as in many ports. The incoming
        gradient, which is replaced, should be the same of the raw task gradients: then
        a strength link measures what the surgery changed.

    Returns:
      A modifier for a route, or a plain link. Zero task gradients conflict with
      nothing. NaN in a task that counts passes through.

    Raises:
      ValueError: for an unknown reduction; at update, without `task_gradients` or with
        one of the wrong shape.
      TypeError: for a `Routed`.

    >>> tasks = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> tx = pcgrad()
    >>> g = tasks.sum(axis=0)
    >>> print(tx.update(g, tx.init(g), task_gradients=tasks)[0])
    [0.5 1.5]

    References: Yu et al., Gradient Surgery for Multi-Task Learning, arXiv:2001.06782.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, expected 'sum' or 'mean'.")

    def init_fn(params):
        del params
        return PCGradState(None if key is None else _tree.stored_key(key))

    def update_fn(
        updates,
        state,
        params=None,
        *,
        task_gradients=None,
        task_mask=None,
        **extra_args,
    ):
        updates = plain_gradient(updates, "pcgrad", params)
        del params, extra_args
        following, now = state.key, None
        if state.key is not None:
            following, now = jax.random.split(state.key)

        def coefficients(gram, mask):
            size = mask.shape[0]
            order = jnp.tile(jnp.arange(size), (size, 1))
            if now is not None:
                order = jax.random.permutation(now, order, axis=1, independent=True)
            weights = _surgery_weights(gram, mask, order)
            seen = jnp.maximum(jnp.sum(mask), 1)
            return weights / seen if reduction == "mean" else weights

        new = _combined(updates, task_gradients, task_mask, "pcgrad", coefficients)
        return new, PCGradState(following)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnames="rescale")
def _worst_case_weights(gram, mask, c, rescale):
    """d = g_0 + Mᵀ v: the largest margin δ ≤ ⟨g_i, d⟩ that a radius c ‖g_0‖ allows.

    For a given δ the shortest v is a box program; its length grows with δ.
    """
    c = jnp.asarray(c, gram.dtype)
    mean = mask.astype(gram.dtype) / jnp.maximum(jnp.sum(mask), 1)

    def product(w):
        return jnp.matmul(gram, w, precision=jax.lax.Precision.HIGHEST)

    def length(w):
        return jnp.sqrt(jnp.maximum(jnp.sum(w * product(w)), 0.0))

    usable = mask & (jnp.diagonal(gram) > 0)
    norm, a = unit_rows(gram, usable, 1e-5)
    inner, radius = product(mean), c * length(mean)

    def shortest(margin):
        q = jnp.where(usable, (inner - margin) / norm, 0.0)
        return box_program(a, q, q < 0) / norm

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        short = length(shortest(middle)) < radius
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    low = jnp.min(jnp.where(usable, inner, jnp.inf))
    low = jnp.where(jnp.any(usable), low, 0.0)
    high = low + radius * jnp.max(jnp.where(usable, norm, 0.0))
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    v = shortest(high)
    reached = length(v)
    v = v * jnp.where(reached > 0, radius / jnp.where(reached > 0, reached, 1.0), 0.0)
    scale = {"square": 1.0 + c * c, "linear": 1.0 + c, None: 1.0}[rescale]
    return (mean + jnp.where(usable, v, 0.0)) / scale


def cagrad(
    c: float = 0.5, *, rescale: Literal["square", "linear"] | None = "square"
) -> optax.GradientTransformationExtraArgs:
    """CAGrad: the best worst-case descent near the mean gradient.

        d = argmax_d min_i ⟨g_i, d⟩  over  ‖d − g_0‖ ≤ c ‖g_0‖
          = g_0 + c ‖g_0‖ g_w / ‖g_w‖,   g_w = Σ_i w_i g_i
        w = argmin_w g_wᵀ g_0 + c ‖g_0‖ ‖g_w‖  over the simplex

    Extra arguments of `update`: as for `pcgrad`.

    Args:
      c: radius, in [0, 1); 0 gives the mean gradient (divided as by `rescale`: by 1).
      rescale: divide d by 1 + c² ("square", the authors' default), 1 + c ("linear"), or
        not at all.

    Returns:
      A modifier for a route, or a plain link; the incoming gradient is replaced and
      should be the mean of the task gradients. Zero task gradients count in the mean
      but not in the minimum. NaN in a task that counts passes through.

    Raises:
      ValueError: for a negative c, an unknown rescale; at update, without
        `task_gradients` or with one of the wrong shape.
      TypeError: for a `Routed`.

    >>> tasks = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> tx = cagrad(c=0.5, rescale=None)
    >>> g = tasks.mean(axis=0)
    >>> print(tx.update(g, tx.init(g), task_gradients=tasks)[0].round(4))
    [0.75 0.75]

    References: Liu et al., Conflict-Averse Gradient Descent, arXiv:2110.14048.
    """
    if rescale not in ("square", "linear", None):
        raise ValueError(f"rescale is {rescale!r}, expected 'square', 'linear', None.")
    if not isinstance(c, jax.Array) and c < 0:
        raise ValueError(f"c must not be negative, got {c}.")

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(
        updates,
        state,
        params=None,
        *,
        task_gradients=None,
        task_mask=None,
        **extra_args,
    ):
        updates = plain_gradient(updates, "cagrad", params)
        del params, extra_args

        def coefficients(gram, mask):
            return _worst_case_weights(gram, mask, c, rescale)

        new = _combined(updates, task_gradients, task_mask, "cagrad", coefficients)
        return new, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
