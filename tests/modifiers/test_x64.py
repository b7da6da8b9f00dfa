"""Constraints and surgery under `jax_enable_x64`: the float32 results, carried."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr

STEPS = 2
RNG = np.random.default_rng(0)
GRADIENTS = {
    "kernel": RNG.normal(size=(STEPS, 4, 3)),
    "bias": RNG.normal(size=(STEPS, 3)),
}


def opposed(*lead):
    """Evidence that the first gradient, and most of the later ones, violate."""
    return {
        name: RNG.normal(size=(*lead, *g.shape[1:])) - g[0]
        for name, g in GRADIENTS.items()
    }


def constrained(strength):
    return optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.constrained_second_moment(adamr.gem_constraint(strength)),
    )


MEMORIES = {"memory_gradients": opposed(5)}
TASKS = {"task_gradients": opposed(5)}
CASES = {
    "gem": (lambda x: adamr.gem(0.1, x), MEMORIES),
    "gem average": (lambda x: adamr.gem(0.1, x, average=True), MEMORIES),
    "gem diagonal": (lambda x: adamr.gem(0.1, x, solver="diagonal"), MEMORIES),
    "p_mgem": (lambda x: adamr.p_mgem(0.1, x), MEMORIES),
    "d_mgem": (
        lambda x: adamr.d_mgem(0.1, x),
        {"memory_gradients": opposed(3, 2)},
    ),
    "agem": (lambda x: adamr.agem(0.1), {"memory_gradient": opposed()}),
    "gem_constraint": (
        lambda x: adamr.gem_constraint(x, regularization=x / 100),
        MEMORIES,
    ),
    "constrained_second_moment": (constrained, MEMORIES),
    "pcgrad": (lambda x: adamr.pcgrad(), TASKS),
    "cagrad": (lambda x: adamr.cagrad(x), TASKS),
}


def run(build, evidence, dtype, how):
    """The steps and the first and last state, at a number in the dtype of params."""
    gradients, evidence = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        for tree in (GRADIENTS, evidence)
    )
    params = jax.tree.map(lambda g: g[0], gradients)
    tx = build(jnp.asarray(0.5, dtype))
    state = tx.init(params)

    def step(state, g):
        steps, state = tx.update(g, state, params, **evidence)
        return state, steps

    if how == "scan":
        last, steps = jax.lax.scan(step, state, gradients)
    else:
        last, steps, jitted = state, [], jax.jit(step)
        for i in range(STEPS):
            last, one = jitted(last, jax.tree.map(lambda g, i=i: g[i], gradients))
            steps.append(one)
        steps = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    return steps, state, last


def dtypes(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_float32(name):
    build, evidence = CASES[name]
    expected, _, _ = run(build, evidence, jnp.float32, "jit")
    for how, dtype in (("jit", jnp.float32), ("scan", jnp.float64)):
        with jax.enable_x64(True):
            steps, first, last = run(build, evidence, dtype, how)
            assert set(dtypes(steps)) == {jnp.dtype(dtype)}
            assert dtypes(first) == dtypes(last)
            for found, wanted in zip(
                jax.tree.leaves(steps), jax.tree.leaves(expected), strict=True
            ):
                wanted = np.asarray(wanted)
                scale = np.abs(wanted).max()
                np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * scale)
