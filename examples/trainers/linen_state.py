"""A Flax linen `TrainState` that trains all parameters.

    python -m examples.trainers.linen_state

A small network learns prose, as a stand-in for a pretrained model. Then it learns code
and after that tables, with plain Adam and protected. What protection adds is in
`protected` and `end_task`. The same for low-rank pairs is in linen_pairs.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

import adamr
from examples.trainers.text import SYMBOLS, Text, read_text, show

__all__ = ["RATE", "Model", "create", "held_out_loss", "learn", "main"]

PAST, WIDTH, RATE = 8, 128, 3e-3


class Model(linen.Module):
    """Each byte from the `PAST` before it."""

    dense: Callable[[int], linen.Module] = partial(linen.Dense, use_bias=False)

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        ends = range(PAST, tokens.shape[1] + 1)
        past = jnp.stack([tokens[:, end - PAST : end] for end in ends], axis=1)
        x = linen.Embed(SYMBOLS, 16)(past)
        x = linen.gelu(self.dense(WIDTH)(x.reshape(*x.shape[:2], -1)))
        return self.dense(SYMBOLS)(linen.gelu(self.dense(WIDTH)(x)))


def forward(params: Any, tokens: jax.Array) -> jax.Array:
    return Model().apply({"params": params}, tokens)


def loss(params: Any, forward: Callable[..., jax.Array], windows: Any) -> jax.Array:
    cost = optax.softmax_cross_entropy_with_integer_labels
    return cost(forward(params, windows[:, :-1]), windows[:, PAST:]).mean()


def create(
    forward: Callable[..., jax.Array], params: Any, tx: optax.GradientTransformation
) -> TrainState:
    return TrainState.create(apply_fn=forward, params=params, tx=tx)


@jax.jit
def step(state: TrainState, batch: jax.Array) -> TrainState:
    gradient = jax.grad(loss)(state.params, state.apply_fn, batch)
    return state.apply_gradients(grads=gradient)


def learn(state: TrainState, text: Text, steps: int) -> TrainState:
    for batch in text.batches(steps):
        state = step(state, batch)
    return state


@jax.jit
def held_out_loss(state: TrainState, windows: jax.Array) -> jax.Array:
    return loss(state.params, state.apply_fn, windows)


def protected(params: Any, tokens: jax.Array) -> optax.GradientTransformation:
    """1. An optimizer that has room for what it will protect."""
    axes = adamr.contracted_axes(forward, params, tokens)
    subspace = adamr.empty_subspace(params, axes=axes, unprotected=["embedding"])
    return adamr.gpm_si(RATE, subspace)


@jax.jit
def end_task(state: TrainState, tokens: jax.Array) -> TrainState:
    """2. What the layers see in the finished task.  3. It stays as it is from here.

    SI holds what no projection can, here the embedding.
    """
    inputs = adamr.layer_inputs(forward, state.params, tokens)
    opt_state = adamr.protect_inputs(state.opt_state, inputs)
    return state.replace(opt_state=adamr.consolidate_si(opt_state, state.params))


def pretrained(text: Text, steps: int) -> Any:
    params = Model().init(jax.random.key(0), text.train[:1, :-1])["params"]
    return learn(create(forward, params, optax.adam(RATE)), text, steps).params


def main(steps: int = 200) -> dict[str, tuple[float, float, float]]:
    general, old, new = read_text()
    tokens, rows = old.batches(1, size=128)[0, :, :-1], {}
    params = pretrained(general, 2 * steps)
    for name in ("Adam", "protected"):
        kept = name == "protected"
        tx = protected(params, tokens) if kept else optax.adam(RATE)
        state = learn(create(forward, params, tx), old, steps)
        before = float(held_out_loss(state, old.held_out))
        if kept:
            state = end_task(state, tokens)
        state = learn(state, new, steps)
        after, learned = (float(held_out_loss(state, t.held_out)) for t in (old, new))
        rows[name] = before, after, learned
    show(old, new, rows)
    return rows


if __name__ == "__main__":
    main()
