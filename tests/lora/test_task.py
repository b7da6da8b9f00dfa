"""Old responses do not move, whatever B does; the boundary changes no response."""

import jax
import jax.numpy as jnp
import optax
import pytest

import adamr
from adamr import lora as room_of
from tests.contract.compilations import nothing_compiles


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


S = 0.5

# einsum of a layer: name -> (kernel, A, B, x, layer(kernel, a, b, x))
LAYERS = {
    "dense": (
        (8, 5), (8, 2), (2, 5), (3, 8), "bi,io->bo", "bi,ir,ro->bo",
    ),
    "heads": (
        (8, 2, 3), (8, 2), (2, 2, 3), (3, 8), "bi,iho->bho", "bi,ir,rho->bho",
    ),
    "out of heads": (
        (2, 4, 5), (2, 4, 2), (2, 5), (3, 2, 4), "bhi,hio->bo", "bhi,hir,ro->bo",
    ),
    "outputs around inputs": (
        (2, 8, 3), (8, 2), (2, 2, 3), (3, 8), "bi,hio->bho", "bi,ir,rho->bho",
    ),
    "experts": (
        (3, 8, 5), (3, 8, 2), (2, 5), (3, 3, 8), "ebi,eio->ebo", "ebi,eir,ro->ebo",
    ),
    "stacked": (
        (3, 8, 5), (3, 8, 2), (3, 2, 5), (3, 3, 8), "ebi,eio->ebo", "ebi,eir,ero->ebo",
    ),
}  # fmt: skip


def layer(name):
    kernel, a, b, x, base_rule, lora_rule = LAYERS[name]
    base = {"w": normal(0, *kernel)}
    lora = {"w_lora_a": normal(1, *a), "w_lora_b": normal(2, *b)}

    def forward(lora, base, x):
        low = jnp.einsum(lora_rule, x, lora["w_lora_a"], lora["w_lora_b"])
        return jnp.einsum(base_rule, x, base["w"]) + S * low

    return forward, base, lora, normal(3, *x)


def optimizer(forward, base, lora, x, make=None, **options):
    axes = room_of.axes(forward, lora, base, x)
    subspace = adamr.empty_subspace(lora, axes=axes, **options)
    make = make or (lambda s: adamr.adamr(0.1, adamr.project_out(s)))
    return make(subspace)


def largest(a, b):
    """The largest change, relative to the largest entry."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)))


def trained(tx, forward, base, lora, state, x, seed, steps=5):
    @jax.jit
    def step(lora, state):
        def loss(lora):
            y = forward(lora, base, x)
            return jnp.mean((y - normal(seed, *y.shape)) ** 2)

        g = jax.grad(loss)(lora)
        updates, state = tx.update(g, state, lora)
        return optax.apply_updates(lora, updates), state

    for _ in range(steps):
        lora, state = step(lora, state)
    return lora, state


@pytest.mark.parametrize("name", LAYERS)
def test_old_responses_do_not_move(name):
    forward, base, lora, x = layer(name)
    tx = optimizer(forward, base, lora, x)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 4)
    before = forward(lora, base, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), scaling=S, threshold=1.0
    )
    assert largest(before, forward(lora, base, x)) < 1e-6
    assert not jnp.any(lora["w_lora_b"])
    fresh = normal(6, *x.shape)
    then = forward(lora, base, fresh)
    lora, state = trained(tx, forward, base, lora, state, fresh, 7, steps=20)
    assert largest(then, forward(lora, base, fresh)) > 0.1
    assert largest(before, forward(lora, base, x)) < 1e-5
    wild = lora | {"w_lora_b": 100 * normal(8, *lora["w_lora_b"].shape)}
    assert largest(before, forward(wild, base, x)) < 1e-3


def nnx_model():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.second = nnx.LoRA(
                8, 3, 4, base_module=nnx.Linear(8, 4, rngs=rngs), rngs=rngs
            )

        def __call__(self, x):
            return self.second(jnp.tanh(self.norm(self.first(x))))

    graph, lora, base = nnx.split(Model(nnx.Rngs(0)), nnx.LoRAParam, ...)
    return lambda lora, base, x: nnx.merge(graph, lora, base)(x), base, lora


def test_nnx_lora_linear():
    """Two layers in a row: the input of the second stays, because the first's does."""
    forward, base, lora = nnx_model()
    x, new = normal(3, 2, 6), normal(4, 5, 6)
    tx = optimizer(forward, base, lora, x)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 5)
    before = forward(lora, base, x)
    inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), threshold=1.0
    )
    assert largest(before, forward(lora, base, x)) < 1e-6
    then = forward(lora, base, new)
    lora, state = trained(tx, forward, base, lora, state, new, 6, steps=20)
    assert largest(then, forward(lora, base, new)) > 0.1
    assert largest(before, forward(lora, base, x)) < 1e-5
    left = room_of.room(state, lora)
    assert {name: int(x.directions) for name, x in left.items()} == {
        "first/lora/lora_a/value": 4,
        "second/lora_a/value": 6,
    }


@pytest.mark.parametrize("wrap", ["chain", "multi_steps", "inject", "gpm", "gpm_si"])
def test_in_any_wrapper_without_recompiling(wrap):
    forward, base, lora, x = layer("dense")

    def make(s):
        if wrap == "gpm":
            return adamr.gpm(0.1, s, weight_decay=0.1)
        if wrap == "gpm_si":
            return adamr.gpm_si(0.1, s)
        if wrap == "inject":
            rate = optax.inject_hyperparams(lambda rate: adamr.gpm(rate, s))
            return rate(rate=0.1)
        inner = adamr.adamr(0.1, adamr.project_out(s))
        if wrap == "chain":
            return optax.chain(optax.clip_by_global_norm(1.0), inner)
        return optax.MultiSteps(inner, 2)

    tx = optimizer(forward, base, lora, x, make)
    grad = jax.grad(lambda lora, base, x: jnp.sum(forward(lora, base, x) ** 2))

    @jax.jit
    def step(lora, base, state, x):
        updates, state = tx.update(grad(lora, base, x), state, lora)
        return optax.apply_updates(lora, updates), state

    state = jax.jit(tx.init)(lora)
    for _ in range(2):
        lora, state = step(lora, base, state, x)
    if wrap == "gpm_si":
        state = adamr.consolidate_si(state, lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    before = forward(lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), scaling=S, threshold=1.0
    )
    new = normal(9, 3, 8)
    with nothing_compiles():
        for _ in range(4):
            lora, state = step(lora, base, state, new)
    assert largest(before, forward(lora, base, x)) < 1e-5
    assert jnp.any(lora["w_lora_b"] != 0)
