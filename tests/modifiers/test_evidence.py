"""Gradients passed as evidence: leaves that are left out are named, never guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from examples.harness.replay import from_first_task

G = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}}


def rows(tree):
    return jax.tree.map(lambda x: jnp.stack([x, -x]), tree)


LINKS = {
    "gem": (lambda: adamr.gem(0.1), "memory_gradients", rows),
    "gem_constraint": (adamr.gem_constraint, "memory_gradients", rows),
    "p_mgem": (lambda: adamr.p_mgem(0.1), "memory_gradients", rows),
    "agem": (lambda: adamr.agem(0.1), "memory_gradient", lambda g: g),
    "agem_constraint": (adamr.agem_constraint, "memory_gradient", lambda g: g),
    "pcgrad": (adamr.pcgrad, "task_gradients", rows),
    "cagrad": (adamr.cagrad, "task_gradients", rows),
    "mix_gradients": (adamr.modifiers.mix_gradients, "memory_gradient", lambda g: g),
    "replay_routing": (adamr.modifiers.replay_routing, "memory_gradient", lambda g: g),
    "er": (lambda: adamr.er(0.1), "memory_gradient", lambda g: g),
    "from_first_task": (
        lambda: from_first_task(adamr.er(0.1)),
        "memory_gradient",
        lambda g: g,
    ),
    "disruption_mask": (
        adamr.modifiers.disruption_mask,
        "retain_gradient",
        lambda g: g,
    ),
    "track_si": (
        lambda: adamr.penalties.track_si(optax.sgd(0.1)),
        "task_gradient",
        lambda g: g,
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
@pytest.mark.parametrize("name", LINKS)
def test_a_leaf_left_out_of_the_evidence_is_named(name, hole):
    make, argument, evidence = LINKS[name]
    tx, tree = make(), evidence(G)
    state = tx.init(G)
    tx.update(G, state, G, **{argument: tree})
    broken = {"dense": {**tree["dense"], "bias": hole}}
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=f"{argument} at 'dense/bias' is ") as e:
            update(G, state, G, **{argument: broken})
        assert "expected an array" in str(e.value)


@pytest.mark.parametrize("name", [name for name in LINKS if name != "track_si"])
def test_a_leaf_left_out_of_both_is_left_out(name):
    make, argument, evidence = LINKS[name]
    tx = make()
    g = {"dense": {**G["dense"], "bias": None}}
    tree = evidence(g)
    step, _ = tx.update(g, tx.init(g), g, **{argument: tree})
    alone = {"kernel": G["dense"]["kernel"]}
    other, _ = tx.update(alone, tx.init(alone), alone, **{argument: evidence(alone)})
    for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_replay_under_a_mask_starts_with_the_first_memory():
    tx = optax.masked(from_first_task(adamr.er(0.1)), {"a": True, "b": False})
    g = {"a": jnp.array([1.0, -2.0]), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, g)
    step, _ = tx.update(g, tx.init(g), g, memory_gradient=zeros)
    same, _ = tx.update(g, tx.init(g), g, memory_gradient=g)
    np.testing.assert_array_equal(step["a"], same["a"])
