"""Every method meets every boundary: under prefix labels, and in an nnx.Optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamr
from tests.contract import boundaries
from tests.contract.cases import COMPOSED, Case, gradients, params, subspace
from tests.contract.test_conformance import rows

each_link = rows(nightly=COMPOSED)


@each_link
def test_prefix_labels_equal_labels_per_leaf(case: Case) -> None:
    """optax puts one MaskedNode over a subtree that a prefix hides."""
    tx, p, g = case.build(subspace())(), params(), gradients(5)
    prefix = {"dense": "other", "conv": "ours", "scale": "ours", "stack": "ours"}
    per_leaf = {**prefix, "dense": {"bias": "other", "kernel": "other"}}
    wrappers = [
        optax.partition({"ours": tx, "other": optax.set_to_zero()}, labels)
        for labels in (prefix, per_leaf)
    ]
    extra_args = case.extra_args(g)
    updates = [jax.jit(wrapper.update) for wrapper in wrappers]
    ours, theirs = [w.init(p) for w in wrappers]
    (a, ours), (b, theirs) = [
        u(g, s, p, **extra_args) for u, s in zip(updates, (ours, theirs), strict=True)
    ]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for name, boundary in boundaries.that_apply(ours):
        (a, _), (b, _) = [
            u(g, boundary(s, p), p, **extra_args)
            for u, s in zip(updates, (ours, theirs), strict=True)
        ]
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


class Tiny(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(6, 8, rngs=nnx.Rngs(0))


@each_link
def test_boundaries_of_an_nnx_optimizer(case: Case) -> None:
    """A boundary keeps the Variables, and a finite step follows."""
    model = Tiny()
    values = nnx.state(model, nnx.Param)
    tx = case.build(adamr.empty_subspace(values, max_rank=2))()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, values)

    @nnx.jit
    def update(optimizer: Any, model: Any, g: Any) -> None:
        optimizer.update(model, g, **case.extra_args(g))

    update(optimizer, model, g)
    before = optimizer.opt_state
    for name, boundary in boundaries.that_apply(before):
        now = nnx.state(model, nnx.Param)
        after = boundary(before, now)
        assert jax.tree.structure(after) == jax.tree.structure(before), name
        optimizer.opt_state = after
        update(optimizer, model, g)
        for x in jax.tree.leaves(nnx.state(model, nnx.Param)):
            assert np.isfinite(x).all(), name


def test_several_holes_that_could_hide_any_leaf_are_refused() -> None:
    p = {name: jnp.ones((3, 2)) for name in "abc"}
    tree = {"x": {"u": p["a"], "v": p["a"]}, "y": p["b"], "z": {"u": p["c"]}}
    s = adamr.empty_subspace(tree)
    hidden = {"x": optax.MaskedNode(), "y": p["b"], "z": {"u": p["c"]}}
    assert s.at(hidden).bases[1:] == s.bases[2:]
    with pytest.raises(ValueError, match="give every leaf its own entry"):
        s.at({"x": optax.MaskedNode(), "y": p["b"], "z": optax.MaskedNode()})
    with pytest.raises(ValueError, match="was made for 4 parameter leaves"):
        s.at({"y": p["b"]})


def test_a_partition_consolidates_under_prefix_labels() -> None:
    p = {"enc": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    p["head"]["b"] = jnp.ones(1)
    labels = {"enc": "a", "head": "b"}
    tx = optax.partition({"a": adamr.ewc(0.1, 1.0), "b": optax.set_to_zero()}, labels)
    state = tx.init(p)
    state = adamr.consolidate(state, p, jax.tree.map(jnp.ones_like, p))
    anchor = adamr.get_anchor(state)
    np.testing.assert_array_equal(anchor.importance["enc"]["w"], 1.0)
    moved = jax.tree.map(lambda x: x + 1.0, p)
    step: Any = tx.update(jax.tree.map(jnp.zeros_like, p), state, moved)[0]
    assert (step["enc"]["w"] < 0).all() and not step["head"]["w"].any()


@each_link
def test_a_subspace_may_come_into_being_in_init(case: Case) -> None:
    """A function of the parameters, for trainers that build optimizers first."""
    if not case.holds_subspace and "directions" not in case.name:
        pytest.skip("protects nothing")
    seen = []

    def make(p: Any) -> adamr.Subspace:
        seen.append(len(jax.tree.leaves(p)))
        return subspace()

    p, g = params(), gradients(5)
    try:
        tx = case.build(make)()  # pyright: ignore[reportArgumentType]
    except AttributeError:
        pytest.skip("the row reads the subspace itself")
    assert not seen
    expected = case.build(subspace())()
    extra_args = case.extra_args(g)
    a, b = tx.init(p), expected.init(p)
    assert set(seen) == {5}
    assert jax.tree.structure(a) == jax.tree.structure(b)
    step, _ = jax.jit(tx.update)(g, a, p, **extra_args)
    wanted, _ = jax.jit(expected.update)(g, b, p, **extra_args)
    for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    optax.tree.map_params(tx, lambda x: x, a)


def test_what_a_function_returns_is_checked() -> None:
    p = params()
    with pytest.raises(
        TypeError, match="the function must return a Subspace, got dict"
    ):
        adamr.gpm(0.1, lambda p: {}).init(p)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"project_out\(subspace\) was made for 5"):
        adamr.gpm(0.1, lambda p: subspace()).init({"w": jnp.ones((3, 2))})
    with pytest.raises(TypeError, match="got int: make one with.*a function"):
        adamr.gpm_si(0.1, 3)  # pyright: ignore[reportArgumentType]


@each_link
def test_an_empty_part_of_a_partition(case: Case) -> None:
    """A label that no leaf has, as a configuration may leave one."""
    tx, p, g = case.build(subspace())(), params(), gradients(5)
    parts: Any = {"unused": tx, "all": optax.sgd(1.0)}
    whole = optax.partition(parts, jax.tree.map(lambda _: "all", p))
    step: Any = jax.jit(whole.update)(g, whole.init(p), p, **case.extra_args(g))[0]
    for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(g), strict=True):
        np.testing.assert_array_equal(x, -y)


def test_inputs_that_protect_nothing_are_refused() -> None:
    p = params()
    state = adamr.gpm(0.1, subspace()).init(p)
    nothing = jax.tree.map(lambda _: None, p)
    with pytest.raises(ValueError, match="inputs has None at every leaf"):
        adamr.protect_inputs(state, nothing)
