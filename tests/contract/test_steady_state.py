"""A step in its steady state: nothing recompiles, nothing leaves the device, nothing
grows."""

import contextlib
import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamr
from tests.contract.compilations import nothing_compiles
from tests.mlp import forward, loss_fn

SIZES = (16, 32, 8)


def weights(mesh):
    rng = np.random.default_rng(0)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    return [
        jax.device_put(rng.normal(size=shape).astype(np.float32), where)
        for shape in zip(SIZES[:-1], SIZES[1:], strict=True)
    ]


def batches(mesh, count, task):
    rng = np.random.default_rng(task)
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shapes = (16, SIZES[0]), (16, SIZES[-1])
    return [
        [jax.device_put(rng.normal(size=s).astype(np.float32), where) for s in shapes]
        for _ in range(count)
    ]


def loop(mesh, tx):
    """The step, counted, and its first arguments."""
    p = weights(mesh)
    places = adamr.state_shardings(tx, p)
    state = jax.jit(tx.init, out_shardings=places)(p)
    keep = [w.sharding for w in p], places
    traces = []

    def step(p, state, x, y):
        traces.append(1)
        g = jax.grad(loss_fn)(p, x, y)
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=keep)
    return step, traces, p, state


def optimizer(p, **options):
    s = adamr.empty_subspace(p, max_rank=8)
    return adamr.adamr(1e-3, adamr.project_out(s), **options)


def mesh_of(data, fsdp):
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), kinds)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_three_tasks_neither_recompile_nor_leave_the_device(shape):
    mesh = mesh_of(*shape)
    tx = optimizer(
        weights(mesh), strength=adamr.overlap_adaptive_scale(), weight_decay=0.1
    )
    step, traces, p, state = loop(mesh, tx)
    for task in range(3):
        data = batches(mesh, 4, task)
        for i, (x, y) in enumerate(data):
            warm = nothing_compiles() if task or i else contextlib.nullcontext()
            with warm, jax.transfer_guard("disallow"):
                p, state = step(p, state, x, y)
                jax.block_until_ready(p)
        s = adamr.get_subspace(state)
        inputs, _ = forward(p, data[0][0])
        s = adamr.grow_subspace(s, inputs, threshold=0.3 + 0.1 * task)
        state = adamr.set_subspace(state, s)
        first, *_ = adamr.subspaces.rank(s)
        assert first is not None and first > task
    assert len(traces) == 1


def test_the_guard_would_see_a_transfer():
    mesh = mesh_of(2, 4)
    step, _, p, state = loop(mesh, optimizer(weights(mesh)))
    x, y = batches(mesh, 1, 0)[0]
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(p, state, np.asarray(x), y)


def resident():
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_nothing_grows_over_10_000_steps(shape):
    mesh = mesh_of(*shape)
    tx = optimizer(weights(mesh), strength=adamr.overlap_adaptive_scale())
    step, _, p, state = loop(mesh, tx)
    data = batches(mesh, 8, 0)

    def run(p, state, steps):
        for i in range(steps):
            p, state = step(p, state, *data[i % len(data)])
        jax.block_until_ready(p)
        gc.collect()
        live = jax.live_arrays()
        return p, state, (len(live), sum(x.nbytes for x in live)), resident()

    p, state, before, start = run(p, state, 1000)
    p, state, after, end = run(p, state, 10_000)
    assert after == before
    assert end - start < 2e6  # 200 bytes a step
    assert all(jnp.all(jnp.isfinite(w)) for w in p)
