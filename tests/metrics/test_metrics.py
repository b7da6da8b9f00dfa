"""Metrics: T21, T22, identities, and what may and may not be asked."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adamr import metrics

T21 = np.array([[0.9, 0.1, 0.1], [0.95, 0.9, 0.2], [0.6, 0.7, 0.9]])
NAN = float("nan")
# While learning task 2 the accuracy on task 1 goes .9 | .5, .6, .8.
T22 = np.array(
    [
        [[0.3, 0.1], [0.6, 0.1], [0.9, 0.1]],
        [[0.5, 0.4], [0.6, 0.7], [0.8, 0.9]],
    ]
)

# Multiples of 1/64: sums and differences of a few are exact in float32.
fractions = st.integers(0, 64).map(lambda k: k / 64)
tasks = st.sampled_from([2, 4])  # few shapes: each one compiles anew
matrices = tasks.flatmap(lambda t: arrays(np.float32, (t, t), elements=fractions))
tensors = st.tuples(tasks, st.sampled_from([1, 3])).flatmap(
    lambda s: arrays(np.float32, (s[0], s[1], s[0]), elements=fractions)
)
few = hypothesis.settings(max_examples=25)


def close(x, expected, atol=1e-6):
    np.testing.assert_allclose(x, expected, rtol=0, atol=atol)


@pytest.mark.smoke
@pytest.mark.parametrize("wrap", [list, np.asarray, jnp.asarray])
def test_t21(wrap):
    r = wrap(T21)
    close(metrics.average_accuracy(r), 0.73333, atol=1e-5)
    close(metrics.backward_transfer(r), -0.25)
    close(metrics.forward_transfer(r, 0.1), 0.05)
    close(metrics.forward_transfer(r, [0.7, 0.1, 0.1]), 0.05)
    close(metrics.forgetting(r), 0.275)
    close(metrics.learning_accuracy(r), 0.9)
    close(metrics.intransigence(r, [0.9, 1.0, 0.8]), [0.0, 0.1, -0.1])


def test_t21_rival_definitions_give_other_numbers():
    """Dividing by T, as GEM's code does; a maximum with the last row, as Mammoth's."""
    close(metrics.backward_transfer(T21) * 2 / 3, -0.16667, atol=1e-5)
    close(metrics.forward_transfer(T21, 0.1) * 2 / 3, 0.03333, atol=1e-5)
    improved = np.array([[0.5, 0.1], [0.8, 0.9]])
    close(metrics.forgetting(improved), -0.3)
    assert np.mean(improved.max(axis=0) - improved[-1]) == 0


@pytest.mark.smoke
def test_t22():
    close(metrics.min_accuracy(T22), 0.5)
    close(metrics.worst_case_accuracy(T22), 0.7)


def test_min_accuracy_reads_only_evaluations_after_the_task():
    a = np.full((3, 2, 3), 0.8)
    a[0, :, 0] = a[1, :, 1] = a[0, :, 1] = a[:, :, 2] = 0.0
    close(metrics.min_accuracy(a), 0.8)
    a[2, 0, 1] = 0.2
    close(metrics.min_accuracy(a), 0.5)


def test_average_anytime_accuracy_is_over_the_tasks_seen():
    close(
        metrics.average_anytime_accuracy(T22),
        (0.3 + 0.6 + 0.9 + 0.45 + 0.65 + 0.85) / 6,
    )


def test_windows_count_evaluations_across_task_borders():
    first = np.array([0.9, 0.5, 0.6, 0.2])  # two tasks of two evaluations each
    a = np.stack([first, np.full(4, 0.5)], axis=1).reshape(2, 2, 2)
    for window, drop, rise in [(2, 0.4, 0.1), (3, 0.4, 0.1), (4, 0.7, 0.1)]:
        close(metrics.windowed_forgetting(a, window), drop / 2)
        close(metrics.windowed_plasticity(a, window), rise / 2)


def brute_force_drop(series, window):
    best = [0.0]
    for n in range(len(series)):
        best += [series[m] - series[n] for m in range(max(0, n - window + 1), n)]
    return max(best)


@few
@hypothesis.given(tensors, st.sampled_from([2, 4, 25]))
def test_windowed_metrics_are_brute_force_and_mirror_in_time(a, window):
    series = a.reshape(-1, a.shape[2]).T
    wf, wp = (
        metrics.windowed_forgetting(a, window),
        metrics.windowed_plasticity(a, window),
    )
    close(wf, np.mean([brute_force_drop(s, window) for s in series]))
    close(wp, np.mean([brute_force_drop(-s, window) for s in series]))
    close(metrics.windowed_forgetting(a[::-1, ::-1], window), wp)
    assert metrics.windowed_forgetting(a, window + 1) >= wf


@few
@hypothesis.given(matrices)
def test_identities_of_the_matrix(r):
    share = (len(r) - 1) / len(r)
    bwt = metrics.backward_transfer(r)
    first, last = np.diagonal(r)[:-1], r[-1, :-1]
    close(bwt, -np.mean(first - last))
    close(metrics.average_accuracy(r), metrics.learning_accuracy(r) + share * bwt)
    assert metrics.forgetting(r) >= -bwt - 1e-6
    close(metrics.intransigence(r, np.diagonal(r)), np.zeros(len(r)))


@few
@hypothesis.given(matrices, fractions)
def test_transfer_ignores_how_hard_a_task_is(r, shift):
    shifts = shift * np.arange(len(r), dtype=np.float32)  # one per column
    for metric in (metrics.backward_transfer, metrics.forgetting):
        close(metric(r + shifts), metric(r), atol=1e-5)
    close(
        metrics.forward_transfer(r + shifts, shifts),
        metrics.forward_transfer(r, 0.0),
        atol=1e-5,
    )


@few
@hypothesis.given(tasks, fractions)
def test_nothing_is_forgotten_where_nothing_changes(t, value):
    r, a = np.full((t, t), value), np.full((t, 3, t), value)
    for metric in (metrics.average_accuracy, metrics.learning_accuracy):
        close(metric(r), value)
    for metric in (metrics.min_accuracy, metrics.worst_case_accuracy):
        close(metric(a), value)
    close(metrics.average_anytime_accuracy(a), value)
    for metric in (metrics.backward_transfer, metrics.forgetting):
        assert metric(r) == 0
    assert metrics.forward_transfer(r, value) == 0
    assert metrics.windowed_forgetting(a, 3) == 0
    assert metrics.windowed_plasticity(a, 3) == 0


@few
@hypothesis.given(tensors)
def test_worst_case_bounds_the_average(a):
    accuracy = metrics.average_accuracy(a[:, -1])
    assert metrics.worst_case_accuracy(a) <= accuracy + 1e-6
    finer = metrics.min_accuracy(a)
    assert finer <= metrics.min_accuracy(a[:, -1:]) + 1e-6


def test_what_was_not_evaluated_may_be_nan():
    later = np.triu_indices(3, k=1)
    r = T21.copy()
    r[later] = NAN
    close(metrics.forgetting(r), 0.275)
    close(metrics.backward_transfer(r), -0.25)
    a = T22.copy()
    a[0, :, 1] = NAN
    close(metrics.average_anytime_accuracy(a), metrics.average_anytime_accuracy(T22))
    close(metrics.worst_case_accuracy(a), 0.7)
    close(metrics.windowed_forgetting(a, 2), 0.4 / 2)
    close(metrics.windowed_plasticity(a, 2), (0.3 + 0.3) / 2)


def on_matrix(metric):
    return lambda r: metric(r, r[0]) if metric in WITH_REFERENCE else metric(r)


WITH_REFERENCE = (metrics.forward_transfer, metrics.intransigence)
ON_MATRIX = (
    metrics.average_accuracy,
    metrics.learning_accuracy,
    metrics.backward_transfer,
    metrics.forgetting,
    *WITH_REFERENCE,
)
ON_TENSOR = (
    metrics.min_accuracy,
    metrics.worst_case_accuracy,
    metrics.average_anytime_accuracy,
    lambda a: metrics.windowed_forgetting(a, 2),
    lambda a: metrics.windowed_plasticity(a, 2),
)


def test_jit_vmap_and_dtype():
    for metric, x in [(on_matrix(m), T21) for m in ON_MATRIX] + [
        (m, T22) for m in ON_TENSOR
    ]:
        eager = metric(jnp.asarray(x))
        assert eager.dtype == jnp.float32
        close(jax.jit(metric)(jnp.asarray(x)), eager)
        both = jax.vmap(metric)(jnp.stack([x, x / 2]))
        close(both[0], eager)
        close(both[1], eager / 2)
    assert metrics.average_accuracy(np.eye(2, dtype=int)).dtype == jnp.float32
    assert metrics.average_accuracy(jnp.eye(2, dtype=jnp.bfloat16)) == 0.5


def test_one_task():
    one, tensor = np.array([[0.5]]), np.array([[[0.2], [0.5]]])
    assert metrics.average_accuracy(one) == metrics.learning_accuracy(one) == 0.5
    assert metrics.worst_case_accuracy(tensor) == 0.5
    for metric, x, name in [
        (metrics.backward_transfer, one, "matrix"),
        (metrics.forgetting, one, "matrix"),
        (lambda r: metrics.forward_transfer(r, 0.1), one, "matrix"),
        (metrics.min_accuracy, tensor, "anytime"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} covers 1 task.*at least 2"):
            metric(x)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2), (0, 0)])
def test_a_matrix_of_another_shape_is_named(shape):
    for metric in ON_MATRIX:
        with pytest.raises(ValueError, match="^matrix "):
            metric(np.zeros(shape), *([0.1] if metric in WITH_REFERENCE else []))


@pytest.mark.parametrize("shape", [(3, 3), (2, 5, 3), (2, 0, 2), (0, 1, 0)])
def test_a_tensor_of_another_shape_is_named(shape):
    for metric in ON_TENSOR:
        with pytest.raises(ValueError, match="^anytime "):
            metric(np.zeros(shape))


def test_other_arguments_are_named():
    with pytest.raises(ValueError, match=r"baseline has shape \(2,\).*\(\) or \(3,\)"):
        metrics.forward_transfer(T21, [0.1, 0.1])
    with pytest.raises(ValueError, match=r"reference has shape \(\).*\(3,\)"):
        metrics.intransigence(T21, 0.9)
    for metric in (metrics.windowed_forgetting, metrics.windowed_plasticity):
        with pytest.raises(ValueError, match="window is 1, expected at least 2"):
            metric(T22, 1)
