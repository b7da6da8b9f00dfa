"""How to write jit-compiled property tests of moment statistics.

Copy this file's pattern for your own modifier:

1. put the whole run into one jitted function: `lax.scan` over generated gradients, with
   `moment_statistics(opt_state)` as the scan's output, so that every step is checked;
2. let hypothesis draw what matters (a seed, scales, places of zeros), not whole arrays:
   shapes stay fixed, so everything compiles once;
3. assert on the stacked statistics outside jit.

Each test names the property and says why it holds.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings

import adamr
from adamr.diagnostics import moment_statistics

B1, B2, STEPS, SHAPE = 0.9, 0.99, 12, (6, 4)
SUBSPACE = adamr.make_subspace(
    jnp.zeros(SHAPE), np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
)
seeds = st.integers(0, 2**31 - 1)


def optimizer(route, modifier, **kwargs):
    return optax.chain(route(modifier), adamr.faithful_second_moment(B1, B2, **kwargs))


PROJECT = adamr.project_out(SUBSPACE)
GUARDED = optimizer(adamr.route_first_moment, PROJECT)
OTHER_MODIFIER = optimizer(adamr.route_first_moment, optax.scale(0.3), guard=False)
UNGUARDED = optimizer(adamr.route_first_moment, PROJECT, guard=False)
SHARED = optimizer(adamr.route_both_moments, PROJECT)


@functools.partial(jax.jit, static_argnames="tx")
def run(tx, gradients):
    """Statistics of every step, stacked along the first axis, and the last state."""

    def step(state, gradient):
        _, state = tx.update(gradient, state)
        return state, moment_statistics(state, SUBSPACE, b1=B1, b2=B2)

    state, statistics = jax.lax.scan(step, tx.init(gradients[0]), gradients)
    return statistics, state


def stream(seed, dead=0, log_scale=0.0):
    """Gaussian gradients at any scale; the first `dead` inputs never fire."""
    g = np.random.default_rng(seed).normal(size=(STEPS, *SHAPE))
    g[:, :dead] = 0.0
    return jnp.asarray(g * 10.0**log_scale, jnp.float32)


@settings(max_examples=40)
@given(seeds, st.integers(0, 5), st.floats(-6, 6))
def test_v_is_never_negative_and_lies_between_its_squares(seed, dead, log_scale):
    """v̂ is a weighted mean of what it was fed: 0 ≤ v, and max v̂ ≤ max of the squares.

    With the guard it is fed max(g², g̃²), and a projection does not expand a column.
    """
    g = stream(seed, dead, log_scale)
    statistics, _ = run(GUARDED, g)
    correction = 1 - B2 ** np.arange(1, STEPS + 1)
    columns = jnp.sum(g**2, axis=1).max()
    assert np.all(statistics.nu_min.total >= 0)
    assert np.all(statistics.nu_max.total / correction <= columns * (1 + 1e-5))


@settings(max_examples=40)
@given(seeds, st.integers(0, 5), st.floats(-3, 3))
def test_the_guard_bounds_every_step(seed, dead, log_scale):
    """|m̂| / √v̂ ≤ √( (1−b2^t) (1−b1)² (1−q^t) / ((1−b1^t)² (1−b2) (1−q)) ), q = b1²/b2.

    Cauchy-Schwarz on m = Σ (1−b1) b1^k f and v ≥ Σ (1−b2) b2^k f²; the guard is what
    makes the second inequality true.
    """
    statistics, _ = run(GUARDED, stream(seed, dead, log_scale))
    t, q = np.arange(1, STEPS + 1), B1**2 / B2
    bound = np.sqrt((1 - B2**t) * (1 - q**t) / ((1 - B2) * (1 - q)))
    bound *= (1 - B1) / (1 - B1**t)
    assert np.all(statistics.largest_ratio.total <= bound * (1 + 1e-4))


@settings(max_examples=10)
@given(seeds, st.integers(1, 5))
def test_without_the_guard_dead_inputs_break_the_bound(seed, dead):
    """The same statistic catches the literal routing: v = 0 where m is not."""
    statistics, _ = run(UNGUARDED, stream(seed, dead))
    assert np.all(np.isinf(statistics.largest_ratio.total))


@settings(max_examples=30)
@given(seeds)
def test_decoupled_v_does_not_depend_on_the_modifier(seed):
    """v sees the raw gradient alone; the moment that differs is the first."""
    g = stream(seed)
    one, _ = run(UNGUARDED, g)
    two, _ = run(OTHER_MODIFIER, g)
    for name in ("nu_mean", "nu_min", "nu_max", "old_energy", "old_learning_rate"):
        a, b = getattr(one, name).total, getattr(two, name).total
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)
    assert not np.allclose(one.mu_norm.total, two.mu_norm.total)


@settings(max_examples=30)
@given(seeds)
def test_shared_v_loses_energy_where_the_modifier_removes_it(seed):
    """‖g̃‖ ≤ ‖g‖ per column, so the mean of shared v is below that of decoupled v."""
    g = stream(seed)
    shared, _ = run(SHARED, g)
    decoupled, _ = run(UNGUARDED, g)
    assert np.all(shared.nu_mean.total <= decoupled.nu_mean.total * (1 + 1e-5))


@settings(max_examples=30)
@given(seeds, st.integers(-20, 20))
def test_scale_equivariance(seed, power):
    """g -> 2^k g gives m -> 2^k m and v -> 4^k v, exactly; steps do not change."""
    g, c = stream(seed), 2.0**power
    one, _ = run(GUARDED, g)
    two, _ = run(GUARDED, c * g)
    np.testing.assert_array_equal(two.mu_norm.total, c * one.mu_norm.total)
    np.testing.assert_array_equal(two.nu_max.total, c * c * one.nu_max.total)
    np.testing.assert_array_equal(two.largest_ratio.total, one.largest_ratio.total)
    np.testing.assert_array_equal(two.old_energy.total, one.old_energy.total)


@settings(max_examples=30)
@given(seeds)
def test_permutation_equivariance(seed):
    """Output units do not talk to each other: permuting them permutes v."""
    g = stream(seed)
    order = np.random.default_rng(seed).permutation(SHAPE[1])
    _, one = run(GUARDED, g)
    _, two = run(GUARDED, g[..., order])
    a, b = (optax.tree.get(x, "nu") for x in (one, two))
    np.testing.assert_allclose(a[:, order], b, rtol=1e-5, atol=1e-12)


@functools.partial(jax.jit, static_argnames="route")
def old_rate(route, gradients, alpha):
    """D along U at every step, for moments in the eigenbasis."""
    tx = optax.chain(
        route(PROJECT),
        adamr.constant_scale(alpha),
        adamr.in_eigenbasis(
            adamr.faithful_second_moment(B1, B2, guard=False), SUBSPACE
        ),
    )

    def step(state, gradient):
        _, state = tx.update(gradient, state)
        statistics = moment_statistics(state, b1=B1, b2=B2, eps=0.0)
        return state, (statistics.old_learning_rate.total, statistics.old_energy.total)

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


@settings(max_examples=20)
@given(seeds, st.floats(0, 0.99))
def test_proposition_1_as_a_property_of_v(seed, alpha):
    """f = (1 − α) g along U, so shared v is (1 − α)² times decoupled v, at every step.

    D is 1/√v̂: shared routing inflates it by 1 / (1 − α), decoupled routing does not.
    """
    g = stream(seed)
    shared, _ = old_rate(adamr.route_both_moments, g, alpha)
    decoupled, energy = old_rate(adamr.route_first_moment, g, alpha)
    np.testing.assert_allclose(shared, decoupled / (1 - alpha), rtol=1e-3)
    assert np.all((energy >= 0) & (energy <= 1))


def test_one_compilation_serves_all_examples():
    run(GUARDED, stream(0))
    before = run._cache_size()
    for seed in range(1, 4):
        run(GUARDED, stream(seed))
    assert run._cache_size() == before
