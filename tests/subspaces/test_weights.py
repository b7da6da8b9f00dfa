"""Subspaces of the weights themselves, and the share that a layer keeps."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamr
from adamr import Axes, weight_subspaces
from adamr.subspaces import layer_budget, rank
from adamr.subspaces.make import stored_shapes
from tests.contract.cases import params
from tests.references import osft as reference


def matrix(x, axes):
    """Slices (batch, n, m) of a leaf, in float64."""
    outputs = [d for d in range(x.ndim) if d not in axes.protected + axes.batch]
    x = np.asarray(x, np.float64)
    sizes = [int(np.prod([x.shape[d] for d in g])) for g in (axes.protected, outputs)]
    order = (*axes.batch, *axes.protected, *outputs)
    return x.transpose(order).reshape(-1, *sizes), outputs


LAYOUTS = [
    ((6, 8), Axes((0,))),
    ((8, 6), Axes((0,))),
    ((6, 8), Axes((1,))),  # (out, in)
    ((5, 2, 3), Axes((0,))),  # a query with heads
    ((2, 3, 5), Axes((0, 1))),  # the output of attention
    ((2, 2, 3, 4), Axes((0, 1, 2))),
    ((3, 4, 5), Axes((1,), (0,))),  # scanned layers
    ((3, 4, 2, 5), Axes((3,), (1,))),
    ((1, 7), Axes((0,))),
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_both_sides_hold_the_leading_singular_vectors(shape, axes, jit):
    """W without P W is the tail of its SVD, from either side, in every layout."""
    w = jax.random.normal(jax.random.key(3), shape)
    decompose = lambda w: weight_subspaces(w, axes, keep=0.5)  # noqa: E731
    sides = (jax.jit(decompose) if jit else decompose)(w)
    slices, outputs = matrix(w, axes)
    k = min(slices.shape[1:]) // 2
    for side, of in zip(sides, (axes, Axes(tuple(outputs), axes.batch)), strict=True):
        assert side.bases[0].shape == stored_shapes(shape, of, max(k, 1))[0]
        assert (side.ranks()[0] == k).all()
        rest, _ = matrix(side.project(w), axes)
        for got, kernel in zip(rest, slices, strict=True):
            u, v = reference.top_directions(kernel, k)
            np.testing.assert_allclose(got, kernel - u @ (u.T @ kernel), atol=2e-5)
            np.testing.assert_allclose(got, kernel - kernel @ v @ v.T, atol=2e-5)


@settings(max_examples=20, deadline=None)
@example(seed=0, rows=3, columns=3, keep=1 / 3, true_rank=3, scale=1.0)
@example(seed=0, rows=2, columns=2, keep=0.9999999999999999, true_rank=0, scale=1.0)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    keep=st.floats(0, 1),
    true_rank=st.integers(0, 9),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_bases_are_orthonormal_and_no_wider_than_the_kernel_s_rank(
    seed, rows, columns, keep, true_rank, scale
):
    rng = np.random.default_rng(seed)
    left, right = (
        rng.normal(size=(rows, true_rank)),
        rng.normal(size=(true_rank, columns)),
    )
    w = jnp.asarray(scale * (left @ right), jnp.float32)
    k = int(np.floor(min(rows, columns) * keep))
    for side, axis in zip(
        weight_subspaces(w, Axes((0,)), keep=keep), (1, 0), strict=True
    ):
        u = np.asarray(side.bases[0], np.float64).squeeze(axis)
        used = np.diag((np.arange(max(k, 1)) < min(k, true_rank)).astype(float))
        np.testing.assert_allclose(u.T @ u, used, atol=1e-6)
        np.testing.assert_array_equal(side.weights[0].ravel(), np.diag(used))


def test_steep_spectra_stay_orthonormal_on_the_longer_side():
    """Left vectors of small singular values come from W v / σ, which loses digits."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (40, 8))
    w = jnp.asarray((u * 10.0 ** -np.arange(8)) @ v.T, jnp.float32)
    inside, outside = weight_subspaces(w, Axes((0,)), keep=1.0)
    basis = np.asarray(inside.bases[0], np.float64)[:, 0]
    count = int(rank(inside)[0])
    assert count >= 6
    np.testing.assert_allclose(
        basis.T @ basis, np.diag(np.arange(8) < count), atol=1e-6
    )
    np.testing.assert_array_equal(rank(inside), rank(outside))


def test_shares_per_leaf_per_slice_and_by_a_rule():
    p, axes = params(), jax.tree.map(lambda _: None, params())
    axes = axes | {
        "stack": Axes((1,), (0,)),
        "dense": {"bias": None, "kernel": Axes((0,))},
    }
    keep = {
        "dense": {"bias": None, "kernel": 0.34},
        "conv": None,
        "scale": None,
        "stack": np.array([0.2, 0.8]),
    }
    inside, outside = weight_subspaces(p, axes, keep=keep)
    for side in (inside, outside):
        dense, stack = side.ranks()
        assert dense == 2 and stack.tolist() == [1, 4]
        assert side.bases[4].shape[-1] == 4

    def rule(path, shape):
        return {"dense/kernel": 0.34, "stack": 0.8}.get(path)

    by_rule = weight_subspaces(p, axes, keep=rule)[0]
    assert [int(jnp.max(r)) for r in by_rule.ranks()] == [2, 4]
    left_out = weight_subspaces(p, axes, unprotected=("stack",))[0]
    assert left_out.bases[4] is None


def test_a_share_that_is_rounded_off_a_whole_number():
    kernel = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    assert 100 * 0.29 < 29
    found = adamr.weight_subspaces({"w": kernel}, {"w": adamr.Axes((0,))}, keep=0.29)
    assert [int(np.sum(s.weights[0])) for s in found] == [29, 29]


def test_room_lets_the_share_grow_without_new_shapes():
    p = {"w": jnp.eye(6) + 0.1, "v": jnp.ones(3)}
    axes = {"w": Axes((0,)), "v": Axes((0,))}
    decompose = jax.jit(lambda p, k: weight_subspaces(p, axes, keep=k, room=0.9))
    sides = [decompose(p, k) for k in (0.0, 0.5, 0.9)]
    assert [int(inside.ranks()[0]) for inside, _ in sides] == [0, 3, 5]
    assert {inside.bases[1].shape for inside, _ in sides} == {(6, 1, 5)}
    assert decompose._cache_size() == 1
    assert sides[0][0].bases[0] is None  # a vector has one side
    nothing = sides[0][0]
    np.testing.assert_array_equal(nothing.project(p)["w"], p["w"])


@pytest.mark.parametrize("explicit", [False, True])
def test_kernels_on_a_mesh(explicit):
    """Outside jit, in init under jit, and abstractly, as state_shardings calls it."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), (kind,) * 2)
    w = jax.random.normal(jax.random.key(0), (8, 4, 4))
    axes = {"w": Axes((0,))}  # a query with heads
    alone = adamr.osft(0.1, *weight_subspaces({"w": w}, axes))
    expected = alone.update({"w": w + 1}, alone.init({"w": w}))[0]["w"]
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        p = {"w": jax.device_put(w, where)}
        made = weight_subspaces(p, axes)
        made_in_init = [lambda p, i=i: weight_subspaces(p, axes)[i] for i in (0, 1)]
        for sides in (made, made_in_init):
            tx = adamr.osft(0.1, *sides)
            places = adamr.state_shardings(tx, p)
            state = jax.jit(tx.init, out_shardings=places)(p)
            inside, outside = (
                s
                for s in jax.tree.leaves(
                    state, is_leaf=lambda s: isinstance(s, adamr.Subspace)
                )
                if isinstance(s, adamr.Subspace)
            )
            assert tuple(inside.bases[0].sharding.spec)[:1] == ("fsdp",)
            assert tuple(outside.bases[0].sharding.spec)[:2] == (None, "tensor")
            g = jax.tree.map(lambda x: x + 1, p)
            step, state = jax.jit(tx.update)(g, state, p)
            np.testing.assert_allclose(step["w"], expected, atol=1e-5)
            again = adamr.set_subspace(state, weight_subspaces(p, axes))
            jax.tree.map(lambda a, b: a.sharding == b.sharding or 1 / 0, again, state)


def test_a_kernel_that_is_not_finite():
    w = {"w": jnp.ones((3, 3)).at[1, 1].set(jnp.nan)}
    with pytest.raises(ValueError, match="NaN or infinite entries at w"):
        weight_subspaces(w, adamr.default_axes)
    inside, _ = jax.jit(lambda w: weight_subspaces(w, adamr.default_axes))(w)
    assert inside.ranks()[0] == 0


def test_errors_name_the_argument_and_the_leaf():
    p = {"w": jnp.ones((4, 4)), "s": jnp.ones((2, 4, 4))}
    axes = {"w": Axes((0,)), "s": Axes((1,), (0,))}
    for keep, said in (
        (1.5, r"keep is 1.5 at s, expected a share in \[0, 1\]"),
        (float("nan"), "keep is nan at s"),
        ({"w": 0.5}, "keep must be a tree like params"),
        ({"w": 0.5, "s": np.ones(3)}, r"keep has shape \(3,\) at s.*per slice, \(2,\)"),
        ({"w": np.ones(2), "s": 0.5}, r"keep has shape \(2,\) at w, expected a number"),
    ):
        with pytest.raises(ValueError, match=said):
            weight_subspaces(p, axes, keep=keep)
    with pytest.raises(ValueError, match="expected at most room = 0.25"):
        weight_subspaces(p, axes, keep=0.5, room=0.25)
    with pytest.raises(ValueError, match="room is 2.0 at s"):
        weight_subspaces(p, axes, room=2.0)
    with pytest.raises(ValueError, match="keep is traced at s"):
        jax.jit(lambda k: weight_subspaces(p, axes, keep=k))(0.5)
    with pytest.raises(ValueError, match="unprotected names 'head'"):
        weight_subspaces(p, axes, unprotected=("head",))
    with pytest.raises(ValueError, match="axes must be a tree like params"):
        weight_subspaces(p, {"w": Axes((0,))})
    shapes = jax.eval_shape(lambda: p)
    with pytest.raises(TypeError, match="ShapeDtypeStruct at s"):
        weight_subspaces(shapes, axes)


# The budget ------------------------------------------------------------------------


def test_the_budget_is_the_target_on_average_and_more_where_less_changes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 8))
    y = [x + c * rng.normal(size=x.shape) for c in (0.1, 1.0, 2.0)]
    inputs = {name: x for name in "abc"}
    outputs = dict(zip("abc", y, strict=True))
    shares = layer_budget(inputs, outputs, least=0.1, target=0.5)
    assert shares["a"] > shares["b"] > shares["c"] > 0.1
    assert np.mean(list(shares.values())) == pytest.approx(0.5)
    lengths = [np.linalg.norm(z, axis=-1) for z in (x, y[1])]
    cosines = {
        n: np.mean(np.sum(x * z, -1) / lengths[0] / np.linalg.norm(z, axis=-1))
        for n, z in outputs.items()
    }
    mean = np.mean(list(cosines.values()))
    assert shares["b"] == pytest.approx(0.1 + 0.4 * cosines["b"] / mean)
    jitted = jax.jit(lambda x, y: layer_budget(x, y, least=0.1, target=0.5))
    found = jitted(inputs, outputs)
    assert all(found[n] == pytest.approx(shares[n], abs=1e-5) for n in "abc")


def test_degenerate_layers_have_a_defined_budget():
    x, zero = np.ones((2, 3)), np.zeros((2, 3))
    assert layer_budget([x, x], [-x, zero]) == [0.1, 0.1]
    assert layer_budget([x, x], [x, -x]) == [1.0, 0.1]
    with pytest.raises(ValueError, match=r"outputs has shape \(2, 4\) at 0"):
        layer_budget([x], [np.ones((2, 4))])
    with pytest.raises(ValueError, match="least is 0.9 and target 0.8"):
        layer_budget([x], [x], least=0.9)


@pytest.mark.parametrize("share", [0.29, 0.53, 0.59, 0.07])
def test_a_traced_share_counts_as_the_same_number(share):
    w, axes = jnp.diag(jnp.linspace(1.0, 2.0, 100)), adamr.Axes((0,))

    def count(keep):
        inside, _ = adamr.weight_subspaces(w, axes, keep=keep, room=0.6)
        return rank(inside)[0]

    assert jax.jit(count)(share) == count(share) == round(100 * share)
    assert count(np.float32(share)) == count(jnp.float32(share)) == round(100 * share)


def test_traced_shares_of_other_dtypes():
    w, axes = jnp.diag(jnp.linspace(1.0, 2.0, 100)), adamr.Axes((0,))

    @jax.jit
    def count(keep):
        return rank(adamr.weight_subspaces(w, axes, keep=keep, room=1.0)[0])[0]

    assert count(1) == 100 and count(jnp.bfloat16(0.5)) == 50


def test_a_complex_kernel_is_refused():
    with pytest.raises(TypeError, match="params is complex at "):
        adamr.weight_subspaces(jnp.ones((3, 3), jnp.complex64), adamr.Axes((0,)))
