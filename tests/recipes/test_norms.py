"""Step shapes: norms that stay (NaP), radial parts that go (AdamP), CLASSP."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamr
from tests.contract.cases import gradients, params
from tests.references import mask as reference


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def norms(tree):
    return [np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]


# Normalize-and-project ---------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_norms_stay_to_1e_6_after_every_kth_step(every):
    p = params()
    start = norms(p)
    tx = optax.chain(optax.adamw(0.1), adamr.recipes.norms.normalize_and_project(every))
    plain, state = optax.adamw(0.1), tx.init(p)
    for t in range(1, 8):
        before, adam_state = p, state[0]
        step, state = jax.jit(tx.update)(gradients(t), state, p)
        p = optax.apply_updates(p, step)
        own, _ = plain.update(gradients(t), adam_state, before)
        trees = (p, before, own, step)
        for x, w, o, s, n in zip(*map(jax.tree.leaves, trees), start, strict=True):
            if x.ndim > 1 and t % every == 0:
                assert abs(np.linalg.norm(np.float64(x)) / n - 1) < 1e-6
                free = np.float64(w) + np.float64(o)  # the same direction
                free *= n / np.linalg.norm(free)
                np.testing.assert_allclose(x, free, rtol=1e-4, atol=1e-6)
            else:
                np.testing.assert_allclose(s, o, rtol=1e-5, atol=1e-8)


def test_projection_does_not_change_a_scale_invariant_layer():
    p = {"kernel": jnp.asarray(normal(0, 6, 5))}
    x = jnp.asarray(normal(1, 4, 6))

    def layer(p):
        h = x @ p["kernel"]
        h = h - h.mean(axis=1, keepdims=True)
        return h / jnp.linalg.norm(h, axis=1, keepdims=True)

    g = {"kernel": jnp.asarray(normal(2, 6, 5))}
    plain, nap = optax.sgd(0.3), adamr.recipes.norms.normalize_and_project()
    tx = optax.chain(plain, nap)
    moved = optax.apply_updates(p, plain.update(g, plain.init(p), p)[0])
    projected = optax.apply_updates(p, tx.update(g, tx.init(p), p)[0])
    assert np.abs(moved["kernel"] - projected["kernel"]).max() > 1e-2
    np.testing.assert_allclose(layer(moved), layer(projected), atol=1e-6)


def test_effective_learning_rate_stays_where_plain_training_slows_down():
    """A scale-invariant loss: g ⟂ w, so ‖w‖ grows and the angle per step shrinks."""
    target = jnp.asarray(normal(0, 4, 4))
    angle = {}
    for name, link in (("plain", optax.identity()), ("nap", None)):
        w = jnp.asarray(normal(1, 4, 4))
        tx = optax.chain(
            optax.sgd(1.0), link or adamr.recipes.norms.normalize_and_project()
        )
        state = tx.init(w)
        for t in range(60):
            noise = jnp.asarray(normal(2 + t, 4, 4))

            def loss(w, noise=noise):
                return jnp.sum(w * (target + 3 * noise)) / jnp.linalg.norm(w)

            step, state = tx.update(jax.grad(loss)(w), state, w)
            new = w + step
            cosine = jnp.sum(w * new) / jnp.linalg.norm(w) / jnp.linalg.norm(new)
            angle[name, t] = float(jnp.arccos(jnp.clip(cosine, -1, 1)))
            w = new
    late = [
        np.mean([angle[name, t] for t in range(40, 60)]) for name in ("plain", "nap")
    ]
    early = np.mean([angle["nap", t] for t in range(20)])
    assert late[0] < 0.5 * late[1] and abs(late[1] / early - 1) < 0.2


def test_degenerate_norms_keep_the_step():
    p = {"zero": jnp.zeros((2, 2)), "gone": jnp.ones((2, 2)), "odd": jnp.ones((2, 2))}
    step = {"zero": p["gone"], "gone": -p["gone"], "odd": p["odd"] * jnp.inf}
    tx = adamr.recipes.norms.normalize_and_project()
    out, _ = tx.update(step, tx.init(p), p)
    for name in p:
        np.testing.assert_array_equal(out[name], step[name])


def test_norms_are_those_of_init_and_only_kernels_have_one():
    p = params()
    state = adamr.recipes.norms.normalize_and_project().init(p)
    held = [None if n is None else float(n) for n in state.norms]
    want = zip(jax.tree.leaves(p), norms(p), strict=True)
    assert held == [pytest.approx(n, 1e-6) if x.ndim > 1 else None for x, n in want]


def test_nap_bad_input():
    g = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="every must be at least 1"):
        adamr.recipes.norms.normalize_and_project(0)
    for tx in (
        adamr.recipes.norms.normalize_and_project(),
        adamr.recipes.norms.remove_radial(optax.identity()),
    ):
        with pytest.raises(ValueError, match="needs params"):
            tx.update(g, tx.init(g))


# AdamP -------------------------------------------------------------------------------


def orthogonalised(g, w, axes):
    part = (g * w).sum(axis=axes, keepdims=True) / (w * w).sum(axis=axes, keepdims=True)
    return g - part * w


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 4, 8), (2, 5, 4)])
@pytest.mark.parametrize("kind", ["channel", "layer", "neither"])
def test_remove_radial_matches_the_authors_rule(shape, kind):
    """Their kernels are (out, in, …); ours have the outputs last."""
    w, g, u = normal(1, 3, *shape)
    if kind == "channel":
        g = orthogonalised(g, w, tuple(range(len(shape) - 1)))
    elif kind == "layer":
        g = orthogonalised(g, w, tuple(range(len(shape))))
    else:
        g = g + w
    tx = adamr.recipes.norms.remove_radial(optax.stateless(lambda g, p: jnp.asarray(u)))
    step, _ = tx.update(jnp.asarray(g), tx.init(w), jnp.asarray(w))
    last = lambda x: np.moveaxis(np.float64(x), -1, 0)  # noqa: E731
    expected, ratio = reference.adamp_projection(last(w), last(g), last(u), 0.1, 0.25)
    np.testing.assert_allclose(last(step), expected, rtol=1e-4, atol=1e-5)
    assert ratio == (1.0 if kind == "neither" else 0.25)
    axes = {"channel": tuple(range(len(shape) - 1)), "layer": tuple(range(len(shape)))}
    if kind == "neither":
        np.testing.assert_array_equal(step, u)
    else:
        radial = np.sum(np.float64(step) * w, axis=axes[kind])
        np.testing.assert_allclose(radial, 0.0, atol=1e-4)
        assert np.abs(np.sum(np.float64(u) * w, axis=axes[kind])).max() > 0.1


@given(st.integers(0, 999), st.floats(0.0, 3.0))
def test_remove_radial_matches_its_twin_near_the_threshold(seed, delta):
    w, g, u = normal(seed, 3, 4, 3)
    tx = adamr.recipes.norms.remove_radial(
        optax.stateless(lambda g, p: jnp.asarray(u)), delta, 0.5, 0.25
    )
    step, _ = tx.update(jnp.asarray(g), tx.init(w), jnp.asarray(w))
    twin = [np.float64(x.T) for x in (w, g, u)]
    for nudge in (1 - 1e-5, 1 + 1e-5):  # float32 may decide either way on the edge
        expected, ratio = reference.adamp_projection(*twin, delta * nudge, 0.25)
        expected = expected.T + 0.5 * ratio * w
        if np.allclose(step, expected, rtol=1e-4, atol=1e-5):
            return
    pytest.fail(f"{step} is not {expected}")


def test_weight_decay_is_weaker_where_the_radial_part_goes():
    w = {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.array([2.0])}
    along, across = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    tx = adamr.recipes.norms.remove_radial(
        optax.identity(), weight_decay=0.5, wd_ratio=0.1
    )
    for g, expected in ((across, [[0.05], [1.0]]), (along, [[1.5], [0.0]])):
        g = {"kernel": g, "bias": jnp.zeros(1)}
        step, _ = tx.update(g, tx.init(w), w)
        np.testing.assert_allclose(step["kernel"], expected, rtol=1e-6)
        np.testing.assert_allclose(step["bias"], [1.0], rtol=1e-6)


def test_adamp_slows_the_growth_of_a_scale_invariant_kernel():
    final = {}
    for name, make in (("adam", optax.adam), ("adamp", adamr.adamp)):
        w = {"kernel": jnp.asarray(normal(0, 8, 4)), "bias": jnp.zeros(4)}
        start = jnp.linalg.norm(w["kernel"])
        tx = make(0.05)
        state = tx.init(w)
        target = jnp.asarray(normal(1, 8, 4))

        def loss(w):
            unit = w["kernel"] / jnp.linalg.norm(w["kernel"], axis=0, keepdims=True)
            return jnp.sum(unit * target) + jnp.sum((w["bias"] - 1) ** 2)  # noqa: B023

        update = jax.jit(lambda s, w: tx.update(jax.grad(loss)(w), s, w))  # noqa: B023
        for _ in range(60):
            step, state = update(state, w)
            w = optax.apply_updates(w, step)
        final[name] = (float(jnp.linalg.norm(w["kernel"]) / start), w["bias"])
    assert final["adam"][0] > 1.1 and final["adamp"][0] < 1 + 0.5 * (
        final["adam"][0] - 1
    )
    np.testing.assert_allclose(final["adam"][1], final["adamp"][1], rtol=1e-5)


def test_adamp_without_projection_is_adamw():
    p, tx = params(), adamr.adamp(0.1, delta=0.0, weight_decay=0.1)
    plain = optax.adamw(0.1, weight_decay=0.1)
    state, plain_state = tx.init(p), plain.init(p)
    for seed in range(3):
        step, state = tx.update(gradients(seed), state, p)
        own, plain_state = plain.update(gradients(seed), plain_state, p)
        for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)


def test_zero_weights_and_gradients_are_no_trouble():
    z, one = jnp.zeros((2, 2)), jnp.ones((2, 2))
    tx = adamr.recipes.norms.remove_radial(optax.stateless(lambda g, p: one))
    np.testing.assert_array_equal(tx.update(one, tx.init(z), z)[0], one)
    np.testing.assert_allclose(tx.update(z, tx.init(one), one)[0], z, atol=1e-6)


# CLASSP ------------------------------------------------------------------------------


@pytest.mark.smoke
def test_classp_closed_form():
    """g = 1, p = 2: S from 0 to 1, step η / √(1 + ε)."""
    tx = adamr.classp(0.2, power=2.0, eps=0.21)
    step, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    np.testing.assert_allclose(step, -0.2 / 1.1, rtol=1e-6)
    np.testing.assert_array_equal(state.total, [1.0])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_classp_matches_its_twin_over_two_data_sets(power):
    """First gathered without suppression, then suppressed without a threshold."""
    gs = normal(0, 8, 12)
    later = lambda count: count >= 4  # noqa: E731
    tx = adamr.classp(
        lambda count: 0.1 / (1 + count),
        lambda count: jnp.where(later(count), 0.0, 0.5),
        power,
        suppress=later,
    )
    steps = range(8)
    twin = reference.classp(
        np.float64(gs), [0.1 / (1 + t) for t in steps], [0.5 * (t < 4) for t in steps],
        [t >= 4 for t in steps], power, 1e-5,
    )  # fmt: skip
    state = tx.init(jnp.zeros(12))
    for g, expected in zip(gs, twin, strict=True):
        step, state = jax.jit(tx.update)(jnp.asarray(g), state)
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-8)


def test_classp_is_sparse_and_element_wise():
    """The authors' code would update both entries of this leaf."""
    g = jnp.array([1.0, 0.1, -1.0])
    tx = adamr.classp(1.0, threshold=0.5)
    step, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(step != 0, [True, False, True])
    np.testing.assert_array_equal(state.total, [1.0, 0.0, 1.0])


def test_classp_switches_by_injected_hyperparameters():
    tx = optax.inject_hyperparams(adamr.classp)(1.0, 0.5, suppress=0.0)
    g = jnp.array([1.0, 0.5])
    state = tx.init(g)
    step, state = tx.update(g, state)
    np.testing.assert_array_equal(step, [-1.0, 0.0])
    state.hyperparams.update(suppress=jnp.asarray(1.0), threshold=jnp.asarray(0.0))
    step, _ = tx.update(g, state)
    np.testing.assert_allclose(step, [-0.5, -1.0], rtol=1e-4)


def test_classp_leaves_what_is_not_finite_alone():
    g = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 2.0])
    tx = adamr.classp()
    step, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(step[:3], 0.0)
    np.testing.assert_array_equal(state.total, [0.0, 0.0, 0.0, 2.0])


def test_classp_bad_input():
    for kwargs in ({"power": 0.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            adamr.classp(**kwargs)
