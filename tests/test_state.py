"""Task boundaries: subspaces and moments inside any wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from tests.contract.cases import bases, gradients, params, subspace


def trained(tx, steps=5):
    p = params()
    state, update = tx.init(p), jax.jit(tx.update)
    for seed in range(steps):
        _, state = update(gradients(seed), state, p)
    return state, update


def boundary_leak(moments):
    """Leak of the first step after the protected space has grown."""
    p = params()
    s = adamr.make_subspace(p, jax.tree.map(lambda x: x[..., :1], bases()), max_rank=4)
    state, update = trained(adamr.adamr(0.1, adamr.project_out(s)))
    grown = adamr.make_subspace(p, bases(), max_rank=4)
    state = adamr.set_subspace(state, grown, moments=moments)
    step, _ = update(gradients(9), state, p)
    leaked = adamr.subspaces.subspace.coordinates(
        grown.bases[2], grown.weights[2], step["dense"]["kernel"]
    )
    return jnp.linalg.norm(leaked) / jnp.linalg.norm(step["dense"]["kernel"])


def test_a_stale_first_moment_leaks_unless_projected_or_reset():
    assert boundary_leak("keep") > 1e-2
    assert boundary_leak("project") < 1e-6
    assert boundary_leak("reset") < 1e-6


@pytest.mark.smoke
def test_projecting_keeps_v_and_the_count_resetting_does_not():
    state, _ = trained(adamr.adamr(0.1, adamr.project_out(subspace())))
    s = subspace(seed=7)
    projected = adamr.set_subspace(state, s)
    for name in ("nu", "count"):
        a, b = (optax.tree.get(x, name) for x in (state, projected))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    reset = adamr.set_subspace(state, s, moments="reset")
    assert optax.tree.get(reset, "count") == 0
    assert not any(np.any(x) for x in jax.tree.leaves(optax.tree.get(reset, "nu")))


def test_every_copy_is_set_and_none_shares_a_buffer():
    s, p = subspace(), params()
    state = adamr.set_subspace(adamr.two_sided(s).init(p), subspace(seed=3))
    found = adamr.state.find_nodes(state, adamr.Subspace)
    assert len(found) == 2
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((found, s))]
    assert len(set(pointers)) == len(pointers)
    copied = adamr.get_subspace(state)
    assert copied.bases[0].unsafe_buffer_pointer() not in pointers


def test_adam_nscl_moments_stay_plain_adam_across_a_boundary():
    """T8: raw moments under update projection equal Adam's bit for bit."""
    p = params()
    tx = optax.chain(optax.scale_by_adam(), adamr.protect_update(subspace()))
    ours, update = trained(tx)
    ours = adamr.set_subspace(ours, subspace(seed=5))
    theirs, adam = trained(optax.scale_by_adam())
    _, ours = update(gradients(8), ours, p)
    _, theirs = adam(gradients(8), theirs, p)
    jax.tree.map(np.testing.assert_array_equal, optax.tree.get(ours, "mu"), theirs.mu)


def test_t8_null_space_projector_of_a_diagonal_covariance():
    """X̄ = diag(4, 1, 0, 0): u = (1, 1, 1, 1) -> (0, 0, 1, 1)."""
    p = jnp.zeros((4, 1))
    x = np.diag([2.0, 1.0, 0.0, 0.0]).astype(np.float32)
    s = adamr.grow_subspace(adamr.empty_subspace(p), x, threshold=1.0)
    tx = adamr.protect_update(s)
    step, _ = tx.update(jnp.ones((4, 1)), tx.init(p))
    np.testing.assert_allclose(step[:, 0], [0, 0, 1, 1], atol=1e-6)


def test_moments_in_an_eigenbasis_start_anew():
    s = subspace()
    tx = optax.chain(
        adamr.route_first_moment(adamr.project_out(s)),
        adamr.in_eigenbasis(adamr.faithful_second_moment(), s),
    )
    state, _ = trained(tx)
    state = adamr.set_subspace(state, subspace(seed=3))
    assert optax.tree.get(state, "count") == 0


def test_set_subspace_works_inside_jit():
    tx, p = adamr.adamr(0.1, adamr.project_out(subspace())), params()
    state = tx.init(p)
    new = subspace(seed=3)
    got = adamr.get_subspace(jax.jit(adamr.set_subspace)(state, new))
    jax.tree.map(np.testing.assert_array_equal, got, new)


def test_placement_is_kept():
    mesh = jax.make_mesh((8,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(adamr.project_out(subspace()).init(params()), place)
    state = adamr.set_subspace(state, subspace(seed=3))
    assert all(x.sharding == place for x in jax.tree.leaves(state))


def test_reset_overlap_and_diagnostics_by_name():
    tx = adamr.adamr(
        0.1, adamr.project_out(subspace()), strength=adamr.overlap_adaptive_scale(0.5)
    )
    state, _ = trained(tx)
    seen = jax.jit(adamr.state.read_diagnostics)(state)
    assert set(seen) == {"overlap", "strength", "rank", "count"}
    np.testing.assert_allclose(seen["strength"], 0.5 * (1 - seen["overlap"]), rtol=1e-6)
    assert [x.tolist() for x in seen["rank"]] == [3, 2, [2, 2]]
    assert seen["count"] == 5
    assert adamr.state.read_diagnostics(adamr.reset_overlap(state))["overlap"] == 0.0
    assert adamr.state.read_diagnostics(optax.sgd(0.1).init(params())) == {}


def test_errors():
    p = params()
    with pytest.raises(ValueError, match=r"opt_state holds no Subspace.*\(gpm, gpm_si"):
        adamr.get_subspace(optax.adam(0.1).init(p))
    state = adamr.project_out(subspace()).init(p)
    with pytest.raises(ValueError, match="keep max_rank and axes"):
        adamr.set_subspace(state, subspace(max_rank=3))
    with pytest.raises(ValueError, match="moments is 'drop'"):
        adamr.set_subspace(state, subspace(), moments="drop")
    with pytest.raises(TypeError, match="must be a Subspace, got dict"):
        adamr.set_subspace(state, {})
    with pytest.raises(TypeError, match="must be a Subspace, got dict"):
        adamr.project_out({})
    two = (state, adamr.project_out(subspace(max_rank=3)).init(p))
    with pytest.raises(ValueError, match="subspaces of different shapes"):
        adamr.get_subspace(two)


def layer_inputs(seed=4):
    rng = np.random.default_rng(seed)

    def rows(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "dense": {"bias": None, "kernel": rows(2, 6)},
        "conv": rows(3, 12),
        "scale": None,
        "stack": rows(2, 2, 5),
    }


def test_protect_inputs_is_get_grow_and_set():
    state, update = trained(adamr.adamr(0.1, adamr.project_out(subspace())))
    grown = adamr.grow_subspace(
        adamr.get_subspace(state), layer_inputs(), threshold=0.8
    )
    for moments in ("project", "reset", "keep"):
        by_hand = adamr.set_subspace(state, grown, moments=moments)
        at_once = adamr.protect_inputs(
            state, layer_inputs(), threshold=0.8, moments=moments
        )
        jax.tree.map(np.testing.assert_array_equal, at_once, by_hand)
    assert sum(map(jnp.sum, adamr.get_subspace(at_once).ranks())) > sum(
        map(jnp.sum, adamr.get_subspace(state).ranks())
    )


def test_after_protect_inputs_the_response_to_them_stays():
    p, inputs = params(), layer_inputs()
    empty = adamr.empty_subspace(p)
    tx = adamr.adamr(0.1, adamr.project_out(empty))
    state, update = trained(tx)
    state = adamr.protect_inputs(state, inputs, threshold=1.0)
    step, _ = update(gradients(9), state, p)
    moved = inputs["dense"]["kernel"] @ step["dense"]["kernel"]
    assert (
        jnp.max(jnp.abs(moved)) < 1e-6 < 1e-2 < jnp.max(jnp.abs(step["dense"]["bias"]))
    )


def test_protect_inputs_refuses_directions():
    d = adamr.empty_directions(params(), 2)
    state = adamr.project_out(d).init(params())
    with pytest.raises(TypeError, match="grow_directions"):
        adamr.protect_inputs(state, layer_inputs())


def test_subspace_and_directions_answer_the_same_calls():
    p, g = params(), gradients(0)
    for held in (subspace(), adamr.empty_directions(p, 2)):
        jax.tree.map(
            np.testing.assert_array_equal,
            adamr.subspaces.project(held, g),
            held.project(g),
        )
        held.check(p, "held")
        with pytest.raises(ValueError, match="held was made for 5 parameter leaves"):
            held.check({"w": jnp.ones(2)}, "held")
        assert held.restrict(p) is held
        copies = jax.tree.leaves(held.beside(p))
        for old, new in zip(jax.tree.leaves(held), copies, strict=True):
            np.testing.assert_array_equal(old, new)
            assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()
        assert all(r.dtype == jnp.int32 for r in held.ranks())
