"""MoFO: AdamW's state, steps where the momentum is largest."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamr
from adamr.recipes.mofo import among_largest
from tests.contract.cases import gradients
from tests.references import momentum as reference

largest = jax.jit(among_largest, static_argnums=(1, 2))


def run(tx, p, gs):
    state, update, steps = tx.init(p), jax.jit(tx.update), []
    for g in gs:
        step, state = update(g, state, p)
        steps.append(step)
    return steps


@pytest.mark.smoke
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_mofo_equals_its_float64_twin(share):
    p = {"w": jnp.ones((8, 10))}
    gs = [gradients(seed, p) for seed in range(5)]
    steps = run(adamr.mofo(0.1, share), p, gs)
    twin = reference.mofo_steps([np.float64(g["w"]) for g in gs], share)
    for step, expected in zip(steps, twin, strict=True):
        np.testing.assert_allclose(step["w"], -0.1 * expected, rtol=1e-4, atol=1e-6)
        assert np.count_nonzero(step["w"]) == round(share * 80)


def test_a_share_of_one_is_adamw():
    p = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
    gs = [gradients(seed, p) for seed in range(3)]
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    ours = run(adamr.mofo(0.1, 1.0, **options), p, gs)
    theirs = run(optax.adamw(0.1, **options), p, gs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_biases_are_not_filtered_and_decay_reaches_every_entry():
    p = {"bias": jnp.ones(10), "norm": {"scale": jnp.ones(10)}, "w": jnp.ones((5, 4))}
    g = gradients(1, p)
    (step,) = run(adamr.mofo(0.1, weight_decay=0.5), p, [g])
    for x in (step["bias"], step["norm"]["scale"]):
        np.testing.assert_allclose(abs(x + 0.05), 0.1, rtol=1e-4)
    decayed = np.isclose(step["w"], -0.05)
    assert decayed.sum() == 18
    np.testing.assert_allclose(abs(step["w"][~decayed] + 0.05), 0.1, rtol=1e-4)
    (step,) = run(adamr.mofo(0.1), p, [g])
    assert np.count_nonzero(step["w"]) == 2


def test_stacked_kernels_are_filtered_by_slice():
    """The second layer's gradients are far smaller; it moves as much as the first."""
    p = {"w": jnp.ones((2, 5, 4))}
    g = {"w": gradients(1, p)["w"] * jnp.array([1.0, 1e-3])[:, None, None]}
    (step,) = run(adamr.mofo(0.1, 0.2), p, [g])
    assert [np.count_nonzero(x) for x in step["w"]] == [4, 4]
    whole = adamr.mofo(0.1, 0.2, axes={"w": adamr.Axes((1,))})
    (step,) = run(whole, p, [g])
    assert [np.count_nonzero(x) for x in step["w"]] == [8, 0]
    (step,) = run(adamr.mofo(0.1, 0.2, axes={"w": None}), p, [g])
    assert np.count_nonzero(step["w"]) == 40


@pytest.mark.parametrize(
    ("x", "share", "kept"),
    [
        ([3.0, 1.0, 2.0, 0.5], 0.5, [1, 0, 1, 0]),
        ([1.0, -1.0, 1.0, 0.5], 0.25, [1, 1, 1, 0]),  # ties with the last move, too
        ([1.0, 2.0, 3.0, 4.0], 0.01, [0, 0, 0, 1]),  # one at least
        ([1.0, 2.0, 3.0, 4.0], 1.0, [1, 1, 1, 1]),
        ([0.0, -0.0, 0.0, 1.0], 0.5, [1, 1, 1, 1]),
        ([np.inf, 1.0, 2.0, -np.inf], 0.5, [1, 0, 0, 1]),
        ([np.nan, 1.0, 2.0, 3.0], 0.5, [1, 0, 0, 1]),
        ([1e-45, 1e-40, 3e38, 0.0], 0.5, [0, 1, 1, 0]),
    ],
)
def test_the_largest_entries(x, share, kept):
    found = largest(jnp.float32(np.array(x)), share)
    np.testing.assert_array_equal(found, np.array(kept, bool))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31 - 1), st.sampled_from([0.05, 0.1, 0.3, 0.9]),
    st.integers(0, 12), st.floats(-30, 30),
)  # fmt: skip
def test_the_largest_entries_are_those_of_a_sort(seed, share, zeros, log_scale):
    x = np.random.default_rng(seed).normal(size=(6, 10)) * 10**log_scale
    x[:, :zeros] = np.round(x[:, :zeros], 0)  # ties
    x = x.astype(np.float32)
    np.testing.assert_array_equal(largest(x, share), reference.among_largest(x, share))
    by_row = np.stack([reference.among_largest(row, share) for row in x])
    np.testing.assert_array_equal(largest(x, share, (0,)), by_row)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_and_a_traced_share(dtype):
    x = gradients(3, jnp.ones((6, 10))).astype(dtype)
    expected = reference.among_largest(np.float32(x), 0.3)
    np.testing.assert_array_equal(largest(x, 0.3), expected)
    np.testing.assert_array_equal(jax.jit(among_largest)(x, 0.3), expected)


def test_float64_is_compared_in_float64():
    with jax.enable_x64(True):
        x = 1 + jnp.arange(4) * 1e-12
        np.testing.assert_array_equal(among_largest(x, 0.25), [0, 0, 0, 1])


def test_a_sharded_leaf_is_not_gathered():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.device_put(gradients(4, jnp.ones((16, 10))), where)
    compiled = jax.jit(lambda x: among_largest(x, 0.1)).lower(x).compile()
    np.testing.assert_array_equal(
        compiled(x), reference.among_largest(np.asarray(x), 0.1)
    )
    assert "all-gather" not in compiled.as_text()


def test_bad_input_is_named():
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(
            ValueError, match=rf"share must lie in \(0, 1\], got {share}"
        ):
            adamr.mofo(0.1, share)
    p = {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="axes must be a tree like params"):
        adamr.mofo(0.1, axes={}).init(p)


def test_a_traced_share_in_half_precision_does_not_overflow():
    x = jnp.arange(700_000.0)
    share = jnp.float16(0.25)
    kept = jax.jit(among_largest)(x, share)
    assert jnp.sum(kept) == 175_000
