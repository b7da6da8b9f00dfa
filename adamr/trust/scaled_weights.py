"""Scaled weights: learning inside a protected space without moving the weights.

    W_eff = W + Σ_j B_j (Q_j − I) B_jᵀ W        (Flax layout: fan-in first)

B_j is a basis inside the frozen space and Q_j a small trainable matrix that starts as
I. Q is stored like the weights of a subspace, with one axis more: (*small, r, r), where
`small` is 1 except along batch axes, so that the shapes alone still give the layout.
Where a basis has zero columns, Q has no effect and gets no gradient.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.subspace import (
    Subspace,
    coordinates,
    einsum,
    layout,
    reconstruct,
)

__all__ = [
    "fold_scales",
    "init_scales",
    "scale_penalty",
    "scaled_params",
    "scaled_weight",
]


def _several(subspaces: Subspace | Sequence[Subspace]) -> tuple[Subspace, ...]:
    # Tested by type: a Subspace is itself a tuple.
    return (subspaces,) if isinstance(subspaces, Subspace) else tuple(subspaces)


def _identity_like(scale: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(scale.shape[-1]), scale.shape)


def init_scales(
    subspaces: Subspace | Sequence[Subspace],
) -> tuple[tuple[jax.Array | None, ...], ...]:
    """Q = I for every basis: trainable, and without effect until it is trained.

    Args:
      subspaces: one or several. r in Q (r, r) is their capacity, so make them with a
        `max_rank`.

    Returns:
      One tuple per subspace, in leaf order: float32 (*small, r, r), such as
      (1, 1, r, r) for a dense kernel and (layers, 1, 1, r, r) for stacked ones, or None
      for an unprotected leaf.

    >>> from adamr import empty_subspace
    >>> s = empty_subspace({"w": jnp.zeros((6, 2))}, max_rank=3)
    >>> init_scales(s)[0][0].shape
    (1, 1, 3, 3)
    """

    def leaf(weights):
        if weights is None:
            return None
        return _identity_like(jnp.zeros((*weights.shape, weights.shape[-1])))

    return tuple(tuple(map(leaf, s.weights)) for s in _several(subspaces))


def _change(kernel: jax.Array, basis: jax.Array, scale: jax.Array) -> jax.Array:
    """B (Q − I) Bᵀ W in float32."""
    weights = scale[..., 0]
    fits = (
        basis.ndim == kernel.ndim + 1
        and scale.ndim == basis.ndim + 1
        and scale.shape[-2:] == (basis.shape[-1],) * 2
        and all(b in (1, n) for b, n in zip(basis.shape, kernel.shape, strict=False))
    )
    if not fits:
        raise ValueError(
            f"scale has shape {scale.shape}, basis {basis.shape} and kernel "
            f"{kernel.shape}, expected an entry of Subspace.bases made for this kernel "
            "and the matching entry of init_scales."
        )
    batch = [basis.shape[d] for d in layout(basis, weights).batch]
    q = scale.astype(jnp.float32) - _identity_like(scale)
    coords = coordinates(basis, weights, kernel)
    stack = "abcdef"[: len(batch)]
    outputs = "mnopqrst"[: coords.ndim - len(batch) - 1]
    coords = einsum(
        f"{stack}yz,{stack}z{outputs}->{stack}y{outputs}",
        q.reshape(*batch, *q.shape[-2:]),
        coords,
    )
    return reconstruct(basis, weights, coords)


def scaled_weight(kernel: jax.Array, basis: jax.Array, scale: jax.Array) -> jax.Array:
    """W_eff = W − B Bᵀ W + B Q Bᵀ W for one kernel.

    Args:
      kernel: W, a float array in any layout for which a `Subspace` can be made.
      basis: B, the entry of `Subspace.bases` for this kernel.
      scale: Q, the matching entry of `init_scales`. The authors' kernels are (out, in),
        so their Q is the transpose of this one.

    Returns:
      An array of the shape and dtype of `kernel`, computed in float32; exactly W where
      Q = I.

    Raises:
      ValueError: if the shapes of the three do not fit.

    >>> from adamr import make_subspace
    >>> kernel = jnp.array([[1.0], [2.0]])
    >>> s = make_subspace(kernel, jnp.array([[1.0], [0.0]]), max_rank=1)
    >>> scaled_weight(kernel, s.bases[0], 2.0 * init_scales(s)[0][0])[:, 0]
    Array([2., 2.], dtype=float32)
    """
    kernel = jnp.asarray(kernel)
    change = _change(kernel, basis, scale)
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def scaled_params(
    params: Any, subspaces: Subspace | Sequence[Subspace], scales: Sequence[Any]
) -> Any:
    """W + Σ_j B_j (Q_j − I) B_jᵀ W on every protected leaf.

    Call it in the loss: it is differentiable in `params` and `scales`.

    Args:
      params: W, a tree of float arrays.
      subspaces: B_j, one or several, such as `trust_region(...).subspaces`.
      scales: Q_j, one tuple per subspace, from `init_scales(subspaces)`.

    Returns:
      A tree like `params`, same dtypes; bit for bit `params` where every Q = I.

    Raises:
      ValueError: if the leaves or shapes of the three do not fit.

    >>> from adamr import make_subspace
    >>> params = {"w": jnp.array([[1.0], [2.0]]), "b": jnp.ones(1)}
    >>> s = make_subspace(params, {"w": jnp.array([[1.0], [0.0]]), "b": None})
    >>> scales = init_scales(s)
    >>> loss = lambda scales: jnp.sum(scaled_params(params, s, scales)["w"])
    >>> jax.grad(loss)(scales)[0][1][0, 0, 0, 0]
    Array(1., dtype=float32)
    """
    subspaces = _several(subspaces)
    if len(subspaces) != len(scales):
        raise ValueError(
            f"scales has entries for {len(scales)} subspaces, expected "
            f"{len(subspaces)}: make them with init_scales(subspaces)."
        )
    for subspace, each in zip(subspaces, scales, strict=True):
        subspace.check(params, "subspaces")
        if len(each) != len(subspace.bases):
            raise ValueError(
                f"scales has {len(each)} leaves, expected {len(subspace.bases)}."
            )
    bases = zip(*(subspace.bases for subspace in subspaces), strict=True)

    def leaf(w, bases, scales):
        pairs = zip(bases, scales, strict=True)
        changes = [
            _change(w, basis, scale)
            for basis, scale in pairs
            if basis is not None and scale is not None
        ]
        if not changes:
            return w
        change = functools.reduce(jnp.add, changes)
        return (w.astype(jnp.float32) + change).astype(w.dtype)

    if not subspaces:
        return params
    return _tree.map_positions(leaf, params, bases, zip(*scales, strict=True))


def scale_penalty(scales: Any, beta: float = 1.0) -> jax.Array:
    """β Σ ‖Q − I‖²: add it to the loss, so that old tasks keep most of their function.

    Args:
      scales: Q, from `init_scales`: any tree of arrays (*small, r, r).
      beta: β ≥ 0; the authors use 1.

    Returns:
      A float32 scalar.

    >>> from adamr import make_subspace
    >>> s = make_subspace(jnp.zeros((3, 2)), jnp.eye(3)[:, :1], max_rank=1)
    >>> scale_penalty(jax.tree.map(lambda q: 3 * q, init_scales(s)))
    Array(4., dtype=float32)
    """

    def leaf(q):
        return _tree.squared_norm(q.astype(jnp.float32) - _identity_like(q))

    return beta * sum(map(leaf, jax.tree.leaves(scales)), jnp.zeros([], jnp.float32))


def fold_scales(
    params: Any, subspace: Subspace | Sequence[Subspace], scales: Sequence[Any]
) -> tuple[Any, tuple[tuple[jax.Array | None, ...], ...]]:
    """Makes the scaling permanent: returns W_eff and Q = I.

    Guarantee: `scaled_params` of the result equals `scaled_params` of the arguments bit
    for bit, so the network's function does not change, and neither `subspace` nor the
    trained Q needs to be kept.

    Args:
      params: W, a tree of float arrays.
      subspace: B, the relaxing subspace, or several.
      scales: Q, from `init_scales(subspace)`, trained.

    Returns:
      (params, scales) of the same shapes and dtypes.

    Raises:
      ValueError: if the leaves or shapes of the three do not fit.

    >>> from adamr import make_subspace
    >>> w = jnp.array([[1.0], [2.0]])
    >>> s = make_subspace(w, jnp.array([[1.0], [0.0]]), max_rank=1)
    >>> params, scales = fold_scales(w, s, [[2.0 * init_scales(s)[0][0]]])
    >>> print(params[:, 0], scales[0][0].item())
    [2. 2.] 1.0
    """
    return scaled_params(params, subspace, scales), init_scales(subspace)
