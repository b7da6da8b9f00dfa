"""Cost of gradient constraints relative to one gradient: one line of JSON.

    python -m benchmarks.constraint_cost [--tasks 20] [--blocks 50] [--seconds 10]

An MLP of about 1e6 parameters at batch size 128, `tasks` memory gradients, every
constraint violated about as often as not. All rivals run once per round:

    gradient           one gradient of the loss                        the unit
    qp                 the dual program of GEM, T x T                  target <= 0.05
    qp_blocks          one program per leaf (p-mGEM), `blocks` leaves  target <= 0.10
    qp_blocks_diagonal the approximate solver in its place             target <= 0.10
    gem, gem_leaf, gem_leaf_diagonal, agem                             the whole link
    constrained_gem    the link in the metric of Adam's preconditioner
    adam               the merging link alone, to compare it with

The whole link reads the T memory gradients two or three times and forms their Gram
matrix, 2 T² p operations; computing them took T gradients.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from adamr.modifiers.dual import solve_diagonal, solve_exact
from benchmarks._speed import timing

BATCH = 128


def stack_of_layers(leaves: int, size: int, rng: np.random.Generator):
    """An MLP with `leaves` kernels and biases and about `size` parameters."""
    layers = leaves // 2
    width = round((size / layers) ** 0.5)

    def layer():
        kernel = rng.standard_normal((width, width), np.float32) * (2 / width) ** 0.5
        return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(width)}

    return [layer() for _ in range(layers)], width


def loss(params, inputs, labels):
    hidden = inputs
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
    logits = hidden @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gram_matrices(rows, blocks):
    """The programs' data, ready made: (blocks, T, T) and (blocks, T)."""
    kernels = [layer["kernel"] for layer in rows][:blocks]
    dots = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    gram = jnp.stack([dots("kab,lab->kl", x[1:], x[1:]) for x in kernels])
    inner = jnp.stack([dots("kab,ab->k", x[1:], x[0]) for x in kernels])
    pick = np.resize(np.arange(len(kernels)), blocks)
    return gram[pick], inner[pick]


def rivals(tasks: int, blocks: int, size: int, seed: int) -> dict[str, tuple]:
    """name -> (function, arguments)."""
    rng = np.random.default_rng(seed)
    params, width = stack_of_layers(blocks, size, rng)
    batches = jnp.asarray(
        rng.standard_normal((tasks + 1, BATCH, width), np.float32),
    )
    labels = jnp.asarray(rng.integers(0, width, (tasks + 1, BATCH)))
    rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, batches, labels)
    noise = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)) * jnp.std(x),
        rows,
    )
    memory = jax.tree.map(lambda x: x[1:], noise)
    mean = jax.tree.map(lambda x: -x[0], rows)
    g = jax.tree.map(lambda x: x[0], rows)
    usable = jnp.ones(tasks, bool)
    one = gram_matrices(noise, 1)
    many = gram_matrices(noise, blocks)

    def exact(gram, inner):
        return jax.vmap(lambda a, b: solve_exact(a, b, 0.5, usable, None))(gram, inner)

    def diagonal(gram, inner):
        squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
        return solve_diagonal(squares, inner, 0.5, usable, None)

    def link(tx, **evidence):
        state = tx.init(params)
        update = lambda g, state, evidence: tx.update(g, state, **evidence)  # noqa: E731
        return update, (g, state, evidence)

    def routed(merge):
        return optax.chain(adamr.route_first_moment(optax.identity()), merge)

    gem, leaf = adamr.gem_constraint, adamr.gem_constraint(partition="leaf")
    rough = adamr.gem_constraint(partition="leaf", solver="diagonal")
    metric = routed(adamr.constrained_second_moment(gem()))
    return {
        "gradient": (jax.grad(loss), (params, batches[0], labels[0])),
        "qp": (exact, one),
        "qp_blocks": (exact, many),
        "qp_blocks_diagonal": (diagonal, many),
        "gem": link(gem(), memory_gradients=memory),
        "gem_leaf": link(leaf, memory_gradients=memory),
        "gem_leaf_diagonal": link(rough, memory_gradients=memory),
        "agem": link(adamr.agem_constraint(), memory_gradient=mean),
        "adam": link(routed(adamr.faithful_second_moment())),
        "constrained_gem": link(metric, memory_gradients=memory),
    }


def timed(function, arguments):
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))

    def once(_):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - start

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    functions = rivals(config.tasks, config.blocks, config.size, config.seed)
    runs = {name: timed(*each) for name, each in functions.items()}
    times = timing.time_rounds(
        runs, [None], rounds=300, seconds=config.seconds, seed=config.seed
    )
    found = {
        name: {
            "milliseconds": 1e3 * float(np.median(each)),
            "of_a_gradient": timing.ratio(each, times["gradient"], config.seed),
        }
        for name, each in times.items()
    }
    machine = {**timing.machine(), "command": "python -m benchmarks.constraint_cost"}
    print(json.dumps({"config": vars(config), "machine": machine, "rivals": found}))


if __name__ == "__main__":
    main()
