"""Masks that hold for the step: an optimizer that leaves alone what is masked."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import map_nodes
from adamr.routing.carrier import Routed
from adamr.routing.merge import FaithfulSecondMomentState

__all__ = ["FreezeMaskedState", "freeze_masked"]


def update_where(
    keep: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """The optimizer's step, with step and moments held where `keep` is False.

    `keep` is a tree of bools like the parameters, full arrays or one bool per leaf.
    """
    steps, new = optimizer.update(updates, state, params, **extra_args)
    steps = jax.tree.map(lambda k, s: jnp.where(k, s, jnp.zeros_like(s)), keep, steps)

    # A tree like the state: the masks where it is shaped like the parameters.
    masks = optax.tree.map_params(
        optimizer,
        lambda value, mask: value if _tree.is_hole(value) else mask,
        state,
        keep,
        transform_non_params=lambda node: jax.tree.map(lambda _: True, node),
        is_leaf=_tree.is_hole,
    )

    def in_leaf_order(node):
        return type(node) is tuple

    def shared(node):
        # A shared v is a tuple in leaf order, which has the leaves of m.
        whole = tuple(jax.tree.leaves(node.mu))
        nu = jax.tree.map(
            lambda x: whole if in_leaf_order(x) else x, node.nu, is_leaf=in_leaf_order
        )
        return node._replace(nu=nu)

    masks = map_nodes(shared, masks, FaithfulSecondMomentState)

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

    v then averages over the steps in which a coordinate was free, so masking does not
    shrink it: routing both moments loses nothing here. But Adam keeps one count for all
    coordinates. One that was masked up to a late step is not fully corrected for its
    bias and starts with a step up to (1 − b1) / √(1 − b2) times the usual one: 3.2
    times with b2 = 0.999, once with b2 = 0.99.

    Args:
      optimizer: any, with or without learning rate, with element-wise moments. State
        that is not shaped like the parameters (counts, a shared v) advances as usual.

    Returns:
      A wrapper, to be put after a mask. After a route, as
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
