"""The plateau detector: once per rise and fall, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamr.plateau import plateau_detector

DETECTOR = plateau_detector(level=2.0, variance=0.1, window=5)


@jax.jit
def scan(losses):
    return jax.lax.scan(DETECTOR.update, DETECTOR.init(), losses)[1]


def firings(*parts):
    return np.flatnonzero(scan(jnp.concatenate([jnp.asarray(p) for p in parts])))


def flat(value, steps):
    return np.full(steps, value, np.float32)


def fall(steps=20):
    return np.linspace(5.0, 1.0, steps, dtype=np.float32)


@pytest.mark.smoke
def test_a_fall_to_a_plateau_fires_once():
    fired = firings(flat(5, 10), fall(), flat(1, 200))
    assert len(fired) == 1
    assert 25 <= fired[0] <= 35
    np.testing.assert_array_equal(firings(flat(5, 10), flat(1, 50)), [14])


@pytest.mark.parametrize("value", [0.0, 1.0, 1.99, 2.0, 5.0])
def test_a_flat_loss_never_fires(value):
    assert len(firings(flat(value, 200))) == 0


def test_a_second_rise_and_fall_fires_again():
    task = [flat(5, 10), fall(), flat(1, 50)]
    fired = firings(*task, *task, *task)
    assert len(fired) == 3
    np.testing.assert_array_equal(np.diff(fired), [80, 80])


def test_a_rise_that_stays_below_the_level_counts():
    """A new peak is one above the last plateau, not above the level."""
    strict = plateau_detector(level=2.0, variance=0.01, window=5)
    losses = np.concatenate([flat(5, 10), flat(1, 20), flat(1.5, 20)])
    _, fired = jax.lax.scan(strict.update, strict.init(), losses)
    np.testing.assert_array_equal(np.flatnonzero(fired), [14, 34])


def test_noise_on_a_plateau_fires_rarely_and_not_with_a_long_window():
    noise = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    losses = np.concatenate([flat(5, 60), 1 + 0.1 * noise])
    for window, most in [(5, 3), (50, 1)]:
        long = plateau_detector(level=2.0, variance=0.1, window=window)
        _, fired = jax.lax.scan(long.update, long.init(), losses)
        assert 1 <= np.sum(fired) <= most


def test_a_fall_goes_on_without_a_new_peak():
    assert len(firings(flat(5, 10), flat(1, 20), flat(0.5, 20), flat(0.1, 20))) == 1


def test_a_loud_plateau_does_not_fire():
    loud = 1 + 0.5 * (-1.0) ** np.arange(100)
    assert len(firings(flat(5, 10), loud.astype(np.float32))) == 0


def test_a_window_that_is_not_full_does_not_fire():
    assert len(firings([5.0, 1.0, 1.0, 1.0])) == 0
    assert len(firings([9.0, 1.0, 1.0, 1.0, 1.0])) == 0
    np.testing.assert_array_equal(firings([2.1, 1.8, 1.8, 1.8, 1.8]), [4])
    np.testing.assert_array_equal(firings([9.0, 1.0, 1.0, 1.0, 1.0, 1.0]), [5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_ignored(bad):
    losses = np.concatenate([flat(5, 10), fall(), flat(1, 30)])
    with_bad = np.insert(losses, [0, 5, 20, 31, 40], bad)
    kept = np.flatnonzero(np.isfinite(with_bad))
    fired = scan(jnp.asarray(with_bad))
    assert not fired[~np.isfinite(with_bad)].any()
    np.testing.assert_array_equal(fired[kept], scan(jnp.asarray(losses)))
    before = DETECTOR.update(DETECTOR.init(), 5.0)[0]
    after, _ = DETECTOR.update(before, bad)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_against_the_rule_in_plain_python():
    losses = np.random.default_rng(0).gamma(2.0, 0.9, 600).astype(np.float32)
    losses = np.convolve(losses, np.ones(8) / 8, "valid").astype(np.float32)
    window, peak, mean_f, var_f, fired = [], False, 2.0, 0.0, []
    for step, loss in enumerate(losses):
        window = [*window, loss][-5:]
        mean, var = np.mean(window), np.var(window)
        peak = peak or mean > mean_f + np.sqrt(var_f)
        if peak and mean < 2.0 and var < 0.1 and len(window) == 5:
            fired.append(step)
            peak, mean_f, var_f = False, mean, var
    np.testing.assert_array_equal(firings(losses), fired)
    assert len(fired) > 3


def test_types_are_stable_and_nothing_recompiles():
    update, state = jax.jit(DETECTOR.update), DETECTOR.init()
    for loss in (jnp.bfloat16(5), jnp.float32(1)):
        new, fired = update(state, jnp.float32(loss))
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(
            jnp.result_type, state
        )
        assert fired.dtype == bool and fired.shape == ()
        state = new
    assert update._cache_size() == 1
    half, _ = DETECTOR.update(DETECTOR.init(), jnp.bfloat16(5))
    assert half.losses.dtype == jnp.float32


def test_vmap_is_a_loop_and_donation_works():
    losses = np.random.default_rng(1).gamma(2.0, 0.6, (3, 100)).astype(np.float32)
    fired = jax.vmap(scan)(losses)
    for one, many in zip(losses, fired, strict=True):
        np.testing.assert_array_equal(scan(one), many)
    update = jax.jit(DETECTOR.update, donate_argnums=0)
    state = DETECTOR.init()
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    for _ in range(3):
        state, _ = update(state, 1.0)
    assert state.count == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(level=float("nan")), "level must be a finite number, got nan"),
        (dict(level=1.0, variance=0.0), "variance must be positive, got 0.0"),
        (dict(level=1.0, window=1), "window must be at least 2, got 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plateau_detector(**arguments)


def test_a_loss_that_is_not_a_scalar_is_named():
    with pytest.raises(ValueError, match=r"loss has shape \(2,\), expected a scalar"):
        DETECTOR.update(DETECTOR.init(), jnp.ones(2))
