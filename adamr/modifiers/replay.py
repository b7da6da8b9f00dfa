"""Replay: the gradient of the new batch mixed with that of a batch from memory.

With g the gradient on new data, g_mem that on memory and w = `weight`,

    g̃ = (1 − w) g + w g_mem                                  mix_gradients
    s = sign(g) √((1 − w) g² + w g_mem²)                     replay_routing

For w = ½ this is experience replay on two batches of equal size. w = 1 − 1/t gives the
t-th task the same weight as each task before it.

v must not be fed with g alone: once the new batch is fitted, g and with it v vanish
while g_mem does not, and the step grows without bound. `route_both_moments` of the
mixture feeds v with g̃²; `replay_routing` feeds it with s², which does not shrink where
the two gradients cancel. Both keep the step bounded.

`adamr.buffers` holds the buffers to draw from.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _rows as evidence
from adamr import _tree
from adamr.routing.carrier import Routed, plain_gradient
from adamr.routing.strength import check_unit

__all__ = ["MixState", "dark_experience_loss", "mix_gradients", "replay_routing"]


class MixState(NamedTuple):
    """int32: number of steps, for a scheduled weight."""

    count: jax.typing.ArrayLike


def read_gradient(
    updates: Any, tree: Any, *, link: str, argument: str, what: str
) -> list[jax.Array]:
    """The float32 leaves of a second gradient, in the order of those of `updates`."""
    if tree is None:
        raise ValueError(
            f"{link} needs {argument}: pass update(gradient, state, params, "
            f"{argument}=tree) with {what}."
        )
    leaves, found = jax.tree.leaves(updates), evidence.align(updates, tree, argument)
    names, nodes = _tree.flatten_with_names(updates)
    names = [n for n, x in zip(names, nodes, strict=True) if not _tree.is_hole(x)]
    for name, g, x in zip(names, leaves, found, strict=True):
        if jnp.shape(x) != g.shape:
            raise ValueError(
                f"{argument} at {name!r} has shape {jnp.shape(x)}, expected that of "
                f"the gradient, {g.shape}."
            )
    return [jnp.asarray(x, jnp.float32) for x in found]


# Convex combinations, exact where nothing is mixed. g + w (m − g) would cancel, and its
# counterpart for squares could fall below 0.


def _mixed(w: jax.Array, g: jax.Array, m: jax.Array) -> jax.Array:
    wide = g.astype(jnp.float32)
    new = ((1.0 - w) * wide + w * m).astype(g.dtype)
    return jnp.where((w == 0) | (m == wide), g, new)


def _root_mean_square(w: jax.Array, g: jax.Array, m: jax.Array) -> jax.Array:
    wide = g.astype(jnp.float32)
    new = jnp.sqrt((1.0 - w) * jnp.square(wide) + w * jnp.square(m))
    # Only the square counts, but a strength link moves it towards g: with opposite
    # signs it would pass through 0.
    new = jnp.where(g < 0, -new, new).astype(g.dtype)
    return jnp.where((w == 0) | (m == wide), g, new)


def _with_memory(
    weight: optax.ScalarOrSchedule,
    link: str,
    combine: Callable[[jax.Array, Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """A link that returns `combine(w, gradient, memory_gradient)`."""
    check_unit("weight", weight)

    def init_fn(params):
        del params
        return MixState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, memory_gradient=None, **extra_args):
        updates = plain_gradient(updates, link, params)
        del params, extra_args
        memory = read_gradient(
            updates,
            memory_gradient,
            link=link,
            argument="memory_gradient",
            what="the gradient of the loss on a batch from memory",
        )
        memory = jax.tree.unflatten(jax.tree.structure(updates), memory)
        w = jnp.asarray(weight(state.count) if callable(weight) else weight)
        combined = combine(w.astype(jnp.float32), updates, memory)
        return combined, MixState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mix_gradients(
    weight: optax.ScalarOrSchedule = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Experience replay on gradients: g̃ = (1 − weight) g + weight · memory_gradient.

    Extra argument of `update`:
      memory_gradient: tree like the gradient. While there is no memory, pass the
        gradient itself, which gives g; a tree of zeros gives (1 − weight) g.

    Args:
      weight: in [0, 1], a number, an array () or a schedule of the step count.

    Returns:
      A modifier or a plain link. Weight 0 gives g bit for bit, whatever the memory
      holds; equal gradients give g. NaN in either gradient passes through. Route it
      with `route_both_moments`, or use `replay_routing`. `route_first_moment` of it is
      unsafe, because v would see g alone. Under `optax.MultiSteps` the memory gradient
      of the last micro-step counts.

    Raises:
      ValueError: for a weight outside [0, 1]; at update, without `memory_gradient` or
        with one of the wrong shape.
      TypeError: for a `Routed`.

    >>> g, memory = jnp.array([1.0, 2.0]), jnp.array([3.0, -2.0])
    >>> tx = mix_gradients(0.25)
    >>> print(tx.update(g, tx.init(g), memory_gradient=memory)[0])
    [1.5 1. ]

    References:
      Chaudhry et al., On Tiny Episodic Memories in Continual Learning,
      arXiv:1902.10486.
    """

    def mixture(w, gradient, memory):
        return jax.tree.map(functools.partial(_mixed, w), gradient, memory)

    return _with_memory(weight, "mix_gradients", mixture)


def replay_routing(
    weight: optax.ScalarOrSchedule = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """The route of replay: m from the mixture, v from both parts of it.

        first  = (1 − weight) g + weight · memory_gradient
        second = ±√((1 − weight) g² + weight · memory_gradient²)      raw = g

    with the sign of g, so that a strength link can move it towards raw. As first² ≤
    second², v is never too small for m: the guard of the merging link has nothing to
    do, and where the gradients oppose each other the step is small rather than rescaled
    to full size, as it would be with v from the mixture.

    The extra argument of `update`, arguments and errors are those of `mix_gradients`.

    Returns:
      A route g -> `Routed`, which `faithful_second_moment` ends. Weight 0 gives
      (g, g, g). Squares are float32: gradients below 1e-19 count as 0 in v.

    >>> g, memory = jnp.array([1.0, 3.0]), jnp.array([1.0, -3.0])
    >>> tx = replay_routing(0.5)
    >>> routed, _ = tx.update(g, tx.init(g), memory_gradient=memory)
    >>> print(routed.first, routed.second)
    [1. 0.] [1. 3.]
    """

    def routed(w, gradient, memory):
        first = jax.tree.map(functools.partial(_mixed, w), gradient, memory)
        second = jax.tree.map(functools.partial(_root_mean_square, w), gradient, memory)
        return Routed(first, second, gradient)

    return _with_memory(weight, "replay_routing", routed)


def _mean(losses: jax.Array, weights: jax.Array | None, name: str) -> jax.Array:
    """Σ weights · losses, after the mean over all axes but the first."""
    losses = jnp.mean(losses, axis=tuple(range(1, losses.ndim)))
    if weights is None:
        return jnp.mean(losses)
    if jnp.shape(weights) != losses.shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(weights)}, expected {losses.shape}: one "
            "weight per item, as adamr.buffers.sample returns."
        )
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))


def dark_experience_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    distilled_logits: jax.Array,
    stored_logits: jax.Array,
    distilled_weights: jax.Array | None = None,
    replayed_logits: jax.Array,
    replayed_labels: jax.Array,
    replayed_weights: jax.Array | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> jax.Array:
    """DER++: labels on new data, stored logits and labels on two draws from memory.

        loss = CE(f(x), y) + alpha · MSE(f(x'), z') + beta · CE(f(x''), y'')

    (x', z') and (x'', y'') are independent draws; z is what the model said when the
    item was stored. The MSE is the mean over logits and batch. With beta = 0 it is DER.

    Args:
      logits: f(x), (batch, …, classes).
      labels: y, (batch, …) integers.
      distilled_logits: f(x'), (memory batch, …, classes).
      stored_logits: z', of the same shape; no gradient flows into it.
      distilled_weights: (memory batch,) of the first draw, as `adamr.buffers.sample`
        returns: sum 1, or all 0 for an empty buffer, whose term is then 0. None: 1 / n.
      replayed_logits: f(x'').
      replayed_labels: y'', integers.
      replayed_weights: those of the second draw.
      alpha: ≥ 0.
      beta: ≥ 0.

    Returns:
      A float32 scalar. Items of weight 0 add nothing if their logits are finite.

    Raises:
      ValueError: for shapes that do not fit.

    >>> new, label = jnp.array([[50.0, 0.0]]), jnp.array([0])
    >>> draw = jnp.array([[0.0, 0.0]])
    >>> loss = dark_experience_loss(
    ...     new, label, distilled_logits=draw, stored_logits=jnp.array([[1.0, 0.0]]),
    ...     replayed_logits=draw, replayed_labels=label)
    >>> print(loss.round(4))
    0.5966

    References:
      Buzzega et al., Dark Experience for General Continual Learning: a Strong, Simple
      Baseline, arXiv:2004.07211.
    """
    if distilled_logits.shape != stored_logits.shape:
        raise ValueError(
            f"stored_logits has shape {stored_logits.shape}, expected that of "
            f"distilled_logits, {distilled_logits.shape}."
        )
    for name, x, y in (
        ("labels", logits, labels),
        ("replayed_labels", replayed_logits, replayed_labels),
    ):
        if x.shape[:-1] != y.shape:
            raise ValueError(f"{name} has shape {y.shape}, expected {x.shape[:-1]}.")

    def entropy(x, y):
        x = x.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(x, y)

    stored = jax.lax.stop_gradient(stored_logits.astype(jnp.float32))
    squares = jnp.square(distilled_logits.astype(jnp.float32) - stored)
    replayed = entropy(replayed_logits, replayed_labels)
    return (
        _mean(entropy(logits, labels), None, "")
        + alpha * _mean(squares, distilled_weights, "distilled_weights")
        + beta * _mean(replayed, replayed_weights, "replayed_weights")
    )
