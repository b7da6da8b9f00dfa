"""Constraints and surgery: closed forms, float64 twins, properties, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamr import empty_subspace
from adamr.modifiers.constraint import agem_constraint, gem_constraint
from adamr.modifiers.dual import solve_diagonal, solve_exact
from adamr.modifiers.projection import project_out
from adamr.modifiers.surgery import cagrad, pcgrad
from adamr.protection.constrained import constrained_second_moment
from adamr.routing.carrier import route_first_moment
from adamr.routing.merge import faithful_second_moment
from tests.references import constraint as reference

SHAPES = {"a": {"bias": (4,), "kernel": (3, 4)}, "scale": (), "stack": (2, 3, 2)}
SIZE = 29


def vector_tree(x, lead=()):
    """A tree like SHAPES out of an array (*lead, SIZE)."""
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    cuts = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
    parts = np.split(np.asarray(x, np.float32), cuts, axis=-1)
    leaves = [
        jnp.asarray(part.reshape((*lead, *s)))
        for part, s in zip(parts, shapes, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def flat(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def draw(seed, tasks, size=SIZE):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=size).astype(np.float32)
    rows = rng.normal(size=(tasks, size)).astype(np.float32)
    return g, rows


def apply(tx, g, **evidence):
    once = jax.jit(lambda g, evidence: tx.update(g, tx.init(g), **evidence))
    return once(g, evidence)


def gem_of(g, rows, *args, **kwargs):
    tx = gem_constraint(*args, **kwargs)
    tree = vector_tree(rows, rows.shape[:-1])
    return flat(apply(tx, vector_tree(g), memory_gradients=tree)[0])


# Closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [1, 2, 5])
def test_average_divides_the_strength_by_the_rows_that_count(seen):
    rng = np.random.default_rng(seen)
    rows, g = rng.normal(size=(5, 8)), rng.normal(size=8)
    rows[0] -= rows[0] @ g / (g @ g) * g + 0.1 * g  # one violation at least
    tx = gem_constraint(0.3, average=True, regularization=1e-3)
    memory, mask = jnp.array(rows, jnp.float32), jnp.arange(5) < seen
    update = jax.jit(lambda g: apply(tx, g, memory_gradients=memory, memory_mask=mask))
    step, _ = update(jnp.array(g, jnp.float32))
    expected = reference.gem(g, rows[:seen], 0.3 / seen, 1e-3)
    np.testing.assert_allclose(step, expected, atol=1e-5)


@pytest.mark.parametrize(
    "rows, g, strength, expected",
    [
        (np.eye(2), (1, -2), 0.0, (1, -0.001998)),
        (np.eye(2), (1, -2), 0.5, (1.5, -0.001998)),
        ([[1, 0], [1, 1]], (-1, 0.5), 0.0, (-0.000999, 0.5)),
        ([[1, 0], [1, 1]], (-1, 0.5), 0.5, (0, 1)),
    ],
)
def test_t10_gem(rows, g, strength, expected):
    tx = gem_constraint(strength, regularization=1e-3)
    g = jnp.array(g, jnp.float32)
    step, state = apply(tx, g, memory_gradients=jnp.array(rows, jnp.float32))
    np.testing.assert_allclose(step, expected, atol=2e-6)
    assert state.violated == int(np.sum(np.asarray(rows) @ g < 0))


@pytest.mark.smoke
def test_t10_dual():
    usable = jnp.ones(2, bool)
    b = jnp.array([1.0, -2.0])
    v = solve_exact(jnp.eye(2), b, 0.0, usable, 1e-3)
    np.testing.assert_allclose(v, [0, 1.998002], rtol=1e-6)
    v = solve_exact(jnp.eye(2), b, 0.5, usable, 1e-3)
    np.testing.assert_allclose(v, [0.5, 1.998002], rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_t10_no_violation_is_the_identity_bit_for_bit(strength):
    g, rows = draw(0, 3)
    rows *= np.sign(rows @ g)[:, None]
    tx = gem_constraint(strength)
    step, state = apply(
        tx, vector_tree(g), memory_gradients=vector_tree(rows, rows.shape[:1])
    )
    np.testing.assert_array_equal(flat(step), g.astype(np.float64))
    assert state.violated == 0


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 1.0, 1e4])
def test_remaining_violation_does_not_depend_on_the_norm(norm):
    g, r = jnp.array([1.0, -2.0]), norm * jnp.array([[0.0, 1.0]])
    step, _ = apply(gem_constraint(0.0, regularization=1e-3), g, memory_gradients=r)
    np.testing.assert_allclose(step[1] / g[1], 1e-3 / 1.001, rtol=1e-3)


@pytest.mark.smoke
def test_t11_agem():
    g = jnp.array([1.0, -2.0])
    step, _ = apply(agem_constraint(), g, memory_gradient=jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(step, [1.0, 0.0])
    for r in ([0.3, 0.1], [0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0]):
        step, state = apply(agem_constraint(), g, memory_gradient=jnp.array(r))
        np.testing.assert_array_equal(step, g)
        assert state.violated == 0


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("constraint", ["agem", "gem"])
def test_t11_in_the_metric(constraint, guard):
    """D = diag(.1, 10), m = (1, −2): plain −14.85, in the metric (.29703, −.29703)."""
    r = jnp.array([1.0, 1.0])
    if constraint == "agem":
        inner, extra = agem_constraint(), {"memory_gradient": r}
    else:
        inner = gem_constraint(0.0, regularization=0.0)
        extra = {"memory_gradients": r[None]}
    tx = constrained_second_moment(inner, b1=0.0, eps=0.0, guard=guard)
    plain = faithful_second_moment(b1=0.0, eps=0.0)
    m = jnp.array([1.0, -2.0])

    def with_metric(tx):
        """The state after which v̂ = (10², .1²) and the momentum is m."""
        state = tx.init(m)
        count = jnp.int32(10**6)  # no bias left to correct
        nu = (jnp.array([100.0, 0.01]) - 0.001 * m**2) / 0.999
        return optax.tree.set(state, count=count, nu=nu)

    route = route_first_moment(agem_constraint())
    g, _ = route.update(m, route.init(m), memory_gradient=r)
    if guard:
        # The guard would feed v with the modified gradient; here it is the metric's.
        g = g._replace(second=jnp.zeros(2), raw=m, first=g.first)
    plain_step, _ = faithful_second_moment(b1=0.0, eps=0.0, guard=False).update(
        g._replace(second=m), with_metric(plain)
    )
    np.testing.assert_allclose(plain_step @ r, -14.85, rtol=1e-4)

    route = route_first_moment(optax.identity())
    raw, _ = route.update(m, route.init(m))
    step, _ = tx.update(raw, with_metric(tx), **extra)
    np.testing.assert_allclose(step, [0.29703, -0.29703], atol=2e-5)


def test_t12_reductions():
    g, rows = draw(3, 4)
    g = g - 2 * rows.sum(axis=0)
    whole = gem_of(g, rows, 0.3)
    same = gem_of(g, rows, 0.3, partition=lambda path, shape: "one")
    np.testing.assert_array_equal(whole, same)
    parts = gem_of(g, rows[:, None], 0.3)  # one part of each task's memory
    np.testing.assert_array_equal(whole, parts)
    halves = gem_of(g, rows.reshape(2, 2, SIZE), 0.3)  # two tasks in two parts each
    np.testing.assert_array_equal(whole, halves)
    tasks = np.ones((3, SIZE), np.float32)
    g = np.where(np.arange(SIZE) < 4, -3.0, 1.0).astype(np.float32)  # block "a/bias"
    assert np.all(tasks @ g >= 0)
    np.testing.assert_array_equal(gem_of(g, tasks, 0.0), g)
    step = gem_of(g, tasks, 0.0, partition="leaf")
    np.testing.assert_array_equal(step[4:], g[4:])
    np.testing.assert_allclose(step[:4], 0.0, atol=3e-5)


def test_t12_blocks_by_a_function():
    g, r = jnp.array([1.0, 1, -3, 1]), jnp.ones((1, 4))
    tree = {"b1": g[:2], "b2": g[2:3], "b3": g[3:]}
    memory = {"b1": r[:, :2], "b2": r[:, 2:3], "b3": r[:, 3:]}
    tx = gem_constraint(0.0, regularization=0.0)
    step, _ = apply(tx, tree, memory_gradients=memory)
    np.testing.assert_array_equal(step["b2"], tree["b2"])
    tx = gem_constraint(
        0.0, regularization=0.0, partition=lambda path, shape: path == "b1"
    )
    step, state = apply(tx, tree, memory_gradients=memory)
    np.testing.assert_array_equal(step["b1"], tree["b1"])
    np.testing.assert_allclose((step["b2"], step["b3"]), [[-2], [2]], atol=1e-5)
    assert state.violated == 1


@pytest.mark.smoke
def test_t13_pcgrad():
    tasks = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    step, _ = apply(pcgrad(), tasks.sum(axis=0), task_gradients=tasks)
    np.testing.assert_allclose(step, [0.5, 1.5], rtol=1e-6)
    step, _ = apply(pcgrad(reduction="mean"), tasks.sum(axis=0), task_gradients=tasks)
    np.testing.assert_allclose(step, [0.25, 0.75], rtol=1e-6)


def test_cagrad_with_c_0_is_the_mean_gradient():
    g, tasks = draw(4, 3)
    step, _ = apply(
        cagrad(0.0), vector_tree(g), task_gradients=vector_tree(tasks, (3,))
    )
    np.testing.assert_allclose(flat(step), tasks.mean(axis=0), rtol=1e-5, atol=1e-6)


# Twins -------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("tasks", [1, 5, 20])
def test_gem_equals_the_float64_twin(tasks, strength):
    for seed in range(3):
        g, rows = draw(seed, tasks)
        rows[0] = np.where(seed == 0, -g, rows[0])
        expected = reference.gem(*map(np.float64, (g, rows)), strength, 1e-3)
        found = gem_of(g, rows, strength, regularization=1e-3)
        # Where the only row is −g nearly all of g cancels: rounding is that of g.
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(g).max())


def test_diagonal_solver():
    """Exact for orthogonal rows; for others v_k = max(γ, −b_k / ((1 + ε) n_k²))."""
    rows = np.diag([1.0, 2.0, 3.0]).astype(np.float32)
    g = jnp.array([1.0, -2.0, -0.3])
    exact = gem_constraint(0.1, regularization=1e-3)
    diagonal = gem_constraint(0.1, regularization=1e-3, solver="diagonal")
    a = apply(exact, g, memory_gradients=jnp.array(rows))[0]
    b = apply(diagonal, g, memory_gradients=jnp.array(rows))[0]
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    g, rows = draw(5, 4)
    v = np.maximum(0.1, -(rows @ g) / (1.001 * (rows**2).sum(axis=1)))
    found = gem_of(g, rows, 0.1, regularization=1e-3, solver="diagonal")
    np.testing.assert_allclose(found, g + rows.T @ v, rtol=1e-4, atol=1e-5)
    squares, usable = jnp.ones(2), jnp.array([True, False])
    v = solve_diagonal(squares, jnp.array([-2.0, -2.0]), 0.0, usable, 0.0)
    np.testing.assert_array_equal(v, [2.0, 0.0])


@pytest.mark.parametrize("tasks", [2, 4, 7])
def test_pcgrad_equals_the_float64_twin(tasks):
    for seed in range(3):
        g, rows = draw(seed, tasks)
        found, _ = apply(
            pcgrad(), vector_tree(g), task_gradients=vector_tree(rows, (tasks,))
        )
        expected = reference.pcgrad(np.float64(rows))
        np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=2e-5)


def test_pcgrad_random_order_is_one_of_the_orders_and_changes():
    """Three tasks: every i has 2 orders of the others, hence 8 results."""
    g, rows = draw(11, 3, size=2)
    rows = np.array([[1, 0.1], [-0.6, 0.9], [-0.5, -1]], np.float32)
    orders = [(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)]
    allowed = np.array(
        [
            reference.pcgrad(np.float64(rows), (a, b, c))
            for a in orders[0]
            for b in orders[1]
            for c in orders[2]
        ]
    )
    tx = pcgrad(key=jax.random.key(0))
    update, state = jax.jit(tx.update), tx.init(jnp.array(g))
    found = []
    for _ in range(20):
        step, state = update(jnp.array(g), state, task_gradients=jnp.array(rows))
        distance = np.abs(allowed - np.asarray(step)).max(axis=1)
        assert distance.min() < 1e-5
        found.append(int(distance.argmin()))
    assert len(set(found)) > 2


@pytest.mark.parametrize("c", [0.2, 0.9])
def test_cagrad_equals_the_float64_twin(c):
    for seed, tasks in ((0, 6), (2, 6)):
        g, rows = draw(seed, tasks)
        rows = rows + np.float32(0.3) * g  # so that 0 is not in their hull
        rows *= np.float32([0.1, 1, 10, 2, 1, 0.5])[:tasks, None]
        found, _ = apply(
            cagrad(c, rescale=None),
            vector_tree(g),
            task_gradients=vector_tree(rows, (tasks,)),
        )
        found, expected = flat(found), reference.cagrad(np.float64(rows), c)
        scale = np.linalg.norm(expected)
        np.testing.assert_allclose(found, expected, atol=2e-3 * scale)
        worst = (np.float64(rows) @ np.stack([found, expected]).T).min(axis=0)
        assert worst[0] >= worst[1] - 1e-4 * scale * np.linalg.norm(rows, axis=1).max()
        for rescale, factor in (("square", 1 + c * c), ("linear", 1 + c)):
            scaled, _ = apply(
                cagrad(c, rescale=rescale),
                vector_tree(g),
                task_gradients=vector_tree(rows, (tasks,)),
            )
            np.testing.assert_allclose(flat(scaled) * factor, found, atol=1e-5 * scale)


@pytest.mark.parametrize("strength, share", [(0.0, None), (0.5, "fan_in")])
def test_constrained_steps_equal_the_float64_twin(strength, share):
    tx = optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(
            gem_constraint(strength, regularization=1e-3),
            b2=0.99,
            guard=False,
            share=share,
        ),
    )
    plain = optax.chain(
        route_first_moment(optax.identity()),
        faithful_second_moment(b2=0.99, guard=False, share=share),
    )
    state = tx.init(vector_tree(np.zeros(SIZE)))
    plain_state = plain.init(vector_tree(np.zeros(SIZE)))
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    m, nonzero = 0.0, 0
    for t in range(1, 6):
        g, rows = draw(t, 4)
        m = 0.9 * m + 0.1 * np.float64(g)
        g, memory = vector_tree(g), vector_tree(rows, (4,))
        step, state = update(g, state, memory_gradients=memory)
        adam, plain_state = plain_update(g, plain_state)
        m_hat = m / (1 - 0.9**t)
        d = flat(adam) / m_hat  # the diagonal that Adam used
        expected = reference.in_metric(d, m_hat, np.float64(rows), strength)
        np.testing.assert_allclose(
            flat(step), expected, atol=2e-4 * np.abs(expected).max()
        )
        nonzero += np.abs(flat(step) - flat(adam)).max() > 1e-2
    assert nonzero >= 3


# Properties --------------------------------------------------------------------------


@functools.lru_cache
def jitted_dual(tasks):
    return jax.jit(solve_exact)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    tasks=st.sampled_from([2, 20, 50]),
    kind=st.sampled_from(["random", "few dimensions", "collinear", "twice", "against"]),
    exponent=st.floats(-4, 4),
    strength=st.sampled_from([0.0, 0.5]),
    regularization=st.sampled_from([1e-3, 1e-5]),
)
def test_kkt_residual(seed, tasks, kind, exponent, strength, regularization):
    rng = np.random.default_rng(seed)
    size = 100
    g = rng.normal(size=size)
    rows = rng.normal(size=(tasks, size))
    if kind == "few dimensions":
        few = max(1, tasks // 3)
        rows = rng.normal(size=(tasks, few)) @ rng.normal(size=(few, size))
    elif kind == "collinear":
        rows = rng.normal(size=(1, size)) + 1e-3 * rows
    elif kind == "twice":
        rows = np.repeat(rows, 2, axis=0)[:tasks]
    elif kind == "against":
        rows = -g + 0.3 * rows
    g = g / np.linalg.norm(g) * 10**exponent
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows * 10 ** rng.uniform(-4, 4, size=(tasks, 1))
    # The program itself is what float32 products make of the gradients.
    gram = np.asarray(
        jnp.matmul(*map(jnp.float32, (rows, rows.T)), precision="highest")
    )
    inner = np.float32(rows @ g)
    v = jitted_dual(tasks)(gram, inner, strength, jnp.ones(tasks, bool), regularization)
    epsilon = max(regularization, 2e-7 * tasks)
    gram, inner, v = map(np.float64, (gram, inner, v))
    assert np.all(v >= strength - 1e-6 * np.abs(v).max())
    assert reference.kkt_residual(gram, inner, v, strength, epsilon) <= 1e-4


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.floats(-4, 4),
    kind=st.sampled_from([(None, True), (None, False), ("leaf", False)]),
)
def test_the_step_that_adam_takes_is_feasible(seed, exponent, kind):
    """⟨Δ, g_k⟩ ≥ 0 to rounding, for gradients whose coordinates differ in scale.

    By leaf only two tasks: five would leave nothing of a block of four numbers.
    """
    partition, guard = kind
    tasks = 2 if partition else 5
    rng = np.random.default_rng(seed)
    scales = np.float32(10 ** (exponent + rng.uniform(-1.5, 1.5, size=SIZE)))
    state, update = feasible_chain(guard, partition)
    cuts = [0, 4, 16, 17, 29] if partition else [0, SIZE]
    for t in range(3):
        g, rows = draw(seed + t, tasks)
        g, rows = g * scales, rows * scales
        memory = vector_tree(rows, (tasks,))
        step, state = update(vector_tree(g), state, memory_gradients=memory)
        step, rows = flat(step), np.float64(rows)
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            part = slice(start, stop)
            inner = rows[:, part] @ step[part]
            # Adam's steps are of size 1 and here never above 3.
            assert np.all(inner >= -3e-5 * np.abs(rows[:, part]).sum(axis=1))


@functools.cache
def feasible_chain(guard, partition):
    tx = optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(
            gem_constraint(0.0, partition=partition), b2=0.99, guard=guard
        ),
    )
    return tx.init(vector_tree(np.zeros(SIZE))), jax.jit(tx.update)


@functools.cache
def gram_based():
    chains = [
        (gem_constraint(0.5), "memory_gradients"),
        (pcgrad(), "task_gradients"),
        (cagrad(), "task_gradients"),
        (EVERY["constrained_gem"](), "memory_gradients"),
    ]

    def once(tx, name, g, rows):
        return tx.update(g, tx.init(g), **{name: rows})[0]

    return [jax.jit(functools.partial(once, *each)) for each in chains]


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_leaf_order_and_splitting_a_leaf_change_nothing(seed):
    g, rows = draw(seed, 4)
    order, cut = np.random.default_rng(seed).permutation(SIZE), 7
    g, rows = jnp.array(g), jnp.array(rows)
    for run in gram_based():
        whole = flat(run([g], [rows]))
        split = flat(run([g[:cut], g[cut:]], [rows[:, :cut], rows[:, cut:]]))
        swapped = flat(run([g[order]], [rows[:, order]]))
        scale = np.abs(whole).max()
        np.testing.assert_allclose(split, whole, atol=2e-5 * scale)
        np.testing.assert_allclose(swapped, whole[order], atol=2e-5 * scale)


EVERY = {
    "pcgrad": lambda: pcgrad(key=jax.random.key(1)),
    "cagrad": lambda: cagrad(),
    "constrained_gem": lambda: optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(gem_constraint(0.0)),
    ),
}
each = pytest.mark.parametrize("name", EVERY)


def evidence_for(seed):
    memory = vector_tree(draw(seed, 4)[1], (4,))
    return {"memory_gradients": memory, "task_gradients": memory}


@each
def test_vmap_over_seeds_equals_loop(name):
    """Each seed with memories of its own, so that each needs its own rounds."""
    tx = EVERY[name]()
    gs = [vector_tree(draw(seed, 1)[0]) for seed in range(6)]
    memories = [evidence_for(seed) for seed in range(6)]

    def one_step(g, memory):
        return tx.update(g, tx.init(g), **memory)[0]

    g, memory = jax.tree.map(lambda *x: jnp.stack(x), *zip(gs, memories, strict=True))
    together = jax.jit(jax.vmap(one_step))(g, memory)
    alone = jax.jit(one_step)
    for i, each in enumerate(zip(gs, memories, strict=True)):
        expected = flat(alone(*each))
        found = flat(jax.tree.map(lambda x, i=i: x[i], together))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["constrained_gem"])
def test_a_masked_subtree_is_left_out_of_the_products(name):
    """Extra arguments stay whole where optax.masked cuts the updates."""
    tx, g, memory = EVERY[name](), vector_tree(draw(7, 1)[0]), evidence_for(7)
    wrapped = optax.masked(tx, {"a": False, "scale": True, "stack": True})
    step, _ = wrapped.update(g, wrapped.init(g), **memory)
    drop = lambda tree: {k: x for k, x in tree.items() if k != "a"}  # noqa: E731
    cut = {k: drop(x) for k, x in memory.items()}
    expected, _ = tx.update(drop(g), tx.init(drop(g)), **cut)
    np.testing.assert_allclose(flat(drop(step)), flat(expected), rtol=1e-6)
    np.testing.assert_array_equal(flat(step["a"]), flat(g["a"]))


def test_new_tasks_do_not_recompile_and_unseen_ones_do_not_count():
    tx = gem_constraint(0.0)
    update = jax.jit(tx.update)
    g, rows = draw(9, 5)
    state = tx.init(vector_tree(g))
    for seen in range(6):
        garbage = np.where(np.arange(5)[:, None] < seen, rows, np.nan)
        mask = jnp.arange(5) < seen
        step, state = update(
            vector_tree(g),
            state,
            memory_gradients=vector_tree(garbage, (5,)),
            memory_mask=mask,
        )
        expected = reference.gem(np.float64(g), np.float64(rows[:seen]), 0.0, 1e-9)
        np.testing.assert_allclose(flat(step), expected, rtol=1e-4, atol=1e-5)
    assert update._cache_size() == 1


# Degenerate and bad input ------------------------------------------------------------


@pytest.mark.parametrize("solver", ["exact", "diagonal"])
@pytest.mark.parametrize("partition", [None, "leaf"])
@pytest.mark.parametrize("bad", ["zero", "nan", "inf", "huge"])
def test_degenerate_memory_gradients_are_no_constraints(solver, partition, bad):
    g, rows = draw(6, 4)
    value = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "huge": 1e25}[bad]
    rows[0] = -g
    tx = gem_constraint(0.2, solver=solver, partition=partition)
    update, state = jax.jit(tx.update), tx.init(vector_tree(g))

    def run(rows, mask):
        evidence = {"memory_gradients": vector_tree(rows, (4,)), "memory_mask": mask}
        return flat(update(vector_tree(g), state, **evidence)[0])

    expected = run(rows, jnp.array([True, False, True, True]))
    assert np.abs(expected - g).max() > 0.1
    rows[1] = value
    found = run(rows, jnp.ones(4, bool))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    rows[:] = value
    np.testing.assert_array_equal(run(rows, jnp.ones(4, bool)), g)


def test_collinear_and_opposite_memory_gradients():
    g, _ = draw(8, 1)
    down = np.stack([-g] * 5)
    np.testing.assert_allclose(gem_of(g, down, 0.0), 0.0, atol=1e-4)
    both = np.stack([g, -g, 2 * g])
    np.testing.assert_allclose(gem_of(g, both, 0.0), 0.0, atol=1e-4)


def test_nan_in_the_gradient_passes_through():
    g, rows = draw(1, 3)
    g[0] = np.nan
    found = gem_of(g, rows)
    assert np.isnan(found[0]) and np.all(np.isfinite(found[1:]))


def test_degenerate_task_gradients():
    zero, one = np.zeros(SIZE, np.float32), draw(0, 1)[0]
    for tx in (pcgrad(), cagrad(0.5, rescale=None)):
        for rows in (np.stack([zero, zero]), np.stack([one, zero]), one[None]):
            tree = vector_tree(rows, rows.shape[:1])
            step, _ = apply(tx, vector_tree(one), task_gradients=tree)
            assert np.all(np.isfinite(flat(step)))
        rows = np.stack([one, np.full_like(one, np.nan)])
        step, _ = apply(
            tx,
            vector_tree(one),
            task_gradients=vector_tree(rows, (2,)),
            task_mask=jnp.array([True, False]),
        )
        expected, _ = apply(
            tx, vector_tree(one), task_gradients=vector_tree(one[None], (1,))
        )
        np.testing.assert_allclose(flat(step), flat(expected), rtol=1e-5, atol=1e-6)
    opposite = vector_tree(np.stack([one, -one]), (2,))
    step, _ = apply(pcgrad(), vector_tree(zero), task_gradients=opposite)
    np.testing.assert_allclose(flat(step), 0.0, atol=1e-6)


@pytest.mark.parametrize("guard, bound", [(True, 30.0), (False, None)])
def test_a_coordinate_that_the_new_task_never_touches(guard, bound):
    """Unguarded, it would carry the correction in steps of hundreds of Adam's."""
    rng = np.random.default_rng(0)
    size = 10_000
    g = 1e-3 * rng.normal(size=size).astype(np.float32)
    g[0] = 0.0
    r = 0.1 * rng.normal(size=size).astype(np.float32) * 1e-3 - g
    r[0] = 1e-4
    tx = optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(agem_constraint(), guard=guard),
    )
    step, _ = apply(tx, jnp.array(g), memory_gradient=jnp.array(r))
    assert np.float64(r) @ np.float64(step) >= -1e-4 * np.abs(r * step).sum()
    if guard:
        assert np.abs(step).max() < bound
    else:
        assert np.abs(step).max() > 300


def test_identity_in_the_metric_is_adam_bit_for_bit():
    g, rows = draw(0, 3)
    rows = np.abs(rows) * np.sign(g)
    tx = optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(gem_constraint(0.5)),
    )
    adam = optax.scale_by_adam()
    state, adam_state = tx.init(vector_tree(g)), adam.init(vector_tree(g))
    for _ in range(3):
        memory = vector_tree(rows, (3,))
        step, state = tx.update(vector_tree(g), state, memory_gradients=memory)
        expected, adam_state = adam.update(vector_tree(g), adam_state)
        np.testing.assert_array_equal(flat(step), flat(expected))


def test_errors_say_what_to_pass():
    g, rows = draw(0, 3)
    tree, memory = vector_tree(g), vector_tree(rows, (3,))
    for tx, name in [
        (gem_constraint(), "memory_gradients"),
        (agem_constraint(), "memory_gradient"),
        (pcgrad(), "task_gradients"),
        (cagrad(), "task_gradients"),
    ]:
        with pytest.raises(ValueError, match=f"needs {name}.*pass update"):
            tx.update(tree, tx.init(tree))
        state = tx.init(tree)
        with pytest.raises(ValueError, match=f"{name} must be a tree like"):
            tx.update(tree, state, **{name: {"other": memory["scale"]}})
        transposed = {**memory, "scale": jnp.ones((3, 2))}
        with pytest.raises(ValueError, match=f"{name} at .*expected"):
            tx.update(tree, state, **{name: transposed})
    tx = gem_constraint()
    with pytest.raises(ValueError, match=r"memory_mask has shape \(4,\).*larger"):
        tx.update(tree, tx.init(tree), memory_gradients=memory, memory_mask=jnp.ones(4))
    for number in (-0.1, np.float32(-0.1), jnp.array(-0.1)):
        with pytest.raises(ValueError, match="memory_strength must not be negative"):
            gem_constraint(number)
    with pytest.raises(ValueError, match="solver is 'fast'"):
        gem_constraint(solver="fast")
    with pytest.raises(ValueError, match="partition is 'layer'"):
        gem_constraint(partition="layer")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        pcgrad(reduction="max")
    with pytest.raises(ValueError, match="rescale is 'cube'"):
        cagrad(rescale="cube")
    wrong = constrained_second_moment(project_out(empty_subspace(tree)))
    with pytest.raises(TypeError, match="takes gem_constraint"):
        wrong.init(tree)
    right = constrained_second_moment(gem_constraint())
    with pytest.raises(TypeError, match="takes a Routed"):
        right.update(tree, right.init(tree), memory_gradients=memory)
