"""The arithmetic of a step is that of the parameters: bf16 gradients, x64, complex."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from tests.contract.cases import CASES, COMPOSED, Case, gradients, params, subspace
from tests.contract.test_conformance import rows

each_link = rows(nightly=COMPOSED)

# optax's Adam comes first here, and rounds (1 − b1) g in the gradient's dtype.
OPTAX_FIRST = ("protect_update", "adam_nscl", "adam_nscl_as_in_code") + (
    "normalize_and_project",
)


@each_link
def test_bfloat16_gradients_of_float32_parameters_step_in_float32(case: Case) -> None:
    """As optax does: the step is that of the same gradient in float32."""
    tx, p = case.build(subspace())(), params()
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(5))
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), low)
    update = jax.jit(tx.update)
    step, _ = update(low, tx.init(p), p, **case.extra_args(low))
    expected, _ = update(wide, tx.init(p), p, **case.extra_args(low))
    for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        atol = 1e-2 if case.name in OPTAX_FIRST else 1e-6
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def test_gpm_does_not_leak_under_bfloat16_gradients() -> None:
    p, s = params(), subspace()
    tx = adamr.gpm(0.1, s)
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(5))
    for with_params in ((p,), ()):
        step, _ = jax.jit(tx.update)(low, tx.init(p), *with_params)
        leak = adamr.update_leak(step, s).total
        assert leak < (1e-6 if with_params else 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@each_link
def test_x64_under_jit_and_scan(case: Case, dtype: jnp.dtype) -> None:
    with jax.enable_x64(True):
        p = params(dtype)
        tx = case.build(subspace())()
        gs = jax.tree.map(lambda *x: jnp.stack(x), gradients(1, p), gradients(2, p))

        def body(carry, g):
            p, state = carry
            step, state = tx.update(g, state, p, **case.extra_args(g))
            return (optax.apply_updates(p, step), state), None

        (moved, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, gs))((p, tx.init(p)))
        for x in jax.tree.leaves(moved):
            assert x.dtype == dtype
            assert np.isfinite(x).all()
        pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(p), strict=True)
        assert not all(np.array_equal(x, old) for x, old in pairs)


@each_link
def test_a_complex_leaf_is_named(case: Case) -> None:
    p = params() | {"scale": jnp.array(3 + 4j)}
    tx = case.build(subspace())()
    with pytest.raises(TypeError, match="'scale' is complex64"):
        tx.update(p, tx.init(p), p, **case.extra_args(p))


def test_every_row_is_met() -> None:
    assert {case.name for case in CASES} >= COMPOSED


@each_link
def test_a_leaf_that_is_no_array_is_named(case: Case) -> None:
    """An Equinox module holds its activation function among the leaves."""
    p = params() | {"scale": jax.nn.relu}
    tx = case.build(subspace())()
    try:
        tx.init(p)
    except TypeError as error:
        assert str(error)
        if case.holds_subspace and case.name not in OPTAX_FIRST:
            assert "the leaf 'scale' is a custom_jvp, expected an array" in str(error)


def test_what_needs_arrays_says_so() -> None:
    p = {"w": jnp.ones((3, 2)), "act": jax.nn.relu}
    calls = (
        lambda: adamr.empty_directions(p, 2),
        lambda: adamr.ewc(0.1, 1.0).init(p),
        lambda: adamr.adamr(0.1, optax.identity()).init(p),
        lambda: adamr.fisher_information(lambda p, x: x @ p["w"], p, jnp.ones((2, 3))),
    )
    for call in calls:
        with pytest.raises(TypeError, match="leaf 'act' is a custom_jvp.*eqx.filter"):
            call()
    adamr.empty_directions({"w": jnp.ones(3), "number": 1.0}, 2)
    adamr.ewc(0.1, 1.0).init({"w": jnp.ones(3), "number": 1.0})


def test_projecting_and_growing_refuse_complex_numbers() -> None:
    p = {"w": jnp.ones((3, 2), jnp.complex64)}
    s = adamr.empty_subspace({"w": jnp.ones((3, 2))})
    for held in (s, adamr.empty_directions({"w": jnp.ones((3, 2))}, 1)):
        with pytest.raises(TypeError, match="'w' is complex64"):
            adamr.subspaces.project(held, p)
    with pytest.raises(TypeError, match="samples is complex64 at w"):
        adamr.grow_subspace(s, {"w": jnp.ones((4, 3), jnp.complex64)})
