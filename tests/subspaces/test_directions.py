"""Whole-vector projections: OGD, OGD+, PCA-OGD and FOPNG."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import adamr
from adamr.modifiers.natural import FopngState
from adamr.subspaces.directions import coordinates
from tests.references import directions as reference

SHAPES = {"a": {"bias": (4,), "kernel": (3, 4)}, "scale": (), "stack": (2, 3, 2)}
SIZE = 29


def tree_of(x, shapes=SHAPES, dtype=jnp.float32):
    """A tree like `shapes` out of an array (*lead, size)."""
    found, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    cuts = np.cumsum([int(np.prod(s)) for s in found])[:-1]
    x = np.asarray(x)
    leaves = [
        jnp.asarray(part.reshape((*x.shape[:-1], *s)), dtype)
        for part, s in zip(np.split(x, cuts, axis=-1), found, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def flat(tree, lead=0):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], axis=lead)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def empty(capacity=6, shapes=SHAPES, **kwargs):
    return adamr.empty_directions(tree_of(np.zeros(SIZE), shapes), capacity, **kwargs)


def grown(samples, capacity=6, shapes=SHAPES, **kwargs):
    return adamr.grow_directions(
        empty(capacity, shapes), tree_of(samples, shapes), **kwargs
    )


def rows_of(directions):
    """The used rows as a float64 matrix."""
    return flat(directions.rows, lead=1)[: int(directions.used)]


def step_of(tx, g, state=None):
    return tx.update(g, tx.init(g) if state is None else state, g)[0]


def assert_orthonormal(rows, atol=1e-6):
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=atol)


def linear(w, x):
    """One logit."""
    return (x @ w)[None]


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_params(seed=0):
    return {"a": jnp.asarray(normal(seed, 5, 7)), "b": jnp.asarray(normal(seed, 7, 3))}


# OGD ---------------------------------------------------------------------------------


@pytest.mark.smoke
def test_t1_closed_form():
    d = adamr.grow_directions(
        adamr.empty_directions(jnp.zeros(2), 2), jnp.array([[1.0, 0.0]])
    )
    g = jnp.array([3.0, 4.0])
    for tx in (adamr.project_out(d), adamr.protect_update(d)):
        np.testing.assert_array_equal(step_of(tx, g), [0.0, 4.0])


@pytest.mark.parametrize("optimizer", ["ogd", "amsgrad", "sgd"])
def test_t1_ogd(optimizer):
    """f(x) = wᵀx: after OGD f(x_j) stays to 1e-6 however long other data is fitted."""
    old, new = normal(0, 3, 10) / 3, jnp.asarray(normal(1, 40, 10))
    targets = jnp.asarray(normal(2, 40))
    w = jnp.asarray(normal(3, 10)) / 10
    d = adamr.recipes.ogd.ogd_directions(
        adamr.empty_directions(w, 5), linear, w, old, jnp.zeros(3, int)
    )
    tx = {
        "ogd": adamr.ogd(0.01, d),
        "amsgrad": adamr.ogd(0.01, d, estimator="amsgrad", b1=0.5),
        "sgd": optax.chain(adamr.project_out(d), optax.sgd(0.01)),
    }[optimizer]

    @jax.jit
    def train(w):
        def body(carry, _):
            w, state = carry
            g = jax.grad(lambda w: jnp.mean((new @ w - targets) ** 2))(w)
            step, state = tx.update(g, state, w)
            return (optax.apply_updates(w, step), state), jnp.max(
                jnp.abs(coordinates(d, step))
            )

        return jax.lax.scan(body, (w, tx.init(w)), None, length=500)

    (after, _), leaks = train(w)
    np.testing.assert_allclose(old @ after, old @ w, atol=1e-6)
    assert jnp.linalg.norm(after - w) > 0.1
    assert jnp.max(leaks) < 1e-8


def test_t1_one_sided_adam_does_not_keep_them():
    """The control: a projected gradient alone is undone by Adam."""
    old = jnp.asarray(normal(0, 3, 10))
    w = jnp.zeros(10)
    d = adamr.grow_directions(adamr.empty_directions(w, 3), old)
    scale = jnp.asarray(10.0 ** normal(1, 10))
    plain = optax.chain(adamr.project_out(d), optax.scale_by_adam())
    for tx, leaks in ((plain, True), (adamr.two_sided(d), False)):
        step = step_of(tx, scale * normal(2, 10))
        leak = jnp.linalg.norm(coordinates(d, step)) / jnp.linalg.norm(step)
        assert (leak > 1e-2) == leaks and (leak < 1e-6) != leaks


def test_two_sided_first_step_descends():
    d = grown(normal(0, 4, SIZE))
    for seed in range(20):
        g = tree_of(normal(seed, SIZE) * 10.0 ** normal(seed + 99, SIZE))
        assert flat(g) @ flat(step_of(adamr.two_sided(d), g)) > 0
        step = step_of(adamr.ogd(0.1, d), g)
        assert flat(g) @ flat(step) < 0
        assert np.max(np.abs(rows_of(d) @ flat(step))) < 1e-6 * np.abs(flat(step)).sum()


def test_projection_equals_the_twin():
    samples, g = normal(0, 5, SIZE), normal(1, SIZE)
    d = grown(samples)
    rows = reference.gram_schmidt([], samples)
    np.testing.assert_allclose(rows_of(d), rows, atol=2e-6)
    projected = flat(adamr.subspaces.project(d, tree_of(g)))
    np.testing.assert_allclose(projected, reference.project(g, rows), atol=2e-6)
    np.testing.assert_allclose(
        coordinates(d, tree_of(g))[:5], rows @ g, rtol=1e-4, atol=1e-5
    )


def test_ogd_as_a_route_and_strength():
    """Every route and strength takes directions as it takes a subspace."""
    d, g = grown(normal(0, 3, SIZE)), tree_of(normal(1, SIZE))
    tx = optax.chain(
        adamr.route_first_moment(adamr.project_out(d)),
        adamr.overlap_adaptive_scale(0.5, 0.9),
        adamr.faithful_second_moment(),
    )
    state = tx.update(g, tx.init(g), g)[1]
    share = np.sum((rows_of(d) @ flat(g)) ** 2) / np.sum(flat(g) ** 2)
    seen = adamr.state.read_diagnostics(state)
    np.testing.assert_allclose(seen["overlap"], 0.1 * share, rtol=1e-5)
    assert [int(r) for r in seen["rank"]] == [3]


# Hypothesis: what a projection is -----------------------------------------------------

seeds = st.integers(0, 2**31)


@settings(max_examples=25)
@given(seeds, st.integers(0, 6), st.floats(-15, 15))
def test_property_projection(seed, count, exponent):
    samples = normal(seed, max(count, 1), SIZE)[:count]
    d = grown(samples) if count else empty()
    g = tree_of(normal(seed + 1, SIZE) * np.float32(10.0) ** np.float32(exponent))
    once = adamr.subspaces.project(d, g)
    size = np.linalg.norm(flat(g))
    assert np.linalg.norm(flat(once)) <= size * (1 + 1e-6)
    twice = flat(adamr.subspaces.project(d, once))
    np.testing.assert_allclose(twice, flat(once), atol=2e-7 * size)
    assert np.max(np.abs(coordinates(d, once)), initial=0) < 1e-6 * size


@settings(max_examples=15)
@given(seeds)
def test_property_leaf_order_and_splitting_a_leaf_change_nothing(seed):
    samples, g = normal(seed, 4, SIZE), normal(seed + 1, SIZE)
    whole = flat(adamr.subspaces.project(grown(samples), tree_of(g)))

    order = np.random.default_rng(seed).permutation(SIZE)
    shapes = {"p": (7,), "q": (11, 2)}
    mixed = grown(samples[:, order], shapes=shapes)
    moved = flat(adamr.subspaces.project(mixed, tree_of(g[order], shapes)))
    np.testing.assert_allclose(moved, whole[order], atol=2e-6 * np.linalg.norm(g))


# Growing ------------------------------------------------------------------------------


def test_grow_continues_and_stays_orthonormal():
    samples = normal(0, 20, SIZE)
    d = empty(20)
    for part in np.split(samples, 4):
        d = adamr.grow_directions(d, tree_of(part))
    assert d.used == 20
    assert_orthonormal(rows_of(d))
    np.testing.assert_allclose(
        rows_of(d), reference.gram_schmidt([], samples), atol=2e-5
    )


def test_grow_drops_duplicates_zeros_and_nan():
    v = normal(0, 2, SIZE)
    samples = np.stack(
        [
            np.zeros(SIZE, np.float32),
            v[0],
            -3 * v[0],
            np.full(SIZE, np.nan, np.float32),
            v[1],
            1e-3 * v[0] + 1e3 * v[1],
            np.where(np.arange(SIZE) == 5, np.inf, v[1]).astype(np.float32),
        ]
    )
    for grow in (adamr.grow_directions, jax.jit(adamr.grow_directions)):
        d = grow(empty(), tree_of(samples))
        assert d.used == 2
        np.testing.assert_allclose(rows_of(d), reference.gram_schmidt([], v), atol=1e-6)
        assert not np.any(flat(d.rows, lead=1)[2:])


def test_one_nan_in_a_long_leaf_is_seen():
    """The compiler's maximum passes over it."""
    samples = np.random.default_rng(0).normal(size=(3, 6000)).astype(np.float32)
    samples[1, 3000] = np.nan
    d = adamr.empty_directions(jnp.zeros(6000), 3)
    d = jax.jit(adamr.grow_directions)(d, samples)
    assert d.used == 2 and np.isfinite(d.rows[0]).all()
    top = jax.jit(lambda x: adamr.subspaces.principal_directions(x, 2))(samples)
    assert np.isfinite(top).all() and np.linalg.norm(top[0]) > 0.9


@pytest.mark.parametrize("scale", [1e-33, 1e-25, 1e20, 1e36])
def test_grow_takes_samples_of_any_scale(scale):
    v = normal(0, 3, SIZE)
    d = grown(v * np.float32(scale))
    np.testing.assert_allclose(rows_of(d), rows_of(grown(v)), atol=1e-5)


def test_grow_keeps_nearly_parallel_samples_above_the_tolerance():
    """Residuals of 1e-3 are directions of their own, and orthogonal to the rest."""
    v = normal(0, 2, SIZE).astype(np.float64)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    for share, expected in ((1e-3, 2), (1e-6, 1)):
        d = grown(np.stack([v[0], v[0] + share * v[1]]).astype(np.float32))
        assert d.used == expected
        assert_orthonormal(rows_of(d))
    assert grown(np.stack([v[0], v[0] + 1e-3 * v[1]]), tolerance=1e-2).used == 1


def test_grow_overflow_and_max_new():
    samples = normal(0, 5, SIZE)
    d = grown(samples, capacity=4, max_new=2)
    assert d.used == 2
    with pytest.raises(ValueError, match="capacity is 4, of which 2 were used"):
        adamr.grow_directions(d, tree_of(normal(1, 3, SIZE)))
    # The last one is in the span: nothing is left out, so nothing is raised.
    assert grown(samples[[0, 1, 2, 3, 2]], capacity=4).used == 4
    inside = jax.jit(lambda s: grown_inside(s))(tree_of(samples))
    assert inside.used == 4
    np.testing.assert_allclose(
        rows_of(inside), reference.gram_schmidt([], samples[:4]), atol=2e-6
    )


def grown_inside(samples):
    return adamr.grow_directions(empty(4), samples)


def test_full_space_lets_exactly_nothing_through():
    d = grown(normal(0, SIZE, SIZE), capacity=SIZE)
    assert d.used == SIZE
    assert not np.any(flat(adamr.subspaces.project(d, tree_of(normal(1, SIZE)))))


def test_exclude():
    d = empty(3, exclude=["bias", "stack"])
    assert [r is None for r in d.rows] == [True, False, False, True]
    same = empty(3, exclude=lambda name, shape: name.endswith("bias") or len(shape) > 2)
    assert jax.tree.structure(same) == jax.tree.structure(d)
    d = adamr.grow_directions(d, tree_of(normal(0, 2, SIZE)))
    g = tree_of(normal(1, SIZE))
    step = step_of(adamr.project_out(d), g)
    np.testing.assert_array_equal(step["a"]["bias"], g["a"]["bias"])
    np.testing.assert_array_equal(step["stack"], g["stack"])
    over = np.concatenate([flat(step["a"]["kernel"]), flat(step["scale"])])
    assert np.max(np.abs(rows_of(d) @ over)) < 1e-6
    nothing = empty(2, exclude=lambda name, shape: True)
    assert adamr.grow_directions(nothing, tree_of(normal(0, 1, SIZE))) is nothing
    np.testing.assert_array_equal(flat(adamr.subspaces.project(nothing, g)), flat(g))


# Principal directions -----------------------------------------------------------------


def test_t2_principal_directions_hold_the_mean():
    """A constant mean under noise is the first direction; centring would lose it."""
    mean = normal(0, SIZE)
    samples = mean + 0.3 * normal(1, 300, SIZE)
    d = adamr.grow_directions(
        empty(5), adamr.subspaces.principal_directions(tree_of(samples), 5)
    )
    assert d.used == 5
    inside = rows_of(d) @ (mean / np.linalg.norm(mean))
    assert np.linalg.norm(inside) > 0.999
    centred = reference.principal(samples - samples.mean(axis=0), 5)
    assert np.linalg.norm(centred @ (mean / np.linalg.norm(mean))) < 0.9


def test_principal_directions_equal_the_twin():
    samples = normal(0, 12, SIZE) * np.linspace(1, 4, SIZE, dtype=np.float32) ** 2
    ours = flat(adamr.subspaces.principal_directions(tree_of(samples), 6), lead=1)
    theirs = reference.principal(samples, 6)
    assert_orthonormal(ours, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(ours * theirs, axis=1)), 1, atol=1e-4)


def test_principal_directions_of_degenerate_samples():
    v = normal(0, 2, SIZE)
    low_rank = np.stack([v[0], v[1], v[0] + v[1], 2 * v[0], 0 * v[0]])
    out = flat(adamr.subspaces.principal_directions(tree_of(low_rank), 4), lead=1)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), [1, 1, 0, 0], atol=1e-5)
    for bad in (np.nan, np.inf):
        with_bad = low_rank.copy()
        with_bad[4, 7] = bad
        same = adamr.subspaces.principal_directions(tree_of(with_bad), 4)
        np.testing.assert_allclose(flat(same, lead=1), out, atol=1e-6)
    zero = adamr.subspaces.principal_directions(tree_of(0 * low_rank), 9)
    assert flat(zero, lead=1).shape == (5, SIZE) and not np.any(flat(zero, lead=1))
    huge = adamr.subspaces.principal_directions(tree_of(low_rank * np.float32(1e30)), 4)
    np.testing.assert_allclose(np.abs(flat(huge, lead=1)), np.abs(out), atol=1e-5)


# Logit gradients, OGD+ ----------------------------------------------------------------


def test_logit_gradients_equal_the_twin():
    p, x = mlp_params(), normal(1, 4, 5)
    labels = np.array([2, 0, 1, 2])
    exact = jax.tree.map(lambda v: np.asarray(v, np.float64), p)
    eye = np.eye(3)
    wanted = {
        "ground_truth": [(i, eye[y]) for i, y in enumerate(labels)],
        "average": [(i, np.full(3, 1 / 3)) for i in range(4)],
        "all": [(i, eye[c]) for i in range(4) for c in range(3)],
    }
    for variant, picks in wanted.items():
        rows = [reference.mlp_gradient(exact, x[i], w) for i, w in picks]
        for chunk_size in (None, 3):
            ours = adamr.subspaces.logit_gradients(
                mlp, p, x, labels, variant=variant, chunk_size=chunk_size
            )
            for name in p:
                theirs = np.stack([row[name] for row in rows])
                np.testing.assert_allclose(ours[name], theirs, atol=1e-5)


def test_logit_gradients_under_jit_and_labels_outside():
    p, x = mlp_params(), jnp.asarray(normal(1, 4, 5))
    labels = jnp.array([2, 0, 3, -1])
    rows = jax.jit(functools.partial(adamr.subspaces.logit_gradients, mlp))(
        p, x, labels
    )
    sizes = np.linalg.norm(flat(rows, lead=1), axis=1)
    assert np.all(sizes[:2] > 0) and not np.any(sizes[2:])


def test_ogd_plus_is_ogd_on_a_linear_model():
    """The gradient of wᵀx is x wherever w is; a tanh network's moves with it."""
    x = [normal(0, 2, 5), normal(1, 2, 5)]
    labels = jnp.array([0, 2])
    models = {
        "linear": (
            (lambda w, x: x @ w),
            [jnp.asarray(normal(s, 5, 3)) for s in (2, 3)],
        ),
        "mlp": (mlp, [mlp_params(2), mlp_params(3)]),
    }
    for name, (f, (before, after)) in models.items():
        none = adamr.empty_directions(before, 6)
        d = adamr.recipes.ogd.ogd_directions(none, f, before, x[0], labels)
        d = adamr.recipes.ogd.ogd_directions(d, f, after, x[1], labels)
        plus = adamr.recipes.ogd.ogd_plus_directions(
            d, f, after, np.concatenate(x), jnp.concatenate([labels, labels])
        )
        assert plus.used == d.used == 4
        overlap = np.linalg.svd(rows_of(plus) @ rows_of(d).T)[1]
        if name == "linear":
            np.testing.assert_allclose(overlap, 1, atol=1e-5)
        else:
            assert overlap.min() < 0.99
            # Exact where the parameters are now.
            fresh = adamr.subspaces.logit_gradients(f, after, x[0], labels)
            rows = flat(fresh, lead=1)
            left = rows - rows @ rows_of(plus).T @ rows_of(plus)
            assert np.linalg.norm(left) < 1e-5 * np.linalg.norm(rows)
            stale = rows - rows @ rows_of(d).T @ rows_of(d)
            assert np.linalg.norm(stale) > 1e-2 * np.linalg.norm(rows)


def test_pca_ogd_keeps_the_strongest():
    p, x = mlp_params(), normal(1, 30, 5)
    labels = jnp.asarray(np.arange(30) % 3)
    d = adamr.recipes.ogd.pca_ogd_directions(
        adamr.empty_directions(p, 8), mlp, p, x, labels, count=5
    )
    samples = flat(adamr.subspaces.logit_gradients(mlp, p, x, labels), lead=1)
    theirs = reference.principal(samples, 5)
    assert d.used == 5
    overlap = np.linalg.svd(theirs @ rows_of(d).T)[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    d = adamr.recipes.ogd.pca_ogd_directions(
        d, mlp, p, normal(2, 30, 5), labels, count=3
    )
    assert d.used == 8
    assert_orthonormal(rows_of(d))


# FOPNG --------------------------------------------------------------------------------


def fopng_step(g, gradients, old, new, shapes=None, damping=1e-7, **kwargs):
    to_tree = (
        jnp.asarray if shapes is None else functools.partial(tree_of, shapes=shapes)
    )
    d = adamr.empty_directions(to_tree(g), len(gradients))
    d = adamr.grow_directions(d, to_tree(gradients))
    tx = adamr.fopng(d, **kwargs)
    state = adamr.modifiers.set_fisher(
        tx.init(to_tree(g)), old=to_tree(old), new=to_tree(new), damping=damping
    )
    return flat(tx.update(to_tree(g), state)[0])


def test_t9_fopng():
    """F = 1, F' = diag(4, 1), G = (1, 1)."""
    gradients, old, new = np.ones((1, 2)), np.ones(2), np.array([4.0, 1.0])

    def ray(d):
        return d / np.linalg.norm(d)

    g = np.array([1.0, 0.0])
    step = fopng_step(g, gradients, old, new)
    np.testing.assert_allclose(ray(step), ray(np.array([0.2, -0.2])), atol=1e-6)
    np.testing.assert_allclose(step @ (new * step), 1, rtol=1e-5)
    published = fopng_step(g, gradients, old, new, as_published=True)
    np.testing.assert_allclose(ray(published), ray(np.array([0.05, -0.8])), atol=1e-6)
    np.testing.assert_allclose(ray(published).sum(), ray(np.array([0.05, -0.8])).sum())

    g = np.array([1.0, 0.5])
    published = fopng_step(g, gradients, old, new, as_published=True)
    assert g @ published < 0  # it ascends
    step = fopng_step(g, gradients, old, new)
    assert g @ step > 0 and abs(step.sum()) < 1e-6


def test_t9_fopng_with_identity_metrics_is_normalised_ogd():
    samples, g = normal(0, 4, SIZE), tree_of(normal(1, SIZE))
    d = grown(samples)
    tx = adamr.fopng(d)
    for state in (
        tx.init(g),
        adamr.modifiers.set_fisher(
            tx.init(g), old=tree_of(np.ones(SIZE)), damping=1e-6
        ),
    ):
        step = flat(tx.update(g, state)[0])
        ogd = flat(adamr.subspaces.project(d, g))
        np.testing.assert_allclose(step, ogd / np.linalg.norm(ogd), atol=1e-6)
    published = adamr.fopng(d, as_published=True)
    np.testing.assert_allclose(flat(step_of(published, g)), step, atol=1e-6)


@pytest.mark.parametrize("as_published", [False, True])
def test_fopng_equals_the_twin(as_published):
    gradients, g = normal(0, 4, SIZE), normal(1, SIZE)
    old, new = np.exp(normal(2, SIZE)), np.exp(normal(3, SIZE))
    ours = fopng_step(
        g, gradients, old, new, SHAPES, damping=0.01, as_published=as_published
    )
    theirs = reference.fopng(
        g.astype(np.float64), gradients.T, old, new,
        as_published=as_published, damping=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@settings(max_examples=10)
@given(seeds)
def test_fopng_solves_the_stated_problem(seed):
    """Feasible, of length 1, descending, and better than any other feasible step."""
    gradients, g = normal(seed, 3, SIZE), normal(seed + 1, SIZE)
    old = np.exp(2 * normal(seed + 2, SIZE))
    new = np.exp(2 * normal(seed + 3, SIZE))
    step = fopng_step(g, gradients, old, new, SHAPES, damping=0.01)
    new = new + 0.01 * new.mean()
    constraints = gradients * old
    leak = np.abs(constraints @ step) / np.linalg.norm(constraints, axis=1)
    assert leak.max() < 2e-6 * np.linalg.norm(step)
    np.testing.assert_allclose(step @ (new * step), 1, rtol=1e-4)
    assert g @ step > 0
    null = np.linalg.svd(constraints.astype(np.float64))[2][3:]
    for other in np.random.default_rng(seed).normal(size=(50, len(null))) @ null:
        other = other / np.sqrt(other @ (new * other))
        assert g @ other <= g @ step * (1 + 1e-4)


def test_fopng_stays_exact_for_ill_conditioned_gradients():
    """Stored gradients that differ by 1e-4: a Gram matrix in float32 loses them."""
    base = normal(0, 1, SIZE)
    gradients = (base + 1e-4 * normal(1, 4, SIZE)).astype(np.float32)
    old, new = np.exp(normal(2, SIZE)), np.exp(normal(3, SIZE))
    d = grown(gradients)
    assert d.used == 4
    step = fopng_step(normal(4, SIZE), gradients, old, new, SHAPES)
    constraints = rows_of(d) * old
    leak = np.abs(constraints @ step) / np.linalg.norm(constraints, axis=1)
    assert leak.max() < 2e-6 * np.linalg.norm(step)


def test_fopng_degenerate_gradients():
    d = grown(normal(0, 3, SIZE))
    tx = adamr.fopng(d)
    zero = tree_of(np.zeros(SIZE))
    assert not np.any(flat(step_of(tx, zero)))
    inside = tree_of(rows_of(d).T @ np.array([1.0, -2.0, 0.5]))
    assert not np.any(flat(step_of(tx, inside)))
    for scale in (1e-30, 1e30):
        g = tree_of(normal(1, SIZE) * np.float32(scale))
        np.testing.assert_allclose(
            flat(step_of(tx, g)), flat(step_of(tx, tree_of(normal(1, SIZE)))), atol=1e-6
        )
    assert np.all(np.isnan(flat(step_of(tx, tree_of(np.full(SIZE, np.nan))))))


def test_fopng_degenerate_fisher():
    g = tree_of(normal(1, SIZE))
    tx = adamr.fopng(grown(normal(0, 3, SIZE)))
    plain = step_of(tx, g)
    zero = tree_of(np.zeros(SIZE))
    state = adamr.modifiers.set_fisher(tx.init(g), new=zero)
    np.testing.assert_array_equal(flat(tx.update(g, state)[0]), flat(plain))
    # F = 0: nothing to protect.
    state = adamr.modifiers.set_fisher(tx.init(g), old=zero)
    free = flat(g) / np.linalg.norm(flat(g))
    np.testing.assert_allclose(flat(tx.update(g, state)[0]), free, atol=1e-6)
    sparse = tree_of(np.where(np.arange(SIZE) % 3, 0.0, 1e-12))
    step = tx.update(g, adamr.modifiers.set_fisher(tx.init(g), old=sparse, new=sparse))[
        0
    ]
    assert np.all(np.isfinite(flat(step)))
    with pytest.raises(ValueError, match="new has negative, NaN or infinite entries"):
        adamr.modifiers.set_fisher(tx.init(g), new=tree_of(np.full(SIZE, np.nan)))
    inside = jax.jit(lambda s, f: adamr.modifiers.set_fisher(s, new=f))
    state = inside(tx.init(g), tree_of(np.full(SIZE, np.nan)))
    np.testing.assert_allclose(flat(tx.update(g, state)[0]), flat(plain), atol=1e-6)


def test_setting_directions_keeps_the_metric():
    """`set_subspace` after `set_fisher` is `set_fisher` after `set_subspace`."""
    g = tree_of(normal(1, SIZE))
    old, new = (tree_of(np.exp(normal(s, SIZE))) for s in (2, 3))
    tx, d = adamr.fopng(empty()), grown(normal(0, 3, SIZE))
    first = adamr.set_subspace(
        adamr.modifiers.set_fisher(tx.init(g), old=old, new=new), d
    )
    last = adamr.modifiers.set_fisher(
        adamr.set_subspace(tx.init(g), d), old=old, new=new
    )
    jax.tree.map(np.testing.assert_array_equal, first, last)
    assert jnp.any(first.basis[0] != d.rows[0])


def test_fisher_diagonals_are_parameter_shaped_state():
    g = tree_of(normal(0, SIZE))
    tx = adamr.fopng(empty())
    state = optax.tree.map_params(tx, lambda x: 2 * x, tx.init(g))
    assert np.all(flat((state.fisher_old, state.fisher_new)) == 2)
    assert not np.any(flat(state.basis))


def test_average_fisher():
    f = adamr.modifiers.average_fisher(
        {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}, 0.25
    )
    np.testing.assert_allclose(f["w"], [1.5, 1.5])


# Boundaries inside wrappers -----------------------------------------------------------

OPTIMIZERS = {
    "project_out": adamr.project_out,
    "protect_update": adamr.protect_update,
    "two_sided": adamr.two_sided,
    "fopng": adamr.fopng,
    "ogd": lambda d: adamr.ogd(0.1, d),
}
WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda s: optax.chain(tx, optax.scale(s))
    )(s=2.0),
    "masked": lambda tx: optax.masked(tx, {"a": True, "scale": True, "stack": False}),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "frozen": optax.set_to_zero()},
        {"a": "ours", "scale": "ours", "stack": "frozen"},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", ["project_out", "two_sided", "fopng"])
def test_boundaries_in_wrappers_do_not_recompile(optimizer, wrapper):
    tx = WRAPPERS[wrapper](OPTIMIZERS[optimizer](empty()))
    p = tree_of(normal(0, SIZE))
    state = tx.init(p)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(g, state):
        traces.append(1)
        return tx.update(g, state, p)

    full = empty()
    for task in range(2):
        for seed in range(2):
            step, state = update(tree_of(normal(10 * task + seed, SIZE)), state)
        samples = tree_of(normal(task, 2, SIZE))
        full = adamr.grow_directions(full, samples)
        if task:  # directions over all leaves are restricted where leaves are hidden
            state = adamr.set_subspace(state, full)
        else:
            d = adamr.grow_directions(adamr.get_subspace(state), samples)
            state = adamr.set_subspace(state, d)
        if optimizer == "fopng":
            state = adamr.modifiers.set_fisher(
                state, new=tree_of(np.exp(normal(task, SIZE)))
            )
    step, state = update(tree_of(normal(77, SIZE)), state)
    assert len(traces) == 1
    d = adamr.get_subspace(state)
    seen = [
        x for x, r in zip(jax.tree.leaves(step), d.rows, strict=True) if r is not None
    ]
    assert len(seen) == (3 if wrapper in ("masked", "partition") else 4)
    rows = rows_of(d)
    assert len(rows) == 4
    assert_orthonormal(rows)
    leak = np.abs(rows @ flat(seen)) / np.linalg.norm(flat(seen))
    assert leak.max() < 1e-6


def test_set_subspace_projects_the_first_moment():
    p = tree_of(normal(0, SIZE))
    for moments, leaks in (("project", False), ("keep", True), ("reset", False)):
        tx = optax.chain(
            adamr.route_both_moments(adamr.project_out(empty())),
            adamr.faithful_second_moment(),
        )
        _, state = tx.update(tree_of(normal(1, SIZE)), tx.init(p), p)
        d = grown(normal(2, 3, SIZE))
        mu = optax.tree.get(adamr.set_subspace(state, d, moments=moments), "mu")
        assert (np.max(np.abs(coordinates(d, mu))) > 1e-3) == leaks


def test_nnx_optimizer_boundaries():
    nnx = pytest.importorskip("flax.nnx")

    class Tiny(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    for build in OPTIMIZERS.values():
        model = Tiny()
        state = nnx.state(model, nnx.Param)
        tx = build(adamr.empty_directions(state, 3))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        g = jax.tree.map(jnp.ones_like, state)
        optimizer.update(model, g)
        d = adamr.get_subspace(optimizer.opt_state)
        samples = tuple(jnp.ones((2, *r.shape[1:])) for r in d.rows)
        d = adamr.grow_directions(d, samples)
        assert d.used == 1
        opt_state = adamr.set_subspace(optimizer.opt_state, d)
        if adamr.state.find_nodes(opt_state, FopngState):
            opt_state = adamr.modifiers.set_fisher(opt_state, new=g)
        optimizer.opt_state = opt_state
        before = flat(nnx.state(model, nnx.Param))
        optimizer.update(model, g)
        assert np.linalg.norm(flat(nnx.state(model, nnx.Param)) - before) < 1e-5


@pytest.mark.as_users
@pytest.mark.parametrize("explicit", [True, False])
def test_directions_lie_as_their_leaves_lie(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    shapes = {"kernel": (4, 16), "bias": (16,)}

    def shard(x, lead=0):
        spec = [None] * (x.ndim - 1) + ["x"]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def make(seed, *lead):
        return tree_of(normal(seed, *lead, 80), shapes)

    def train(p, samples, g, fisher):
        d = adamr.grow_directions(adamr.empty_directions(p, 4), samples)
        tx = adamr.fopng(d)
        state = adamr.modifiers.set_fisher(tx.init(p), new=fisher)
        ogd = adamr.ogd(0.1, d)
        return (
            d,
            jax.jit(tx.update)(g, state)[0],
            jax.jit(ogd.update)(g, ogd.init(p))[0],
        )

    trees = make(0), make(1, 3), make(2), jax.tree.map(jnp.square, make(3))
    expected = train(*trees)
    with jax.set_mesh(mesh):
        found = train(*jax.tree.map(shard, trees))
        for rows, p in zip(found[0].rows, jax.tree.leaves(trees[0]), strict=True):
            wanted = PartitionSpec(*[None] * p.ndim, "x")
            assert rows.sharding.is_equivalent_to(
                NamedSharding(mesh, wanted), rows.ndim
            )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, atol=2e-6)


def test_bf16_gradients_keep_their_dtype():
    d = grown(normal(0, 3, SIZE))
    g = tree_of(normal(1, SIZE), dtype=jnp.bfloat16)
    for build in OPTIMIZERS.values():
        step = step_of(build(d), g)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(step))
    samples = tree_of(normal(0, 3, SIZE), dtype=jnp.bfloat16)
    more = adamr.grow_directions(empty(), samples)
    assert all(r.dtype == jnp.float32 for r in more.rows)


def test_restrict_is_a_projection_of_what_remains():
    d = grown(normal(0, 4, SIZE))
    like = [None, *d.rows[1:]]
    small = d.restrict(like)
    assert small.rows[0] is None and small.used == 4
    assert_orthonormal(rows_of(small))
    old = flat([r for r in d.rows[1:]], lead=1)[:4]
    left = old - old @ rows_of(small).T @ rows_of(small)
    assert np.max(np.abs(left)) < 1e-6
    assert d.restrict(d.rows) is d


# Bad input ----------------------------------------------------------------------------


def test_errors():
    d, g = grown(normal(0, 2, SIZE)), tree_of(normal(1, SIZE))
    p = mlp_params()
    x, y = normal(0, 2, 5), jnp.array([0, 1])
    routed = adamr.Routed(g, g, g)
    for build in (adamr.project_out, adamr.protect_update, adamr.fopng):
        with pytest.raises(TypeError, match="plain gradient tree"):
            build(d).update(routed, build(d).init(g))
        with pytest.raises(ValueError, match="made for 4 parameter leaves"):
            build(d).init({"w": jnp.zeros(3)})
        other = jax.tree.map(lambda v: jnp.zeros((5, *v.shape)), g)
        with pytest.raises(ValueError, match="do not fit a leaf"):
            build(d).init(other)
        with pytest.raises(TypeError, match="must be"):
            build({})
    with pytest.raises(TypeError, match="must be a Subspace, got Directions"):
        adamr.oblique_second_moment(d)
    with pytest.raises(ValueError, match="leaves out"):
        adamr.subspaces.project(d, {**g, "scale": None})
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        empty(0)
    with pytest.raises(ValueError, match="exclude names 'haed'"):
        empty(1, exclude=["haed"])
    with pytest.raises(ValueError, match="sequence of str"):
        empty(1, exclude="head")
    samples = tree_of(normal(0, 2, SIZE))
    for name, bad in (("scale", jnp.ones(3)), ("scale", None), ("stack", g["stack"])):
        with pytest.raises(
            ValueError, match=f"samples has shape .* at {name}, expected"
        ):
            adamr.grow_directions(d, {**samples, name: bad})
    with pytest.raises(ValueError, match="one entry per parameter leaf"):
        adamr.grow_directions(d, {"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="samples is empty"):
        adamr.grow_directions(d, tree_of(np.zeros((0, SIZE))))
    with pytest.raises(ValueError, match="count must be at least 1"):
        adamr.subspaces.principal_directions(g, 0)
    with pytest.raises(ValueError, match="variant is 'gtl'"):
        adamr.subspaces.logit_gradients(mlp, p, x, y, variant="gtl")
    with pytest.raises(ValueError, match="labels is None"):
        adamr.subspaces.logit_gradients(mlp, p, x)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        adamr.subspaces.logit_gradients(mlp, p, x, y + 2)
    with pytest.raises(ValueError, match="labels has shape"):
        adamr.subspaces.logit_gradients(mlp, p, x, y[:1])
    with pytest.raises(ValueError, match="without a batch axis"):
        adamr.subspaces.logit_gradients(lambda p, x: mlp(p, x)[None], p, x, y)
    with pytest.raises(ValueError, match="inputs must be arrays"):
        adamr.subspaces.logit_gradients(mlp, p, (x, x[:1]), y)
    with pytest.raises(ValueError, match="chunk_size must be"):
        adamr.subspaces.logit_gradients(mlp, p, x, y, chunk_size=0)
    state = adamr.project_out(d).init(g)
    with pytest.raises(ValueError, match="keep max_rank and axes"):
        adamr.set_subspace(state, empty(3))
    with pytest.raises(TypeError, match="the state holds a Directions"):
        adamr.set_subspace(state, adamr.empty_subspace(g))
    with pytest.raises(ValueError, match="holds no fopng"):
        adamr.modifiers.set_fisher(state, new=g)
    tx = adamr.fopng(d)
    with pytest.raises(ValueError, match="damping must be positive"):
        adamr.modifiers.set_fisher(tx.init(g), new=g, damping=0.0)
    with pytest.raises(ValueError, match="new has shape"):
        adamr.modifiers.set_fisher(tx.init(g), new=jax.tree.map(lambda v: v[None], g))


def test_logit_gradients_of_a_sigmoid_head():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    for head in (lambda w, x: x @ w, lambda w, x: (x @ w)[None]):
        for variant in ("ground_truth", "average", "all"):
            rows = adamr.subspaces.logit_gradients(
                head, jnp.ones(2), x, jnp.array([0, 1]), variant=variant
            )
            np.testing.assert_array_equal(rows, x)
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        adamr.subspaces.logit_gradients(head, jnp.ones(2), x, jnp.array([0, 2]))
