"""TRGP's trusted tasks and scaled weights, ROGO's relaxing subspace."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import adamr
from adamr import Axes
from tests.contract.cases import orthonormal
from tests.references import recipes as reference


def columns(s, leaf=0):
    """The used directions of a dense kernel, float64 (n, r)."""
    u = np.asarray(s.bases[leaf], np.float64)[:, 0]
    return u[:, (u**2).sum(axis=0) > 0.5]


def span(u):
    return u @ u.T


def dense(fan_in, outputs=3):
    return jnp.zeros((fan_in, outputs))


def unit_subspace(p, *which, **kwargs):
    return adamr.make_subspace(p, np.eye(p.shape[0])[:, list(which)], **kwargs)


# Trust ------------------------------------------------------------------------------


@pytest.mark.smoke
def test_t6_trust_is_one_inside_the_span_and_zero_outside():
    p = dense(4)
    tasks = [unit_subspace(p, 0, 1), unit_subspace(p, 2), adamr.empty_subspace(p)]
    inside = jnp.zeros((4, 3)).at[:2].set(jnp.arange(6.0).reshape(2, 3))
    region = adamr.trust.trust_region(tasks, inside)
    np.testing.assert_allclose(region.scores[0], [1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(region.tasks[0], [0, -1])
    np.testing.assert_array_equal(region.subspaces[0].bases[0], tasks[0].bases[0])
    assert not np.any(region.subspaces[1].bases[0])
    assert not np.any(region.subspaces[1].weights[0])
    # Strictly above: no share at all is never trusted, nor is an empty task.
    every = adamr.trust.trust_region(tasks, inside, threshold=0.0, count=3)
    np.testing.assert_array_equal(every.tasks[0], [0, -1, -1])
    outside = adamr.trust.trust_region(tasks, jnp.zeros((4, 3)).at[3].set(1.0))
    np.testing.assert_array_equal(outside.scores[0], [0, 0, 0])
    np.testing.assert_array_equal(outside.tasks[0], [-1, -1])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_most_trusted_tasks_above_the_threshold_come_first(scale):
    p = dense(5, 1)
    tasks = [unit_subspace(p, i) for i in range(5)]
    g = scale * jnp.array([[0.3], [0.5], [0.1], [0.8], [0.6]])
    norm = np.sqrt(1.35)
    region = jax.jit(
        lambda tasks, g: adamr.trust.trust_region(tasks, g, threshold=0.5 / norm - 1e-3)
    )(tasks, g)
    expected = np.array([0.3, 0.5, 0.1, 0.8, 0.6]) / norm
    np.testing.assert_allclose(region.scores[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(region.tasks[0], [3, 4])
    three = adamr.trust.trust_region(tasks, g, threshold=0.5 / norm + 1e-3, count=7)
    np.testing.assert_array_equal(three.tasks[0], [3, 4, -1, -1, -1, -1, -1])
    assert len(three.subspaces) == 7


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_trust_equals_its_twin(seed):
    rng = np.random.default_rng(seed)
    bases = [orthonormal(seed + i, 6, 1 + i) for i in range(3)]
    g = rng.normal(size=(6, 4)).astype(np.float32)
    tasks = [adamr.make_subspace(g, b, max_rank=3) for b in bases]
    region = adamr.trust.trust_region(tasks, g, threshold=0.0, count=3)
    expected = reference.trust([b.astype(np.float64) for b in bases], g)
    np.testing.assert_allclose(region.scores[0], expected, atol=1e-5)
    np.testing.assert_array_equal(region.tasks[0], np.argsort(-expected))


def test_stacked_layers_choose_their_tasks_one_by_one():
    """Also where the batch axis is not the first, and where leaves are missing."""
    p = {"a": jnp.zeros((4, 2, 3)), "b": jnp.zeros(3), "c": jnp.zeros((4, 3))}
    axes = {"a": Axes((0,), (1,)), "b": None, "c": Axes((0,))}
    eye = np.eye(4, dtype=np.float32)

    def task(first, second):
        u = np.stack([eye[:, [first]], eye[:, [second]]])
        bases = {"a": u, "b": None, "c": eye[:, [first]]}
        return adamr.make_subspace(p, bases, axes=axes, max_rank=1)

    tasks = [task(0, 1), task(1, 0), task(2, 3)]
    g = np.zeros((4, 2, 3), np.float32)
    g[1, 0], g[3, 1] = 1.0, -2.0
    region = adamr.trust.trust_region(
        tasks, {"a": g, "b": jnp.ones(3), "c": None}, count=1
    )
    np.testing.assert_allclose(region.scores[0], [[0, 0], [1, 0], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(region.tasks[0], [[1, 2]])
    chosen = np.asarray(region.subspaces[0].bases[0])
    np.testing.assert_array_equal(chosen[:, 0, 0, 0], eye[1])
    np.testing.assert_array_equal(chosen[:, 1, 0, 0], eye[3])
    assert region.tasks[1] is None
    np.testing.assert_array_equal(region.tasks[2], [-1])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_degenerate_gradients_trust_nobody(value):
    p = dense(3)
    g = jnp.full((3, 3), value)
    region = jax.jit(adamr.trust.trust_region)([unit_subspace(p, 0, 1, 2)] * 2, g)
    np.testing.assert_array_equal(region.scores[0], [0, 0])
    np.testing.assert_array_equal(region.tasks[0], [-1, -1])


# The task's own subspace ------------------------------------------------------------


def test_task_subspace_keeps_the_strongest_new_direction():
    """Energies 6 on e1, 3 on e2, 1 on e3, with M = span(e1)."""
    p = dense(4)
    x = np.diag(np.sqrt([6.0, 3.0, 1.0, 0.0])).astype(np.float32)
    memory = unit_subspace(p, 0)
    for threshold, own, all_of_them in [(0.55, 1, 1), (0.85, 2, 2), (0.95, 3, 3)]:
        task, grown = adamr.trust.grow_task_subspace(memory, x, threshold=threshold)
        assert int(adamr.subspaces.rank(task)[0]) == own
        assert int(adamr.subspaces.rank(grown)[0]) == all_of_them
        expected = np.diag((np.arange(4) < own).astype(float))
        np.testing.assert_allclose(span(columns(task)), expected, atol=1e-6)


def test_old_directions_without_energy_are_not_the_tasks_own():
    p = dense(4)
    x = np.diag(np.sqrt([0.0, 3.0, 6.0, 1.0])).astype(np.float32)
    task, grown = adamr.trust.grow_task_subspace(
        unit_subspace(p, 0, 1), x, threshold=0.85
    )
    np.testing.assert_allclose(span(columns(task)), np.diag([0.0, 1, 1, 0]), atol=1e-6)
    np.testing.assert_allclose(span(columns(grown)), np.diag([1.0, 1, 1, 0]), atol=1e-6)
    np.testing.assert_array_equal(task.weights[0][0, 0], [1, 1, 0, 0])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(0, 5),
    threshold=st.sampled_from([0.5, 0.8, 0.95, 0.999]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_task_subspace_equals_its_twin(seed, rank, threshold, scale):
    rng = np.random.default_rng(seed)
    basis = orthonormal(seed, 7, rank) if rank else np.zeros((7, 0), np.float32)
    x = (rng.normal(size=(12, 7)) * 2.0 ** -np.arange(7)).astype(np.float32)
    memory = adamr.make_subspace(dense(7), basis)
    task, grown = adamr.trust.grow_task_subspace(memory, scale * x, threshold=threshold)
    own, everything = reference.task_subspace(columns(memory), x, threshold)
    assert int(adamr.subspaces.rank(task)[0]) == own.shape[1]
    assert int(adamr.subspaces.rank(grown)[0]) == everything.shape[1]
    np.testing.assert_allclose(span(columns(task)), span(own), atol=1e-5)
    np.testing.assert_allclose(span(columns(grown)), span(everything), atol=1e-5)
    # What the task needs is frozen, orthonormal, and reaches the share of energy.
    u = columns(task)
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
    np.testing.assert_allclose(span(columns(grown)) @ u, u, atol=1e-6)
    assert ((x @ u) ** 2).sum() >= (threshold - 2e-6) * (x**2).sum()
    np.testing.assert_array_equal(
        np.asarray(grown.bases[0])[..., :rank], np.asarray(memory.bases[0])[..., :rank]
    )


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(0, 5),
    threshold=st.sampled_from([0.5, 0.8, 0.95, 0.999]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_a_gram_matrix_gives_the_directions_of_its_samples(
    seed, rank, threshold, scale
):
    rng = np.random.default_rng(seed)
    basis = orthonormal(seed, 7, rank) if rank else np.zeros((7, 0), np.float32)
    x = (rng.normal(size=(12, 7)) * 2.0 ** -np.arange(7)).astype(np.float32)
    memory = adamr.make_subspace(dense(7), basis)
    gram = (jnp.asarray(scale * x.T @ x / 12, jnp.float32),)
    covariance = adamr.subspaces.Covariance(gram, (jnp.array(12, jnp.int32),))
    grow = functools.partial(adamr.trust.grow_task_subspace, threshold=threshold)
    expected = grow(memory, x)
    for found in (grow(memory, covariance), jax.jit(grow)(memory, covariance)):
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(span(columns(a)), span(columns(b)), atol=2e-3)


def test_layer_inputs_are_taken_as_they_are():
    keys = jax.random.split(jax.random.key(0), 3)
    p = {
        "b": jnp.zeros(3),
        "in": jax.random.normal(keys[0], (5, 4)),
        "out": jax.random.normal(keys[1], (4, 3)),
    }
    x = jax.random.normal(keys[2], (2, 5))

    def forward(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"] + p["b"][None]

    axes = adamr.contracted_axes(forward, p, x)
    memory = adamr.empty_subspace(p, axes=axes, unprotected=["b"])
    rows = {"b": None, "in": x, "out": jnp.tanh(x @ p["in"])}
    expected = adamr.trust.grow_task_subspace(memory, rows)
    for kind in ("gram", "rows"):
        inputs = adamr.layer_inputs(forward, p, x, kind=kind)
        found = adamr.trust.grow_task_subspace(memory, inputs)
        for a, b in zip(expected, found, strict=True):
            assert [*adamr.subspaces.rank(a)] == [*adamr.subspaces.rank(b)]
            for u, v in zip(a.bases[1:], b.bases[1:], strict=True):
                np.testing.assert_allclose(span(u[:, 0]), span(v[:, 0]), atol=1e-4)


def test_a_gram_matrix_without_energy_gives_an_empty_task():
    memory = adamr.make_subspace(dense(3), np.eye(3)[:, :1])
    for bad in (0.0, np.nan):
        moment = jnp.full((3, 3), bad, jnp.float32)
        nothing = adamr.subspaces.Covariance((moment,), (jnp.array(1, jnp.int32),))
        grow = adamr.trust.grow_task_subspace
        if bad:
            with pytest.raises(ValueError, match="samples has NaN or infinite"):
                grow(memory, nothing)
            grow = jax.jit(grow)
        task, grown = grow(memory, nothing)
        assert not np.any(task.bases[0]) and not np.any(task.weights[0])
        np.testing.assert_array_equal(grown.bases[0], memory.bases[0])


def test_inputs_of_another_model_are_named():
    memory = adamr.empty_subspace(dense(3))
    other = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
    inputs = adamr.layer_inputs(
        lambda p, x: x @ p["a"] @ p["b"], other, jnp.ones((1, 3))
    )
    for grow in (adamr.trust.grow_task_subspace, adamr.grow_subspace):
        with pytest.raises(ValueError, match="Covariance of 2 parameter leaves"):
            grow(memory, inputs)
        with pytest.raises(ValueError, match=r"as layer_inputs\(forward, params, x\)"):
            grow(memory, other)


def test_first_task_is_that_of_gpm():
    p = {"stack": jnp.zeros((2, 5, 3)), "b": jnp.zeros(3)}
    x = np.random.default_rng(0).normal(size=(2, 20, 5)).astype(np.float32)
    empty = adamr.empty_subspace(p)
    samples = {"stack": x, "b": None}
    task, grown = adamr.trust.grow_task_subspace(empty, samples, threshold=0.8)
    gpm = adamr.grow_subspace(empty, samples, threshold=0.8)
    for a, b, c in zip(task.bases, grown.bases, gpm.bases, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b)
            sign = np.sign(np.sum(b * c, axis=1, keepdims=True))  # is arbitrary
            np.testing.assert_allclose(sign * b, c, atol=1e-6)
            assert np.any(c)


def test_where_room_ends_the_strongest_new_directions_are_in():
    p = dense(4)
    memory = unit_subspace(p, 0, max_rank=2)
    x = np.diag(np.sqrt([1.0, 3.0, 6.0, 4.0])).astype(np.float32)
    task, grown = adamr.trust.grow_task_subspace(memory, x, threshold=1.0)
    np.testing.assert_allclose(span(columns(grown)), np.diag([1.0, 0, 1, 0]), atol=1e-6)
    np.testing.assert_allclose(span(columns(task)), span(columns(grown)), atol=1e-6)


def test_no_evidence_gives_an_empty_task_and_keeps_the_memory():
    p = {"w": dense(3), "v": dense(3)}
    memory = adamr.make_subspace(p, {"w": np.eye(3)[:, :1], "v": np.eye(3)[:, :1]})
    x = {"w": np.zeros((4, 3), np.float32), "v": None}
    nan = {"w": np.full((4, 3), np.nan, np.float32), "v": None}
    inside = jax.jit(adamr.trust.grow_task_subspace)(memory, nan)
    for task, grown in (adamr.trust.grow_task_subspace(memory, x), inside):
        for i in range(2):
            assert not np.any(task.bases[i]) and not np.any(task.weights[i])
            np.testing.assert_array_equal(grown.bases[i], memory.bases[i])
            np.testing.assert_array_equal(grown.weights[i], memory.weights[i])
    with pytest.raises(ValueError, match="samples has NaN"):
        adamr.trust.grow_task_subspace(memory, nan)


def test_growing_under_jit_equals_growing_outside():
    memory = unit_subspace(dense(6), 0, 1)
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    outside = adamr.trust.grow_task_subspace(memory, x, threshold=0.8)
    inside = jax.jit(lambda m, x: adamr.trust.grow_task_subspace(m, x, threshold=0.8))
    for a, b in zip(outside, inside(memory, x), strict=True):
        np.testing.assert_allclose(span(columns(a)), span(columns(b)), atol=1e-5)


# Scaled weights ---------------------------------------------------------------------


@pytest.mark.smoke
def test_t6_closed_form():
    w = jnp.array([[1.0], [2.0]])
    s = unit_subspace(w, 0, max_rank=1)
    scale = adamr.trust.init_scales(s)[0][0]
    np.testing.assert_array_equal(adamr.trust.scaled_weight(w, s.bases[0], scale), w)
    twice = adamr.trust.scaled_weight(w, s.bases[0], 2.0 * scale)
    np.testing.assert_allclose(twice[:, 0], [2.0, 2.0], atol=1e-6)


LAYOUTS = [
    ((6, 5), None, (), (6,)),
    ((3, 6, 5), None, (3,), (6,)),
    ((2, 3, 4, 5), None, (), (2, 3, 4)),
    ((6, 3, 5), Axes((0,), (1,)), (3,), (6,)),
    ((6, 3, 2), Axes((0,)), (), (6,)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: str(x[0]))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaled_weight_equals_its_twin_in_every_layout(layout, dtype):
    shape, axes, batch, fan_in = layout
    n, rng = int(np.prod(fan_in)), np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), dtype)
    u = orthonormal(1, *batch, n, 3)
    s = adamr.make_subspace([w], [u], axes=[axes], max_rank=4)
    (scales,) = adamr.trust.init_scales(s)
    same = adamr.trust.scaled_params([w], s, [scales])[0]
    np.testing.assert_array_equal(same, w)
    assert same.dtype == w.dtype
    q = rng.normal(size=(*batch, 4, 4)).astype(np.float32)
    scale = jnp.asarray(q.reshape(scales[0].shape))
    got = np.asarray(
        jax.jit(adamr.trust.scaled_weight)(w, s.bases[0], scale), np.float64
    )
    atol = 5e-6 if dtype == jnp.float32 else 0.05
    for i in range(batch[0] if batch else 1):
        at = () if not batch else (i,) if axes is None else (slice(None), i)
        kernel = np.asarray(w, np.float64)[at].reshape(n, -1)
        basis, matrix = (u[i], q[i]) if batch else (u, q)
        # The fourth column of the basis is padding: there Q has no effect.
        expected = reference.scaled_weight(kernel, basis, matrix[:3, :3])
        np.testing.assert_allclose(got[at].reshape(n, -1), expected, atol=atol)


def test_several_scalings_add_up_on_the_same_weights():
    """As in the paper: W + Σ_j B_j (Q_j − I) B_jᵀ W, not one after the other."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    bases = [orthonormal(i, 5, 2) for i in range(2)]
    subspaces = [adamr.make_subspace(w, b, max_rank=2) for b in bases]
    scales = jax.tree.map(lambda q: q + 0.5, adamr.trust.init_scales(subspaces))
    got = adamr.trust.scaled_params(w, subspaces, scales)
    q = np.eye(2) + 0.5
    parts = [reference.scaled_weight(np.asarray(w), b, q) - w for b in bases]
    np.testing.assert_allclose(got, w + sum(parts), atol=1e-5)


def test_scales_are_trainable_and_padding_gets_no_gradient():
    p = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    s = adamr.make_subspace(p, {"w": np.eye(4)[:, :2], "b": None}, max_rank=3)
    x = jnp.arange(1.0, 5.0)[None]

    def loss(p, scales):
        p = adamr.trust.scaled_params(p, s, scales)
        return jnp.sum((x @ p["w"] + p["b"][None]) ** 2)

    grad, scale_grad = jax.grad(loss, argnums=(0, 1))(p, adamr.trust.init_scales(s))
    plain = jax.grad(lambda p: jnp.sum((x @ p["w"] + p["b"][None]) ** 2))(p)
    np.testing.assert_allclose(grad["w"], plain["w"], rtol=1e-6)
    assert scale_grad[0][0] is None
    # dL/dQ = Bᵀ (dL/dW_eff) (Bᵀ W)ᵀ, and leaves in order: b before w.
    expected = plain["w"][:2] @ p["w"][:2].T
    np.testing.assert_allclose(scale_grad[0][1][0, 0, :2, :2], expected, rtol=1e-6)
    assert not np.any(scale_grad[0][1][0, 0, 2]) and not np.any(
        scale_grad[0][1][0, 0, :, 2]
    )


# Relaxing ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 6),
    threshold=st.sampled_from([0.5, 0.8, 0.95]),
    outputs=st.integers(1, 8),
)
def test_relaxing_subspace_equals_the_greedy_search(seed, rank, threshold, outputs):
    rng = np.random.default_rng(seed)
    memory = adamr.make_subspace(dense(7, outputs), orthonormal(seed, 7, rank))
    g = (rng.normal(size=(7, outputs)) * 0.5 ** np.arange(7)[:, None]).astype("f4")
    got = columns(adamr.trust.relaxing_subspace(memory, g, threshold=threshold))
    m = columns(memory)
    expected = reference.relaxing_subspace(m, np.float64(g), 0.97, threshold)
    assert got.shape == expected.shape
    np.testing.assert_allclose(span(got), span(expected), atol=1e-4)
    np.testing.assert_allclose(span(m) @ got, got, atol=1e-6)
    np.testing.assert_allclose(got.T @ got, np.eye(got.shape[1]), atol=1e-6)


def test_t7_above_threshold_1_nothing_is_relaxed():
    p = dense(4)
    memory = unit_subspace(p, 0, 1, 2, 3)
    g = jax.random.normal(jax.random.key(0), (4, 3))
    relaxed = adamr.trust.relaxing_subspace(memory, g, threshold=1.0 + 1e-6)
    assert int(adamr.subspaces.rank(relaxed)[0]) == 0
    # In a full space every gradient direction is there to be relaxed.
    full = adamr.trust.relaxing_subspace(memory, g, energy=1.0, threshold=0.999)
    assert int(adamr.subspaces.rank(full)[0]) == 3


def test_t7_folding_leaves_the_function_unchanged():
    p = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.ones(3)}
    s = adamr.make_subspace(p, {"w": orthonormal(0, 4, 2), "b": None}, max_rank=3)
    noise = jax.random.normal(jax.random.key(1), (1, 1, 3, 3))
    scales = jax.tree.map(lambda q: q + noise, adamr.trust.init_scales(s))
    x = jax.random.normal(jax.random.key(2), (5, 4))

    def network(p, scales):
        p = adamr.trust.scaled_params(p, s, scales)
        return x @ p["w"] + p["b"][None]

    folded, fresh = adamr.trust.fold_scales(p, s, scales)
    np.testing.assert_array_equal(network(folded, fresh), network(p, scales))
    assert float(jnp.max(jnp.abs(folded["w"] - p["w"]))) > 0.1
    assert float(adamr.trust.scale_penalty(fresh)) == 0.0


def test_a_second_search_keeps_the_first_and_adds_behind_it():
    memory = unit_subspace(dense(5), 0, 1, 2)
    g = np.zeros((5, 2), np.float32)
    g[0, 0] = 1.0
    first = adamr.trust.relaxing_subspace(memory, g)
    g[:, 1] = [1.0, 1.0, 0.0, 0.0, 0.0]
    second = adamr.trust.relaxing_subspace(memory, g, start=first)
    u = np.asarray(second.bases[0])[:, 0]
    np.testing.assert_array_equal(u[:, 0], np.asarray(first.bases[0])[:, 0, 0])
    np.testing.assert_allclose(np.abs(u[:, 1]), np.eye(5)[1], atol=1e-6)
    assert int(adamr.subspaces.rank(second)[0]) == 2
    again = adamr.trust.relaxing_subspace(memory, g, start=second)
    np.testing.assert_array_equal(again.bases[0], second.bases[0])


def test_relaxing_stacked_layers_and_bad_gradients():
    p = {"b": jnp.zeros(3), "stack": jnp.zeros((3, 4, 3))}
    eye = np.broadcast_to(np.eye(4, dtype=np.float32)[:, :2], (3, 4, 2))
    memory = adamr.make_subspace(p, {"b": None, "stack": eye}, max_rank=3)
    g = np.zeros((3, 4, 3), np.float32)
    g[0, 1], g[1, 3], g[2] = 1.0, 1.0, np.nan
    tree = {"b": jnp.ones(3), "stack": g}
    relaxed = jax.jit(adamr.trust.relaxing_subspace)(memory, tree)
    np.testing.assert_array_equal(adamr.subspaces.rank(relaxed)[1], [1, 0, 0])
    np.testing.assert_allclose(
        np.abs(relaxed.bases[1][0, :, 0, 0]), np.eye(4)[1], atol=1e-6
    )
    missing = adamr.trust.relaxing_subspace(memory, {"b": jnp.ones(3), "stack": None})
    assert not np.any(missing.bases[1])


def test_penalty_is_beta_times_the_squared_distance_to_the_identity():
    s = adamr.empty_subspace({"w": dense(4), "stack": jnp.zeros((2, 4, 3))}, max_rank=2)
    scales = adamr.trust.init_scales([s, s])
    assert float(adamr.trust.scale_penalty(scales)) == 0.0
    moved = jax.tree.map(lambda q: q + 0.5, scales)
    assert float(adamr.trust.scale_penalty(moved, 3.0)) == 3 * 2 * 3 * 4 * 0.25


# Errors -----------------------------------------------------------------------------


def test_errors_name_the_argument_and_both_sides():
    p = {"w": dense(4)}
    s = adamr.empty_subspace(p)

    def fails(match, call, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)

    trust, own = adamr.trust.trust_region, adamr.trust.grow_task_subspace
    fails("count must be at least 1", trust, [s], p, count=0)
    fails("at least one task", trust, [], p)
    small = adamr.empty_subspace(p, max_rank=2)
    fails(r"bases_per_task\[1\] has shapes", trust, [s, small], p)
    fails(r"bases_per_task\[0\].*does not fit", trust, [s], {"w": dense(5)})
    fails("threshold must lie", own, s, {"w": np.ones((2, 4))}, threshold=2.0)
    fails(r"samples has shape \(2, 5\) at w", own, s, {"w": np.ones((2, 5))})
    fails("got 0 .*expected 1", own, s, {})
    scales = adamr.trust.init_scales(s)
    fails(
        "entries for 1 subspaces, expected 2",
        adamr.trust.scaled_params,
        p,
        [s, s],
        scales,
    )
    fails("scales has 2 leaves", adamr.trust.scaled_params, p, s, [scales[0] * 2])
    wrong = adamr.trust.init_scales(small)
    fails(r"scale has shape \(1, 1, 2, 2\)", adamr.trust.scaled_params, p, s, wrong)
    fails("does not fit a leaf", adamr.trust.scaled_params, {"w": dense(5)}, s, scales)
    relax = adamr.trust.relaxing_subspace
    fails("energy must lie", relax, s, p, energy=1.5)
    fails("start has shapes", relax, s, p, start=small)
    fails("memory.*does not fit", relax, s, {"w": dense(5)})
