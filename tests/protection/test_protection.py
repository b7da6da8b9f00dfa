"""The guarantees that adamr/protection.py and the alias state."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import adamr
from tests.contract.cases import bases, gradients, orthonormal, params, subspace
from tests.references import core as reference

ALPHAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

# Every exact protection, as (subspace) -> unsigned step.
EXACT = {
    "shared v": lambda s: optax.chain(
        adamr.route_first_moment(adamr.project_out(s)),
        adamr.faithful_second_moment(share="fan_in"),
    ),
    "alias": lambda s: adamr.adamr(0.1, adamr.project_out(s), weight_decay=0.1),
    "update projection": lambda s: optax.chain(
        optax.scale_by_adam(), adamr.protect_update(s)
    ),
    "two-sided": adamr.two_sided,
    "oblique": lambda s: optax.chain(
        adamr.route_first_moment(optax.identity()), adamr.oblique_second_moment(s)
    ),
    "oblique of projected": lambda s: optax.chain(
        adamr.route_first_moment(adamr.project_out(s)), adamr.oblique_second_moment(s)
    ),
    "eigenbasis": lambda s: optax.chain(
        adamr.route_first_moment(adamr.project_out(s)),
        adamr.in_eigenbasis(adamr.faithful_second_moment(), s),
    ),
}
each_exact = pytest.mark.parametrize("name", EXACT)
# Update projection may ascend; the alias is signed by the learning rate.
DESCENDING = sorted(set(EXACT) - {"update projection", "alias"})


def leak(s, step):
    """‖UᵀΔ‖ / ‖Δ‖ over the protected leaves, in float64."""
    inside, whole = 0.0, 0.0
    for basis, weights, x in zip(*s, jax.tree.leaves(step), strict=True):
        if basis is None:
            continue
        c = adamr.subspaces.subspace.coordinates(basis, weights, x)
        inside += float(jnp.sum(jnp.square(c)))
        whole += float(jnp.sum(jnp.square(x)))
    return (inside / whole) ** 0.5


def stream(kind, seed):
    """Gradients a user meets: isotropic, anisotropic, with dead inputs."""
    g = gradients(seed)
    if kind == "isotropic":
        return g

    def spread(x):
        if x.ndim < 2:
            return x
        n = x.shape[-2]
        scale = 10.0 ** jnp.linspace(-1.5, 1.5, n)
        if kind == "dead inputs":
            scale = jnp.where(jnp.arange(n) % 3 == 0, 0.0, scale)
        return x * scale.reshape((1,) * (x.ndim - 2) + (n, 1))

    return jax.tree.map(spread, g)


@each_exact
@pytest.mark.parametrize("kind", ["isotropic", "anisotropic", "dead inputs"])
def test_leak_of_exact_protections(name, kind):
    s, p = subspace(), params()
    tx = EXACT[name](s)
    state, update = tx.init(p), jax.jit(tx.update)
    for seed in range(8):
        step, state = update(stream(kind, seed), state, p)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(step))
    assert leak(s, step) < 1e-6


@pytest.mark.parametrize("route", [adamr.route_both_moments, adamr.route_first_moment])
def test_t0c_element_wise_routing_leaks(route):
    s, p = subspace(), params()
    tx = optax.chain(route(adamr.project_out(s)), adamr.faithful_second_moment())
    state = tx.init(p)
    for seed in range(8):
        step, state = tx.update(stream("anisotropic", seed), state)
    assert leak(s, step) > 1e-2


def first_step(tx, g, nu):
    """One step with D fixed: b2 = 1 keeps the second moment that is put in."""
    state = optax.tree.set(tx.init(g), nu=nu)
    return tx.update(g, state)[0]["w"][:, 0]


@pytest.mark.smoke
def test_t0d_closed_form():
    """U = (1,1)/√2, g = (3,2), D = diag(.1, 10): ⟨g, Δ⟩ of the four protections."""
    g = {"w": jnp.array([[3.0], [2.0]])}
    s = adamr.make_subspace(g, {"w": np.full((2, 1), 0.5**0.5)})
    d = np.array([0.1, 10.0])
    # rmsprop has no bias correction of v, and b2 = 1 leaves it at 1/D².
    fixed = {"b1": 0.0, "b2": 1.0, "eps": 0.0, "estimator": "rmsprop"}
    nu = {"w": jnp.asarray(d[:, None] ** -2.0, jnp.float32)}
    raw = adamr.route_first_moment(optax.identity())
    projected = adamr.route_first_moment(adamr.project_out(s))
    merge = adamr.faithful_second_moment(**fixed)
    vector, u = np.array([3.0, 2.0]), np.full((2, 1), 0.5**0.5)

    links = {
        -9.85: optax.chain(raw, merge, adamr.protect_update(s)),
        2.525: adamr.two_sided(s, **fixed),
        0.0990099: optax.chain(raw, adamr.oblique_second_moment(s, **fixed)),
    }
    for expected, tx in links.items():
        step = np.asarray(first_step(tx, g, nu), np.float64)
        np.testing.assert_allclose(vector @ step, expected, rtol=1e-4)
        assert abs(u[:, 0] @ step) < 1e-5
    leaking = first_step(optax.chain(projected, merge), g, nu)
    np.testing.assert_allclose(vector @ leaking, -9.85, rtol=1e-4)
    assert abs(u[:, 0] @ leaking) > 1e-2


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), name=st.sampled_from(DESCENDING))
def test_exact_protections_descend(seed, name):
    """⟨g, Δ⟩ ≥ 0 on the first step."""
    tx, g = EXACT[name](subspace()), gradients(seed)
    step, _ = tx.update(g, tx.init(g))
    assert optax.tree.vdot(g, step) >= 0


def test_oblique_equals_its_float64_twin():
    rng = np.random.default_rng(0)
    basis = orthonormal(0, 6, 2)
    g = rng.normal(size=(6, 4))
    d = 10.0 ** rng.uniform(-2, 2, size=(6, 4))
    s = adamr.make_subspace({"w": jnp.zeros((6, 4))}, {"w": basis}, max_rank=4)
    tx = optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.oblique_second_moment(s, 0.0, 1.0, 0.0, estimator="rmsprop"),
    )
    gradient = {"w": jnp.asarray(g, jnp.float32)}
    nu = {"w": jnp.asarray(d**-2, jnp.float32)}
    step, _ = tx.update(gradient, optax.tree.set(tx.init(gradient), nu=nu))
    expected = reference.oblique(g, d, basis.astype(np.float64))
    np.testing.assert_allclose(step["w"], expected, rtol=1e-4, atol=1e-4)
    # The step is affine in λ, and λ counts once.
    half = s._replace(weights=jax.tree.map(lambda w: w / 2, s.weights))
    state = adamr.set_subspace(tx.init(gradient), half)
    step, _ = tx.update(gradient, optax.tree.set(state, nu=nu))
    np.testing.assert_allclose(step["w"], (d * g + expected) / 2, rtol=1e-4, atol=1e-4)


def test_eigenbasis_equals_its_float64_twin():
    basis = orthonormal(0, 6, 2)
    s = adamr.make_subspace(jnp.zeros((6, 4)), basis, max_rank=4)
    firsts, seconds = np.random.default_rng(1).normal(size=(2, 6, 6, 4))
    tx = adamr.in_eigenbasis(adamr.faithful_second_moment(eps=1e-3), s)
    state = tx.init(jnp.zeros((6, 4)))
    expected = reference.eigenbasis(firsts, seconds, basis.astype(np.float64), eps=1e-3)
    for f, g, e in zip(firsts, seconds, expected, strict=True):
        f, g = jnp.asarray(f, jnp.float32), jnp.asarray(g, jnp.float32)
        step, state = tx.update(adamr.Routed(f, g, g), state)
        np.testing.assert_allclose(step, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_proposition_1_in_the_eigenbasis(alpha):
    """Along a rotated direction: decoupled keeps 1 − α of Adam's step, shared all.

    So the effective learning rate is inflated by 1/(1 − α) under shared routing and by
    1 under decoupled routing, within 1 %.
    """
    rng = np.random.default_rng(0)
    u = orthonormal(0, 8, 2)
    s = adamr.make_subspace(jnp.zeros((8, 5)), u)
    gs = jnp.asarray(rng.normal(1.0, 0.3, size=(400, 8, 5)), jnp.float32)

    def steps_along(tx):
        def body(state, g):
            step, state = tx.update(g, state)
            return state, step

        steps = jax.lax.scan(body, tx.init(gs[0]), gs)[1]
        return np.linalg.norm(np.einsum("nr,tno->tro", u, steps)[200:])

    def along(route):
        return steps_along(
            optax.chain(
                route(adamr.project_out(s)),
                adamr.constant_scale(alpha),
                adamr.in_eigenbasis(adamr.faithful_second_moment(b2=0.99), s),
            )
        )

    adam = adamr.in_eigenbasis(optax.scale_by_adam(b2=0.99), s)
    norm = steps_along(adam)
    decoupled = along(adamr.route_first_moment) / (1 - alpha)
    shared = along(adamr.route_both_moments) / (1 - alpha)
    np.testing.assert_allclose(decoupled / norm, 1.0, rtol=0.01)
    np.testing.assert_allclose(shared / norm, 1 / (1 - alpha), rtol=0.01)


def test_shared_routing_in_the_eigenbasis_scales_rounding_up():
    """What `in_eigenbasis` warns of, and that decoupled routing has none of it."""
    rng = np.random.default_rng(0)
    s = adamr.make_subspace(jnp.zeros((32, 8)), orthonormal(0, 32, 4))

    def worst(route):
        tx = optax.chain(
            route(adamr.project_out(s)),
            adamr.in_eigenbasis(adamr.faithful_second_moment(eps=1e-12), s),
        )
        state, leaks = tx.init(jnp.zeros((32, 8))), []
        for _ in range(5):
            g = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
            step, state = tx.update(g, state)
            leaks.append(leak(s, step))
        return max(leaks)

    assert worst(adamr.route_first_moment) < 1e-6
    assert worst(adamr.route_both_moments) > 1e-2


# The alias --------------------------------------------------------------------------


def test_alias_shares_v_where_it_projects_and_nowhere_else():
    tx = adamr.adamr(0.1, adamr.project_out(subspace()))
    nu = optax.tree.get(tx.init(params()), "nu")
    shapes = [x.shape for x in nu]
    assert shapes == [(1, 1, 1, 8), (8,), (1, 8), (), (2, 1, 8)]


def test_alias_is_plain_adam_where_nothing_is_protected():
    s = adamr.empty_subspace(params(), axes=lambda path, shape: None)
    tx, adam, p = adamr.adamr(0.1, adamr.project_out(s)), optax.adam(0.1), params()
    a, b = tx.init(p), adam.init(p)
    for seed in range(3):
        x, a = tx.update(gradients(seed), a, p)
        y, b = adam.update(gradients(seed), b, p)
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_array_equal(u, v)


def test_the_alias_bounds_what_is_chained_to_a_projection():
    """A penalty or replay goes on where g is 0; v from g alone would be 0 there."""
    shift = optax.stateless(lambda g, p: jax.tree.map(lambda x: x + 1.0, g))
    p = {"w": jnp.zeros((4, 3))}
    s = adamr.make_subspace(p, {"w": orthonormal(0, 4, 2)})
    modifier = optax.chain(shift, adamr.project_out(s))
    to_the_letter = optax.chain(
        adamr.route_first_moment(modifier),
        adamr.faithful_second_moment(share=s),
        optax.scale_by_learning_rate(0.1),
    )
    largest = []
    for tx in (adamr.adamr(0.1, modifier), to_the_letter):
        step, _ = tx.update(p, tx.init(p), p)
        largest.append(float(jnp.max(jnp.abs(step["w"]))))
        assert float(adamr.update_leak(step, s).total) < 1e-6
    assert largest[0] < 0.1 * 2 + 1e-6  # √n at the most, all in one coordinate
    assert largest[1] > 1e6


def test_alias_with_an_element_wise_modifier_is_element_wise_and_guarded():
    keep = optax.clip(0.1)
    tx = adamr.adamr(0.1, keep)
    state = tx.init(params())
    assert jax.tree.structure(optax.tree.get(state, "nu")) == jax.tree.structure(
        params()
    )
    shift = optax.stateless(lambda g, p: jax.tree.map(lambda x: x + 1.0, g))
    tx, g = adamr.adamr(0.1, shift), {"w": jnp.zeros(3)}
    step, _ = tx.update(g, tx.init(g), g)
    assert jnp.all(jnp.abs(step["w"]) < 0.11)


@pytest.mark.smoke
def test_alias_weight_decay_stays_out_of_the_protected_space():
    s, p = subspace(), params()
    tx = adamr.adamr(0.1, adamr.project_out(s), weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, p)
    step, _ = tx.update(zero, tx.init(p), p)
    assert leak(s, step) < 1e-6
    np.testing.assert_allclose(
        step["dense"]["bias"], -0.05 * p["dense"]["bias"], rtol=1e-5
    )
    expected = jax.tree.map(lambda x: -0.05 * x, adamr.subspaces.project(s, p))
    np.testing.assert_allclose(step["conv"], expected["conv"], atol=1e-6)
    with pytest.raises(ValueError, match="params"):
        tx.update(zero, tx.init(p))


def test_alias_weight_decay_mask():
    p = params()
    mask = jax.tree.map(lambda x: x.ndim > 1, p)
    tx = adamr.adamr(0.1, optax.identity(), weight_decay=0.5, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, p)
    step, _ = tx.update(zero, tx.init(p), p)
    assert not jnp.any(step["dense"]["bias"]) and jnp.any(step["conv"])


def test_alias_finds_a_subspace_inside_wrappers():
    mask = jax.tree.map(lambda x: x.ndim == 2, params())
    modifier = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(adamr.project_out(subspace()), mask),
    )
    state = adamr.adamr(0.1, modifier).init(params())
    assert optax.tree.get(state, "nu")[2].shape == (1, 8)


def test_bf16_parameters_leak_no_more_than_their_rounding():
    s = adamr.make_subspace(params(), bases(), max_rank=4)
    p = params(jnp.bfloat16)
    tx = adamr.adamr(
        0.1, adamr.project_out(s), mu_dtype=jnp.float32, nu_dtype=jnp.float32
    )
    state = tx.init(p)
    for seed in range(4):
        step, state = tx.update(gradients(seed, p), state, p)
    step = jax.tree.map(lambda x: x.astype(jnp.float32), step)
    assert 1e-6 < leak(s, step) < 2.0**-8
