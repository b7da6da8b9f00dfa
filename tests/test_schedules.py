"""Schedules: the numbers of the papers, continuity, and use inside optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamr import schedules

INFINITE = dict(
    init_value=0.0,
    peak_value=1.0,
    constant_value=0.5,
    end_value=0.05,
    warmup_steps=10,
    cooldown_steps=100,
    anneal_begin=200,
    anneal_steps=50,
)
WSD_S = dict(
    init_value=0.0,
    peak_value=1.0,
    end_value=0.1,
    warmup_steps=4,
    decay_steps=10,
    task_steps=100,
)
REWARM = dict(
    init_value=0.0, peak_value=1.0, end_value=0.1, warmup_steps=10, task_steps=110
)
CASES = {
    "infinite": (schedules.infinite_schedule, INFINITE),
    "inverse_sqrt": (
        schedules.infinite_schedule,
        INFINITE | dict(cooldown="inverse_sqrt"),
    ),
    "endless": (schedules.infinite_schedule, INFINITE | dict(anneal_begin=None)),
    "wsd_s": (schedules.wsd_s_schedule, WSD_S),
    "wsd_s_tasks": (schedules.wsd_s_schedule, WSD_S | dict(task_steps=(50, 70, 30))),
    "rewarm": (schedules.rewarm_redecay_schedule, REWARM),
    "rewarm_tasks": (
        schedules.rewarm_redecay_schedule,
        REWARM | dict(task_steps=[50, 70, 30]),
    ),
}


def make(case, **changes):
    schedule, arguments = CASES[case]
    return schedule(**arguments | changes)


def close(x, expected, rtol=1e-6):
    np.testing.assert_allclose(x, expected, rtol=rtol, atol=1e-7)


def test_infinite_numbers():
    at = make("infinite")(jnp.array([0, 5, 10, 60, 110, 150, 200, 225, 250, 999]))
    close(at, [0, 0.5, 1, 0.75, 0.5, 0.5, 0.5, 0.1581139, 0.05, 0.05])


def test_inverse_square_root_cooldown_against_the_equation():
    def h(x):
        return 1 / np.sqrt(1 + 10 * x) - 1

    n = np.arange(10, 111)
    expected = 1.0 + (0.5 - 1.0) * h((n - 10) / 100) / h(1.0)
    close(make("inverse_sqrt")(n), expected)
    assert make("inverse_sqrt")(60) < make("infinite")(60)


def test_without_an_anneal_the_constant_never_ends():
    close(make("endless")(jnp.array([110, 10**9])), [0.5, 0.5])


def test_the_next_task_goes_on_from_the_checkpoint_before_the_anneal():
    now, later = make("infinite"), make("infinite", anneal_begin=500)
    n = np.arange(201)
    np.testing.assert_array_equal(now(n), later(n))
    close(later(499), 0.5)


@pytest.mark.parametrize("case", ["infinite", "inverse_sqrt", "rewarm", "rewarm_tasks"])
def test_continuous(case):
    """No step is larger than the steepest phase allows, so no phase jumps."""
    values = np.asarray(jax.jit(make(case))(np.arange(400)))
    assert np.abs(np.diff(values)).max() <= 0.1 + 1e-6
    # On a grid 100 times as fine every step is 100 times as small.
    slow = jax.jit(make(case, **stretched(case, 100)))
    fine = np.asarray(slow(np.arange(40000)))
    assert np.abs(np.diff(fine)).max() <= 1.001e-3


def stretched(case, factor):
    def scale(x):
        return [factor * n for n in x] if isinstance(x, list | tuple) else factor * x

    arguments = CASES[case][1]
    return {k: scale(v) for k, v in arguments.items() if k.endswith(("steps", "begin"))}


@pytest.mark.smoke
def test_wsd_s_numbers():
    at = make("wsd_s")(jnp.array([0, 2, 4, 90, 95, 100, 102, 195, 1095]))
    close(at, [0, 0.5, 1, 1, 0.1818182, 1, 1, 0.1818182, 0.1818182])


def test_wsd_s_inverse_is_linear_during_the_decay():
    inverse = 1 / np.asarray(make("wsd_s")(np.arange(90, 100)), np.float64)
    close(np.diff(inverse), np.full(9, 0.9), rtol=1e-5)


def test_wsd_s_with_a_length_per_task_ends_decayed():
    n = jnp.array([39, 40, 45, 50, 52, 109, 115, 120, 145, 150, 10**6])
    at = make("wsd_s_tasks")(n)
    close(at, [1, 1, 0.1818182, 1, 1, 1, 0.1818182, 1, 0.1818182, 0.1, 0.1])


@pytest.mark.smoke
def test_rewarm_numbers():
    at = make("rewarm")(jnp.array([0, 5, 10, 60, 110, 115, 120, 170, 220]))
    close(at, [0, 0.5, 1, 0.55, 0.1, 0.55, 1, 0.55, 0.1])
    at = make("rewarm_tasks")(jnp.array([10, 30, 50, 60, 90, 120, 130, 150, 10**6]))
    close(at, [1, 0.55, 0.1, 1, 0.55, 0.1, 1, 0.1, 0.1])


@pytest.mark.parametrize("case", ["wsd_s", "rewarm"])
def test_one_length_for_all_is_that_length_for_each(case):
    n = np.arange(3 * CASES[case][1]["task_steps"])
    steps = CASES[case][1]["task_steps"]
    each = make(case, task_steps=[steps] * 3)
    close(jax.jit(make(case))(n), jax.jit(each)(n), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_no_warmup(case):
    assert make(case, warmup_steps=0)(0) == 1.0


@pytest.mark.parametrize("case", CASES)
def test_jit_scan_vmap_and_plain_ints_agree(case):
    schedule, n = make(case), jnp.arange(300)
    whole = schedule(n)
    assert whole.dtype == jnp.float32
    assert np.all((whole >= 0) & (whole <= 1))
    close(jax.vmap(schedule)(n), whole)
    _, scanned = jax.jit(lambda: jax.lax.scan(lambda c, x: (c, schedule(x)), 0, n))()
    close(scanned, whole)
    assert schedule(7).shape == ()
    close([schedule(7), schedule(np.int32(7))], [whole[7]] * 2)


@pytest.mark.parametrize("case", CASES)
def test_inside_an_optimizer(case):
    schedule = make(case)
    tx = optax.scale_by_learning_rate(schedule)
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    for n in range(3):
        step, state = update(jnp.ones(2), state)
        close(step, -schedule(n) * np.ones(2))
    assert update._cache_size() == 1
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    _, state = injected.update(jnp.ones(2), injected.init(jnp.ones(2)))
    close(state.hyperparams["learning_rate"], schedule(0))


def test_large_counts_are_exact():
    """2²⁴ + 1 is not a float32: the difference must be taken in integers."""
    schedule = make("endless", anneal_begin=2**24 + 1, anneal_steps=2)
    close(schedule(2**24 + 2), 0.5 * np.sqrt(0.1))


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("infinite", dict(constant_value=2.0), "peak_value >= constant_value >= end"),
        ("infinite", dict(end_value=0.0), "> 0, got .*end_value=0.0"),
        ("infinite", dict(peak_value=float("nan")), "peak_value=nan"),
        ("infinite", dict(init_value=2.0), "init_value <= peak_value, got 2.0"),
        ("infinite", dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        ("infinite", dict(cooldown_steps=0), "cooldown_steps must be at least 1"),
        ("infinite", dict(anneal_steps=0), "anneal_steps must be at least 1"),
        ("infinite", dict(anneal_begin=109), "anneal_begin .* = 110, got 109"),
        ("infinite", dict(cooldown="linear"), "cooldown is 'linear', expected"),
        ("wsd_s", dict(end_value=2.0), "peak_value >= end_value"),
        ("wsd_s", dict(decay_steps=0), "decay_steps must be at least 1"),
        ("wsd_s", dict(task_steps=13), "task_steps .* = 14, got 13"),
        ("wsd_s", dict(task_steps=[]), "task_steps .* got \\[\\]"),
        ("wsd_s", dict(task_steps=[100, 13]), "task_steps .* got \\[100, 13\\]"),
        ("rewarm", dict(task_steps=10), "task_steps .* = 11, got 10"),
        ("rewarm", dict(end_value=-1.0), "> 0, got .*end_value=-1.0"),
    ],
)
def test_mistakes_are_named(case, changes, message):
    with pytest.raises(ValueError, match=message):
        make(case, **changes)
