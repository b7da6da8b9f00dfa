"""A Flax linen `TrainState` with low-rank pairs among its parameters.

    python -m examples.trainers.linen_pairs

The network of linen_state.py with pairs beside its kernels. They learn code and after
that tables, with plain Adam and protected. What protection adds is in `protected` and
`end_task`. The pairs have the names that Qwix gives them, so what Qwix has adapted
works alike, with its scaling α / r as `scaling=` of `start_task`.
"""

from typing import Any

import jax
import optax
from flax import linen
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

import adamr
from examples.trainers.linen_state import (
    RATE,
    Model,
    create,
    held_out_loss,
    learn,
    pretrained,
)
from examples.trainers.text import read_text, show

RANK = 4


class Dense(linen.Module):
    """x W + (x A) B."""

    outputs: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, init = x.shape[-1], linen.initializers
        w = self.param("kernel", init.lecun_normal(), (n, self.outputs))
        a = self.param("kernel_lora_a", init.he_uniform(), (n, RANK))
        b = self.param("kernel_lora_b", init.zeros, (RANK, self.outputs))
        return x @ w + x @ a @ b


def forward(params: Any, tokens: jax.Array) -> jax.Array:
    return Model(Dense).apply({"params": params}, tokens)


def with_pairs(params: Any, tokens: jax.Array) -> Any:
    fresh = Model(Dense).init(jax.random.key(1), tokens)["params"]
    return unflatten_dict(flatten_dict(fresh) | flatten_dict(params))


def part(params: Any, pairs: bool) -> Any:
    """The pairs or the rest, with None in place of the other."""
    leaves = flatten_dict(params).items()
    return unflatten_dict(
        {path: x if ("_lora_" in path[-1]) == pairs else None for path, x in leaves}
    )


def whole(pairs: Any, rest: Any) -> Any:
    def leaf(a: Any, b: Any) -> Any:
        return b if a is None else a

    return jax.tree.map(leaf, pairs, rest, is_leaf=lambda x: x is None)


def of_pairs(pairs: Any, rest: Any, tokens: jax.Array) -> jax.Array:
    return forward(whole(pairs, rest), tokens)


def of_pairs_only(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        names = {path: "_lora_" in path[-1] for path in flatten_dict(params)}
        return unflatten_dict(names)

    return optax.partition({True: tx, False: optax.set_to_zero()}, labels)


def protected(params: Any, tokens: jax.Array) -> optax.GradientTransformation:
    """1. An optimizer of the pairs that has room for what it will protect."""
    pairs, rest = part(params, True), part(params, False)
    axes = adamr.lora.axes(of_pairs, pairs, rest, tokens)
    return adamr.gpm(RATE, adamr.empty_subspace(pairs, axes=axes))


@jax.jit
def end_task(state: TrainState, tokens: jax.Array, key: jax.Array) -> TrainState:
    """2. What the layers see in the finished task.  3. It stays as it is from here."""
    pairs, rest = part(state.params, True), part(state.params, False)
    inputs = adamr.layer_inputs(of_pairs, pairs, rest, tokens)
    rest, pairs, opt_state = adamr.lora.start_task(
        rest, pairs, state.opt_state, inputs, key
    )
    return state.replace(params=whole(pairs, rest), opt_state=opt_state)


def main(steps: int = 200) -> dict[str, tuple[float, float, float]]:
    general, old, new = read_text()
    tokens, rows = old.batches(1, size=128)[0, :, :-1], {}
    params = with_pairs(pretrained(general, 2 * steps), tokens)
    for name in ("Adam", "protected"):
        kept = name == "protected"
        tx = protected(params, tokens) if kept else optax.adam(RATE)
        state = learn(create(forward, params, of_pairs_only(tx)), old, steps)
        before = float(held_out_loss(state, old.held_out))
        if kept:
            state = end_task(state, tokens, jax.random.key(0))
        state = learn(state, new, steps)
        after, learned = (float(held_out_loss(state, t.held_out)) for t in (old, new))
        rows[name] = before, after, learned
    show(old, new, rows)
    return rows


if __name__ == "__main__":
    main()
