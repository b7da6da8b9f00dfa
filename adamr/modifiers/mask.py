"""Masks: some coordinates of the gradient are set to zero.

    disruption_mask     g̃ = [sign g = sign r] g / ‖g‖

A mask on the gradient alone does not stop an optimizer: its momentum moves a masked
coordinate for another 1/(1 − b1) steps, and weight decay moves it always. Two wrappers
in `adamr.protection` make the step exactly zero where masked and freeze the moments
there: `freeze_masked` wherever the incoming gradient is zero, `half_fine_tuning` on a
random half of the leaves, drawn anew every round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.modifiers.replay import read_gradient
from adamr.routing.carrier import plain_gradient
from adamr.routing.strength import check_unit

__all__ = ["DisruptionState", "disruption_mask"]


class DisruptionState(NamedTuple):
    retain: Any  # r, float32, a tree like the parameters


def disruption_mask(
    decay: float = 0.9, *, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    """MUDMAN's mask: only coordinates whose step also lowers the loss to be retained.

        r_t = decay · r_{t−1} + (1 − decay) · retain_gradient
        g̃ = [sign g = sign r_t] g / ‖g‖

    ‖g‖ is the norm over all leaves before the mask. g is the gradient of the loss that
    training minimises (in unlearning, minus the forget loss). Then g̃_i r_i ≥ 0 in every
    coordinate, which is stricter than A-GEM's ⟨g̃, r⟩ ≥ 0.

    Extra argument of `update`:
      retain_gradient: tree like the gradient: that of the loss to be retained, on a
        batch of old data. While r is zero everything is masked.

    Args:
      decay: of r, in [0, 1).
      normalize: divide by ‖g‖. Off inside `route_first_moment`, where v sees the raw g.

    Returns:
      A modifier or a plain link; put `freeze_masked(optimizer)` after it, or momentum
      leaks. A zero gradient gives zero. An entry of `retain_gradient` that is not
      finite leaves its r unchanged. NaN in g spreads through ‖g‖.

    Raises:
      ValueError: for a decay outside [0, 1]; at update, without `retain_gradient` or
        with one of the wrong shape.
      TypeError: for a `Routed`.

    >>> g, r = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, -1.0])
    >>> tx = disruption_mask()
    >>> print(tx.update(g, tx.init(g), retain_gradient=r)[0].round(5))
    [0.26726 0.      0.     ]

    References:
      Sondej et al., Robust LLM Unlearning with MUDMAN: Meta-Unlearning with Disruption
      Masking And Normalization, arXiv:2506.12484.
    """
    check_unit("decay", decay)

    def init_fn(params):
        return DisruptionState(optax.tree.zeros_like(params, dtype=jnp.float32))

    def update_fn(updates, state, params=None, *, retain_gradient=None, **extra_args):
        updates = plain_gradient(updates, "disruption_mask", params)
        del params, extra_args
        new = read_gradient(
            updates,
            retain_gradient,
            link="disruption_mask",
            argument="retain_gradient",
            what="the gradient of the loss to be retained, on a batch of old data",
        )
        leaves, treedef = jax.tree.flatten(updates)

        def average(r, x):
            moved = decay * r + (1.0 - decay) * x
            return jnp.where(jnp.isfinite(x), moved, r).astype(r.dtype)

        retain = list(map(average, jax.tree.leaves(state.retain), new))
        norm = jnp.sqrt(
            sum(map(_tree.squared_norm, leaves), jnp.zeros([], jnp.float32))
        )
        scale = (
            1.0 / jnp.where(norm == 0, 1.0, norm)
            if normalize
            else jnp.ones([], jnp.float32)
        )

        def masked(g, r):
            scaled = (g.astype(jnp.float32) * scale).astype(g.dtype)
            agrees = jnp.sign(g.astype(jnp.float32)) == jnp.sign(r)
            return jnp.where(agrees, scaled, jnp.zeros_like(g))

        updates = jax.tree.unflatten(treedef, list(map(masked, leaves, retain)))
        retained = jax.tree.structure(state.retain)
        return updates, DisruptionState(jax.tree.unflatten(retained, retain))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
