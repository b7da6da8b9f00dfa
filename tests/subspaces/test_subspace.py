"""Subspaces: layouts, projection, growth, merging, truncation, the sketch."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import adamr
from adamr import Axes
from tests.contract.cases import orthonormal
from tests.references import core as reference

# shape, path, axes, shape of one basis, fan-in
LAYOUTS = [
    ((6, 5), "kernel", None, (6,)),
    ((4, 6, 5), "scan/kernel", None, (4, 6)),
    ((2, 3, 4, 5), "conv/kernel", None, (24,)),
    ((6, 2, 3), "query/kernel", None, (6,)),
    ((2, 3, 6), "out/kernel", None, (6,)),
    ((5, 6), "transposed", Axes((1,)), (6,)),
    ((6, 4, 5), "experts", Axes((2,), (0,)), (6, 5)),
    ((4, 2, 3, 5), "scanned/heads", Axes((1, 2), (0,)), (4, 6)),
    ((1, 5), "single", None, (1,)),
    ((12, 2), "adapter", None, (12,)),  # more directions than outputs
    ((3, 12, 2), "scan/adapter", None, (3, 12)),
]
each_layout = pytest.mark.parametrize(
    ("shape", "path", "axes", "fan_in"), LAYOUTS, ids=[x[1] for x in LAYOUTS]
)


def nested(path, leaf):
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def columns_first(x, axes):
    """(*batch, fan_in, outputs): the layout in which a projection is a matmul."""
    rest = [d for d in range(x.ndim) if d not in axes.protected + axes.batch]
    batch = [x.shape[d] for d in axes.batch]
    x = np.transpose(x, (*axes.batch, *axes.protected, *rest))
    fan_in = int(np.prod(x.shape[len(batch) : len(batch) + len(axes.protected)]))
    return x.reshape(*batch, fan_in, -1)


@each_layout
def test_projection_in_every_layout_equals_the_matrix_form(shape, path, axes, fan_in):
    rank = max(1, fan_in[-1] // 3)
    basis = orthonormal(1, *fan_in, rank)
    lam = np.random.default_rng(2).uniform(size=(*fan_in[:-1], rank))
    g = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    tree, how = nested(path, jnp.asarray(g)), None
    if axes is not None:
        how = nested(path, axes)
    s = adamr.make_subspace(
        tree, nested(path, basis), weights=nested(path, lam), axes=how
    )
    got = jax.tree.leaves(jax.jit(adamr.subspaces.project)(s, tree))[0]
    axes = axes or adamr.default_axes(path, shape)
    flat, out = columns_first(g.astype(np.float64), axes), columns_first(got, axes)
    if not axes.batch:
        flat, out, basis, lam = flat[None], out[None], basis[None], lam[None]
    for i in range(len(flat)):
        expected = reference.project(flat[i], basis[i].astype(np.float64), lam[i])
        np.testing.assert_allclose(out[i], expected, atol=1e-5)


@each_layout
def test_growing_in_every_layout_protects_what_was_seen(shape, path, axes, fan_in):
    """Rank-deficient samples; afterwards their directions are gone from a gradient."""
    tree = nested(path, jnp.ones(shape))
    how = None if axes is None else nested(path, axes)
    s = adamr.empty_subspace(tree, axes=how)
    rng = np.random.default_rng(0)
    seen = max(1, fan_in[-1] // 2)
    low = rng.normal(size=(*fan_in[:-1], 20, seen)) @ rng.normal(
        size=(*fan_in[:-1], seen, fan_in[-1])
    )
    s = adamr.grow_subspace(s, nested(path, low.astype(np.float32)), threshold=1.0)
    rank = [r for r in adamr.subspaces.rank(s) if r is not None][0]
    np.testing.assert_array_equal(rank, np.full(fan_in[:-1], seen))
    g = rng.normal(size=shape).astype(np.float32)
    got = jax.tree.leaves(adamr.subspaces.project(s, nested(path, jnp.asarray(g))))[0]
    axes = axes or adamr.default_axes(path, shape)
    flat = columns_first(np.asarray(got, np.float64), axes)
    response = np.abs(low @ flat).max() / np.abs(low).max()
    assert response < 1e-5


@pytest.mark.parametrize(
    ("threshold", "added"), [(0.55, 0), (0.6, 0), (0.85, 1), (0.9, 1), (0.95, 2)]
)
def test_t4_rank_rule_with_a_basis(threshold, added):
    """M = span(e1), energies 6 on e1 and 3, 1 outside."""
    p = {"w": jnp.zeros((4, 2))}
    s = adamr.make_subspace(p, {"w": np.eye(4)[:, :1]})
    samples = {"w": np.diag(np.sqrt([6.0, 3.0, 1.0, 0.0])).astype(np.float32)}
    grown = adamr.grow_subspace(s, samples, threshold=threshold)
    assert int(adamr.subspaces.rank(grown)[0]) == 1 + added


def test_t4_equation_5_not_one_fewer():
    """Spectrum (.90, .06, .03, .01) at .95: two directions, not one."""
    p = {"w": jnp.zeros((4, 2))}
    spectrum = np.sqrt([0.90, 0.06, 0.03, 0.01]).astype(np.float32)
    s = adamr.grow_subspace(
        adamr.empty_subspace(p), {"w": np.diag(spectrum)}, threshold=0.95
    )
    assert int(adamr.subspaces.rank(s)[0]) == 2


def test_t3_gpm_keeps_the_response_to_a_rank_one_input():
    """X of rank 1 along a = (1,1,1,1)/2, SGD: a W unchanged."""
    a = np.full(4, 0.5, np.float32)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    samples = np.outer([1.0, -2.0, 3.0], a).astype(np.float32)
    s = adamr.grow_subspace(adamr.empty_subspace(w), samples)
    before = a @ w
    for seed in range(20):
        g = jax.random.normal(jax.random.key(seed), w.shape)
        w = w - 0.1 * adamr.subspaces.project(s, g)
    np.testing.assert_allclose(a @ w, before, atol=2e-6)


@pytest.mark.smoke
def test_t5_scaled_gradient_projection():
    """α = 10, σ = (10, 5, 1): λ = (1, .91667, .55); g along direction 3 keeps .45."""
    p = {"w": jnp.zeros((3, 1))}
    samples = {"w": np.diag([10.0, 5.0, 1.0]).astype(np.float32)}
    s = adamr.grow_subspace(
        adamr.empty_subspace(p), samples, threshold=1.0, scaling=10.0
    )
    lam = np.asarray(s.weights[0]).reshape(3)
    np.testing.assert_allclose(lam, [1.0, 0.916667, 0.55], rtol=1e-5)
    g = {"w": jnp.array([[0.0], [0.0], [1.0]])}
    np.testing.assert_allclose(adamr.subspaces.project(s, g)["w"][2], 0.45, rtol=1e-5)
    # The second task sees direction 3 at full strength: λ accumulates, up to 1.
    s = adamr.grow_subspace(s, {"w": np.eye(3, dtype=np.float32)[2:]}, scaling=10.0)
    np.testing.assert_allclose(s.weights[0].reshape(3), [1, 0.916667, 1], rtol=1e-5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(0, 4),
    threshold=st.floats(0.1, 0.99),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e12]),
)
def test_growth_equals_its_float64_twin(seed, rank, threshold, scale):
    rng = np.random.default_rng(seed)
    basis = orthonormal(seed, 8, rank) if rank else np.zeros((8, 0), np.float32)
    spectrum = 2.0 ** -np.arange(8)
    samples = rng.normal(size=(12, 8)) * spectrum
    s = adamr.make_subspace(np.zeros((8, 3), np.float32), basis)
    grown = adamr.grow_subspace(
        s, (scale * samples).astype(np.float32), threshold=threshold
    )
    expected = reference.grow(basis.astype(np.float64), samples, threshold)
    assert int(adamr.subspaces.rank(grown)[0]) == expected.shape[1]
    u = np.asarray(grown.bases[0], np.float64)[:, 0]
    np.testing.assert_allclose(u @ u.T, expected @ expected.T, atol=2e-4)
    used = u[:, : expected.shape[1]]
    np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 6))
def test_projection_is_idempotent_and_does_not_expand(seed, rank):
    s = adamr.make_subspace(np.zeros((6, 3), np.float32), orthonormal(seed, 6, rank))
    g = jax.random.normal(jax.random.key(seed), (6, 3))
    once = adamr.subspaces.project(s, g)
    np.testing.assert_allclose(adamr.subspaces.project(s, once), once, atol=1e-6)
    assert jnp.linalg.norm(once) <= jnp.linalg.norm(g) * (1 + 1e-6)


# Degenerate inputs ------------------------------------------------------------------


def awkward_samples():
    rng = np.random.default_rng(0)
    tall = rng.normal(size=(40, 8))
    return {
        "zero": np.zeros((5, 8)),
        "rank 1": np.outer(rng.normal(size=30), rng.normal(size=8)),
        "duplicate columns": np.repeat(rng.normal(size=(30, 4)), 2, axis=1),
        "dead inputs": tall * (np.arange(8) % 2),
        "badly scaled": tall * 10.0 ** -np.arange(0, 16, 2),
        "one sample": tall[:1],
        "more than room": tall,
    }


@pytest.mark.parametrize("kind", awkward_samples())
def test_awkward_samples_give_finite_orthonormal_bases(kind):
    s = adamr.empty_subspace(np.zeros((8, 2), np.float32), max_rank=6)
    x = awkward_samples()[kind].astype(np.float32)
    for _ in range(3):
        s = adamr.grow_subspace(s, x, threshold=0.999)
    u, r = np.asarray(s.bases[0])[:, 0], int(adamr.subspaces.rank(s)[0])
    assert np.isfinite(u).all() and not u[:, r:].any()
    np.testing.assert_allclose(u[:, :r].T @ u[:, :r], np.eye(r), atol=1e-6)
    assert {"zero": r == 0, "rank 1": r == 1, "one sample": r == 1}.get(kind, r <= 6)


def test_a_full_basis_stays_full_and_lets_exactly_nothing_through():
    s = adamr.empty_subspace(np.zeros((8, 2), np.float32))
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    s = adamr.grow_subspace(s, x, threshold=1.0)
    again = adamr.grow_subspace(s, x[::-1].copy(), threshold=1.0)
    assert int(adamr.subspaces.rank(s)[0]) == 8
    np.testing.assert_array_equal(s.bases[0], again.bases[0])
    assert not np.any(adamr.subspaces.project(s, jnp.ones((8, 2))))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_few_samples_and_many_give_the_same_bases(jit, threshold):
    """Zero rows add nothing but take the way of more samples than the fan-in."""
    rng = np.random.default_rng(0)
    s = adamr.empty_subspace({"w": jnp.zeros((40, 3))})
    grow = functools.partial(adamr.grow_subspace, threshold=threshold)
    grow = jax.jit(grow) if jit else grow
    few = many = s
    for _ in range(3):
        x = (rng.normal(size=(8, 40)) * np.geomspace(1, 0.02, 40)).astype(np.float32)
        few = grow(few, {"w": x})
        many = grow(many, {"w": np.concatenate([x, np.zeros((40, 40), x.dtype)])})
        assert adamr.subspaces.rank(few)[0] == adamr.subspaces.rank(many)[0] > 0
        each = [np.asarray(u.bases[0][:, 0], np.float64) for u in (few, many)]
        one, other = (u @ u.T for u in each)
        np.testing.assert_allclose(one, other, atol=2e-4 if jit else 1e-6)
    assert threshold < 1 or adamr.subspaces.rank(few)[0] == 24


@pytest.mark.parametrize("condition", [1.0, 20.0, 300.0, 3e4])
def test_threshold_one_spans_badly_conditioned_samples(condition):
    """A layer's response to what was sampled does not move, to float32's rounding."""
    rng, n, r = np.random.default_rng(0), 12, 5
    scales = condition ** -np.linspace(0.0, 1.0, r)
    x = (orthonormal(1, 40, r) * scales) @ orthonormal(2, n, r).T
    x = x.astype(np.float32)
    w = np.zeros((n, 3), np.float32)
    s = adamr.grow_subspace(adamr.empty_subspace(w), x, threshold=1.0)
    assert int(adamr.subspaces.rank(s)[0]) == r
    step = np.asarray(
        adamr.subspaces.project(s, rng.normal(size=w.shape).astype(np.float32))
    )
    assert np.linalg.norm(step) > 1.0
    moved = np.linalg.norm(x.astype(np.float64) @ step)
    assert moved < 1e-6 * np.linalg.norm(x) * np.linalg.norm(step)


def test_rank_zero_changes_nothing():
    g = jnp.arange(6.0).reshape(3, 2)
    s = adamr.empty_subspace(g)
    np.testing.assert_array_equal(adamr.subspaces.project(s, g), g)


@pytest.mark.parametrize("jit", [False, True])
def test_growth_keeps_a_basis_whose_zero_columns_come_first(jit):
    w = jnp.zeros((3, 2))
    basis, lam = jnp.eye(3)[:, :1], jnp.array([0.0, 0.25])
    make = functools.partial(adamr.make_subspace, w, weights=lam, max_rank=3)
    s = (jax.jit(make) if jit else make)(jnp.pad(basis, [(0, 0), (1, 0)]))
    np.testing.assert_array_equal(s.weights[0].ravel(), [0.25, 0, 0])
    s = adamr.grow_subspace(s, jnp.array([[0.0, 2.0, 0.0]]), threshold=1.0)
    np.testing.assert_allclose(np.abs(s.bases[0][:, 0]), np.diag([1, 1, 0]), atol=1e-6)
    np.testing.assert_array_equal(s.weights[0].ravel(), [0.25, 1, 0])


def test_threshold_and_scaling_may_be_array_scalars():
    s, x = adamr.empty_subspace(jnp.zeros((3, 2))), jnp.diag(jnp.arange(1.0, 4.0))
    grown = adamr.grow_subspace(s, x, threshold=jnp.float32(1), scaling=jnp.float32(2))
    expected = adamr.grow_subspace(s, x, threshold=1.0, scaling=2.0)
    jax.tree.map(np.testing.assert_array_equal, grown, expected)


@pytest.mark.parametrize("scaling", [-1.0, 0.0, np.inf, np.nan])
def test_a_scaling_that_is_not_positive_and_finite(scaling):
    s = adamr.empty_subspace(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="scaling must be positive and finite"):
        adamr.grow_subspace(s, jnp.eye(3), scaling=scaling)


def test_axes_of_a_leaf_that_is_not_an_array_protect_nothing():
    params = {"hole": None, "name": "x", "w": jnp.zeros((3, 2))}
    axes = dict.fromkeys(params, Axes((0,)))
    s = adamr.empty_subspace(params, axes=axes)
    assert [b if b is None else b.shape for b in s.bases] == [None, None, (3, 1, 3)]


def test_nan_samples_raise_outside_jit_and_change_nothing_inside():
    s = adamr.make_subspace(np.zeros((3, 2), np.float32), np.eye(3)[:, :1])
    bad = np.full((4, 3), np.nan, np.float32)
    gram = adamr.subspaces.Covariance((jnp.full((3, 3), jnp.nan),), (jnp.int32(1),))
    with pytest.raises(ValueError, match="samples has NaN"):
        adamr.grow_subspace(s, gram)
    with pytest.raises(ValueError, match="samples has NaN"):
        adamr.grow_subspace(s, bad)
    inside = jax.jit(lambda s, x: adamr.grow_subspace(s, x))(s, bad)
    np.testing.assert_array_equal(inside.bases[0], s.bases[0])
    np.testing.assert_array_equal(inside.weights[0], s.weights[0])


def test_bases_made_under_jit_and_vmap_equal_those_made_outside():
    p = np.zeros((6, 2), np.float32)
    bases = np.stack([orthonormal(seed, 6, 2) for seed in range(3)])
    make = lambda u: adamr.make_subspace(p, u, max_rank=4)  # noqa: E731
    together = jax.jit(jax.vmap(make))(bases)
    for i, basis in enumerate(bases):
        for a, b in zip(together, make(basis), strict=True):
            np.testing.assert_allclose(a[0][i], b[0], atol=1e-6)


def test_growth_under_jit_equals_growth_outside():
    s = adamr.empty_subspace(np.zeros((8, 2), np.float32))
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    outside = adamr.grow_subspace(s, x, threshold=0.8)
    inside = jax.jit(lambda s, x: adamr.grow_subspace(s, x, threshold=0.8))(s, x)
    u, v = outside.bases[0][:, 0], inside.bases[0][:, 0]
    np.testing.assert_allclose(u @ u.T, v @ v.T, atol=1e-5)


# Merging, truncating, sketching -----------------------------------------------------


def test_merging_spans_both_and_keeps_the_stronger_weight():
    p = np.zeros((5, 2), np.float32)
    eye = np.eye(5)
    a = adamr.make_subspace(p, eye[:, :2], weights=np.array([0.2, 1.0]))
    b = adamr.make_subspace(p, eye[:, [0, 3]], weights=np.array([0.7, 0.4]))
    merged = adamr.subspaces.merge_subspaces(a, b)
    assert int(adamr.subspaces.rank(merged)[0]) == 3
    got = adamr.subspaces.project(merged, jnp.eye(5))
    np.testing.assert_allclose(np.diag(got), [0.3, 0, 1, 0.6, 1], atol=1e-5)


def test_truncation_keeps_the_largest_weights_and_the_room():
    p = np.zeros((5, 2), np.float32)
    s = adamr.make_subspace(p, np.eye(5)[:, :3], weights=np.array([0.2, 1.0, 0.5]))
    cut = adamr.subspaces.truncate_subspace(s, 2)
    assert cut.bases[0].shape == s.bases[0].shape
    assert int(adamr.subspaces.rank(cut)[0]) == 2
    got = adamr.subspaces.project(cut, jnp.eye(5))
    np.testing.assert_allclose(np.diag(got), [1, 0, 0.5, 1, 1], atol=1e-6)
    assert int(adamr.subspaces.rank(adamr.subspaces.truncate_subspace(s, 0))[0]) == 0


@pytest.mark.parametrize("outputs", [2, 30])
def test_sketch_keeps_the_frequent_directions_bound(outputs):
    """0 ≤ ‖Ax‖² − ‖Bx‖² ≤ ‖A − A_k‖² / (size − k), streamed by scan."""
    n, size, steps = 10, 6, 25
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(n, n)) * 2.0 ** -np.arange(n)[:, None]
    g = np.einsum("sro,rn->sno", rng.normal(size=(steps, n, outputs)), mixing)
    g = g.astype(np.float32)
    s = adamr.empty_subspace({"w": jnp.zeros((n, outputs)), "b": jnp.zeros(3)})

    def body(sketch, gradient):
        tree = {"w": gradient, "b": jnp.zeros(3)}
        rows = adamr.subspaces.gradient_samples(s, tree)
        return adamr.subspaces.update_sketch(sketch, rows), None

    sketch, _ = jax.jit(lambda k: jax.lax.scan(body, k, jnp.asarray(g)))(
        adamr.subspaces.empty_sketch(s, size)
    )
    a = np.moveaxis(g, 1, 2).reshape(-1, n).astype(np.float64)
    b = np.asarray(sketch.rows[1], np.float64)
    gap = np.linalg.eigvalsh(a.T @ a - b.T @ b)
    spectrum = np.linalg.svd(a, compute_uv=False) ** 2
    total = spectrum.sum()
    assert gap.min() > -1e-4 * total
    for k in range(size):
        assert gap.max() <= spectrum[k:].sum() / (size - k) + 1e-4 * total
    # What grows from the sketch spans the leading gradient directions.
    grown = adamr.grow_subspace(s, sketch.rows, threshold=0.7)
    top = np.linalg.svd(a)[2][0]
    u = np.asarray(grown.bases[1])[:, 0]
    assert np.linalg.norm(u.T @ top) > 0.999


def test_sketch_of_stacked_leaves_and_of_bad_steps():
    s = adamr.empty_subspace({"scan": {"kernel": jnp.zeros((2, 4, 3))}})
    sketch = adamr.subspaces.empty_sketch(s, 3)
    g = {"scan": {"kernel": jax.random.normal(jax.random.key(0), (2, 4, 3))}}
    sketch = adamr.subspaces.update_sketch(
        sketch, adamr.subspaces.gradient_samples(s, g)
    )
    for i in range(2):
        k = g["scan"]["kernel"][i]
        got = sketch.rows[0][i]
        np.testing.assert_allclose(got.T @ got, k @ k.T, atol=1e-4)
    bad = jax.tree.map(lambda x: x * jnp.nan, adamr.subspaces.gradient_samples(s, g))
    after = adamr.subspaces.update_sketch(sketch, bad)
    np.testing.assert_array_equal(after.rows[0], sketch.rows[0])


# Errors -----------------------------------------------------------------------------


def test_errors_name_the_argument_the_leaf_and_both_sides():
    p = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    eye = np.eye(4, dtype=np.float32)

    def fails(match, *args, call=adamr.make_subspace, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)

    fails(r"bases has shape \(3, 1\) at w; expected", p, {"w": eye[:3, :1], "b": None})
    fails("orthonormal columns.* at w", p, {"w": 2 * eye[:, :1], "b": None})
    fails(
        "has 3 directions at w, expected at most 2",
        p,
        {"w": eye[:, :3], "b": None},
        max_rank=2,
    )  # noqa: E501
    fails("bases has NaN", p, {"w": eye[:, :1] * np.nan, "b": None})
    fails("got 1 entries.*expected 2", p, {"w": eye[:, :1]})
    fails("a basis at b, which has no fan-in", p, {"w": None, "b": eye[:2, :1]})
    fails("max_rank must be at least 1", p, {"w": None, "b": None}, max_rank=0)
    fails(
        r"weights must lie in \[0, 1\] at w",
        p,
        {"w": eye[:, :1], "b": None},
        weights={"w": np.array([1.5]), "b": None},
    )
    fails(
        "weights has shape",
        p,
        {"w": eye[:, :1], "b": None},
        weights={"w": np.ones(3), "b": None},
    )
    fails(
        "unprotected names 'head'", p, call=adamr.empty_subspace, unprotected=["head"]
    )
    fails("sequence of str", p, call=adamr.empty_subspace, unprotected="w")
    bad_axes = {"w": Axes((2,)), "b": None}
    fails("names axis 2", p, call=adamr.empty_subspace, axes=bad_axes)

    s, grow = adamr.empty_subspace(p), adamr.grow_subspace
    x = {"w": np.ones((3, 4), np.float32), "b": None}
    fails("threshold must lie", s, x, call=grow, threshold=1.5)
    fails("scaling must be positive", s, x, call=grow, scaling=0.0)
    fails(
        r"samples has shape \(3, 5\) at w",
        s,
        {"w": np.ones((3, 5)), "b": None},
        call=grow,
    )  # noqa: E501
    fails("samples is empty at w", s, {"w": np.ones((0, 4)), "b": None}, call=grow)
    fails("got 1 .*expected 2", s, {"w": x["w"]}, call=grow)
    fails(
        "made for 2 parameter leaves",
        s,
        {"w": jnp.zeros((4, 2))},
        call=adamr.subspaces.project,
    )
    wrong = {"w": jnp.zeros((5, 2)), "b": jnp.zeros(2)}
    fails("does not fit a leaf of shape", s, wrong, call=adamr.subspaces.project)
    other = adamr.empty_subspace({"w": jnp.zeros((5, 2)), "b": jnp.zeros(2)})
    fails("other has a basis", s, other, call=adamr.subspaces.merge_subspaces)
    fails("size must be", s, 0, call=adamr.subspaces.empty_sketch)


def test_a_state_restored_as_numpy_arrays_grows_as_one_of_jax():
    params = {"w": jnp.ones((4, 2))}
    state = adamr.gpm(0.1, adamr.empty_subspace(params)).init(params)
    inputs = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
    expected = adamr.protect_inputs(state, inputs)
    found = adamr.protect_inputs(jax.tree.map(np.asarray, state), inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(isinstance(x, jax.Array) for x in adamr.get_subspace(found).bases)
