"""Masks: some coordinates or leaves stay as they are.

    disruption_mask     g̃ = [sign g = sign r] g / ‖g‖      coordinates, anew every step
    half_fine_tuning    half of the leaves per category    leaves, anew every round
                                                           (`adamr.modifiers.half`)

A mask on the gradient alone does not stop an optimizer: its momentum moves a masked
coordinate for another 1/(1 − b1) steps, and weight decay moves it always. Two wrappers
around an optimizer make its step exactly zero where masked and freeze the moments
there: `freeze_masked` wherever the incoming gradient is zero, `half_fine_tuning` on the
frozen leaves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _trees
from adamr.modifiers.replay import read_gradient
from adamr.routing import FaithfulSecondMomentState, Routed, require_plain
from adamr.state import _map_nodes
from adamr.strength import _check_unit

__all__ = [
    "DisruptionState",
    "FreezeMaskedState",
    "disruption_mask",
    "freeze_masked",
]


class DisruptionState(NamedTuple):
    retain: Any  # r, float32, a tree like the parameters


def disruption_mask(
    decay: float = 0.9, *, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    """MUDMAN's mask: only coordinates whose step also lowers the loss to be retained.

        r_t = decay · r_{t−1} + (1 − decay) · retain_gradient
        g̃ = [sign g = sign r_t] g / ‖g‖

    ‖g‖ is the norm over all leaves before the mask. g is the gradient of the loss that
    is being descended (in unlearning, that of minus the forget loss); then
    g̃_i r_i ≥ 0 in every coordinate, which is stricter than A-GEM's ⟨g̃, r⟩ ≥ 0.

    Extra argument of `update`:
      retain_gradient: tree like the gradient: that of the loss to be retained, on a
        batch of old data. Zeros until r has seen any mask everything.

    Args:
      decay: of r, in [0, 1).
      normalize: divide by ‖g‖. Off inside `route_first_moment`, where v sees the raw g.

    Returns:
      A modifier or a plain link; put `freeze_masked(optimizer)` behind it, or momentum
      leaks. A zero gradient gives zero. An entry of `retain_gradient` that is not
      finite leaves its r as it was. NaN in g spreads through ‖g‖.

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
    _check_unit("decay", decay)

    def init_fn(params):
        return DisruptionState(optax.tree.zeros_like(params, dtype=jnp.float32))

    def update_fn(updates, state, params=None, *, retain_gradient=None, **extra_args):
        del params, extra_args
        require_plain(updates, "disruption_mask")
        new = read_gradient(
            updates, retain_gradient, link="disruption_mask",
            argument="retain_gradient",
            what="the gradient of the loss to be retained, on a batch of old data",
        )  # fmt: skip
        leaves, treedef = jax.tree.flatten(updates)

        def average(r, x):
            moved = decay * r + (1.0 - decay) * x
            return jnp.where(jnp.isfinite(x), moved, r).astype(r.dtype)

        retain = list(map(average, jax.tree.leaves(state.retain), new))
        norm = jnp.sqrt(sum(map(_trees.squared_norm, leaves), jnp.zeros([])))
        scale = 1.0 / jnp.where(norm == 0, 1.0, norm) if normalize else jnp.ones([])

        def masked(g, r):
            scaled = (g.astype(jnp.float32) * scale).astype(g.dtype)
            agrees = jnp.sign(g.astype(jnp.float32)) == jnp.sign(r)
            return jnp.where(agrees, scaled, jnp.zeros_like(g))

        updates = jax.tree.unflatten(treedef, list(map(masked, leaves, retain)))
        retained = jax.tree.structure(state.retain)
        return updates, DisruptionState(jax.tree.unflatten(retained, retain))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def update_where(keep, optimizer, updates, state, params, extra_args):
    """The optimizer's step, with step and moments held where `keep` is False.

    `keep` is a tree of bools like the parameters, full arrays or one number per leaf.
    """
    steps, new = optimizer.update(updates, state, params, **extra_args)
    steps = jax.tree.map(lambda k, s: jnp.where(k, s, jnp.zeros_like(s)), keep, steps)

    # A tree like the state: the masks where it is shaped like the parameters.
    masks = optax.tree.map_params(
        optimizer,
        lambda value, mask: value if _trees.is_hole(value) else mask,
        state,
        keep,
        transform_non_params=lambda node: jax.tree.map(lambda _: True, node),
        is_leaf=_trees.is_hole,
    )

    def shared(node):
        # A shared v is a tuple in leaf order, which has the leaves of m.
        whole = tuple(jax.tree.leaves(node.mu))
        plain = lambda x: type(x) is tuple  # noqa: E731
        nu = jax.tree.map(lambda x: whole if plain(x) else x, node.nu, is_leaf=plain)
        return node._replace(nu=nu)

    masks = _map_nodes(shared, masks, FaithfulSecondMomentState)

    def choose(mask, after, before):
        if mask is True or (mask.ndim and mask.shape != after.shape):
            return after
        return jnp.where(mask, after, before)

    return steps, jax.tree.map(choose, masks, new, state)


class FreezeMaskedState(NamedTuple):
    inner: Any


def freeze_masked(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves alone what its gradient leaves out.

    Where the incoming gradient is exactly zero, the step is exactly zero, weight decay
    included, and the moments stay. Everywhere else it is the optimizer's own step.
    Proven in `test_step_is_zero_exactly_where_masked`.

    v then averages over the steps in which a coordinate was free, so masking does not
    shrink it: routing both moments loses nothing here. Adam's count is shared, though:
    a coordinate that was masked up to a late step is not fully corrected for its bias
    and starts with a step up to (1 − b1) / √(1 − b2) times the usual one, 3.2 times
    with b2 = 0.999 and 1 with b2 = 0.99.

    Args:
      optimizer: any, with or without learning rate, with element-wise moments; state
        that is not shaped like the parameters (counts, shared v) goes on as usual.

    Returns:
      A wrapper to be put behind a mask. Behind a route, as
      `freeze_masked(faithful_second_moment())`, zeros in `first` count.

    >>> tx = freeze_masked(optax.sgd(1.0, momentum=0.9))
    >>> step, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> print(tx.update(jnp.array([1.0, 0.0]), state)[0])
    [-1.9  0. ]
    """
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        return FreezeMaskedState(inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        seen = updates.first if isinstance(updates, Routed) else updates
        keep = jax.tree.map(lambda g: g != 0, seen)
        steps, new = update_where(keep, inner, updates, state.inner, params, extra_args)
        return steps, FreezeMaskedState(new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
