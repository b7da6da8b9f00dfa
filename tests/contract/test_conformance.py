"""The optax contract, for every row of tests/contract/cases.py.

Compiling is what these tests spend their time on: a case has one compiled step, which
is what the wrappers, the vmapped scan, the restored state and the steps without jit
are compared with.
"""

import contextlib
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import adamr
from tests.contract.boundaries import set_grown, subspaces_of
from tests.contract.cases import CASES, COMPOSED, Case, gradients, params, subspace
from tests.contract.compilations import nothing_compiles

SMOKE = ("adamr_adaptive", "two_sided")


def rows(nightly: Collection[str] = ()) -> pytest.MarkDecorator:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        slow = [pytest.mark.slow] if name in nightly else []
        return [pytest.mark.smoke] if name in SMOKE else slow

    each = [pytest.param(c, id=c.name, marks=marks(c.name)) for c in CASES]
    return pytest.mark.parametrize("case", each)


each_case, each_link = rows(), rows(nightly=COMPOSED)
Step = Callable[..., tuple[Any, Any, Any]]
EXACT = ("project_out", "protect_update", "two_sided", "oblique_second_moment")


def donated(case: Case, tx: Any, traces: list[int]) -> Step:
    """(g, state, p) -> (step, state, p); the state and p that it is given are gone."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(g, state, p, **extra_args):
        traces.append(1)
        step, state = tx.update(g, state, p, **extra_args)
        return step, state, optax.apply_updates(p, step)

    return update


@functools.cache
def compiled(name: str) -> tuple[Any, Step]:
    """A case's transformation, and its step."""
    case = next(case for case in CASES if case.name == name)
    tx = case.build(subspace())()
    return tx, donated(case, tx, [])


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def run(case: Case, state: Any, gs: Any) -> tuple[Any, Any]:
    """Every step with the parameters kept, and the last state."""
    update, steps = compiled(case.name)[1], []
    for g in gs:
        step, state, _ = update(g, state, params(), **case.extra_args(g))
        steps.append(step)
    return steps, state


def assert_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    a_leaves, b_leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a_leaves) == len(b_leaves)
    for x, y in zip(a_leaves, b_leaves, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol
        )


def assert_finite(tree: Any) -> None:
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))


def assert_holds_a_subspace(case: Case, state: Any, step: Any = None) -> None:
    """It is found and can be set; an exact link's step has nothing along it."""
    if not case.holds_subspace:
        return
    held = subspaces_of(state)
    assert held
    s = held[0]
    if step is not None and case.name in EXACT:
        s = adamr.Subspace(*(jax.tree.map(jnp.asarray, field) for field in s))
        for basis, x in (
            (s.bases[2], step["dense"]["kernel"]),
            (s.bases[4], step["stack"]),
        ):
            inner = jnp.einsum("...nor,...no->...ro", basis, x)
            assert jnp.max(jnp.abs(inner)) < 1e-5
    grown = adamr.set_subspace(state, held if len(held) > 1 else s)
    assert jax.tree.structure(grown) == jax.tree.structure(state)


@each_case
def test_jit_equals_no_jit_and_unknown_extra_args_pass(case: Case) -> None:
    (tx, update), p = compiled(case.name), params()
    plain, jitted = tx.init(p), jax.jit(tx.init)(p)
    for seed in range(3):
        g = gradients(seed)
        extra_args = case.extra_args(g)
        step, plain = tx.update(g, plain, p, nobody=1.0, **extra_args)
        fast, jitted, _ = update(g, jitted, params(), **extra_args)
        assert_close(step, fast)
        assert_finite(step)
    assert_close(plain, jitted)


def scan(case: Case, p: Any, gs: Any) -> tuple[Any, Any]:
    """Parameters after training on gradients one after another, and every step."""
    tx = compiled(case.name)[0]

    def body(carry, g):
        p, state = carry
        step, state = tx.update(g, state, p, **case.extra_args(g))
        assert jax.tree.map(jnp.result_type, step) == jax.tree.map(jnp.result_type, g)
        return (optax.apply_updates(p, step), state), step

    (p, _), steps = jax.lax.scan(body, (p, tx.init(p)), gs)
    return p, steps


@each_case
def test_vmap_over_seeds_of_a_scan_equals_a_loop_of_steps(case: Case) -> None:
    tx, update = compiled(case.name)
    seeds = [[gradients(10 * seed + i) for i in range(3)] for seed in range(3)]
    together = jax.jit(jax.vmap(functools.partial(scan, case, params())))
    last, steps = together(stacked(*(stacked(*gs) for gs in seeds)))
    for seed, gs in enumerate(seeds):
        state, p = tx.init(params()), params()
        for i, g in enumerate(gs):
            alone, state, p = update(g, state, p, **case.extra_args(g))
            here = jax.tree.map(lambda x, at=(seed, i): x[at], steps)
            assert_close(here, alone, atol=1e-5)
    assert_finite(last)


@each_case
def test_scan_carries_a_bfloat16_state(case: Case) -> None:
    p = params(jnp.bfloat16)
    gs = stacked(*(gradients(i, p) for i in range(4)))
    last, _ = jax.jit(functools.partial(scan, case))(p, gs)
    assert_finite(last)


@each_case
def test_donation(case: Case) -> None:
    p, s = params(), subspace()
    state = case.build(s)().init(p)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    arguments = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((p, s))}
    assert not arguments & set(buffers)
    update = compiled(case.name)[1]
    for seed in range(2):
        g = gradients(seed)
        _, state, p = update(g, state, p, **case.extra_args(g))
    jax.block_until_ready((p, state, s))


@each_link
def test_multi_steps_sees_the_mean_gradient(case: Case) -> None:
    (tx, update), p = compiled(case.name), params()
    a, b = gradients(1), gradients(2)
    wrapped = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    micro = jax.jit(wrapped.update)
    quiet, state = micro(a, wrapped.init(p), p, **case.extra_args(a))
    assert all(not jnp.any(x) for x in jax.tree.leaves(quiet))
    # Evidence in extra arguments is that of the last micro-step.
    evidence = case.extra_args(b)
    loud, state = micro(b, state, p, **evidence)
    assert_holds_a_subspace(case, state, loud)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    expected, *_ = update(mean, tx.init(p), p, **evidence)
    assert_close(loud, expected, atol=1e-5)


@each_link
def test_masked_and_partition_leave_leaves_out(case: Case) -> None:
    """Leaves left out do not shift the others' bases."""
    tx, p, g = compiled(case.name)[0], params(), gradients(5)
    keep = {"dense": {"bias": True, "kernel": True}, "conv": False, "scale": True}
    keep["stack"] = True
    labels = jax.tree.map(lambda k: "ours" if k else "sgd", keep)
    wrappers = (
        optax.masked(tx, keep),
        optax.partition({"ours": tx, "sgd": optax.identity()}, labels),
    )

    @jax.jit
    def each(g, p):  # what both compute is compiled once
        extra_args = case.extra_args(g)
        return [w.update(g, w.init(p), p, **extra_args) for w in wrappers]

    for wrapped, (step, state) in zip(wrappers, each(g, p), strict=True):
        assert jax.tree.structure(wrapped.init(p)) == jax.tree.structure(state)
        np.testing.assert_array_equal(step["conv"], g["conv"])
        assert_holds_a_subspace(case, state, step)


@each_link
def test_inject_hyperparams_and_apply_if_finite(case: Case) -> None:
    p, g, s = params(), gradients(3), subspace()
    injected = optax.inject_hyperparams(case.build(s))()
    assert_holds_a_subspace(case, injected.init(p))
    (tx, update), extra_args = compiled(case.name), case.extra_args(g)
    assert_holds_a_subspace(case, optax.apply_if_finite(tx, 3).init(p))
    wrapped = optax.apply_if_finite(injected, 3)
    step, state = jax.jit(wrapped.update)(g, wrapped.init(p), p, **extra_args)
    assert_holds_a_subspace(case, state, step)
    expected, *_ = update(g, tx.init(p), p, **extra_args)
    assert_close(step, expected, atol=1e-5)


@each_case
def test_map_params_touches_only_parameter_shaped_state(case: Case) -> None:
    tx, p = compiled(case.name)[0], params()
    state = tx.init(p)
    shapes = jax.tree.map(lambda x: np.array(x.shape, int), p)
    seen = []

    def note(value, shape):
        assert value.shape == tuple(shape)
        seen.append(shape)
        return value

    mapped = optax.tree.map_params(tx, note, state, shapes)
    assert_close(mapped, state)


@each_case
def test_orbax_round_trip(case: Case, tmp_path: Path) -> None:
    tx = compiled(case.name)[0]
    _, state = run(case, tx.init(params()), [gradients(seed) for seed in range(2)])
    if not jax.tree.leaves(state):
        pytest.skip("has no state; orbax refuses empty trees")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    a, _ = run(case, state, [gradients(9)])
    b, _ = run(case, restored, [gradients(9)])
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@each_link
@pytest.mark.parametrize("committed", [True, False])
def test_no_recompilation_across_tasks(case: Case, committed: bool) -> None:
    if not case.holds_subspace:
        pytest.skip("has no task boundary")
    tx, p, traces = compiled(case.name)[0], params(), []
    update = donated(case, tx, traces)
    device = jax.devices()[0] if committed else None
    p, state = jax.device_put((p, tx.init(p)), device)
    gs = jax.device_put([gradients(seed) for seed in range(2)], device)
    extra_args = [case.extra_args(g) for g in gs]
    for task in range(3):
        for i in range(2):
            with nothing_compiles() if task or i else contextlib.nullcontext():
                _, state, p = update(gs[i], state, p, **extra_args[i])
        state = set_grown(state, gradients(task), threshold=0.5)
    assert len(traces) == 1


@each_link
def test_nnx_optimizer(case: Case) -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Tiny(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    model = Tiny()
    state = nnx.state(model, nnx.Param)
    s = adamr.empty_subspace(state, max_rank=2)
    optimizer = nnx.Optimizer(model, case.build(s)(), wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, state)

    @nnx.jit
    def update(optimizer, model, g):
        optimizer.update(model, g, **case.extra_args(g))

    update(optimizer, model, g)
    if case.holds_subspace:
        held = subspaces_of(optimizer.opt_state)
        for inner in held:
            assert all(b is None or isinstance(b, jax.Array) for b in inner.bases)
        held = held if len(held) > 1 else held[0]
        optimizer.opt_state = adamr.set_subspace(optimizer.opt_state, held)
        update(optimizer, model, g)
