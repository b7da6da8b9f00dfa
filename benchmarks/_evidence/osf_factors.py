"""PEFT's OSF: the factors of what a kernel may learn, trained by AdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamr
from adamr.subspaces import gradient_samples
from adamr.subspaces.columns import to_columns

__all__ = ["Factored", "assembled", "factored", "hook"]


class Factored(NamedTuple):
    """Kernels as what is kept + U diag(S) Vᵀ.

    Attributes:
      factors: U, S and V of each kernel, which are trained.
      frozen: the rest of each kernel, and the directions that are kept.
    """

    factors: Any
    frozen: Any


def _leaf(matrix: jax.Array, axes: adamr.Axes, shape: tuple[int, ...]) -> jax.Array:
    """(*batch, n, m) back in the shape of its leaf."""
    inner = axes.batch + axes.protected
    order = (*inner, *(d for d in range(len(shape)) if d not in inner))
    moved = matrix.reshape([shape[d] for d in order])
    return moved.transpose([order.index(d) for d in range(len(shape))])


def _off(basis: jax.Array, g: jax.Array) -> jax.Array:
    return g - basis @ (jnp.swapaxes(basis, -1, -2) @ g)


def factored(
    kernels: dict[str, jax.Array],
    full: tuple[adamr.Subspace, adamr.Subspace],
    axes: dict[str, adamr.Axes],
    keep: float,
) -> Factored:
    """Splits each kernel as `decompose_weight_matrix` in PEFT's OSF does.

    Args:
      kernels: by name, sorted.
      full: `weight_subspaces(kernels, axes, keep=1.0)`.
      axes: of each kernel.
      keep: the share of the directions that stays.
    """
    kept, low = {}, {}
    matrices = gradient_samples(full[0], kernels)  # transposed: outputs come first
    sides = [map(to_columns, side.bases, side.weights) for side in full]
    for name, rows, (u, _), (v, _) in zip(kernels, matrices, *sides, strict=True):
        k = int(u.shape[-1] * keep)
        s = jnp.einsum("...nr,...mn,...mr->...r", u, rows, v)
        kept[name] = {"u": u[..., :k], "v": v[..., :k]}
        low[name] = {"u": u[..., k:], "s": s[..., k:], "v": v[..., k:]}
    rest = jax.tree.map(jnp.subtract, kernels, _dense(low, kernels, axes))
    return Factored(low, {"rest": rest, "kept": kept})


def _dense(factors: Any, like: Any, axes: dict[str, adamr.Axes]) -> Any:
    def kernel(name: str, f: Any) -> jax.Array:
        matrix = (f["u"] * f["s"][..., None, :]) @ jnp.swapaxes(f["v"], -1, -2)
        return _leaf(matrix, axes[name], like[name].shape)

    return {name: kernel(name, f) for name, f in factors.items()}


def assembled(factors: Any, frozen: Any, axes: dict[str, adamr.Axes]) -> Any:
    """The kernels that the factors make."""
    low = _dense(factors, frozen["rest"], axes)
    return jax.tree.map(jnp.add, frozen["rest"], low)


def hook(frozen: Any) -> optax.GradientTransformation:
    """Projects the gradients of U and V off the directions that are kept."""

    def update(gradients: Any, params: Any) -> Any:
        del params
        projected = {
            name: {
                side: _off(basis, gradients[name][side]) for side, basis in b.items()
            }
            for name, b in frozen["kept"].items()
        }
        return {name: gradients[name] | projected[name] for name in gradients}

    return optax.stateless(update)
