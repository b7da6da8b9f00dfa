"""Replay mixing, its routing, the DER++ loss, the recipe `er`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamr
from adamr import buffers
from adamr.routing.carrier import Routed
from tests.contract.cases import gradients, params
from tests.references import mask as reference


def apply(tx, g, **evidence):
    return tx.update(g, tx.init(g), g, **evidence)[0]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Mixing ------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, lambda count: 0.0 * count])
@pytest.mark.parametrize("memory", [-3.0, 0.0, np.nan, np.inf])
def test_weight_zero_is_plain_bit_for_bit(weight, memory):
    g = gradients(0)
    rows = jax.tree.map(lambda x: jnp.full_like(x, memory), g)
    mixed = apply(adamr.modifiers.mix_gradients(weight), g, memory_gradient=rows)
    routed = apply(adamr.modifiers.replay_routing(weight), g, memory_gradient=rows)
    for tree in (mixed, *routed):
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(g), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.smoke
@given(st.floats(0, 1, width=32), st.integers(0, 99))
def test_identical_gradients_give_the_gradient(weight, seed):
    g = jnp.asarray(normal(seed, 7))
    mixed = apply(adamr.modifiers.mix_gradients(weight), g, memory_gradient=g)
    np.testing.assert_array_equal(mixed, g)
    routed = apply(adamr.modifiers.replay_routing(weight), g, memory_gradient=g)
    np.testing.assert_array_equal(routed.first, g)
    np.testing.assert_array_equal(routed.second, g)
    assert isinstance(routed, Routed) and routed.raw is g


@given(st.floats(0, 1, width=32), st.integers(0, 99))
def test_mixture_matches_its_twin_and_never_exceeds_what_v_sees(weight, seed):
    g, m = normal(seed, 2, 50)
    mixed = apply(
        adamr.modifiers.mix_gradients(weight), jnp.asarray(g), memory_gradient=m
    )
    expected = reference.mix(*np.float64([g, m]), weight)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    routed = apply(
        adamr.modifiers.replay_routing(weight), jnp.asarray(g), memory_gradient=m
    )
    np.testing.assert_array_equal(routed.first, mixed)
    squares = reference.mix(*np.float64([g, m]) ** 2, weight)
    np.testing.assert_allclose(routed.second**2, squares, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.sign(routed.second), np.sign(g))
    assert np.all(np.abs(routed.first) <= np.abs(routed.second) * (1 + 1e-5) + 1e-6)


@pytest.mark.parametrize("weight", [1.0, 1 - 2**-24])
def test_a_small_memory_gradient_is_not_lost_beside_a_large_one(weight):
    g, m = jnp.float32(1e4) * normal(0, 99), jnp.asarray(normal(1, 99))
    routed = apply(adamr.modifiers.replay_routing(weight), g, memory_gradient=m)
    wide = np.float64([g, m])
    expected = np.sqrt(reference.mix(*wide**2, weight))
    np.testing.assert_allclose(routed.first, reference.mix(*wide, weight), rtol=1e-4)
    np.testing.assert_allclose(np.abs(routed.second), expected, rtol=1e-5)


def test_no_memory_yet():
    g = gradients(1)
    zeros = jax.tree.map(jnp.zeros_like, g)
    for evidence, factor in ((zeros, 0.75), (g, 1.0)):
        mixed = apply(adamr.modifiers.mix_gradients(0.25), g, memory_gradient=evidence)
        for x, y in zip(jax.tree.leaves(mixed), jax.tree.leaves(g), strict=True):
            np.testing.assert_allclose(x, factor * y, rtol=1e-6)


def test_weight_is_a_schedule_of_the_count_and_a_hyperparameter():
    g, m = jnp.ones(3), -jnp.ones(3)
    tx = adamr.modifiers.mix_gradients(lambda count: 0.25 * count)
    state = tx.init(g)
    for expected in (1.0, 0.5, 0.0, -0.5):
        step, state = tx.update(g, state, memory_gradient=m)
        np.testing.assert_array_equal(step, expected * g)
    injected = optax.inject_hyperparams(adamr.er)(0.1, weight=0.5)
    state = injected.init(g)
    assert not jnp.any(injected.update(g, state, memory_gradient=m)[0])
    state.hyperparams["weight"] = jnp.asarray(1.0)
    step, _ = injected.update(g, state, memory_gradient=m)
    np.testing.assert_allclose(step, 0.1, rtol=1e-5)


def test_er_matches_its_twin():
    gs, memories = normal(3, 2, 6, 4)
    tx = adamr.er(0.1, 0.3, b1=0.8, b2=0.95, eps=1e-3)
    state = tx.init(jnp.zeros(4))
    twin = reference.er(*np.float64([gs, memories]), 0.3, b1=0.8, b2=0.95, eps=1e-3)
    for g, m, expected in zip(gs, memories, twin, strict=True):
        step, state = tx.update(jnp.asarray(g), state, memory_gradient=m)
        np.testing.assert_allclose(step, -0.1 * expected, rtol=2e-5, atol=1e-7)


def test_er_on_identical_batches_is_adam():
    tx, adam, p = adamr.er(0.1, 0.5), optax.adam(0.1), params()
    state, adam_state = tx.init(p), adam.init(p)
    for seed in range(3):
        g = gradients(seed)
        step, state = tx.update(g, state, memory_gradient=g)
        expected, adam_state = adam.update(g, adam_state)
        for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_steps_stay_bounded_when_the_new_gradient_vanishes():
    """v from g alone divides the memory's gradient by 0; from both parts it does not.

    |m̂| / √v̂ is at most √((1 − b1)² / ((1 − b2)(1 − b1²/b2))) = 7.3 for these decays.
    """
    g, m = jnp.zeros(2), jnp.array([1.0, -1e-3])
    merge = adamr.faithful_second_moment
    safe = optax.chain(adamr.modifiers.replay_routing(0.5), merge())
    mixture = optax.chain(
        adamr.route_both_moments(adamr.modifiers.mix_gradients()), merge()
    )
    alone = optax.chain(
        adamr.route_first_moment(adamr.modifiers.mix_gradients()), merge(guard=False)
    )
    largest = {}
    for name, tx in {"safe": safe, "mixture": mixture, "alone": alone}.items():
        state = tx.init(g)
        for t in range(30):  # the new batch is fitted at the tenth step
            new = jnp.where(t < 10, jnp.array([1.0, 1.0]), g)
            step, state = tx.update(new, state, memory_gradient=m)
            largest[name] = float(max(largest.get(name, 0.0), jnp.max(jnp.abs(step))))
        if name == "alone":
            step, _ = tx.update(g, tx.init(g), memory_gradient=m)
            assert jnp.max(jnp.abs(step)) > 1e7
    assert largest["safe"] < 1.01 and largest["mixture"] < 7.3


def test_opposed_gradients_give_a_small_step_not_a_rescaled_one():
    g, m = jnp.array([1.0]), jnp.array([-0.8])
    step = apply(adamr.er(1.0), g, memory_gradient=m)
    np.testing.assert_allclose(step, -0.1 / np.sqrt(0.82), rtol=1e-4)
    shared = optax.chain(adamr.modifiers.mix_gradients(), optax.scale_by_adam())
    np.testing.assert_allclose(apply(shared, g, memory_gradient=m), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        adamr.modifiers.mix_gradients,
        adamr.modifiers.replay_routing,
        lambda w=0.5: adamr.er(0.1, w),
    ],
)
def test_replay_bad_input(make):
    g = {"w": jnp.ones(3), "b": jnp.ones(2)}
    tx = make()
    with pytest.raises(ValueError, match="needs memory_gradient"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match=r"memory_gradient at 'w' has shape \(2,\)"):
        tx.update(g, tx.init(g), memory_gradient=g | {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="memory_gradient must be a tree like"):
        tx.update(g, tx.init(g), memory_gradient={"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="weight must lie in"):
        make(1.5)
    with pytest.raises(TypeError, match="takes a plain gradient tree"):
        tx.update(Routed(g, g, g), tx.init(g), memory_gradient=g)


# DER++ -------------------------------------------------------------------------------


def der(new, first, second, **kwargs):
    return adamr.modifiers.dark_experience_loss(
        *new, distilled_logits=first[0], stored_logits=first[1],
        replayed_logits=second[0], replayed_labels=second[1], **kwargs,
    )  # fmt: skip


def test_dark_experience_closed_form():
    label, zeros = jnp.array([0]), jnp.zeros((1, 2))
    stored = jnp.array([[1.0, 0.0]])
    fitted = jnp.array([[1e4, 0.0]])
    loss = der((fitted, label), (zeros, stored), (zeros, label))
    np.testing.assert_allclose(loss, 0.25 + 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5966, atol=5e-5)
    new = der((zeros, label), (zeros, stored), (zeros, label), alpha=0.0, beta=0.0)
    np.testing.assert_allclose(new, np.log(2), rtol=1e-6)


def test_dark_experience_draws_are_independent_and_weighted():
    x, z, y = normal(0, 3, 4, 5)
    labels = jnp.arange(4)
    weights = jnp.array([0.5, 0.5, 0.0, 0.0])
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(alpha, beta, first=None, second=None):
        return der(
            (x, labels), (z, y), (y, labels), alpha=alpha, beta=beta,
            distilled_weights=first, replayed_weights=second,
        )  # fmt: skip

    new = entropy(x, labels).mean()
    np.testing.assert_allclose(loss(0.0, 0.0), new, rtol=1e-6)
    np.testing.assert_allclose(loss(2.0, 0.0) - new, 2 * ((z - y) ** 2).mean(), 1e-5)
    np.testing.assert_allclose(
        loss(1.0, 0.0, weights) - new, ((z - y)[:2] ** 2).mean(), 1e-5
    )
    np.testing.assert_allclose(
        loss(0.0, 3.0) - new, 3 * entropy(y, labels).mean(), 1e-5
    )
    np.testing.assert_allclose(
        loss(0.0, 1.0, None, weights) - new, entropy(y, labels)[:2].mean(), 1e-5
    )


def test_dark_experience_sequences_average_over_positions():
    x, z = normal(1, 2, 3, 6, 5)
    labels = jnp.ones((3, 6), jnp.int32)
    flat = lambda a: a.reshape(18, *a.shape[2:])  # noqa: E731
    whole = der((x, labels), (x, z), (z, labels))
    parts = (flat(x), flat(labels)), (flat(x), flat(z)), (flat(z), flat(labels))
    np.testing.assert_allclose(whole, der(*parts), rtol=1e-5)


def test_dark_experience_with_an_empty_reservoir_is_the_plain_loss():
    """The step is compiled once, with the buffer empty at first."""
    item = {"x": jnp.zeros(3), "y": jnp.zeros([], jnp.int32), "z": jnp.zeros(4)}
    w, x, y = jnp.asarray(normal(0, 3, 4)), normal(1, 2, 3), jnp.array([0, 3])

    @jax.jit
    def gradient(w, buffer):
        buffer, first, first_weights = buffers.sample(buffer, 4)
        buffer, second, second_weights = buffers.sample(buffer, 4)

        def loss(w):
            return adamr.modifiers.dark_experience_loss(
                x @ w, y,
                distilled_logits=first["x"] @ w, stored_logits=first["z"],
                distilled_weights=first_weights,
                replayed_logits=second["x"] @ w, replayed_labels=second["y"],
                replayed_weights=second_weights,
            )  # fmt: skip

        return jax.value_and_grad(loss)(w)

    def plain(w):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()

    buffer = buffers.empty_reservoir(8, item, jax.random.key(0))
    expected = jax.value_and_grad(plain)(w)
    for a, b in zip(gradient(w, buffer), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    filled = buffers.add_to_reservoir(buffer, {"x": x, "y": y, "z": x @ w + 1.0})
    value, _ = gradient(w, filled)
    np.testing.assert_allclose(value, 1.5 * expected[0] + 0.5, rtol=1e-5)
    assert gradient._cache_size() == 1


def test_no_gradient_reaches_the_stored_logits():
    z, label = jnp.ones((1, 2)), jnp.array([0])
    loss = lambda s: der((z, label), (0 * z, s), (z, label))  # noqa: E731
    assert not jnp.any(jax.grad(loss)(z))


def test_dark_experience_bad_shapes():
    x, label = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="stored_logits has shape"):
        der((x, label), (x, x[:1]), (x, label))
    with pytest.raises(ValueError, match="replayed_labels has shape"):
        der((x, label), (x, x), (x, label[:1]))
    with pytest.raises(ValueError, match="distilled_weights has shape"):
        der((x, label), (x, x), (x, label), distilled_weights=jnp.ones(3))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_strength_link_keeps_the_second_gradient_away_from_zero(alpha):
    g, m = jnp.array([-1.0, 1.0]), jnp.array([1.0, 1.0])
    tx = optax.chain(adamr.modifiers.replay_routing(0.5), adamr.constant_scale(alpha))
    routed = apply(tx, g, memory_gradient=m)
    np.testing.assert_allclose(routed.second, g)
    np.testing.assert_allclose(routed.first, [alpha - 1, 1.0])
