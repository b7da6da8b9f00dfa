"""Leaves of size 0, such as adapters of rank 0 or a head without classes.

They get steps of size 0, everything stays finite, and the other leaves step as they do
without them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamr
from tests.contract import cases
from tests.contract.cases import Case, bases, gradients, params
from tests.contract.test_conformance import rows

SHAPES = {"rows": (0, 3), "columns": (3, 0), "stack": (2, 0, 3)}

# Their numbers depend on how many leaves there are: a mean over leaves, random halves.
COUNT_LEAVES = ("overlap_mean_debiased", "half_fine_tuning", "hft")


def with_empty(tree: Any) -> Any:
    """The empty leaves come last in leaf order, where random keys differ least."""
    return tree | {"zero": {name: jnp.zeros(shape) for name, shape in SHAPES.items()}}


def subspace(tree: Any) -> adamr.Subspace:
    own = bases() | ({"zero": dict.fromkeys(SHAPES)} if "zero" in tree else {})
    return adamr.make_subspace(tree, own, max_rank=4)


def directions(s: adamr.Subspace) -> adamr.Directions:
    tree = params() if len(s.bases) == 5 else with_empty(params())
    rows = jax.tree.map(lambda x: jnp.stack([x + 1, x * x]), tree)
    return adamr.grow_directions(adamr.empty_directions(tree, 4), rows)


def two_steps(case: Case, change: Any) -> tuple[Any, Any]:
    p = change(params())
    tx = case.build(subspace(p))()
    state, update = jax.jit(tx.init)(p), jax.jit(tx.update)
    for seed in (1, 2):
        g = change(gradients(seed))
        step, state = update(g, state, p, **case.extra_args(g))
    return step, state


def all_finite(tree: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)


@rows()
def test_leaves_of_size_0_change_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "directions", directions)
    step, state = two_steps(case, with_empty)
    assert all_finite(step) and all_finite(state)
    empty = {name: x.shape for name, x in step.pop("zero").items()}
    assert empty == SHAPES
    if case.name in COUNT_LEAVES:
        return
    alone, _ = two_steps(case, lambda tree: tree)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        step,
        alone,
    )


def test_leaves_of_size_0_can_be_protected() -> None:
    """A kernel without inputs or outputs has no directions to protect."""
    tree = {
        "kernel": jnp.ones((4, 3)),
        "none": jnp.zeros((0, 3)),
        "out": jnp.zeros((3, 0)),
    }
    s = adamr.empty_subspace(tree)
    tx = adamr.gpm(0.1, s)
    step, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    assert all_finite(step) and all_finite(state)
    assert {name: x.shape for name, x in step.items()} == {
        name: x.shape for name, x in tree.items()
    }
