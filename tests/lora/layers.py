"""One layer with a low-rank pair, in the layouts of the libraries, and its training."""

import jax
import jax.numpy as jnp
import optax

import adamr
from adamr import lora as room_of


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
