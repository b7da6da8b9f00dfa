"""OSFT as a whole optimizer: both sides of every kernel, under Adam with decay."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import adamr
from adamr import Axes, weight_subspaces
from tests.contract.cases import gradients, output_side, params, subspace
from tests.contract.compilations import nothing_compiles
from tests.references import osft as reference

RATE = 0.05
AXES = {"b": None, "w": Axes((0,))}


def small(rows=7, columns=5):
    return {
        "b": jnp.ones(3),
        "w": jax.random.normal(jax.random.key(1), (rows, columns)),
    }


def uneven(p, steps, seed=0):
    """Rows and columns of very different scale: where element-wise Adam leaks most."""
    rows, columns = (10.0 ** np.linspace(-1, 1, n) for n in p["w"].shape)
    found = []
    for i in range(steps):
        g = gradients(seed + i, p)
        found.append(g | {"w": g["w"] * np.outer(rows, columns).astype(np.float32)})
    return found


def change(tx, p, gs):
    """The sum of the steps, in float64, and the state."""
    state, update = tx.init(p), jax.jit(tx.update)
    total = jax.tree.map(lambda x: np.zeros(x.shape), p)
    for g in gs:
        step, state = update(g, state, p)
        p = optax.apply_updates(p, step)
        total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, step)
    return total, p, state


def columns_of(p, keep=0.5):
    w = np.asarray(p["w"], np.float64)
    return reference.top_directions(w, int(min(w.shape) * keep))


def share(p, total, keep=0.5):
    return reference.protected_share(total["w"], *columns_of(p, keep))


@pytest.mark.parametrize("share_v", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_osft_leaves_the_protected_directions_alone(decay, share_v):
    """Of every layout, on both sides: dense, convolution, stacked."""
    p, inside = params(), subspace()
    outside = output_side(inside)
    tx = adamr.osft(RATE, inside, outside, weight_decay=decay, share_v=share_v)
    total, *_ = change(tx, p, [gradients(seed) for seed in range(5)])
    total = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), total)
    for side in (inside, outside):
        assert adamr.update_leak(total, side).total < 1e-6
    assert all(jnp.linalg.norm(x) > RATE for x in jax.tree.leaves(total))


@pytest.mark.parametrize("share_v", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_osft_keeps_the_leading_singular_triples(shape, share_v):
    p, sides = small(*shape), weight_subspaces(small(*shape), AXES)
    tx = adamr.osft(1e-3, *sides, weight_decay=0.1, share_v=share_v)
    _, end, _ = change(tx, p, uneven(p, 50))
    u, s, vt = np.linalg.svd(np.asarray(p["w"], np.float64))
    w, k = np.asarray(end["w"], np.float64), min(shape) // 2
    np.testing.assert_allclose(u[:, :k].T @ w, s[:k, None] * vt[:k], atol=1e-5)
    np.testing.assert_allclose(w @ vt[:k].T, u[:, :k] * s[:k], atol=1e-5)
    assert np.linalg.norm(w - np.asarray(p["w"])) > 0.01


@pytest.mark.parametrize("share_v", [True, False])
@pytest.mark.parametrize("form", ["both_sides", "paper"])
def test_osft_equals_its_float64_twin(form, share_v):
    p, options = small(), dict(b1=0.8, b2=0.95)
    u, v = columns_of(p)
    gs = uneven(p, 8)
    twin = reference.trajectory(
        np.asarray(p["w"], np.float64),
        [np.asarray(g["w"], np.float64) for g in gs],
        u, v, rate=RATE, decay=0.3, form=form, share_v=share_v, **options,
    )  # fmt: skip
    sides, options = weight_subspaces(p, AXES), options | dict(share_v=share_v)
    tx = adamr.osft(RATE, *sides, weight_decay=0.3, form=form, **options)
    _, end, _ = change(tx, p, gs)
    np.testing.assert_allclose(end["w"], twin[-1], atol=2e-6)


@pytest.mark.parametrize("form", ["code", "oplora"])
def test_the_code_and_oplora_project_on_both_sides(form):
    p = small()
    sides, gs = weight_subspaces(p, AXES), uneven(p, 3)
    found = change(adamr.osft(RATE, *sides, form=form), p, gs)[0]
    np.testing.assert_array_equal(
        found["w"], change(adamr.osft(RATE, *sides), p, gs)[0]["w"]
    )


def test_osft_of_the_paper_protects_the_block_of_both_sides_alone():
    p = small()
    u, v = columns_of(p)
    tx = adamr.osft(RATE, *weight_subspaces(p, AXES), form="paper", weight_decay=0.1)
    total, *_ = change(tx, p, uneven(p, 10))
    w = total["w"]
    assert np.linalg.norm(u.T @ w @ v) < 1e-6 * np.linalg.norm(w)
    assert np.linalg.norm(u.T @ w) > 0.1 * np.linalg.norm(w)
    assert np.linalg.norm(w @ v) > 0.1 * np.linalg.norm(w)


@pytest.mark.parametrize("form", ["both_sides", "paper"])
def test_bfloat16_gradients_of_osft_leak_no_more_than_their_rounding(form):
    p = small()
    u, v = columns_of(p)
    tx = adamr.osft(RATE, *weight_subspaces(p, AXES), form=form)
    g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(0, p))
    step = np.asarray(tx.update(g, tx.init(p), p)[0]["w"], np.float64)
    assert 0 < np.linalg.norm(u.T @ step @ v) < 2**-8 * np.linalg.norm(step)


# The authors' way can fail --------------------------------------------------------


def hooked(sides, decay):
    """Projected gradients, handed to AdamW."""
    inside, outside = map(adamr.project_out, sides)
    return optax.chain(inside, outside, optax.adamw(1e-3, weight_decay=decay))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_projected_gradients_under_adamw_leak(decay):
    p = small(24, 16)
    sides, gs = weight_subspaces(p, AXES), uneven(p, 30)
    leaked = share(p, change(hooked(sides, decay), p, gs)[0])
    assert 0.4 < leaked < 0.9
    ours = adamr.osft(1e-3, *sides, weight_decay=decay)
    assert share(p, change(ours, p, gs)[0]) < 1e-6


def test_factors_under_adamw_leak_and_their_directions_are_ours():
    p = small(24, 16)
    w = np.asarray(p["w"], np.float64)
    gs = [np.asarray(g["w"], np.float64) for g in uneven(p, 30)]
    end = reference.factors_under_adamw(w, gs, 8, rate=1e-3, decay=0.01)
    free = reference.factors_under_adamw(w, gs, 8, rate=1e-3, decay=0.01, hook=False)
    hooks, none = (
        reference.protected_share(e - w, *columns_of(p)) for e in (end, free)
    )
    assert 0.1 < hooks < none


@pytest.mark.parametrize("share_v", ["inside", "outside"])
def test_v_shared_along_one_side_commutes_with_that_side_alone(share_v):
    """Why each matrix has one v."""
    p = small(8, 6)
    inside, outside = weight_subspaces(p, AXES)
    shared = {"inside": inside, "outside": outside}[share_v]
    tx = optax.chain(
        adamr.route_first_moment(
            optax.chain(adamr.project_out(inside), adamr.project_out(outside))
        ),
        adamr.faithful_second_moment(share=shared),
    )
    total = change(tx, p, uneven(p, 5))[0]["w"]
    u, v = columns_of(p)
    parts = {"inside": u.T @ total, "outside": total @ v}
    size = np.linalg.norm(total)
    for name, part in parts.items():
        leaked = np.linalg.norm(part) / size
        assert leaked < 1e-6 if name == share_v else leaked > 0.05, name


# Closed forms ---------------------------------------------------------------------


def test_osft_that_protects_nothing_is_adam_with_one_v_per_matrix():
    p = small()
    tx = adamr.osft(RATE, *weight_subspaces(p, AXES, keep=0.0), share_v=True)
    state = tx.init(p)
    assert [v.shape for v in optax.tree.get(state, "nu")] == [(3,), (1, 1)]
    g = uneven(p, 1)[0]
    step, _ = tx.update(g, state, p)
    scale = np.sqrt(np.mean(np.square(g["w"])))
    np.testing.assert_allclose(step["w"], -RATE * g["w"] / scale, rtol=1e-5)
    np.testing.assert_allclose(step["b"], -RATE * jnp.sign(g["b"]), rtol=1e-5)


@pytest.mark.parametrize("form", ["both_sides", "paper"])
def test_osft_that_protects_all_does_not_move(form):
    p = small(5, 5)
    sides, options = weight_subspaces(p, AXES, keep=1.0), dict(weight_decay=0.1)
    for share_v, most in ((True, 0.0), (False, 1e-6)):
        tx = adamr.osft(RATE, *sides, form=form, share_v=share_v, **options)
        total, *_ = change(tx, p, uneven(p, 3))
        assert np.max(np.abs(total["w"])) <= most
        assert (total["b"] != 0).all()


def test_v_per_entry_that_protects_nothing_is_adamw():
    p = small()
    sides, gs = weight_subspaces(p, AXES, keep=0.0), uneven(p, 4)
    tx = adamr.osft(RATE, *sides, weight_decay=0.1)
    found, *_ = change(tx, p, gs)
    expected, *_ = change(optax.adamw(RATE, weight_decay=0.1), p, gs)
    for a, b in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_decay_of_osft_shrinks_what_is_free_and_nothing_else():
    p = small()
    tx = adamr.osft(1.0, *weight_subspaces(p, AXES), weight_decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, p)
    step, _ = tx.update(zero, tx.init(p), p)
    u, v = columns_of(p)
    free = reference.project(np.asarray(p["w"], np.float64), u, v)
    np.testing.assert_allclose(step["w"], -0.1 * free, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    keep=st.floats(0.1, 0.9),
    form=st.sampled_from(["both_sides", "paper"]),
)
def test_no_step_of_osft_touches_the_common_block(seed, rows, columns, keep, form):
    p = small(rows, columns)
    tx = adamr.osft(RATE, *weight_subspaces(p, AXES, keep=keep), form=form)
    total, *_ = change(tx, p, uneven(p, 2, seed))
    u, v = columns_of(p, keep)
    assert np.linalg.norm(u.T @ total["w"] @ v) <= 1e-5 * np.linalg.norm(total["w"])


# Boundaries -----------------------------------------------------------------------


@pytest.mark.parametrize("share_v", [True, False])
def test_a_new_decomposition_neither_recompiles_nor_leaks(share_v):
    p = small()
    sides = weight_subspaces(p, AXES, keep=0.2, room=0.8)
    tx = adamr.osft(RATE, *sides, share_v=share_v)
    state, update = tx.init(p), jax.jit(tx.update)
    for task, keep in enumerate((0.2, 0.5, 0.8)):
        sides = weight_subspaces(p, AXES, keep=keep, room=0.8)
        state = adamr.set_subspace(state, sides if task else sides[::-1])
        start, total = p, np.zeros(p["w"].shape)
        for i, g in enumerate(uneven(p, 4, seed=10 * task)):
            if task or i:
                with nothing_compiles():
                    step, state = update(g, state, p)
            else:
                step, state = update(g, state, p)
            total = total + np.asarray(step["w"], np.float64)
            p = jax.tree.map(np.add, p, step)
            p = jax.tree.map(jnp.asarray, p)
        assert share(start, {"w": total}, keep) < 1e-6


@pytest.mark.parametrize("moments", ["project", "reset", "keep"])
def test_moments_at_a_new_decomposition(moments):
    """What the old momentum would still do along the new directions."""
    p = small()
    sides = weight_subspaces(p, AXES, keep=0.2, room=0.8)
    tx = adamr.osft(RATE, *sides, share_v=True)  # else the step itself is projected
    *_, state = change(tx, p, uneven(p, 4))
    sides = weight_subspaces(p, AXES, keep=0.8, room=0.8)
    state = adamr.set_subspace(state, sides, moments=moments)
    step, _ = tx.update(jax.tree.map(jnp.zeros_like, p), state, p)
    if moments == "reset":
        np.testing.assert_array_equal(step["w"], 0.0)
    else:
        leaked = share(p, jax.tree.map(np.asarray, step), 0.8)
        assert (leaked < 1e-5) if moments == "project" else (leaked > 0.1)


def test_osft_in_a_partition_with_a_boundary():
    p = {"head": jnp.ones((4, 2)), "body": small()}
    axes = {"head": None, "body": AXES}
    sides = weight_subspaces(p, axes)
    tx = optax.MultiSteps(
        optax.partition(
            {"ours": adamr.osft(RATE, *sides), "rest": optax.adam(RATE)},
            {"head": "rest", "body": "ours"},
        ),
        every_k_schedule=2,
    )
    state = adamr.set_subspace(tx.init(p), weight_subspaces(p, axes))
    total, *_ = change(tx, p, [gradients(i, p) for i in range(4)])
    assert share(p["body"], total["body"]) < 1e-6 and total["head"].all()
    jax.tree.map(lambda a, b: a.dtype == b.dtype or 1 / 0, state, tx.init(p))


def test_osft_of_functions_that_decompose_in_init():
    p = small()
    made = adamr.osft(RATE, *weight_subspaces(p, AXES))
    inside = lambda p: weight_subspaces(p, AXES)[0]  # noqa: E731
    outside = lambda p: weight_subspaces(p, AXES)[1]  # noqa: E731
    gs = uneven(p, 3)
    for form in ("both_sides", "paper"):
        made = adamr.osft(RATE, *weight_subspaces(p, AXES), form=form)
        tx = adamr.osft(RATE, inside, outside, form=form)
        optax.tree.map_params(tx, lambda x: x, tx.init(p))
        a, b = change(tx, p, gs)[0], change(made, p, gs)[0]
        np.testing.assert_allclose(a["w"], b["w"], atol=1e-6)


def test_errors_of_osft_and_of_its_boundary():
    p = small()
    inside, outside = weight_subspaces(p, AXES)
    with pytest.raises(ValueError, match="form is 'svd', expected one of 'both_sides'"):
        adamr.osft(RATE, inside, outside, form="svd")
    with pytest.raises(TypeError, match="osft: subspace must be a Subspace, got tuple"):
        adamr.osft(RATE, (inside, outside), outside)
    state = adamr.osft(RATE, inside, outside).init(p)
    with pytest.raises(ValueError, match="set_subspace takes several"):
        adamr.get_subspace(state)
    with pytest.raises(ValueError, match="set_subspace takes several"):
        adamr.set_subspace(state, inside)
    with pytest.raises(ValueError, match="subspace has shapes.*weight_subspaces, room"):
        adamr.set_subspace(state, weight_subspaces(p, AXES, keep=0.9))
    with pytest.raises(ValueError, match="subspace has shapes"):
        adamr.set_subspace(state, (inside,))
    with pytest.raises(TypeError, match="subspace must be a Subspace, got dict"):
        adamr.set_subspace(state, (inside, {}))
    with pytest.raises(ValueError, match="was made for 2 parameter leaves"):
        adamr.osft(RATE, inside, outside).init({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="weight_decay needs params"):
        tx = adamr.osft(RATE, inside, outside, weight_decay=0.1)
        tx.update(p, tx.init(p))
    with pytest.raises(ValueError, match="weight_decay needs params"):
        tx = adamr.osft(RATE, inside, outside, weight_decay=0.1, share_v=True)
        tx.update(p, tx.init(p))
