"""Muon on projected momentum: what it keeps, and that it is Muon otherwise."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from optax import contrib

import adamr
from adamr.subspaces import matrix_axes
from tests.contract.cases import gradients, orthonormal, params, subspace
from tests.references import momentum as reference

SCHULZ = (1.875, -1.25, 0.375)  # converges to the polar factor
CONVERGED = {"ns_coeffs": SCHULZ, "ns_steps": 30}


def kernel(n, out, rank, seed=0):
    """A kernel, the basis of its subspace, and gradients of very uneven scale."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, rank)))[0]
    uneven = 10.0 ** rng.uniform(-2, 2, size=(n, out))
    gs = [rng.normal(size=(n, out)) * uneven for _ in range(4)]
    return {"w": jnp.ones((n, out))}, basis, gs


def protecting(p, basis, **options):
    return adamr.project_out(adamr.make_subspace(p, {"w": basis}, **options))


def run(tx, p, gs, state=None):
    """Every step, and the last state."""
    state, update, steps = (
        tx.init(p) if state is None else state,
        jax.jit(tx.update),
        [],
    )
    for g in gs:
        step, state = update(jax.tree.map(jnp.float32, g), state, p)
        steps.append(step)
    return steps, state


def along(basis, step):
    """‖Uᵀ Δ‖ / ‖Δ‖."""
    return np.linalg.norm(np.asarray(basis).T @ np.asarray(step)) / np.linalg.norm(step)


# The promise --------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_its_float64_twin(nesterov):
    p, basis, gs = kernel(12, 20, 4)
    tx = adamr.muon(0.1, protecting(p, basis), nesterov=nesterov)
    steps, _ = run(tx, p, [{"w": g} for g in gs])
    twin = reference.muon_steps(gs, basis, nesterov=nesterov)
    for step, expected in zip(steps, twin, strict=True):
        np.testing.assert_allclose(step["w"], -0.1 * expected, atol=2e-5)


def test_muon_is_the_polar_factor_of_the_projected_momentum():
    """With coefficients that converge: singular values 1 off U, 0 on it."""
    p, basis, gs = kernel(8, 5, 2)
    tx = adamr.muon(1.0, protecting(p, basis), **CONVERGED)
    steps, _ = run(tx, p, [{"w": g} for g in gs])
    twin = reference.muon_steps(gs, basis, msign=reference.polar)
    for step, expected in zip(steps, twin, strict=True):
        np.testing.assert_allclose(step["w"], -expected, atol=1e-4)
        sigma = np.linalg.svd(np.asarray(step["w"]), compute_uv=False)
        np.testing.assert_allclose(sigma, 1.0, atol=1e-4)


def test_muon_never_moves_the_response_to_a_protected_input():
    """Whether the projection is on the input or on the output side, or stacked."""
    p, s = params(), subspace()
    tx = adamr.muon(0.1, adamr.project_out(s))
    for step in run(tx, p, [gradients(seed) for seed in range(10)])[0]:
        assert adamr.update_leak(step, s).total < 1e-6
    square, basis, gs = kernel(12, 20, 4)
    axes = {"w": adamr.Axes((1,))}
    right = adamr.make_subspace(
        square, {"w": orthonormal(1, 20, 4)}, axes=axes, max_rank=4
    )
    tx = adamr.muon(0.1, adamr.project_out(right), axes={"w": adamr.Axes((0,))})
    for step in run(tx, square, [{"w": g} for g in gs])[0]:
        assert along(orthonormal(1, 20, 4), step["w"].T) < 1e-6


def test_muon_keeps_both_sides_at_once():
    p, basis, gs = kernel(12, 20, 4)
    right = orthonormal(1, 20, 4)
    left = adamr.make_subspace(p, {"w": basis})
    outside = adamr.make_subspace(p, {"w": right}, axes={"w": adamr.Axes((1,))})
    modifier = optax.chain(adamr.project_out(left), adamr.project_out(outside))
    for step in run(adamr.muon(0.1, modifier), p, [{"w": g} for g in gs])[0]:
        assert along(basis, step["w"]) < 1e-6 and along(right, step["w"].T) < 1e-6


def test_the_last_projection_removes_what_msign_made_of_rounding():
    """Without it the iteration magnifies the rounding of the projected gradient."""
    p, basis, gs = kernel(32, 32, 8)
    outside = np.eye(32) - basis @ basis.T
    gs = [{"w": 1e-4 * outside @ g + basis @ basis.T @ g} for g in gs]
    plain = optax.chain(protecting(p, basis), contrib.muon(0.1))
    leaks = [along(basis, x["w"]) for x in run(plain, p, gs)[0]]
    ours = [
        along(basis, x["w"])
        for x in run(adamr.muon(0.1, protecting(p, basis)), p, gs)[0]
    ]
    assert max(leaks) > 1e-4 and max(ours) < 1e-6


SMALL = {"w": jnp.ones((6, 9))}
ONCE = adamr.muon(0.1, adamr.project_out(adamr.empty_subspace(SMALL)))
UPDATE = jax.jit(ONCE.update)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.floats(-6, 6))
def test_muon_does_not_leak_at_any_scale(seed, rank, log_scale):
    _, basis, gs = kernel(6, 9, rank, seed)
    s = adamr.make_subspace(SMALL, {"w": basis})
    state = adamr.set_subspace(ONCE.init(SMALL), s)
    for g in gs:
        step, state = UPDATE({"w": jnp.float32(10**log_scale * g)}, state, SMALL)
        assert np.isfinite(step["w"]).all()
        assert along(basis, step["w"]) < 1e-5


def test_an_attenuation_is_undone_by_msign_and_weights_act_last():
    """U made of singular directions: what msign sees has singular values c and 1."""
    p = {"w": jnp.ones((3, 3))}
    basis, g = np.eye(3)[:, :1], {"w": np.diag([3.0, 2.0, 1.0])}
    weak = optax.stateless(
        lambda g, _: {"w": g["w"].at[0].multiply(0.1)}  # α = .9 along the first input
    )
    for modifier, kept in (
        (weak, 1.0),
        (protecting(p, basis, weights={"w": np.array([0.9])}), 0.1),
    ):
        ((step,), _) = run(adamr.muon(1.0, modifier, **CONVERGED), p, [g])
        np.testing.assert_allclose(step["w"], -np.diag([kept, 1, 1]), atol=1e-5)


def test_directions_of_the_whole_vector_are_kept_by_the_last_projection():
    p = params()
    d = adamr.grow_directions(
        adamr.empty_directions(p, 2), jax.tree.map(lambda x: x[None], gradients(7))
    )
    for step in run(adamr.muon(0.1, adamr.project_out(d)), p, [gradients(1)])[0]:
        assert abs(optax.tree.vdot(step, gradients(7))) < 1e-5


@pytest.mark.parametrize(("basis", "moves"), [(np.eye(4), False), (None, True)])
def test_a_full_basis_and_a_zero_gradient_give_zero(basis, moves):
    p = {"w": jnp.ones((4, 3))}
    tx = adamr.muon(0.1, protecting(p, basis))
    ((step,), state) = run(tx, p, [{"w": np.ones((4, 3))}])
    assert bool(np.any(step["w"])) == moves
    zero = {"w": np.zeros((4, 3))}
    ((step,), _) = run(tx, p, [zero])
    np.testing.assert_array_equal(step["w"], 0.0)


@pytest.mark.parametrize(("low", "limit"), [("gradient", 1e-6), ("both", 1e-2)])
def test_bfloat16(low, limit):
    """Of gradients alone it costs nothing; bf16 parameters round the step."""
    p, s = params(), subspace()
    g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(3))
    if low == "both":
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    tx = adamr.muon(0.1, adamr.project_out(s), mu_dtype=jnp.float32)
    step, state = jax.jit(tx.update)(g, tx.init(p), p)
    assert adamr.update_leak(step, s).total < limit
    assert {x.dtype for x in jax.tree.leaves(state[1].mu)} == {jnp.dtype(jnp.float32)}
    dtypes = [x.dtype for x in jax.tree.leaves(step)]
    assert dtypes == [x.dtype for x in jax.tree.leaves(p)]


# It is Muon otherwise, and the alias --------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"ns_steps": 3}])
def test_without_protection_it_is_optaxs_muon(shape, options):
    p, gs = (
        {"w": jnp.ones(shape)},
        [{"w": gradients(i, jnp.ones(shape))} for i in (1, 2)],
    )
    ours = run(adamr.muon(0.1, optax.identity(), **options), p, gs)[0]
    theirs = run(contrib.muon(0.1, **options), p, gs)[0]
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x["w"], y["w"], atol=1e-5)


def test_kernels_are_reshaped_and_slices_are_on_their_own():
    shapes = {
        "out": (2, 3, 4),
        "query": (4, 2, 3),
        "stack": (2, 5, 4),
        "conv": (2, 2, 3),
    }
    p = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    g = gradients(1, p)
    tx = adamr.muon(1.0, optax.identity())
    ((step,), _) = run(tx, p, [g])

    def alone(x):
        ((step,), _) = run(tx, {"w": x}, [{"w": x}])
        return step["w"]

    def close(x, y):
        np.testing.assert_allclose(x, y, atol=1e-5)

    close(step["out"].reshape(6, 4), alone(g["out"].reshape(6, 4)))
    close(step["query"].reshape(4, 6), alone(g["query"].reshape(4, 6)))
    close(step["conv"].reshape(4, 3), alone(g["conv"].reshape(4, 3)))
    for i in range(2):
        close(step["stack"][i], alone(g["stack"][i]))


def test_leaves_that_are_no_matrices_get_the_alias():
    p = {"bias": jnp.ones(4), "embed": jnp.ones((6, 4)), "w": jnp.ones((4, 4))}
    basis = {"bias": None, "embed": orthonormal(0, 6, 2), "w": None}
    modifier = adamr.project_out(adamr.make_subspace(p, basis))
    half = adamr.make_subspace(p, basis)
    half = half._replace(weights=jax.tree.map(lambda w: w / 2, half.weights))
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    gs = [gradients(seed, p) for seed in range(3)]
    for each in (adamr.project_out(half), modifier):
        tx = adamr.muon(0.5, each, adam_learning_rate=0.1, **options)
        ours, state = run(tx, p, gs)
        alias = run(adamr.adamr(0.1, each, **options), p, gs)[0]
        for x, y in zip(ours, alias, strict=True):
            for name in ("bias", "embed"):
                np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-7)
            assert not np.allclose(x["w"], y["w"], atol=1e-2)
    assert adamr.update_leak(ours[-1], adamr.get_subspace(state)).total < 1e-6
    assert [v.shape for v in state[1].nu] == [(4,), (1, 4)]


def test_a_matrix_is_what_the_subspace_says():
    """A scanned kernel with heads: the guess would take all layers for one matrix."""
    p = {"query": jnp.ones((3, 4, 2, 2))}
    axes = {"query": adamr.Axes((1,), (0,))}
    g = gradients(3, p)
    g = {"query": g["query"].at[2].multiply(100.0)}
    modifier = adamr.project_out(adamr.empty_subspace(p, axes=axes))
    read, given = (
        run(adamr.muon(1.0, modifier, axes=how), p, [g])[0][0] for how in (None, axes)
    )
    np.testing.assert_array_equal(read["query"], given["query"])
    norms = np.linalg.norm(read["query"].reshape(3, -1), axis=1)
    assert norms.min() > 0.8 * norms.max()


@pytest.mark.parametrize("hidden", ["a", "c"])
def test_axes_of_leaves_that_labels_hide(hidden):
    part = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
    p, shown = {"a": part, "c": part}, "c" if hidden == "a" else "a"
    of_part = {"b": None, "w": adamr.Axes((0,))}
    axes = {"a": of_part, "c": of_part}
    tx = adamr.muon(0.1, optax.identity(), axes=axes)
    labels = {shown: "muon", hidden: "frozen"}
    both = optax.partition({"muon": tx, "frozen": optax.set_to_zero()}, labels)
    g = gradients(4, p)
    ((found,), _), ((alone,), _) = run(both, p, [g]), run(tx, p, [g])
    for name in part:
        np.testing.assert_allclose(found[shown][name], alone[shown][name], atol=1e-6)
    assert not any(jnp.any(x) for x in found[hidden].values())


def test_axes_and_a_rate_of_their_own_under_map_params():
    p = {"a": jnp.ones((4, 3)), "b": jnp.ones(3)}
    axes = {"a": adamr.Axes((0,)), "b": None}
    tx = adamr.muon(0.1, optax.identity(), axes=axes, adam_learning_rate=0.01)
    state = tx.init(p)
    zeros = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert jax.tree.structure(zeros) == jax.tree.structure(state)


def test_axes_say_what_is_a_matrix():
    p = {"a": jnp.ones((4, 3)), "b": {"w": jnp.ones((4, 3))}}
    g = gradients(2, p)
    for axes in (
        {"a": adamr.Axes((0,)), "b": {"w": None}},
        lambda path, shape: adamr.Axes((0,)) if path == "a" else None,
    ):
        tx = adamr.muon(0.1, optax.identity(), axes=axes)
        ((step,), _) = run(tx, p, [g])
        np.testing.assert_allclose(abs(step["b"]["w"]), 0.1, rtol=1e-5)  # Adam's sign
        assert np.linalg.norm(step["a"], 2) < 0.13
    assert matrix_axes("token_embedder/kernel", (8, 4)) is None


def test_weight_decay_is_projected_and_masked():
    p = {"bias": jnp.ones(4), "w": jnp.ones((4, 4))}
    basis = orthonormal(0, 4, 2)
    s = adamr.make_subspace(p, {"bias": None, "w": basis})
    g = jax.tree.map(jnp.zeros_like, p)
    tx = adamr.muon(
        0.1, adamr.project_out(s), weight_decay=0.5, mask={"bias": False, "w": True}
    )
    ((step,), _) = run(tx, p, [g])
    np.testing.assert_array_equal(step["bias"], 0.0)
    expected = -0.05 * (np.eye(4) - basis @ basis.T) @ np.ones((4, 4))
    np.testing.assert_allclose(step["w"], expected, atol=1e-6)


# Boundaries -------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["project", "reset", "keep"])
def test_a_boundary_projects_the_momentum(moments):
    p, basis, gs = kernel(6, 8, 3)
    tx = adamr.muon(0.1, adamr.project_out(adamr.empty_subspace(p, max_rank=3)))
    _, before = run(tx, p, [{"w": g} for g in gs])
    new = adamr.make_subspace(p, {"w": basis}, max_rank=3)
    state = adamr.set_subspace(before, new, moments=moments)
    (before,), (after,) = (
        optax.tree.get_all_with_path(s, "mu") for s in (before, state)
    )
    old, m = before[1]["w"], after[1]["w"]
    expected = {
        "project": old - basis @ (basis.T @ old), "reset": 0 * old, "keep": old
    }[moments]  # fmt: skip
    np.testing.assert_allclose(m, expected, atol=1e-4)
    ((step,), _) = run(tx, p, [{"w": gs[0]}], state)
    assert along(basis, step["w"]) < 1e-6


def test_protect_inputs_ends_a_task():
    p, x = {"w": jnp.ones((4, 3))}, {"w": jnp.array([[0.0, 2.0, 0.0, 0.0]])}
    tx = adamr.muon(0.1, adamr.project_out(adamr.empty_subspace))
    state = adamr.protect_inputs(tx.init(p), x)
    ((step,), _) = run(tx, p, [gradients(1, p)], state)
    np.testing.assert_allclose(step["w"][1], 0.0, atol=1e-7)
    assert np.abs(step["w"][0]).max() > 1e-2


def test_reset_moments_keeps_the_coefficients_of_optaxs_muon():
    """They are in its state; zeros would stop it for good."""
    p = {"w": jnp.ones((4, 3))}
    tx = contrib.muon(0.1)
    _, state = run(tx, p, [gradients(1, p)])
    steps = [
        run(tx, p, [gradients(2, p)], s)[0][0]["w"]
        for s in (tx.init(p), adamr.reset_moments(state))
    ]
    np.testing.assert_array_equal(*steps)
    assert np.any(steps[0])


# Bad input --------------------------------------------------------------------------


def test_bad_input_is_named():
    p, identity = {"w": jnp.ones((2, 3, 4))}, optax.identity()
    with pytest.raises(TypeError, match="muon: modifier must be an optax"):
        adamr.muon(0.1, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="muon: weight_decay must be a number"):
        adamr.muon(0.1, identity, weight_decay=lambda t: 0.1)  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"ns_coeffs has shape \(2,\), expected \(3,\)"
    ):
        adamr.muon(0.1, identity, ns_coeffs=(1.0, 2.0))
    with pytest.raises(ValueError, match="axes must be a tree like params"):
        adamr.muon(0.1, identity, axes={}).init(p)
    s = adamr.make_subspace(p, {"w": np.eye(6)[:, :2]}, axes={"w": adamr.Axes((0, 1))})
    crossing = adamr.muon(0.1, adamr.project_out(s), axes={"w": adamr.Axes((0,), (2,))})
    with pytest.raises(
        ValueError, match=r"at w, but a subspace is projected along axes"
    ):
        crossing.init(p)
    with pytest.raises(ValueError, match="weight_decay needs params"):
        tx = adamr.muon(0.1, identity, weight_decay=0.1)
        tx.update(p, tx.init(p))
