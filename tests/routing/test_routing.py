"""The carrier, the routes, the merging link and the strength links."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import adamr
from adamr import Routed
from tests.contract.cases import gradients, params
from tests.references import core as reference


def trajectory(tx, carriers):
    """Steps of a link over a list of carriers, under jit."""
    state, update = tx.init(carriers[0].raw), jax.jit(tx.update)
    steps = []
    for carrier in carriers:
        step, state = update(carrier, state)
        steps.append(step)
    return steps, state


def streams(seed, steps=6, shape=(5, 3)):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, steps, *shape)).astype(np.float32)
    return first, second


# Identity ---------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("route", ["first", "both", "second"])
def test_t0e_identity_equals_optax_adam_bit_for_bit(jitted, dtype, route):
    route = getattr(adamr, f"route_{route}_moment" + "s" * (route == "both"))
    ours = optax.chain(
        route(optax.identity()), adamr.faithful_second_moment(0.9, 0.99, 1e-7, 1e-9)
    )
    theirs, p = optax.scale_by_adam(0.9, 0.99, 1e-7, 1e-9), params(dtype)
    a, b = ours.init(p), theirs.init(p)
    wrap = jax.jit if jitted else lambda f: f
    ours_update, theirs_update = wrap(ours.update), wrap(theirs.update)
    for seed in range(5):
        g = gradients(seed, p)
        (x, a), (y, b) = ours_update(g, a), theirs_update(g, b)
        chex.assert_trees_all_equal(x, y)
    chex.assert_trees_all_equal(optax.tree.get(a, "nu"), b.nu)


@pytest.mark.parametrize("route", [adamr.route_first_moment, adamr.route_both_moments])
@pytest.mark.parametrize(
    "link", [adamr.constant_scale(0.0), adamr.overlap_adaptive_scale(0.0)]
)
def test_t0e_zero_strength_equals_optax_adam_bit_for_bit(route, link):
    ours = optax.chain(route(optax.scale(0.1)), link, adamr.faithful_second_moment())
    theirs, p = optax.scale_by_adam(), params()
    a, b = ours.init(p), theirs.init(p)
    for seed in range(3):
        g = gradients(seed)
        (x, a), (y, b) = jax.jit(ours.update)(g, a), jax.jit(theirs.update)(g, b)
        chex.assert_trees_all_equal(x, y)


TWINS = {
    "amsgrad": ({"b1": 0.8}, optax.scale_by_amsgrad(b1=0.8)),
    "rmsprop": ({"b1": 0.0, "b2": 0.9}, optax.scale_by_rms(0.9, eps_in_sqrt=False)),
    "adagrad": ({"b1": 0.0, "eps": 0.0, "eps_root": 1e-7}, optax.scale_by_rss()),
    "yogi": ({"eps": 1e-3}, optax.scale_by_yogi()),
    "adafactor": ({"b1": 0.0, "eps": 0.0}, optax.scale_by_factored_rms()),
}


@pytest.mark.parametrize("estimator", TWINS)
def test_identity_equals_the_optax_twin(estimator):
    hyperparameters, theirs = TWINS[estimator]
    p = {"big": jnp.zeros((130, 140)), "cube": jnp.zeros((3, 150, 129)), **params()}
    ours = optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.faithful_second_moment(**hyperparameters, estimator=estimator),
    )
    a, b = ours.init(p), theirs.init(p)
    for seed in range(4):
        g = gradients(seed, p)
        x, a = jax.jit(ours.update)(g, a)
        y, b = jax.jit(theirs.update)(g, b, p)
        chex.assert_trees_all_close(x, y, rtol=1e-6, atol=1e-6)


# Twins ------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [True, False, "shared"])
@pytest.mark.parametrize("shared", [(), (0,)])
@pytest.mark.parametrize("estimator", ["adam", *TWINS])
def test_merging_link_equals_its_float64_twin(estimator, shared, guard):
    first, second = streams(1)
    tx = adamr.faithful_second_moment(
        0.9,
        0.99,
        1e-4,
        1e-6,
        estimator=estimator,
        share=(lambda path, shape: shared) if shared else None,
        guard=guard,
    )
    got, _ = trajectory(
        tx, [Routed(f, s, s) for f, s in zip(first, second, strict=True)]
    )
    expected = reference.trajectory(
        first.astype(np.float64),
        second.astype(np.float64),
        b2=0.99,
        eps=1e-4,
        eps_root=1e-6,
        estimator=estimator,
        shared_axes=shared,
        guard=guard,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "path", "shared"),
    [
        ((5, 3), "kernel", (1, 3)),
        ((7,), "bias", (7,)),
        ((2, 3, 4, 5), "conv/kernel", (1, 1, 1, 5)),
        ((6, 2, 3), "attention/query/kernel", (1, 2, 3)),
        ((2, 3, 6), "attention/out/kernel", (1, 1, 6)),
        ((4, 5, 6), "scanned/kernel", (4, 1, 6)),
    ],
)
def test_sharing_along_the_fan_in(shape, path, shared):
    *parents, name = path.split("/")
    tree = {name: jnp.ones(shape)}
    for parent in reversed(parents):
        tree = {parent: tree}
    state = adamr.faithful_second_moment(share="fan_in").init(tree)
    assert [x.shape for x in jax.tree.leaves(state.nu)] == [shared]
    assert isinstance(state.nu, tuple)


def test_sharing_along_what_a_subspace_protects():
    """Unprotected kernels stay element-wise; "fan_in" would share them, too."""
    p = {"b": jnp.zeros(3), "head": jnp.zeros((4, 2)), "w": jnp.zeros((4, 3))}
    s = adamr.empty_subspace(p, unprotected=("head",))
    state = adamr.faithful_second_moment(share=s).init(p)
    assert [x.shape for x in jax.tree.leaves(state.nu)] == [(3,), (4, 2), (1, 3)]
    with pytest.raises(ValueError, match="share was made for 3 parameter leaves"):
        adamr.faithful_second_moment(share=s).init({"w": p["w"]})


def test_accumulator_dtypes():
    p = params(jnp.bfloat16)
    for share in (None, "fan_in"):
        tx = adamr.faithful_second_moment(
            share=share, mu_dtype=jnp.float32, nu_dtype=jnp.float32
        )
        state = tx.init(p)
        g = gradients(1, p)
        step, state = tx.update(Routed(g, g, g), state)
        kinds = {x.dtype for x in jax.tree.leaves((state.mu, state.nu))}
        assert kinds == {jnp.dtype("float32")}
        assert {x.dtype for x in jax.tree.leaves(step)} == {jnp.dtype("bfloat16")}
    default = adamr.faithful_second_moment().init(p)
    assert {x.dtype for x in jax.tree.leaves(default.nu)} == {jnp.dtype("bfloat16")}


# Degenerate numbers -----------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["adam", *TWINS])
def test_t0b_dead_input_is_bounded_by_the_guard(estimator):
    """g = (1, 0) every step, U = (1, 1)/√2: the projection moves a dead coordinate."""
    p = {"w": jnp.zeros((2, 1))}
    u = adamr.make_subspace(p, {"w": jnp.full((2, 1), 0.5**0.5)})

    def largest(guard, share=None, steps=50):
        tx = optax.chain(
            adamr.route_first_moment(adamr.project_out(u)),
            adamr.faithful_second_moment(estimator=estimator, guard=guard, share=share),
        )
        g = {"w": jnp.array([[1.0], [0.0]])}

        def body(state, _):
            step, state = tx.update(g, state)
            return state, jnp.max(jnp.abs(step["w"]))

        return jnp.max(jax.lax.scan(body, tx.init(p), None, length=steps)[1])

    # Without bias correction of v, RMSProp's first step is 1/√(1 − b2) for Adam too.
    bound = 32 if estimator == "rmsprop" else 2
    assert largest(guard=True) < bound
    assert largest(guard=True, share="fan_in") < bound
    if estimator == "adam":
        np.testing.assert_allclose(largest(guard=False), 0.5 / 1e-8, rtol=1e-3)


@pytest.mark.parametrize("estimator", ["adam", *TWINS])
@pytest.mark.parametrize("share", [None, "fan_in"])
def test_zero_gradients_give_finite_steps(estimator, share):
    zeros = jax.tree.map(jnp.zeros_like, params())
    tx = optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.overlap_adaptive_scale(),
        adamr.faithful_second_moment(estimator=estimator, share=share),
    )
    step, state = tx.update(zeros, tx.init(zeros))
    assert all(jnp.all(jnp.abs(x) < 1e-2) for x in jax.tree.leaves(step))
    assert optax.tree.get(state, "overlap") == 0.0


def test_nan_reaches_the_moments_but_never_the_overlap():
    g = {"w": jnp.array([jnp.nan, 1.0])}
    tx = optax.chain(
        adamr.route_first_moment(optax.scale(0.5)),
        adamr.overlap_adaptive_scale(decay=0.5),
        adamr.faithful_second_moment(),
    )
    good = {"w": jnp.array([1.0, 1.0])}
    _, state = tx.update(good, tx.init(good))
    before = optax.tree.get(state, "overlap")
    step, state = tx.update(g, state)
    assert optax.tree.get(state, "overlap") == before
    assert jnp.isnan(step["w"][0]) and jnp.isfinite(step["w"][1])


# Strength ---------------------------------------------------------------------------


def test_t0a_attenuation_is_kept_decoupled_and_cancelled_shared():
    g = jnp.ones(1)
    for alpha in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        for route, expected in (
            (adamr.route_first_moment, 1 - alpha),
            (adamr.route_both_moments, 1.0),
        ):
            tx = optax.chain(
                route(optax.set_to_zero()),
                adamr.constant_scale(alpha),
                adamr.faithful_second_moment(),
            )
            state, update = tx.init(g), jax.jit(tx.update)
            for _ in range(100):
                step, state = update(g, state)
            np.testing.assert_allclose(step, expected, rtol=2e-5)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("aggregate", ["global", "mean", "leaf"])
def test_overlap_and_strength_equal_their_twin(aggregate, debias):
    rng = np.random.default_rng(0)
    gs = [{k: rng.normal(size=(4, 2)) for k in "ab"} for _ in range(5)]
    factor = {"a": 0.3, "b": 0.9}
    tx = adamr.overlap_adaptive_scale(0.7, 0.8, aggregate=aggregate, debias=debias)
    state = tx.init(gs[0])
    overlaps = []
    for g in gs:
        h = {k: factor[k] * g[k] for k in g}
        as_float32 = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
        carrier = Routed(*map(as_float32, (h, g, g)))
        moved, state = jax.jit(tx.update)(carrier, state)
        away = np.array([((g[k] - h[k]) ** 2).sum() for k in "ab"])
        whole = np.array([(g[k] ** 2).sum() for k in "ab"])
        overlaps.append(
            {
                "global": away.sum() / whole.sum(),
                "mean": (away / whole).mean(),
                "leaf": away / whole,
            }[aggregate]
        )
    alphas, means = reference.strength(overlaps, 0.7, 0.8, debias)
    np.testing.assert_allclose(state.overlap, means[-1], rtol=1e-5)
    np.testing.assert_allclose(state.strength, alphas[-1], rtol=1e-5)
    alpha = np.broadcast_to(alphas[-1], (2,))
    for i, k in enumerate("ab"):
        expected = g[k] - alpha[i] * (g[k] - h[k])
        np.testing.assert_allclose(moved.first[k], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moved.second[k], g[k], rtol=1e-6)


def test_overlap_of_a_projection_is_the_energy_of_its_coordinates():
    g = gradients(3)["dense"]["kernel"]
    u = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
    s = adamr.make_subspace(g, u.astype(np.float32))
    tx = optax.chain(
        adamr.route_first_moment(adamr.project_out(s)),
        adamr.overlap_adaptive_scale(decay=0.0),
    )
    for run in (tx.update, jax.jit(tx.update)):
        _, state = run(g, tx.init(g))
        g64 = np.asarray(g, np.float64)
        expected = ((u.T @ g64) ** 2).sum() / (g64**2).sum()
        got = optax.tree.get(state, "overlap")
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_rule_replaces_the_falling_rule_and_is_clipped():
    g = jnp.ones(2)
    tx = adamr.overlap_adaptive_scale(decay=0.0, rule=lambda s: 4.0 * s)
    _, state = tx.update(Routed(0.5 * g, g, g), tx.init(g))
    assert state.strength == 1.0


def test_a_modifier_that_adds_energy_cannot_make_the_strength_negative():
    g = jnp.ones(2)
    tx = adamr.overlap_adaptive_scale(decay=0.0)
    moved, state = tx.update(Routed(100 * g, g, g), tx.init(g))
    assert state.overlap == 1.0 and state.strength == 0.0
    np.testing.assert_array_equal(moved.first, g)


@pytest.mark.smoke
def test_constant_scale_takes_a_schedule():
    g = jnp.ones(1)
    tx = adamr.constant_scale(lambda count: 0.25 * count)
    state = tx.init(g)
    for expected in (1.0, 0.75, 0.5):
        moved, state = jax.jit(tx.update)(Routed(0 * g, g, g), state)
        np.testing.assert_allclose(moved.first, expected)
        np.testing.assert_allclose(state.strength, 1 - expected)


@pytest.mark.smoke
@settings(max_examples=25)
@given(
    alpha=st.floats(0.0, 1.0, width=32),
    seed=st.integers(0, 2**16),
)
def test_strength_interpolates_both_fields(alpha, seed):
    first, second = streams(seed, steps=1)
    raw = streams(seed + 1, steps=1)[0]
    tx = adamr.constant_scale(alpha)
    carrier = Routed(first, second, raw)
    moved, _ = tx.update(jax.tree.map(jnp.asarray, carrier), tx.init(raw))
    for got, x in zip(moved[:2], (first, second), strict=True):
        np.testing.assert_allclose(got, raw - alpha * (raw - x), atol=1e-5)
    np.testing.assert_array_equal(moved.raw, raw)


# Errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (adamr.faithful_second_moment(), "faithful_second_moment"),
        (adamr.overlap_adaptive_scale(), "overlap_adaptive_scale"),
        (adamr.constant_scale(0.5), "constant_scale"),
    ],
)
def test_a_plain_tree_where_routed_is_needed(link, name):
    g = jnp.ones(2)
    with pytest.raises(TypeError, match=f"{name} takes a Routed.*route_first_moment"):
        link.update(g, link.init(g))


@pytest.mark.parametrize("link", ["project_out", "protect_update"])
def test_routed_where_a_plain_tree_is_needed(link):
    g = jnp.ones((2, 2))
    tx = getattr(adamr, link)(adamr.empty_subspace(g))
    with pytest.raises(TypeError, match=f"{link} takes a plain gradient tree"):
        tx.update(Routed(g, g, g), tx.init(g))


def test_a_route_in_a_route():
    tx = adamr.route_first_moment(optax.identity())
    g = jnp.ones(2)
    with pytest.raises(TypeError, match="route_first_moment takes a plain"):
        tx.update(Routed(g, g, g), tx.init(g))


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_strengths_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
        adamr.constant_scale(alpha)
    with pytest.raises(ValueError, match=r"alpha_max must lie in \[0, 1\], got"):
        adamr.overlap_adaptive_scale(alpha)
    with pytest.raises(ValueError, match="decay must lie"):
        adamr.overlap_adaptive_scale(0.5, alpha)
    with pytest.raises(ValueError, match="alpha must lie"):
        adamr.adamr(0.1, optax.identity(), strength=alpha)


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (adamr.route_first_moment, "route_first_moment"),
        (adamr.route_both_moments, "route_both_moments"),
        (adamr.route_second_moment, "route_second_moment"),
        (lambda modifier: adamr.adamr(0.1, modifier), "adamr"),
    ],
)
def test_a_subspace_where_a_modifier_is_needed(link, name):
    with pytest.raises(TypeError, match=f"{name}: modifier must be .* got Subspace"):
        link(adamr.empty_subspace(jnp.ones((3, 2))))


def test_a_schedule_of_the_weight_decay_is_refused():
    with pytest.raises(TypeError, match="weight_decay must be a number, got a func"):
        adamr.adamr(0.1, optax.identity(), weight_decay=lambda count: 0.1)


def test_unknown_names():
    with pytest.raises(ValueError, match="estimator is 'adamw', expected"):
        adamr.faithful_second_moment(estimator="adamw")
    with pytest.raises(ValueError, match="share is 'rows', expected"):
        adamr.faithful_second_moment(share="rows")
    with pytest.raises(ValueError, match="share is a Directions, expected"):
        adamr.faithful_second_moment(share=adamr.empty_directions(jnp.ones(3), 2))
    with pytest.raises(ValueError, match="guard is 'all', expected"):
        adamr.faithful_second_moment(guard="all")
    with pytest.raises(ValueError, match="aggregate is 'sum', expected"):
        adamr.overlap_adaptive_scale(aggregate="sum")


SCALES = (1e-25, 1e-19, 1e-10, 1.0, 1e10, 1e19, 1e25)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aggregate", ["global", "mean", "leaf"])
@pytest.mark.parametrize("kind", ["projection", "directions", "other"])
def test_overlap_of_gradients_of_any_scale(kind, aggregate, scale):
    """Squares of 1e-25 and of 1e25 are no float32; their ratios are."""
    rng = np.random.default_rng(0)
    g = {"u": rng.normal(size=(5, 3)), "w": rng.normal(size=(4, 3))}
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    bases = {n: np.linalg.qr(rng.normal(size=(len(x), 2)))[0] for n, x in g.items()}
    if kind == "directions":
        empty = adamr.empty_directions(g, 2)
        made = adamr.grow_directions(empty, jax.tree.map(lambda x: x[None] ** 2, g))
    else:
        made = adamr.make_subspace(g, bases)
    modifier = adamr.project_out(made)
    if kind == "other":  # the strength link measures it on its own
        modifier = optax.chain(modifier, optax.identity())
    link = adamr.overlap_adaptive_scale(decay=0.0, aggregate=aggregate)
    tx = adamr.adamr(0.1, modifier, strength=link)

    def overlap(factor):
        scaled = jax.tree.map(lambda x: x * jnp.float32(factor), g)
        _, state = jax.jit(tx.update)(scaled, tx.init(g), g)
        return np.asarray(optax.tree.get(state, "overlap"))

    expected = overlap(1.0)
    assert np.all((expected > 0.01) & (expected < 0.99))
    np.testing.assert_allclose(overlap(scale), expected, rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["mean", "leaf"])
def test_each_leaf_has_its_own_scale(aggregate):
    g = {"a": jnp.array([[3e-25], [4e-25]]), "b": jnp.array([[4e22], [3e22]])}
    first = jax.tree.map(lambda x: x.at[0].set(0.0), g)
    tx = adamr.overlap_adaptive_scale(decay=0.0, aggregate=aggregate)
    _, state = tx.update(Routed(first, g, g), tx.init(g))
    each = np.array([0.36, 0.64])
    expected = each.mean() if aggregate == "mean" else each
    np.testing.assert_allclose(state.overlap, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("aggregate", ["global", "mean", "leaf"])
def test_gradients_that_are_not_finite_leave_the_overlap(aggregate, bad):
    g = {"a": jnp.array([[bad], [1.0]]), "b": jnp.array([[bad], [1e-25]])}
    first = jax.tree.map(lambda x: x * jnp.array([[1.0], [0.0]]), g)
    tx = adamr.overlap_adaptive_scale(decay=0.5, aggregate=aggregate)
    state = tx.init(g)._replace(overlap=jnp.full_like(tx.init(g).overlap, 0.25))
    _, after = tx.update(Routed(first, g, g), state)
    np.testing.assert_array_equal(after.overlap, state.overlap)


@pytest.mark.parametrize("strength", [0.5, adamr.overlap_adaptive_scale()])
def test_the_strength_of_the_alias_is_found_by_name(strength):
    tx = adamr.adamr(0.1, optax.scale(0.5), strength=strength)
    _, state = tx.update(gradients(0), tx.init(params()), params())
    assert 0 < optax.tree.get(state, "strength") <= 0.5


def test_a_rule_of_axes_shares_v_along_what_it_protects():
    by_rule = adamr.faithful_second_moment(share=adamr.default_axes)
    by_name = adamr.faithful_second_moment(share="fan_in")
    a, b = (tx.init(params()) for tx in (by_rule, by_name))
    assert [x.shape for x in a.nu] == [x.shape for x in b.nu]
