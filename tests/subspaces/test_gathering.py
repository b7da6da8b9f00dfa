"""Bases from Gram matrices, without gathering; stored small; kept on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamr
from tests.contract.collectives import collectives
from tests.references import core as reference

IN, OUT = 16, 8


def mesh_of_eight():
    return jax.make_mesh((8,), ("data",), (AxisType.Auto,))


def samples(seed, count=64, decay=0.7):
    """Rows with energies that fall by `decay`² from direction to direction."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(IN, IN)))[0]
    rows = rng.normal(size=(count, IN)) * decay ** np.arange(IN)
    return (rows @ q).astype(np.float32)


def covariance_of(s, *batches):
    c = adamr.subspaces.empty_covariance(s)
    for x in batches:
        c = adamr.subspaces.update_covariance(c, (x,))
    return c


def empty(max_rank=None):
    return adamr.empty_subspace({"w": jnp.zeros((IN, OUT))}, max_rank=max_rank)


def projector(s):
    u = np.asarray(s.bases[0][:, 0], np.float64)
    return u @ u.T


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_growth_from_a_covariance_equals_the_twin_on_samples(threshold, scale):
    first, second = samples(0), samples(1)
    s = adamr.grow_subspace(empty(), (first,), threshold=0.5)
    x = (scale * second).astype(np.float32)
    c = covariance_of(s, x[:24], x[24:])
    grown = adamr.grow_subspace(s, c, threshold=threshold)
    columns = np.asarray(s.bases[0][:, 0], np.float64)
    columns = columns[:, np.linalg.norm(columns, axis=0) > 0.5]
    expected = reference.grow(columns, second.astype(np.float64), threshold)
    assert int(adamr.subspaces.rank(grown)[0]) == expected.shape[1]
    np.testing.assert_allclose(projector(grown), expected @ expected.T, atol=1e-4)


def test_scaling_from_a_covariance_equals_that_from_samples():
    x = samples(2)
    options = dict(threshold=0.9, scaling=5.0)
    by_rows = adamr.grow_subspace(empty(), (x,), **options)
    by_gram = adamr.grow_subspace(empty(), covariance_of(empty(), x), **options)
    np.testing.assert_allclose(by_gram.weights[0], by_rows.weights[0], atol=1e-5)
    inside = jax.jit(lambda s, c: adamr.grow_subspace(s, c, **options))
    again = inside(empty(), covariance_of(empty(), x))
    np.testing.assert_allclose(again.weights[0], by_rows.weights[0], atol=1e-3)


def test_covariances_of_nothing_change_nothing():
    s = adamr.grow_subspace(empty(), (samples(3),), threshold=0.5)
    for moment in (0.0, np.nan, np.inf):
        c = adamr.subspaces.Covariance(
            (jnp.full((IN, IN), moment),), (jnp.ones([], int),)
        )
        grow = functools.partial(adamr.grow_subspace, threshold=1.0)
        same = jax.jit(grow)(s, c)
        np.testing.assert_array_equal(same.bases[0], s.bases[0])
        if moment == 0:
            np.testing.assert_array_equal(grow(s, c).bases[0], s.bases[0])
        else:
            with pytest.raises(ValueError, match="samples has NaN or infinite"):
                grow(s, c)
    parts = adamr.subspaces.empty_covariance(s, parts=4)
    with pytest.raises(ValueError, match="merge_covariance"):
        adamr.grow_subspace(s, parts)
    with pytest.raises(ValueError, match="multiple of 4"):
        adamr.subspaces.update_covariance(parts, (samples(0, 6),))
    with pytest.raises(ValueError, match="parts must be at least 1"):
        adamr.subspaces.empty_covariance(s, parts=0)


def test_parts_add_up_whatever_they_saw():
    """Stacked layers too; a part that saw nothing counts nothing."""
    rng = np.random.default_rng(0)
    params = {"stack": jnp.zeros((3, IN, OUT)), "w": jnp.zeros((IN, OUT))}
    s = adamr.empty_subspace(params)
    parts = adamr.subspaces.empty_covariance(s, parts=4)
    assert not any(
        map(jnp.any, jax.tree.leaves(adamr.subspaces.merge_covariance(parts).counts))
    )
    batches = [(rng.normal(size=(3, n, IN)), rng.normal(size=(n, IN))) for n in (8, 12)]
    whole = adamr.subspaces.empty_covariance(s)
    for stack, w in batches:
        whole = adamr.subspaces.update_covariance(whole, (stack, w))
        parts = adamr.subspaces.update_covariance(parts, (stack, w))
    merged = adamr.subspaces.merge_covariance(parts)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bases_without_gathering():
    """Taking in sends nothing; a boundary sends n × n numbers per kernel, once."""
    mesh = mesh_of_eight()
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    x = samples(4)
    rows = (jax.device_put(x, sharded),)
    s = empty()
    parts = jax.device_put(adamr.subspaces.empty_covariance(s, parts=8), sharded)
    update = jax.jit(adamr.subspaces.update_covariance).lower(parts, rows).compile()
    assert collectives(update) == []
    parts = update(parts, rows)
    assert parts.moments[0].sharding.is_equivalent_to(sharded, 3)
    merge = jax.jit(adamr.subspaces.merge_covariance).lower(parts).compile()
    sent = sorted(n for _, *numbers in collectives(merge) for n in numbers)
    assert sent[-1] == IN * IN and sum(sent[:-1]) <= 16  # and the counts
    assert {kind for kind, *_ in collectives(merge)} <= {"all-reduce", "all-gather"}
    grown = adamr.grow_subspace(s, merge(parts), threshold=0.9)
    expected = adamr.grow_subspace(s, (x,), threshold=0.9)
    np.testing.assert_allclose(projector(grown), projector(expected), atol=1e-4)


def test_growing_inside_jit_from_sharded_samples_sends_one_gram():
    rows = (
        jax.device_put(
            samples(5), NamedSharding(mesh_of_eight(), PartitionSpec("data"))
        ),
    )
    grow = jax.jit(lambda s, x: adamr.grow_subspace(s, x, threshold=0.9))
    compiled = grow.lower(empty(), rows).compile()
    sent = collectives(compiled)
    assert {kind for kind, *_ in sent} == {"all-reduce"}
    numbers = sorted(n for _, *sizes in sent for n in sizes)
    assert numbers.count(IN * IN) == 1 and max(numbers) == IN * IN
    assert sum(numbers) - IN * IN <= 4  # the scale of the samples


# Bases in bfloat16.


@pytest.mark.parametrize("rank", [4, 32, 128])
def test_bases_in_bfloat16_leak_what_is_stated(rank):
    """0.4 % of the gradient at most in the mean; float32 leaks nothing of the kind."""
    n, out = 256, 64
    rng = np.random.default_rng(rank)
    u = np.linalg.qr(rng.normal(size=(n, rank)))[0].astype(np.float32)
    params = {"w": jnp.zeros((n, out))}
    s = adamr.make_subspace(params, {"w": u}, max_rank=rank)
    small = adamr.subspaces.cast_bases(s, jnp.bfloat16)
    assert small.bases[0].dtype == jnp.bfloat16
    assert small.weights[0].dtype == jnp.float32
    inside = u @ rng.normal(size=(rank, out)).astype(np.float32)  # nothing may pass
    anything = rng.normal(size=(n, out)).astype(np.float32)
    leak = {}
    for name, g in (("inside", inside), ("anything", anything)):
        for kind, basis in (("float32", s), ("bfloat16", small)):
            step = np.asarray(
                adamr.subspaces.project(basis, {"w": jnp.asarray(g)})["w"]
            )
            leak[name, kind] = np.linalg.norm(u.T @ step) / np.linalg.norm(g)
    assert leak["inside", "float32"] < 1e-6 and leak["anything", "float32"] < 1e-6
    assert 1e-4 < leak["inside", "bfloat16"] < 4e-3
    assert leak["anything", "bfloat16"] < 4e-3


def test_an_optimizer_with_bases_in_bfloat16_takes_float32_ones_at_a_boundary():
    params = {"w": jnp.ones((IN, OUT))}
    master = adamr.grow_subspace(empty(8), (samples(6),), threshold=0.9)
    tx = adamr.adamr(
        0.1, adamr.project_out(adamr.subspaces.cast_bases(empty(8), jnp.bfloat16))
    )
    state = adamr.set_subspace(tx.init(params), master)
    held = adamr.get_subspace(state)
    assert held.bases[0].dtype == jnp.bfloat16
    step, _ = jax.jit(tx.update)(params, state, params)
    assert 0 < adamr.update_leak(step, master).total < 1e-2
    again = adamr.grow_subspace(held, (samples(6),), threshold=0.9)
    np.testing.assert_array_equal(again.bases[0], held.bases[0])
    small = adamr.subspaces.cast_bases(empty(), jnp.bfloat16)
    full = adamr.grow_subspace(small, (samples(6),), threshold=1.0)
    once = int(adamr.subspaces.rank(full)[0])
    twice = adamr.grow_subspace(full, (samples(6),), threshold=1.0)
    assert int(adamr.subspaces.rank(twice)[0]) == once  # rounding is not evidence


# Host memory.


def test_offloaded_arrays_come_back_where_they_were():
    mesh = mesh_of_eight()
    where = NamedSharding(mesh, PartitionSpec("data"))
    s = empty()
    c = jax.device_put(adamr.subspaces.empty_covariance(s, parts=8), where)
    c = adamr.subspaces.update_covariance(c, (jax.device_put(samples(7), where),))
    held = adamr.sharding.offload(
        {"c": c, "d": adamr.empty_directions(s.bases[0], 2), "n": 3}
    )
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(held["c"])}
    assert kinds == {"pinned_host"}
    back = adamr.sharding.onload(held)
    assert back["n"] == 3
    for a, b in zip(jax.tree.leaves(back["c"]), jax.tree.leaves(c), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    jax.block_until_ready(adamr.subspaces.update_covariance(back["c"], (samples(7),)))


def test_offloaded_values_outlive_donated_ones():
    donate = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(1000.0)
    held = adamr.sharding.offload(x)
    jax.block_until_ready(donate(x))
    np.testing.assert_array_equal(adamr.sharding.onload(held), np.arange(1000.0))


def test_without_host_memory_arrays_become_numpy(monkeypatch):
    monkeypatch.setattr("adamr.sharding._has_host_memory", lambda sharding: False)
    held = adamr.sharding.offload([jnp.arange(3)])
    assert type(held[0]) is np.ndarray
    assert isinstance(adamr.sharding.onload(held)[0], jax.Array)


def test_captured_rows_of_a_sharded_batch_stay_where_they_are():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(16, 6, rngs=rngs)
            self.hidden = nnx.Linear(6, 5, rngs=rngs)
            self.head = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, tokens):
            x = jnp.tanh(self.hidden(self.embed(tokens)))
            return self.head(jnp.tanh(self.hidden(jnp.pad(x, [(0, 0)] * 2 + [(0, 1)]))))

    tokens = np.random.default_rng(0).integers(0, 16, (16, 4))
    where = NamedSharding(mesh_of_eight(), PartitionSpec("data"))
    graph, params = nnx.split(Model(), nnx.Param)

    def forward(params, tokens):
        return nnx.merge(graph, params)(tokens)

    def rows(tokens):
        return adamr.layer_inputs(forward, params, tokens, kind="rows")

    near, far = rows(tokens), rows(jax.device_put(tokens, where))
    for a, b in zip(jax.tree.leaves(far), jax.tree.leaves(near), strict=True):
        assert not a.sharding.is_fully_replicated
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    axes = adamr.contracted_axes(forward, params, tokens)
    s = adamr.empty_subspace(params, axes=axes, unprotected=["bias"])
    parts = jax.device_put(adamr.subspaces.empty_covariance(s, parts=8), where)
    parts = adamr.subspaces.update_covariance(parts, far)
    whole = adamr.subspaces.update_covariance(adamr.subspaces.empty_covariance(s), near)
    merged = adamr.subspaces.merge_covariance(parts)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_few_rows_of_a_sharded_batch(kind, jit):
    w, x = jnp.ones((3, 2)), jax.random.normal(jax.random.key(0), (16, 4, 3))

    def rows(w, x):
        forward = lambda w, x: jnp.einsum("bti,io->bto", x, w)  # noqa: E731
        return adamr.layer_inputs(forward, w, x, kind="rows", max_rows=5)

    near = rows(w, x)
    mesh = jax.make_mesh((8,), ("data",), (kind,))
    with jax.set_mesh(mesh):
        far = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        found = (jax.jit(rows) if jit else rows)(w, far)
    np.testing.assert_array_equal(found, near)
