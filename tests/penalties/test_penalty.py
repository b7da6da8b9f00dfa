"""Penalties, path integrals and boundaries: closed forms, float64 twins, properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adamr
from adamr import consolidate, get_anchor, set_anchor
from adamr.modifiers import Anchor
from tests.references import penalty as reference

PROXIMAL = {
    "adam": lambda rate, strength, **kw: optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.proximal_second_moment(rate, strength, **kw),
        optax.scale_by_learning_rate(rate),
    ),
    "sgd": lambda rate, strength, **kw: optax.chain(
        adamr.protection.proximal_penalty(rate, strength, **kw),
        optax.scale_by_learning_rate(rate),
    ),
}


def train(tx, theta, gradient, steps, state=None):
    """(θ, state) at the end and every θ, in one scan."""

    def body(carry, t):
        theta, state = carry
        step, state = tx.update(gradient(theta, t), state, theta)
        theta = optax.apply_updates(theta, step)
        return (theta, state), theta

    state = tx.init(theta) if state is None else state
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(steps)))
    (theta, state), path = run((theta, state))
    return theta, state, path


# Stiffness ---------------------------------------------------------------------------


def noise(theta, t):
    return 0.01 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (10,))


def distance_of(tx, steps=4000):
    start = jnp.full(10, 0.1)
    state = set_anchor(tx.init(start), Anchor(jnp.ones(10), jnp.zeros(10)))
    path = train(tx, start, noise, steps, state)[2]
    return np.abs(np.asarray(path))


@pytest.mark.parametrize("strength", [10.0, 1e3, 1e8])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_t0f_proximal_contracts_for_any_strength(base, strength):
    distance = distance_of(PROXIMAL[base](1e-3, strength))
    assert distance.max() <= 0.1
    assert distance[-1].max() < 0.03
    assert distance[2000:].max() < 0.1 / strength


def additive(route, strength, **kwargs):
    return optax.chain(
        route(adamr.quadratic_penalty(strength)),
        adamr.faithful_second_moment(**kwargs),
        optax.scale_by_learning_rate(1e-3),
    )


def test_t0f_additive_decoupled_overflows():
    """Why the recipes are proximal: v̂ does not know of the pull it divides."""
    decoupled = functools.partial(additive, adamr.route_first_moment, guard=False)
    assert 0.3 < distance_of(decoupled(30.0)).max() < 1
    assert distance_of(decoupled(100.0)).max() > 10
    assert not np.all(np.isfinite(distance_of(decoupled(1e3))))
    # Adam on the sum, and the guard of the second moment, bound it.
    for tx in (
        additive(adamr.route_both_moments, 1e3),
        additive(adamr.route_first_moment, 1e3),
    ):
        assert distance_of(tx).max() < 0.12


numbers = st.floats(-10, 10, width=32)
positive = st.floats(0, 2.0**100, width=32)


@settings(max_examples=50)
@given(
    st.sampled_from(["adam", "sgd"]),
    st.lists(st.tuples(numbers, numbers, numbers, positive), min_size=3, max_size=3),
    st.floats(2.0**-20, 8.0, width=32),
)
def test_the_proximal_step_lies_between(base, rows, rate):
    """Between the free point and the anchor, for any importance."""
    theta, anchor, g, omega = (jnp.array(x, jnp.float32) for x in zip(*rows))  # noqa: B905
    tx = PROXIMAL[base](rate, 1.0)
    free = set_anchor(tx.init(theta), Anchor(0 * omega, anchor))
    held = set_anchor(free, Anchor(omega, anchor))
    a = np.asarray(theta + tx.update(g, free, theta)[0], np.float64)
    b = np.asarray(theta + tx.update(g, held, theta)[0], np.float64)
    slack = 1e-5 * (np.abs(a) + np.abs(anchor) + np.abs(theta) + 1e-6)
    assert np.all(b >= np.minimum(a, anchor) - slack)
    assert np.all(b <= np.maximum(a, anchor) + slack)


def test_resetting_the_moments_does_not_turn_the_schedule_back():
    """The pull at the rate of step 0, scaled by that of step 20, would overshoot."""
    theta, anchor = jnp.array([1.0, -2.0]), jnp.zeros(2)
    tx = adamr.ewc(optax.linear_schedule(0.0, 0.1, 20), 1e6)
    state = set_anchor(tx.init(theta), Anchor(jnp.ones(2), anchor))
    for _ in range(20):
        _, state = tx.update(jnp.zeros(2), state, theta)
    step, _ = tx.update(jnp.ones(2), adamr.reset_moments(state), theta)
    np.testing.assert_allclose(theta + step, anchor, atol=1e-4)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_an_endless_strength_holds_the_anchor(base):
    theta, anchor = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.0])
    tx = PROXIMAL[base](optax.linear_schedule(0.0, 0.1, 1), 1e38)
    state = set_anchor(tx.init(theta), Anchor(jnp.full(2, 1e38), anchor))
    step, state = tx.update(jnp.ones(2), state, theta)  # at rate 0
    np.testing.assert_array_equal(step, jnp.zeros(2))
    step, _ = tx.update(jnp.ones(2), state, theta)
    np.testing.assert_allclose(theta + step, anchor, atol=1e-6)


# The links against their twins -------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_proximal_links_are_their_float64_twins(base):
    rng = np.random.default_rng(0)
    theta, anchor = rng.normal(size=(2, 6))
    omega = np.array([0, 0.1, 1, 10, 1e3, 1e6])
    targets = rng.normal(size=(30, 6))
    schedule = optax.linear_schedule(0.1, 0.02, 20)
    tx = PROXIMAL[base](schedule, 3.0, **({"b1": 0.8} if base == "adam" else {}))
    start = jnp.array(theta, jnp.float32)
    state = set_anchor(
        tx.init(start),
        Anchor(jnp.array(omega, jnp.float32), jnp.array(anchor, jnp.float32)),
    )

    def gradient(theta, t):
        return theta - jnp.array(targets, jnp.float32)[t]

    path = train(tx, start, gradient, 30, state)[2]
    rate = lambda t: 0.1 + (0.02 - 0.1) * min(t, 20) / 20  # noqa: E731
    if base == "adam":
        expected = reference.proximal_trajectory(
            theta, lambda x, t: x - targets[t - 1], 30, rate, 3 * omega, anchor, b1=0.8
        )
    else:
        expected = []
        for t in range(30):
            k = rate(t) * 3 * omega
            near = theta - rate(t) * (theta - targets[t])
            theta = (near + k * anchor) / (1 + k)
            expected.append(theta)
    np.testing.assert_allclose(path, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("share", [None, "fan_in"])
def test_without_importance_it_is_the_merging_link(share):
    p = {"w": jax.random.normal(jax.random.key(0), (5, 4)), "b": jnp.ones(4)}
    plain = optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.faithful_second_moment(share=share),
        optax.scale_by_learning_rate(0.1),
    )
    penal = PROXIMAL["adam"](0.1, 1e6, share=share)
    a, b = plain.init(p), penal.init(p)
    for seed in range(3):
        g = jax.tree.map(lambda x, s=seed: jnp.sin(x + s), p)
        (x, a), (y, b) = plain.update(g, a, p), penal.update(g, b, p)
        jax.tree.map(
            functools.partial(
                np.testing.assert_allclose, rtol=1e-6 if share else 0, atol=0
            ),
            x, y,
        )  # fmt: skip


def test_the_shared_second_moment_is_the_metric_of_the_pull():
    """One D per output: the proximal point is Adam's with that D."""
    p = jax.random.normal(jax.random.key(0), (5, 4))
    g = jax.random.normal(jax.random.key(1), (5, 4))
    tx = PROXIMAL["adam"](0.1, 2.0, share="fan_in", importance=1.0)
    state = tx.init(jnp.zeros((5, 4)))
    new = p + tx.update(g, state, p)[0]
    p, g = np.asarray(p), np.asarray(g)
    d = 0.1 / (np.sqrt(np.mean(g**2, axis=0)) + 1e-8)
    np.testing.assert_allclose(new, (p - d * g) / (1 + 2 * d), rtol=1e-5, atol=1e-6)


def test_t14_gradient_is_that_of_the_penalty():
    p = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.ones(2)}
    omega = jax.tree.map(lambda x: jnp.abs(jnp.cos(3 * x)), p)
    start = jax.tree.map(jnp.sin, p)
    tx = adamr.quadratic_penalty(7.0, importance=omega)

    def penalty(p):
        terms = jax.tree.map(lambda o, x, a: jnp.sum(o * (x - a) ** 2), omega, p, start)
        return 7.0 / 2 * sum(jax.tree.leaves(terms))

    zeros = jax.tree.map(jnp.zeros_like, p)
    pulled, state = tx.update(zeros, tx.init(start), p)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        pulled,
        jax.grad(penalty)(p),
    )
    # At the anchor there is none.
    at_anchor = tx.update(zeros, state, start)[0]
    assert not any(jnp.any(x) for x in jax.tree.leaves(at_anchor))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_t14_merged_form_is_the_sum(seed, tasks):
    """The gradients agree everywhere, where nothing is important too."""
    rng = np.random.default_rng(seed)
    fishers = rng.exponential(size=(tasks, 8)) * (rng.random((tasks, 8)) < 0.6)
    thetas, at = rng.normal(size=(tasks, 8)), rng.normal(size=8)
    tx = adamr.quadratic_penalty(2.0)
    state = tx.init(jnp.full(8, 9.0))
    for theta, f in zip(thetas, fishers, strict=True):
        state = consolidate(
            state, jnp.array(theta, jnp.float32), jnp.array(f, jnp.float32)
        )
    pulled, _ = tx.update(jnp.zeros(8), state, jnp.array(at, jnp.float32))
    expected = 2 * (fishers * (at - thetas)).sum(axis=0)
    np.testing.assert_allclose(pulled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_t15_online_ewc():
    tx = adamr.quadratic_penalty()
    state = tx.init(jnp.zeros(1))
    for task in range(3):
        theta = jnp.full(1, float(task + 1))
        state = consolidate(state, theta, jnp.ones(1), rule="online", decay=0.9)
    importance, anchor = get_anchor(state)
    np.testing.assert_allclose(importance, 2.439, rtol=1e-6)
    np.testing.assert_allclose(importance / 0.9, 2.71, rtol=1e-6)
    assert anchor == 3
    pulled, _ = tx.update(jnp.zeros(1), state, jnp.full(1, 4.0))
    np.testing.assert_allclose(pulled, 2.439, rtol=1e-6)


def test_t17_memory_aware_importances_are_summed_and_the_anchor_moves():
    tx = adamr.mas(0.1)
    state = tx.init(jnp.zeros(2))
    for theta in (1.0, 5.0):
        state = consolidate(
            state, jnp.full(2, theta), jnp.array([2.0, 1.0]), rule="online"
        )
    importance, anchor = get_anchor(state)
    np.testing.assert_array_equal(importance, [4, 2])
    np.testing.assert_array_equal(anchor, [5, 5])
    state = consolidate(state, jnp.zeros(2), jnp.ones(2), rule="replace")
    np.testing.assert_array_equal(get_anchor(state).importance, [1, 1])
    np.testing.assert_array_equal(get_anchor(state).anchor, [0, 0])


# Path integrals ----------------------------------------------------------------------

CURVATURE, MINIMUM = jnp.array([4.0, 1.0]), jnp.array([1.0, -2.0])


def quadratic(theta):
    return 0.5 * jnp.sum(CURVATURE * (theta - MINIMUM) ** 2)


def quadratic_gradient(theta, t):
    return jax.grad(quadratic)(theta)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_t16_path_integral(name):
    base = {"sgd": optax.sgd, "adam": optax.adam}[name](1e-3)
    penalty = adamr.quadratic_penalty(0.0)
    tx = adamr.penalties.track_si(optax.chain(penalty, base))
    theta, state, _ = train(tx, jnp.zeros(2), quadratic_gradient, 20_000)
    np.testing.assert_allclose(state.omega, [2, 2], rtol=3e-3)
    decrease = quadratic(jnp.zeros(2)) - quadratic(theta)
    np.testing.assert_allclose(state.omega.sum(), decrease, rtol=3e-3)
    done = adamr.consolidate_si(state, theta, damping=0.0)
    importance, anchor = get_anchor(done)
    np.testing.assert_allclose(importance, CURVATURE / 2, rtol=6e-3)
    np.testing.assert_array_equal(anchor, theta)
    np.testing.assert_array_equal(done.omega, 0)
    # So c Σ Ω Δ² with c = 1 is the loss; the recipe turns c into strength = 2 c.
    si = adamr.si(0.1, c=1.0, form="additive")
    held = set_anchor(si.init(theta), get_anchor(done))
    at = jnp.array([3.0, 3.0])
    pulled, _ = adamr.quadratic_penalty(2.0).update(jnp.zeros(2), done.inner[0], at)
    np.testing.assert_allclose(pulled, jax.grad(quadratic)(at), rtol=6e-3)
    moved, _ = si.update(-jax.grad(quadratic)(at), held, at)
    mu = optax.tree.get(si.update(jnp.zeros(2), held, at)[1], "mu")
    np.testing.assert_allclose(mu, 0.1 * jax.grad(quadratic)(at), rtol=6e-3)
    assert jnp.all(jnp.isfinite(moved))


@pytest.mark.parametrize("form", ["proximal", "additive"])
def test_the_path_sees_the_tasks_gradient_and_the_whole_step(form):
    """Not the penalty's: the error of most implementations."""
    tx = adamr.si(0.05, c=100.0, form=form)
    theta = jnp.array([1.0, -1.0])
    state = set_anchor(tx.init(theta), Anchor(jnp.ones(2), jnp.zeros(2)))
    g = jnp.array([0.5, 2.0])
    step, after = tx.update(g, state, theta)
    np.testing.assert_allclose(after.omega, -g * step, rtol=1e-6)
    other = jnp.array([-1.0, 3.0])
    same, passed = tx.update(g, state, theta, task_gradient=other)
    np.testing.assert_array_equal(same, step)
    np.testing.assert_allclose(passed.omega, -other * step, rtol=1e-6)


def test_the_path_counts_the_change_after_rounding():
    """Steps below half a unit in the last place move no bfloat16 parameter."""
    p = jnp.array([1.0, 1.0], jnp.bfloat16)
    tx = adamr.penalties.track_si(optax.sgd(1.0))
    g = jnp.array([-1e-3, -1e-2], jnp.bfloat16)

    @jax.jit
    def step(g, state, p):
        steps, state = tx.update(g, state, p)
        return optax.apply_updates(p, steps), state

    new, state = step(g, tx.init(p), p)
    change = np.asarray(new, np.float64) - np.asarray(p, np.float64)
    assert change[0] == 0 and change[1] == 2**-7
    np.testing.assert_allclose(state.omega, -np.asarray(g, np.float64) * change)


def test_what_is_not_finite_adds_nothing():
    p = jnp.ones(3)
    g = jnp.array([jnp.nan, jnp.inf, 1.0])
    _, path = adamr.penalties.track_si(optax.sgd(0.1)).update(
        g, adamr.penalties.track_si(optax.sgd(0.1)).init(p), p
    )
    np.testing.assert_allclose(path.omega, [0, 0, 0.1], rtol=1e-6)
    walk = adamr.penalties.track_rwalk(optax.sgd(0.1), interval=1)
    _, state = walk.update(g, walk.init(p), p)
    assert jnp.all(jnp.isfinite(state.fisher)) and jnp.all(jnp.isfinite(state.score))
    # A parameter that did not move, without damping.
    tx = adamr.penalties.track_si(adamr.quadratic_penalty())
    state = adamr.consolidate_si(tx.init(p), p, damping=0.0)
    np.testing.assert_array_equal(get_anchor(state).importance, 0)


def test_the_path_may_lower_the_importance_but_not_below_zero():
    tx = adamr.penalties.track_si(adamr.quadratic_penalty())
    state = set_anchor(tx.init(jnp.zeros(3)), Anchor(jnp.full(3, 2.0), jnp.zeros(3)))
    state = state._replace(omega=jnp.array([1.0, -1.0, -9.0]))
    theta = jnp.ones(3)
    done = adamr.consolidate_si(state, theta, damping=1.0)
    expected = reference.si_boundary(2.0, np.array([1, -1, -9]), 1.0, 0.0, 1.0)
    np.testing.assert_allclose(get_anchor(done).importance, expected)
    np.testing.assert_allclose(expected, [2.5, 1.5, 0])


def test_t18_walk_score():
    tx = adamr.penalties.track_rwalk(optax.sgd(0.5), interval=1, alpha=0.0, damping=0.0)
    theta = jnp.zeros(1)
    state = tx.init(theta)._replace(fisher=jnp.full(1, 2.0))
    step, state = tx.update(jnp.full(1, -1.0), state, theta)
    assert step == 0.5
    np.testing.assert_allclose(state.score, 2.0)
    np.testing.assert_allclose(state.fisher, 2.0)


def test_walk_is_its_float64_twin_over_two_tasks():
    rng = np.random.default_rng(0)
    tx = adamr.rwalk(0.05, 2.0, interval=5, alpha=0.7, damping=1e-2)
    theta = jnp.array(rng.normal(size=4), jnp.float32)
    state = tx.init(theta)
    fisher, past = np.zeros(4), None
    for _ in range(2):
        target = jnp.array(rng.normal(size=4), jnp.float32)
        gradient = lambda x, t, a=target: (x - a) * jnp.array([1, 2, 3, 0.1])  # noqa: E731
        start = theta
        theta, state, path = train(tx, theta, gradient, 23, state)
        thetas = np.concatenate([start[None], path]).astype(np.float64)
        gradients = [np.asarray(gradient(x, 0), np.float64) for x in thetas[:-1]]
        fisher, score = reference.walk(thetas, gradients, 5, 0.7, 1e-2, fisher)
        np.testing.assert_allclose(state.fisher, fisher, rtol=1e-4)
        np.testing.assert_allclose(state.score, score, rtol=1e-3)
        past = score if past is None else (past + score) / 2
        state = adamr.consolidate_rwalk(state, theta)
        importance, anchor = get_anchor(state)
        expected = reference.unit_range(fisher) + reference.unit_range(past)
        np.testing.assert_allclose(importance, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(anchor, theta)
        np.testing.assert_array_equal(state.mark, theta)
        assert (
            state.count == 0 and not jnp.any(state.score) and not jnp.any(state.omega)
        )


def test_a_walk_shorter_than_an_interval_leaves_nothing():
    tx = adamr.rwalk(0.1, interval=10)
    state = tx.init(jnp.ones(2))
    _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
    state = adamr.consolidate_rwalk(state, jnp.ones(2))
    np.testing.assert_array_equal(get_anchor(state).importance, 0)


# Recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["proximal", "additive"])
def test_ewc_on_quadratics_reaches_the_joint_minimum(form):
    """With the true curvature as F, two tasks cost what both losses together cost."""
    ks, minima = jnp.array([[4.0, 1.0], [1.0, 2.0]]), jnp.array([[1.0, -2.0], [0, 1]])
    rate = optax.exponential_decay(0.05, 200, 0.5)
    tx = adamr.ewc(rate, strength=1.0, form=form)
    theta, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    for k, a in zip(ks, minima, strict=True):
        gradient = lambda x, t, k=k, a=a: k * (x - a)  # noqa: E731
        theta, state, _ = train(tx, theta, gradient, 3000, state)
        state = adamr.reset_moments(consolidate(state, theta, k))
        rate_reset = tx.init(theta)[-1]
        state = (*state[:-1], rate_reset)
    joint = (ks * minima).sum(axis=0) / ks.sum(axis=0)
    np.testing.assert_allclose(theta, joint, atol=2e-3)


def test_additive_recipes_are_adam_on_the_penalised_loss():
    p = jnp.array([0.5, -1.0])
    tx, adam = adamr.l2_sp(0.1, 3.0, form="additive"), optax.adam(0.1)
    a, b = tx.init(p), adam.init(p)
    x = y = p
    for t in range(5):
        g = jnp.sin(x + t)
        step, a = tx.update(g, a, x)
        other, b = adam.update(jnp.sin(y + t) + 3.0 * (y - p), b, y)
        x, y = x + step, y + other
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_l2_sp_frees_what_it_is_told_to():
    p = {"body": jnp.ones(2), "head": jnp.ones(3), "norm": jnp.ones(1)}
    tx = adamr.l2_sp(0.1, 1e9, importance={"body": 1.0, "head": None, "norm": 0.0})
    g = jax.tree.map(jnp.ones_like, p)
    step, _ = tx.update(g, tx.init(p), p)
    assert jnp.max(jnp.abs(step["body"])) < 1e-6
    np.testing.assert_allclose(step["head"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(step["norm"], -0.1, rtol=1e-5)


@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas", "l2_sp", "si", "rwalk"])
def test_strength_changes_without_recompiling(name):
    strength = "c" if name == "si" else "strength"
    tx = optax.inject_hyperparams(getattr(adamr, name))(
        learning_rate=0.1, **{strength: 1.0}
    )
    p, g = jnp.ones(2), jnp.ones(2)
    state = set_anchor(tx.init(p), Anchor(jnp.ones(2), jnp.zeros(2)))
    traces = []

    @jax.jit
    def update(g, state, p):
        traces.append(1)
        return tx.update(g, state, p)

    weak, _ = update(g, state, p)
    state.hyperparams[strength] = jnp.full_like(state.hyperparams[strength], 1e9)
    strong, _ = update(g, state, p)
    k = 2 if name == "si" else 1
    np.testing.assert_allclose(weak, -(0.1 + 0.1 * k) / (1 + 0.1 * k), rtol=1e-5)
    np.testing.assert_allclose(strong, -1, rtol=1e-5)
    assert len(traces) == 1


# Boundaries --------------------------------------------------------------------------

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: COMPILED.append(event)
)
PARAMS = {"a": jnp.ones((3, 8)), "b": jnp.ones(8), "c": jnp.ones(())}

WRAPPERS = {
    "plain": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False, "c": True}),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": tx}, {"a": "x", "b": "y", "c": "x"}
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject": lambda tx: optax.inject_hyperparams(lambda r: optax.chain(tx))(r=1.0),
}

BOUNDARIES = {
    "ewc": (lambda: adamr.ewc(0.1, 1.0), lambda s, p: consolidate(s, p, p)),
    "sgd": (
        lambda: PROXIMAL["sgd"](0.1, 1.0),
        lambda s, p: consolidate(s, p, p, rule="online", decay=0.5),
    ),
    "additive": (
        lambda: adamr.ewc(0.1, 1.0, form="additive"),
        lambda s, p: set_anchor(s, get_anchor(consolidate(s, p, p, rule="replace"))),
    ),
    "si": (lambda: adamr.si(0.1), adamr.consolidate_si),
    "rwalk": (lambda: adamr.rwalk(0.1, interval=1), adamr.consolidate_rwalk),
}


@pytest.mark.parametrize("method", BOUNDARIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("committed", [True, False])
def test_boundaries_reach_through_wrappers_and_do_not_recompile(
    method, wrapper, committed
):
    make, boundary = BOUNDARIES[method]
    tx = WRAPPERS[wrapper](make())
    device = jax.devices()[0] if committed else None
    p = jax.device_put(PARAMS, device)
    state = jax.device_put(tx.init(p), device)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(g, state, p):
        step, state = tx.update(g, state, p)
        return optax.apply_updates(p, step), state

    g = jax.device_put(jax.tree.map(lambda x: x + 0.5, PARAMS), device)
    p = jax.tree.map(jnp.copy, p)
    p, state = update(g, state, p)
    p, state = update(g, state, p)
    for task in range(2):
        before = jax.tree.map(jnp.copy, p)
        state = boundary(state, p)
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(buffers)) == len(buffers)
        assert not set(buffers) & {
            x.unsafe_buffer_pointer() for x in jax.tree.leaves(p)
        }
        held = get_anchor(state)
        held_leaves = ("a", "c") if wrapper == "masked" else ("a", "b", "c")
        for name in () if method == "ewc" and task else held_leaves:
            np.testing.assert_allclose(held.anchor[name], before[name], rtol=1e-6)
        if wrapper == "masked":
            assert isinstance(held.anchor["b"], optax.MaskedNode)
        traced = jax.jit(boundary)(state, p)
        assert jax.tree.structure(traced) == jax.tree.structure(state)
        del COMPILED[:]
        p, state = update(g, state, p)
        assert "/jax/core/compile/backend_compile_duration" not in COMPILED


def test_boundaries_keep_the_sharding():
    mesh = jax.make_mesh((8,), ("data",))
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    p = {"w": jax.device_put(jnp.ones((4, 16)), shard)}
    tx = adamr.ewc(0.1, 1.0)
    state = jax.jit(tx.init)(p)
    state = consolidate(state, p, {"w": jnp.ones((4, 16))})
    for x in get_anchor(state):
        assert x["w"].sharding.is_equivalent_to(shard, 2)


def test_nnx_optimizer_and_partial_importance():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamr.si(0.1, c=1e6), wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, g)
    params = nnx.state(model, nnx.Param)
    optimizer.opt_state = adamr.consolidate_si(optimizer.opt_state, params)
    before = jnp.copy(model.kernel[...])
    optimizer.update(model, g)
    assert jnp.max(jnp.abs(model.kernel[...] - before)) < 1e-3
    importance = get_anchor(optimizer.opt_state).importance
    assert all(jnp.all(x > 0) for x in jax.tree.leaves(importance))


def test_a_missing_leaf_of_importance_counts_as_zero():
    tx = adamr.ewc(0.1, 1.0)
    importance = {"a": jnp.ones((3, 8)), "b": None, "c": jnp.ones(())}
    state = consolidate(tx.init(PARAMS), PARAMS, importance)
    assert not jnp.any(get_anchor(state).importance["b"])
    assert jnp.all(get_anchor(state).importance["a"] == 1)


def test_tiny_and_zero_importances_divide_nothing_by_zero():
    tx = adamr.quadratic_penalty()
    f = jnp.array([0.0, 1e-45, 1e-38, 3e38])
    state = tx.init(jnp.zeros(4))
    for theta in (1.0, 2.0):
        state = consolidate(state, jnp.full(4, theta), f / 2)
        assert all(jnp.all(jnp.isfinite(x)) for x in get_anchor(state))
    assert get_anchor(state).anchor[0] == 0
    np.testing.assert_allclose(get_anchor(state).anchor[3], 1.5)


def test_under_jit_bad_importance_counts_as_zero():
    tx = adamr.quadratic_penalty()
    f = jnp.array([jnp.nan, jnp.inf, -1.0, 2.0])
    state = jax.jit(consolidate)(tx.init(jnp.zeros(4)), jnp.ones(4), f)
    np.testing.assert_array_equal(get_anchor(state).importance, [0, 0, 0, 2])
    with pytest.raises(ValueError, match="finite and not negative"):
        consolidate(tx.init(jnp.zeros(4)), jnp.ones(4), f)


def test_bfloat16_parameters_keep_a_float32_anchor():
    p = jnp.ones(3, jnp.bfloat16)
    for tx in (adamr.ewc(0.1, 1.0), adamr.si(0.1), adamr.rwalk(0.1)):
        state = tx.init(p)
        assert all(x.dtype == jnp.float32 for x in get_anchor(state))
        step, after = tx.update(p, state, p)
        assert step.dtype == jnp.bfloat16
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(
            jnp.result_type, state
        )


def test_errors_say_what_to_pass():
    p = {"w": jnp.ones(2), "b": jnp.ones(1)}
    links = [
        adamr.quadratic_penalty(),
        adamr.protection.proximal_penalty(0.1),
        adamr.ewc(0.1, 1.0),
        adamr.si(0.1),
        adamr.rwalk(0.1),
    ]
    for tx in links:
        with pytest.raises(ValueError, match="needs params: pass update"):
            tx.update(p, tx.init(p))
    routed = adamr.Routed(p, p, p)
    for tx in (links[0], links[1], adamr.penalties.track_si(optax.sgd(0.1))):
        with pytest.raises(TypeError, match="takes a plain gradient tree"):
            tx.update(routed, tx.init(p), p)
    tx = adamr.proximal_second_moment(0.1)
    with pytest.raises(TypeError, match="takes a Routed"):
        tx.update(p, tx.init(p), p)
    for make in (
        adamr.quadratic_penalty,
        functools.partial(adamr.protection.proximal_penalty, 0.1),
        functools.partial(adamr.proximal_second_moment, 0.1),
    ):
        negative = "strength must not be negative, got -1"
        for number in (-1.0, np.float32(-1.0), jnp.array(-1.0)):
            with pytest.raises(ValueError, match=negative):
                make(number)
        with pytest.raises(ValueError, match="importance must not be negative"):
            make(importance=-1.0)
        with pytest.raises(ValueError, match="importance must be a tree like params"):
            make(importance={"w": 1.0}).init(p)
        with pytest.raises(ValueError, match=r"shape \(3,\) for a parameter"):
            make(importance={"w": jnp.ones(3), "b": 1.0}).init(p)
    with pytest.raises(ValueError, match="form is 'implicit'"):
        adamr.ewc(0.1, 1.0, form="implicit")
    for name, value in [("interval", 0), ("alpha", 1.5), ("damping", -1)]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            adamr.penalties.track_rwalk(optax.sgd(0.1), **{name: value})
    si = adamr.si(0.1)
    with pytest.raises(ValueError, match="task_gradient must be a tree like"):
        si.update(p, si.init(p), p, task_gradient={"w": p["w"]})
    with pytest.raises(ValueError, match="task_gradient at '.*' is of shape"):
        si.update(p, si.init(p), p, task_gradient={"w": p["b"], "b": p["w"]})


def test_boundary_errors_say_what_was_found():
    p = {"w": jnp.ones(2), "b": jnp.ones(1)}
    adam, state = optax.adam(0.1).init(p), adamr.ewc(0.1, 1.0).init(p)
    for call in (
        lambda: get_anchor(adam),
        lambda: set_anchor(adam, Anchor(p, p)),
        lambda: consolidate(adam, p, p),
        lambda: adamr.consolidate_si(
            adamr.penalties.track_si(optax.sgd(0.1)).init(p), p
        ),
        lambda: adamr.consolidate_rwalk(
            adamr.penalties.track_rwalk(optax.sgd(0.1)).init(p), p
        ),
    ):
        with pytest.raises(ValueError, match="holds no Anchor: build"):
            call()
    with pytest.raises(ValueError, match="no SIState: build .* track_si"):
        adamr.consolidate_si(state, p)
    with pytest.raises(ValueError, match="no RWalkState: build .* track_rwalk"):
        adamr.consolidate_rwalk(state, p)
    both = optax.chain(adamr.quadratic_penalty(), adamr.ewc(0.1, 1.0)).init(p)
    with pytest.raises(ValueError, match="2 anchors for the same parameters"):
        consolidate(both, p, p)
    assert get_anchor(both[0])
    with pytest.raises(TypeError, match="must be an Anchor, got dict"):
        set_anchor(state, p)
    with pytest.raises(ValueError, match="rule is 'mean'"):
        consolidate(state, p, p, rule="mean")
    with pytest.raises(ValueError, match="decay must lie in"):
        consolidate(state, p, p, rule="online", decay=1.5)
    with pytest.raises(ValueError, match="decay is for rule='online'"):
        consolidate(state, p, p, decay=0.5)
    with pytest.raises(ValueError, match="params must be a tree like params"):
        consolidate(state, {"w": p["w"]}, p)
    swapped = {"w": p["b"], "b": p["w"]}
    with pytest.raises(ValueError, match=r"importance at b has shape \(2,\), expected"):
        consolidate(state, p, swapped)
