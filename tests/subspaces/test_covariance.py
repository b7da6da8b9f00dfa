"""Feature covariance and the null space that Adam-NSCL moves in."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import adamr
from adamr import Axes
from tests.references import recipes as reference


def kernel(fan_in, outputs=3):
    return jnp.zeros((fan_in, outputs))


def learnt(s, x):
    return adamr.subspaces.update_covariance(adamr.subspaces.empty_covariance(s), x)


def projector(s, fan_in):
    """P as a matrix, from what projection does to the unit vectors."""
    return np.asarray(adamr.subspaces.project(s, jnp.eye(fan_in)), np.float64)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_covariance_of_batches_equals_that_of_all(sizes, seed, scale):
    rng = np.random.default_rng(seed)
    batches = [(scale * rng.normal(size=(k, 4))).astype(np.float32) for k in sizes]
    c = adamr.subspaces.empty_covariance(adamr.empty_subspace(kernel(4)))
    for x in batches:
        c = adamr.subspaces.update_covariance(c, x)
    assert int(c.counts[0]) == sum(sizes)
    expected = reference.covariance(batches)
    np.testing.assert_allclose(c.moments[0], expected, atol=2e-6 * np.trace(expected))


def test_scan_equals_loop_and_shapes_stay():
    s = adamr.empty_subspace({"b": jnp.zeros(3), "w": kernel(4)})
    x = jax.random.normal(jax.random.key(0), (5, 7, 4))
    start = adamr.subspaces.empty_covariance(s)
    assert start.moments[0] is None and start.counts[0] is None

    def body(c, batch):
        return adamr.subspaces.update_covariance(c, {"b": None, "w": batch}), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, x))(start)
    looped = functools.reduce(lambda c, batch: body(c, batch)[0], x, start)
    np.testing.assert_allclose(scanned.moments[1], looped.moments[1], rtol=1e-6)
    assert int(scanned.counts[1]) == 35


LAYOUTS = [
    ("stack/kernel", (2, 4, 3), None, (2,), (4,)),
    ("conv/kernel", (2, 2, 3, 5), None, (), (2, 2, 3)),
    ("experts", (4, 2, 3), Axes((0,), (1,)), (2,), (4,)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x[0])
def test_every_layout_equals_the_twin_slice_by_slice(layout):
    name, shape, axes, batch, fan_in = layout
    tree = {name.split("/")[0]: jnp.zeros(shape)}
    how = None if axes is None else {name.split("/")[0]: axes}
    s = adamr.empty_subspace(tree, axes=how)
    n = int(np.prod(fan_in))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*batch, 50, n)) * 4.0 ** -np.arange(n)
    x = x.astype(np.float32)
    # The fan-in flat or axis by axis is the same.
    c = learnt(s, [x])
    axis_by_axis = learnt(s, [x.reshape(*batch, 50, *fan_in)])
    np.testing.assert_array_equal(c.moments[0], axis_by_axis.moments[0])
    grown = adamr.subspaces.null_space_complement(c, s, ratio=3.0, floor=1e-4)
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, s)
    g = rng.normal(size=shape).astype(np.float32)
    got = np.asarray(jax.tree.leaves(adamr.subspaces.project(grown, [g]))[0])
    for i in range(batch[0] if batch else 1):
        rows, before, after = (x, g, got) if not batch else (x[i], g[i], got[i])
        if name == "experts":
            before, after = g[:, i], got[:, i]
        p = reference.null_space_projector(reference.covariance([rows]), 3.0, 1e-4)
        assert 0 < np.linalg.matrix_rank(p) < n
        expected = p @ before.reshape(n, -1)
        np.testing.assert_allclose(after.reshape(n, -1), expected, atol=2e-4)


# The null space ---------------------------------------------------------------------


def diagonal(*variances):
    """Samples whose covariance is diag(variances)."""
    return np.diag(np.sqrt(np.float32(len(variances)) * np.float32(variances)))


@pytest.mark.smoke
def test_t8_projector_of_a_diagonal_covariance():
    s = adamr.empty_subspace(kernel(4))
    c = learnt(s, diagonal(4, 1, 0, 0))
    np.testing.assert_allclose(c.moments[0], np.diag([4.0, 1, 0, 0]), atol=1e-6)
    p = projector(adamr.subspaces.null_space_complement(c, s), 4)
    np.testing.assert_allclose(p, np.diag([0.0, 0, 1, 1]), atol=1e-6)
    np.testing.assert_allclose(p @ np.ones(4), [0, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "floor", "free"),
    [
        (1.0, 0.0, 1),
        (9.9, 0.0, 1),
        (10.1, 0.0, 2),
        (9.0, 0.001, 1),  # the larger of the two, not their sum
        (10.0, 0.011, 3),
        (1e4, 0.0, 4),
    ],
)
def test_ratio_and_floor_bound_what_is_free(ratio, floor, free):
    s = adamr.empty_subspace(kernel(4))
    c = learnt(s, diagonal(100, 10, 1, 0.1))
    grown = adamr.subspaces.null_space_complement(c, s, ratio=ratio, floor=floor)
    assert 4 - int(adamr.subspaces.rank(grown)[0]) == free
    expected = np.diag((np.arange(4) >= 4 - free).astype(float))
    np.testing.assert_allclose(projector(grown, 4), expected, atol=1e-6)


def test_a_dead_input_does_not_close_the_null_space():
    """λ_min = 0: only the dead input is free without the floor, weak ones with it."""
    s = adamr.empty_subspace(kernel(4))
    c = learnt(s, diagonal(1, 1e-3, 1e-7, 0))
    without = adamr.subspaces.null_space_complement(c, s, floor=0.0)
    assert int(adamr.subspaces.rank(without)[0]) == 3
    assert (
        int(adamr.subspaces.rank(adamr.subspaces.null_space_complement(c, s))[0]) == 2
    )


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    ratio=st.floats(1.0, 100.0),
    floor=st.sampled_from([1e-6, 1e-3]),
    decay=st.floats(0.1, 1.0),
)
def test_mean_response_changes_by_at_most_the_bound(seed, ratio, floor, decay):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(6, 6)) * decay ** np.arange(6)[:, None]
    x = (rng.normal(size=(40, 6)) @ mixing).astype(np.float32)
    s = adamr.empty_subspace(kernel(6))
    s = adamr.subspaces.null_space_complement(learnt(s, x), s, ratio=ratio, floor=floor)
    assert int(adamr.subspaces.rank(s)[0]) < 6
    step = np.asarray(
        adamr.subspaces.project(s, rng.normal(size=(6, 3)).astype(np.float32))
    )
    moment = reference.covariance([x])
    least, most = np.linalg.eigvalsh(moment)[[0, -1]]
    bound = ratio * max(least, floor * most) * (step**2).sum()
    changed = np.trace(step.T @ moment @ step)
    assert changed <= bound * (1 + 1e-3) + 1e-6 * most * (step**2).sum()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), ratio=st.floats(1.0, 50.0))
def test_projector_equals_its_float64_twin(seed, ratio):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(60, 6)) * 2.0 ** -np.arange(6)).astype(np.float32)
    moment = reference.covariance([x])
    values = np.linalg.eigvalsh(moment)
    if np.min(np.abs(values / values[0] - ratio)) < 1e-2:
        return  # an eigenvalue on the boundary
    s = adamr.empty_subspace(kernel(6))
    s = adamr.subspaces.null_space_complement(learnt(s, x), s, ratio=ratio)
    expected = reference.null_space_projector(moment, ratio, 1e-6)
    np.testing.assert_allclose(projector(s, 6), expected, atol=1e-3)


def test_the_newest_covariance_replaces_what_was_protected():
    s = adamr.make_subspace(kernel(4), jnp.eye(4)[:, 2:3])
    s = adamr.subspaces.null_space_complement(learnt(s, diagonal(4, 1, 0, 0)), s)
    np.testing.assert_allclose(projector(s, 4), np.diag([0.0, 0, 1, 1]), atol=1e-6)
    # Strongest first, so that truncation keeps the strongest.
    assert abs(float(s.bases[0][0, 0, 0])) > 0.999


def test_jit_equals_no_jit():
    s = adamr.empty_subspace(kernel(5))
    x = np.random.default_rng(0).normal(size=(30, 5)) * 3.0 ** -np.arange(5)
    c = learnt(s, x.astype(np.float32))
    outside = adamr.subspaces.null_space_complement(c, s, ratio=5.0)
    inside = jax.jit(
        lambda c, s: adamr.subspaces.null_space_complement(c, s, ratio=5.0)
    )(c, s)
    np.testing.assert_allclose(projector(outside, 5), projector(inside, 5), atol=1e-5)


def test_no_evidence_protects_nothing():
    s = adamr.empty_subspace(kernel(3))
    nothing = adamr.subspaces.empty_covariance(s)
    assert (
        int(adamr.subspaces.rank(adamr.subspaces.null_space_complement(nothing, s))[0])
        == 0
    )
    zero = learnt(s, np.zeros((5, 3), np.float32))
    assert (
        int(adamr.subspaces.rank(adamr.subspaces.null_space_complement(zero, s))[0])
        == 0
    )


def test_bad_samples_raise_outside_jit_and_change_nothing_inside():
    s = adamr.empty_subspace({"stack": jnp.zeros((2, 3, 2))})
    c = learnt(s, {"stack": np.ones((2, 4, 3), np.float32)})
    bad = np.ones((2, 4, 3), np.float32)
    bad[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="samples has NaN"):
        adamr.subspaces.update_covariance(c, {"stack": bad})
    after = jax.jit(adamr.subspaces.update_covariance)(c, {"stack": 2 * bad})
    np.testing.assert_array_equal(after.moments[0][1], c.moments[0][1])
    np.testing.assert_array_equal(after.counts[0], [8, 4])
    assert float(after.moments[0][0, 0, 0]) == 2.5
    huge = jax.jit(adamr.subspaces.update_covariance)(c, {"stack": bad * 0 + 1e30})
    assert np.isfinite(huge.moments[0]).all()
    # A moment that is not finite can only come from outside; it protects as before.
    broken = c._replace(moments=(c.moments[0] * jnp.nan,))
    kept = adamr.subspaces.null_space_complement(broken, s)
    np.testing.assert_array_equal(kept.bases[0], s.bases[0])


def test_one_nan_in_a_large_moment_protects_as_before():
    s = adamr.empty_subspace({"w": jnp.zeros((80, 2))})
    c = learnt(s, {"w": np.eye(80, dtype=np.float32)[:5]})
    broken = c._replace(moments=(c.moments[0].at[40, 40].set(jnp.nan),))
    kept = adamr.subspaces.null_space_complement(broken, s)
    np.testing.assert_array_equal(kept.bases[0], s.bases[0])


def test_the_count_saturates():
    s = adamr.empty_subspace(kernel(2))
    c = learnt(s, np.ones((1, 2), np.float32))
    c = c._replace(counts=(jnp.asarray(2**31 - 3, jnp.int32),))
    c = adamr.subspaces.update_covariance(c, np.zeros((8, 2), np.float32))
    assert int(c.counts[0]) == 2**31 - 1
    assert 0.99 < float(c.moments[0][0, 0]) < 1.0 + 1e-6


def test_errors_name_the_argument_and_both_sides():
    p = {"w": kernel(4)}
    s = adamr.empty_subspace(p)
    c = adamr.subspaces.empty_covariance(s)

    def fails(match, call, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)

    grow = adamr.subspaces.null_space_complement
    wrong, none = np.ones((3, 5)), np.ones((0, 4))
    update = adamr.subspaces.update_covariance
    fails(r"samples has shape \(3, 5\) at w, expected", update, c, {"w": wrong})
    fails(r"samples has shape \(4,\) at w", update, c, {"w": np.ones(4)})
    fails("samples is empty at w", update, c, {"w": none})
    fails("got 2 .*expected 1", update, c, {"w": wrong, "b": None})
    fails("ratio must be at least 1, got 0.5", grow, c, s, ratio=0.5)
    fails("floor must not be negative", grow, c, s, floor=-1.0)
    small = adamr.empty_subspace(p, max_rank=2)
    fails("room for 2 directions at leaf 0, expected its fan-in 4", grow, c, small)
    two = adamr.empty_subspace({"w": kernel(4), "b": jnp.zeros(2)})
    fails("made for 1 leaves, subspace_like for 2", grow, c, two)
    other = adamr.empty_subspace({"w": kernel(5)})
    fails(r"covariance has shape \(4, 4\) at leaf 0, expected", grow, c, other)
