"""Optimizers that leave whole leaves as they are: every A, while the B's train."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from adamr import _tree
from adamr.lora.pairs import halves
from adamr.routing.carrier import plain_gradient

__all__ = ["hold", "train_b"]


def hold(
    optimizer: optax.GradientTransformation, held: Callable[[Any], Sequence[bool]]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves whole leaves as they are; see `train_b`.

    Args:
      optimizer: any.
      held: `tree -> bool per position` of a gradient: True where a leaf stands still.

    Returns:
      An optimizer with the state of `optimizer`.

    >>> tx = hold(optax.sgd(1.0), lambda tree: [True, False])
    >>> g = {"a": jnp.ones(1), "b": jnp.ones(1)}
    >>> tx.update(g, tx.init(g))[0]
    {'a': Array([0.], dtype=float32), 'b': Array([-1.], dtype=float32)}
    """
    inner = optax.with_extra_args_support(optimizer)

    def kept(tree):
        def leaf(x, still):
            return jnp.zeros_like(x) if still else x

        return _tree.map_positions(leaf, tree, held(tree))

    def update_fn(updates, state, params=None, **extra_args):
        updates = kept(plain_gradient(updates, "train_b", params))
        steps, state = inner.update(updates, state, params, **extra_args)
        return kept(steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def train_b(
    optimizer: optax.GradientTransformation, *, pairs: Sequence[Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that trains the B's and leaves every A as it is, to the bit.

    Args:
      optimizer: a whole one over the tree of the pairs, with the `Subspace` of the A's
        that `start_task` grows: `adamr(rate, project_out(subspace))`.
      pairs: as for `find_pairs`.

    Returns:
      An optimizer with the state of `optimizer`.

    Raises:
      ValueError: at update, for leaves in no pair.

    >>> lora = {"w_lora_a": jnp.ones((3, 1)), "w_lora_b": jnp.ones((1, 2))}
    >>> tx = train_b(optax.adamw(0.1))
    >>> step, _ = tx.update(lora, tx.init(lora), lora)
    >>> f"{step['w_lora_a'].sum():.2f}, {step['w_lora_b'].sum():.2f}"
    '0.00, -0.20'
    """

    def held(tree):
        still = {each.a for each in halves(tree, pairs)}
        return [i in still for i in range(len(_tree.flatten(tree)[0]))]

    return hold(optimizer, held)
