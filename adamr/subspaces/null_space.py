"""The complement of the null space of the feature covariance, which Adam-NSCL protects.

GPM grows a basis from a sample of layer inputs. Adam-NSCL keeps the second moment X̄ of
all inputs so far (n × n per kernel, no rank to choose) and lets a kernel move only
along directions in which the inputs have hardly any energy.
"""

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import on_host, to_columns, to_storage
from adamr.subspaces.covariance import Covariance, check_moment
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["null_space_complement"]


@jax.jit
def _complement(basis, weights, moment, ratio, floor):
    """The basis and weights of one leaf, from its second moment."""
    columns, lam = to_columns(basis, weights)
    moment = moment.astype(columns.dtype)
    peak = _tree.largest(moment, (-1, -2), keepdims=True)
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
    return to_storage(columns, lam, basis, weights)


def null_space_complement(
    covariance: Covariance,
    subspace_like: Subspace,
    *,
    ratio: float = 10.0,
    floor: float = 1e-6,
) -> Subspace:
    """Protects all but the approximate null space of the feature covariance.

    With e_i, u_i the eigenvalues and eigenvectors of X̄ (`covariance`), protects every
    u_i with

        e_i > ratio · max(e_min, floor · e_max)

    and leaves the others free, at least one. Guarantee: for a step Δ of a kernel that
    is projected off the protected directions, the mean of ‖xᵀΔ‖² over all samples is at
    most ratio · max(e_min, floor · e_max) · ‖Δ‖². This is the approximation that the
    method makes.

    With floor = 0, as in the paper, an input that never fires makes e_min = 0, and then
    only exact zeros are free; the eigenvalues of a float32 matrix are noise below
    ~1e-7 e_max. A larger floor leaves more room to learn and protects less.

    Args:
      covariance: X̄, of all tasks so far.
      subspace_like: gives shapes and dtypes; its directions are replaced. Its capacity
        must be the fan-in (`max_rank=None`).
      ratio: at least 1; the authors use 10 for ten tasks and 30 for twenty.
      floor: at least 0: the smallest e_min that counts, as a share of e_max.

    Returns:
      A `Subspace` with λ = 1, the direction of most energy first. A leaf that has seen
      no samples is unprotected; one whose moment is not finite is unchanged.

    Raises:
      ValueError: for ratio < 1, a negative floor, a capacity below the fan-in, or a
        covariance made for other leaves.

    >>> from adamr import empty_subspace
    >>> from adamr.subspaces import empty_covariance
    >>> from adamr.subspaces import project
    >>> from adamr.subspaces import update_covariance
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
        return on_host(_complement, basis, weights, moment, ratio=ratio, floor=floor)

    positions = range(len(covariance.moments))
    pairs = map(leaf, positions, *subspace_like, covariance.moments)
    return Subspace(*zip(*pairs, strict=True))
