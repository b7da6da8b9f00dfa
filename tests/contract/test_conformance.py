"""The optax contract, for every row of tests/cases.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import adamr
from tests.contract.cases import CASES, COMPOSED, gradients, params, subspace

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_link = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case.name in COMPOSED))
        for case in CASES
    ],
    ids=lambda case: case.name,
)


def make(case, seed=0):
    return case.build(subspace(seed))()


def run(tx, state, seeds, tree, extra_args=lambda g: {}):
    """Steps without jit; the list of steps and the last state."""
    steps = []
    for seed in seeds:
        g = gradients(seed, tree)
        step, state = tx.update(g, state, tree, **extra_args(g))
        steps.append(step)
    return steps, state


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    a_leaves, b_leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a_leaves) == len(b_leaves)
    for x, y in zip(a_leaves, b_leaves, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol
        )


@each_case
def test_jit_equals_no_jit_and_unknown_extra_args_pass(case):
    tx, p = make(case), params()
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **case.extra_args(g)))
    plain, jitted = tx.init(p), jax.jit(tx.init)(p)
    for seed in range(3):
        g = gradients(seed)
        step, plain = tx.update(g, plain, p, nobody=1.0, **case.extra_args(g))
        fast, jitted = update(g, jitted, p)
        assert_close(step, fast)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(step))
    assert_close(plain, jitted)


@each_link
def test_vmap_over_seeds_equals_loop(case):
    tx, p = make(case), params()
    gs = [gradients(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gs)

    def two_steps(g):
        state = tx.init(p)
        _, state = tx.update(g, state, p, **case.extra_args(g))
        return tx.update(g, state, p, **case.extra_args(g))

    together = jax.jit(jax.vmap(two_steps))(stacked)
    for i, g in enumerate(gs):
        alone = two_steps(g)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, atol=1e-5)


@each_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scan_carries_the_state_and_steps_have_the_gradients_dtype(case, dtype):
    tx, p = make(case), params(dtype)
    gs = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(i, p) for i in range(4)))

    def body(carry, g):
        p, state = carry
        step, state = tx.update(g, state, p, **case.extra_args(g))
        assert jax.tree.map(jnp.result_type, step) == jax.tree.map(jnp.result_type, g)
        return (optax.apply_updates(p, step), state), None

    (p, _), _ = jax.jit(functools.partial(jax.lax.scan, body))((p, tx.init(p)), gs)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(p))


@each_case
def test_donation(case):
    p, s = params(), subspace()
    tx = case.build(s)()
    state = tx.init(p)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    arguments = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((p, s))}
    assert not arguments & set(buffers)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(g, state, p):
        step, state = tx.update(g, state, p, **case.extra_args(g))
        return optax.apply_updates(p, step), state

    for seed in range(2):
        p, state = update(gradients(seed), state, p)
    jax.block_until_ready((p, state, s))


@each_link
def test_multi_steps_sees_the_mean_gradient(case):
    tx, p = make(case), params()
    a, b = gradients(1), gradients(2)
    wrapped = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    state = wrapped.init(p)
    quiet, state = wrapped.update(a, state, p, **case.extra_args(a))
    assert all(not jnp.any(x) for x in jax.tree.leaves(quiet))
    loud, _ = wrapped.update(b, state, p, **case.extra_args(b))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    # Evidence in extra arguments is that of the last micro-step.
    expected, _ = tx.update(mean, tx.init(p), p, **case.extra_args(b))
    assert_close(loud, expected, atol=1e-5)


@each_link
@pytest.mark.parametrize(
    "wrapper", ["masked", "partition", "apply_if_finite", "multi_steps"]
)
def test_leaf_wise_wrappers(case, wrapper):
    """Leaves left out do not shift the others' bases."""
    tx, p, g = make(case), params(), gradients(5)
    keep = {"dense": {"bias": True, "kernel": True}, "conv": False, "scale": True}
    keep["stack"] = True
    if wrapper == "masked":
        wrapped = optax.masked(tx, keep)
    elif wrapper == "partition":
        labels = jax.tree.map(lambda k: "ours" if k else "sgd", keep)
        wrapped = optax.partition({"ours": tx, "sgd": optax.identity()}, labels)
    else:
        wrapped = optax.apply_if_finite(tx, 3)
        if wrapper == "multi_steps":
            wrapped = optax.MultiSteps(tx, 1).gradient_transformation()
        keep = jax.tree.map(lambda k: True, keep)
    state = wrapped.init(p)
    step, state = jax.jit(wrapped.update)(g, state, p, **case.extra_args(g))
    if not keep["conv"]:
        np.testing.assert_array_equal(step["conv"], g["conv"])
    if case.holds_subspace:
        s = adamr.get_subspace(state)
        from_tests = case.name in ("project_out", "protect_update", "two_sided")
        if from_tests or case.name == "oblique_second_moment":
            s = adamr.Subspace(*(jax.tree.map(jnp.asarray, field) for field in s))
            for name, i in (("dense", 2), ("stack", 4)):
                basis, x = s.bases[i], step[name]
                x = x["kernel"] if name == "dense" else x
                inner = jnp.einsum("...nor,...no->...ro", basis, x)
                assert jnp.max(jnp.abs(inner)) < 1e-5
        grown = adamr.set_subspace(state, s)
        assert jax.tree.structure(grown) == jax.tree.structure(state)


@each_link
def test_inject_hyperparams(case):
    p, g, s = params(), gradients(3), subspace()
    factory = case.build(s)
    tx, injected = factory(), optax.inject_hyperparams(factory)()
    expected, _ = tx.update(g, tx.init(p), p, **case.extra_args(g))
    state = injected.init(p)
    step, state = jax.jit(injected.update)(g, state, p, **case.extra_args(g))
    assert_close(step, expected, atol=1e-5)
    if case.holds_subspace:
        adamr.set_subspace(state, adamr.get_subspace(state))


@each_case
def test_map_params_touches_only_parameter_shaped_state(case):
    tx, p = make(case), params()
    state = tx.init(p)
    shapes = jax.tree.map(jnp.shape, p, is_leaf=lambda x: isinstance(x, jax.Array))
    seen = []

    def note(value, shape):
        assert value.shape == tuple(shape)
        seen.append(shape)
        return value

    wrapped = jax.tree.map(
        lambda s: np.array(s, int), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    mapped = optax.tree.map_params(tx, note, state, wrapped)
    assert_close(mapped, state)


@each_case
def test_orbax_round_trip(case, tmp_path):
    tx, p = make(case), params()
    _, state = run(tx, tx.init(p), range(2), p, case.extra_args)
    if not jax.tree.leaves(state):
        pytest.skip("has no state; orbax refuses empty trees")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    a, _ = run(tx, state, [9], p, case.extra_args)
    b, _ = run(tx, restored, [9], p, case.extra_args)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **kwargs: COMPILED.append(event)
)


@each_link
@pytest.mark.parametrize("committed", [True, False])
def test_no_recompilation_across_tasks(case, committed):
    if not case.holds_subspace:
        pytest.skip("has no task boundary")
    tx, p = make(case), params()
    traces = []

    @jax.jit
    def update(g, state, p):
        traces.append(1)
        step, state = tx.update(g, state, p, **case.extra_args(g))
        return optax.apply_updates(p, step), state

    device = jax.devices()[0] if committed else None
    p, state = jax.device_put((p, tx.init(p)), device)
    gs = jax.device_put([gradients(seed) for seed in range(2)], device)
    for task in range(3):
        for g in gs:
            del COMPILED[:]
            p, state = update(g, state, p)
            if task or g is gs[1]:
                assert "/jax/core/compile/backend_compile_duration" not in COMPILED
        s = adamr.get_subspace(state)
        rows = adamr.subspaces.gradient_samples(s, gradients(task))
        state = adamr.set_subspace(state, adamr.grow_subspace(s, rows, threshold=0.5))
    assert len(traces) == 1


@each_link
def test_nnx_optimizer(case):
    nnx = pytest.importorskip("flax.nnx")

    class Tiny(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    model = Tiny()
    state = nnx.state(model, nnx.Param)
    s = adamr.empty_subspace(state, max_rank=2)
    tx = case.build(s)()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, state)
    optimizer.update(model, g, **case.extra_args(g))
    if case.holds_subspace:
        inner = adamr.get_subspace(optimizer.opt_state)
        assert all(b is None or isinstance(b, jax.Array) for b in inner.bases)
        optimizer.opt_state = adamr.set_subspace(optimizer.opt_state, inner)
        optimizer.update(model, g, **case.extra_args(g))
