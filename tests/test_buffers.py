"""Memories: exact inclusion probabilities, order semantics, and life under jit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamr import buffers

KEY = jax.random.key(0)
SCALAR = jnp.zeros([], jnp.int32)
ADD = jax.jit(buffers.add_to_reservoir)
SAMPLE = jax.jit(buffers.sample, static_argnums=1)
M, N, SEEDS = 3, 8, 20_000
# 99.9 % quantiles of chi-square with 7 and 55 degrees of freedom.
CHI7, CHI55 = 24.32, 93.17


def marginal_statistic(kept):
    """χ² with N − 1 degrees of freedom, for draws without replacement."""
    p = M / N
    counts = np.bincount(kept.ravel(), minlength=N)
    variance = len(kept) * p * (1 - p) * N / (N - 1)
    return counts / len(kept), np.sum((counts - len(kept) * p) ** 2) / variance


@pytest.fixture(scope="module")
def kept():
    """Items held after N insertions, one row per seed."""

    def run(key):
        buffer = buffers.empty_reservoir(M, SCALAR, key)
        return buffers.add_to_reservoir(buffer, jnp.arange(N)).items

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, SEEDS)))


def test_t19_every_item_has_the_same_inclusion_probability(kept):
    shares, statistic = marginal_statistic(kept)
    np.testing.assert_allclose(shares, 0.375, atol=0.015)
    assert statistic < CHI7


def test_t19_every_subset_is_equally_likely(kept):
    subsets = list(itertools.combinations(range(N), M))
    found = [tuple(row) for row in np.sort(kept, axis=1)]
    assert set(found) == set(subsets)
    counts = np.array([found.count(s) for s in subsets])
    expected = SEEDS / len(subsets)
    assert np.sum((counts - expected) ** 2) / expected < CHI55


def test_t19_would_catch_the_off_by_one():
    """agem draws j from {0, …, n − 1}: 2/7 for the first three, 3/7 for the rest."""
    rng = np.random.default_rng(0)
    kept = np.tile(np.arange(M), (SEEDS, 1))
    for n in range(M, N):
        j = rng.integers(0, n, SEEDS)
        rows = np.flatnonzero(j < M)
        kept[rows, j[rows]] = n
    shares, statistic = marginal_statistic(kept)
    np.testing.assert_allclose(shares, [2 / 7] * 3 + [3 / 7] * 5, atol=0.015)
    assert statistic > 40 * CHI7


def nested(n):
    return {"x": jnp.arange(2.0 * n).reshape(n, 2), "y": (jnp.arange(n),)}


EXAMPLE = jax.tree.map(lambda x: x[0], nested(1))


def rows(tree, start, stop):
    return jax.tree.map(lambda x: x[start:stop], tree)


def assert_same(a, b):
    a, b = (x._replace(key=jax.random.key_data(x.key)) for x in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["reservoir", "ring"])
@pytest.mark.parametrize("capacity", [1, 30])
def test_a_batch_is_stored_as_its_items_one_by_one(kind, capacity):
    data = nested(40)
    if kind == "reservoir":
        start = buffers.empty_reservoir(capacity, EXAMPLE, KEY)
        add = ADD
    else:
        start = buffers.empty_ring(3, capacity, EXAMPLE, KEY)
        add = jax.jit(lambda buffer, batch: buffers.add_to_ring(buffer, batch, 1))
    results = []
    for size in (1, 20):
        buffer = start
        for begin in range(0, 40, size):
            buffer = add(buffer, rows(data, begin, begin + size))
        results.append(buffer)
    for other in results[1:]:
        assert_same(results[0], other)
    # The leaves of an item stay together.
    items = results[0].items
    x, y = items["x"][buffers.filled(results[0])], items["y"][0]
    np.testing.assert_array_equal(x[:, 0], 2 * y[buffers.filled(results[0])])


def test_a_reservoir_in_plain_python():
    buffer = buffers.empty_reservoir(M, SCALAR, KEY)
    slots = [0] * M

    @jax.vmap
    def drawn_at(n):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 0), n)
        return jax.random.randint(key, (), 0, n + 1)

    drawn = jax.jit(drawn_at)(jnp.arange(30))
    for n in range(30):
        j = n if n < M else int(drawn[n])
        if j < M:
            slots[j] = n
    buffer = ADD(buffer, jnp.arange(30))
    assert buffer.items.tolist() == slots


@pytest.mark.smoke
def test_a_ring_keeps_the_newest_of_each_task():
    buffer = buffers.empty_ring(3, 4, SCALAR, KEY)
    add = jax.jit(buffers.add_to_ring)
    for task, batch in [(0, range(1, 4)), (2, range(10, 20)), (0, range(4, 7))]:
        buffer = add(buffer, jnp.array(batch), task)
    assert buffer.items[0].tolist() == [5, 6, 3, 4]  # item n in slot n mod 4
    assert buffer.items[2].tolist() == [18, 19, 16, 17]
    assert buffer.seen.tolist() == [6, 0, 10]
    assert not buffers.filled(buffer)[1].any()


def test_under_jit_a_task_that_is_not_there_is_dropped():
    start = buffers.empty_ring(2, 3, SCALAR, KEY)
    for task in (-1, 2, 7):
        assert_same(jax.jit(buffers.add_to_ring)(start, jnp.ones(2, int), task), start)


def draw_many(buffer, batch_size, draws=2000):
    def step(buffer, _):
        buffer, items, weights = buffers.sample(buffer, batch_size)
        return buffer, (items, weights)

    return jax.jit(lambda b: jax.lax.scan(step, b, length=draws))(buffer)[1]


def test_samples_are_uniform_and_without_replacement():
    buffer = buffers.empty_reservoir(6, SCALAR, KEY)
    buffer = ADD(buffer, jnp.arange(6))
    items, weights = draw_many(buffer, 2)
    assert np.all(items[:, 0] != items[:, 1])
    np.testing.assert_array_equal(weights, 0.5)
    for position in range(2):
        shares = np.bincount(items[:, position], minlength=6) / len(items)
        np.testing.assert_allclose(shares, 1 / 6, atol=0.035)
    assert np.all(np.sort(draw_many(buffer, 6, 5)[0], axis=1) == np.arange(6))


def test_a_ring_is_sampled_over_all_its_items():
    buffer = buffers.empty_ring(3, 4, SCALAR, KEY)
    buffer = buffers.add_to_ring(buffer, jnp.array([1]), 0)
    buffer = buffers.add_to_ring(buffer, jnp.array([2, 3, 4]), 2)
    items, weights = draw_many(buffer, 1)
    shares = np.bincount(items[:, 0], minlength=5) / len(items)
    np.testing.assert_allclose(shares, [0, 0.25, 0.25, 0.25, 0.25], atol=0.04)
    np.testing.assert_array_equal(weights, 1.0)


def test_a_partly_filled_buffer_gives_weight_0_to_the_rest():
    buffer = buffers.empty_reservoir(5, SCALAR, KEY)
    buffer = ADD(buffer, jnp.array([7, 9]))
    _, items, weights = SAMPLE(buffer, 4)
    assert sorted(items[:2].tolist()) == [7, 9]
    np.testing.assert_array_equal(items[2:], 0)
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("kind", ["reservoir", "ring"])
def test_an_empty_buffer_is_an_error_outside_jit_and_weight_0_inside(kind):
    buffer = (
        buffers.empty_reservoir(5, EXAMPLE, KEY)
        if kind == "reservoir"
        else buffers.empty_ring(2, 5, EXAMPLE, KEY)
    )
    with pytest.raises(ValueError, match="buffer is empty"):
        buffers.sample(buffer, 2)
    _, items, weights = SAMPLE(buffer, 2)
    np.testing.assert_array_equal(weights, [0, 0])
    assert not any(np.any(x) for x in jax.tree.leaves(items))


def test_sampling_does_not_change_what_is_stored():
    first = ADD(buffers.empty_reservoir(M, SCALAR, KEY), jnp.arange(15))
    drawn, one, _ = SAMPLE(first, 3)
    drawn, two, _ = SAMPLE(drawn, 3)
    plain, mixed = (ADD(b, jnp.arange(15, 30)) for b in (first, drawn))
    np.testing.assert_array_equal(plain.items, mixed.items)
    assert mixed.drawn == 2
    np.testing.assert_array_equal(SAMPLE(first, 3)[1], one)
    assert sorted(one.tolist()) == sorted(two.tolist())


def stream(buffer, batches):
    """A training loop in small: replay, then store."""

    def step(buffer, batch):
        buffer, items, weights = buffers.sample(buffer, 2)
        return buffers.add_to_reservoir(buffer, batch), (items, weights)

    return jax.lax.scan(step, buffer, batches)


def test_vmap_over_seeds_is_a_loop_that_stops_and_resumes():
    batches = jax.tree.map(lambda x: x.reshape(10, 4, *x.shape[1:]), nested(40))
    keys = jax.random.split(KEY, 3)
    make = jax.vmap(lambda key: buffers.empty_reservoir(M, EXAMPLE, key))
    many, drawn = jax.jit(jax.vmap(stream, in_axes=(0, None)))(make(keys), batches)
    run = jax.jit(stream)
    for seed, key in enumerate(keys):
        half, _ = run(buffers.empty_reservoir(M, EXAMPLE, key), rows(batches, 0, 5))
        one, rest = run(half, rows(batches, 5, 10))
        assert_same(one, jax.tree.map(lambda x, s=seed: x[s], many))
        tail = jax.tree.map(lambda x, s=seed: x[s, 5:], drawn)
        jax.tree.map(np.testing.assert_array_equal, rest, tail)


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)])
def test_donation_and_no_shared_buffers(key):
    for buffer, add in [
        (buffers.empty_reservoir(4, EXAMPLE, key), buffers.add_to_reservoir),
        (
            buffers.empty_ring(2, 4, EXAMPLE, key),
            lambda buffer, batch: buffers.add_to_ring(buffer, batch, 1),
        ),
    ]:
        arrays = [
            jax.random.key_data(buffer.key),
            *jax.tree.leaves(buffer._replace(key=0))[:-1],
        ]
        pointers = [x.unsafe_buffer_pointer() for x in arrays]
        pointers.append(jax.random.key_data(key).unsafe_buffer_pointer())
        pointers += [x.unsafe_buffer_pointer() for x in jax.tree.leaves(EXAMPLE)]
        assert len(set(pointers)) == len(pointers)
        # Functions of their own: jit shares its cache between wraps of one function.
        step = jax.jit(lambda b, new, add=add: add(b, new), donate_argnums=0)
        draw = jax.jit(lambda b: buffers.sample(b, 2), donate_argnums=0)
        shapes = jax.tree.map(jnp.shape, buffer)
        for _ in range(3):
            buffer, _, _ = draw(step(buffer, nested(6)))
        assert step._cache_size() == draw._cache_size() == 1
        assert jax.tree.map(jnp.shape, buffer) == shapes
    assert jax.random.bits(key).shape == ()  # the argument still lives


def test_an_example_of_shapes_serves_as_well():
    shapes = jax.eval_shape(lambda: EXAMPLE)
    assert_same(
        buffers.empty_reservoir(3, shapes, KEY),
        buffers.empty_reservoir(3, EXAMPLE, KEY),
    )


def test_types_are_kept():
    example = (jnp.zeros(2, jnp.bfloat16), np.zeros(2, np.uint8))
    buffer = buffers.empty_reservoir(3, example, KEY)
    batch = jax.tree.map(lambda x: jnp.ones((4, *x.shape), x.dtype), example)
    _, items, weights = SAMPLE(ADD(buffer, batch), 2)
    assert [x.dtype for x in items] == [jnp.bfloat16, jnp.uint8]
    assert weights.dtype == jnp.float32


def test_the_counter_saturates():
    buffer = buffers.empty_reservoir(M, SCALAR, KEY)
    most = np.iinfo(np.int32).max
    buffer = buffer._replace(seen=jnp.array(most - 2, jnp.int32))
    for _ in range(3):
        buffer = ADD(buffer, jnp.ones(5, jnp.int32))
        assert buffer.seen == most


RESERVOIR = buffers.empty_reservoir(3, EXAMPLE, KEY)
RING = buffers.empty_ring(2, 3, SCALAR, KEY)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: buffers.empty_reservoir(0, SCALAR, KEY),
            "capacity must be at least 1",
        ),
        (lambda: buffers.empty_reservoir(3, (), KEY), "example has no arrays"),
        (lambda: buffers.empty_ring(0, 3, SCALAR, KEY), "tasks must be at least 1"),
        (lambda: buffers.empty_ring(2, 0, SCALAR, KEY), "capacity must be at least 1"),
        (lambda: buffers.sample(RESERVOIR, 4), "batch_size must be between 1 and 3"),
        (lambda: buffers.sample(RING, 7), "batch_size must be between 1 and 6, got 7"),
        (
            lambda: buffers.add_to_ring(RING, jnp.ones(1, int), 2),
            r"task .*\[0, 2\), got 2",
        ),
        (lambda: buffers.add_to_ring(RING, jnp.ones(1, int), -1), "task .* got -1"),
        (
            lambda: buffers.add_to_reservoir(RESERVOIR, {"x": jnp.ones((2, 2))}),
            "batch has the structure",
        ),
        (
            lambda: buffers.add_to_ring(RING, jnp.ones([], int), 0),
            "batch must have one",
        ),
        (
            lambda: buffers.add_to_reservoir(
                RESERVOIR, {"x": jnp.ones((2, 2)), "y": (jnp.ones(3, int),)}
            ),
            "batch must have one leading axis",
        ),
        (
            lambda: buffers.add_to_ring(RING, jnp.ones((2, 2), int), 0),
            r"batch has items int32\[2\], the buffer holds int32\[\]",
        ),
        (
            lambda: buffers.add_to_ring(RING, jnp.ones(2), 0),
            r"batch has items float32\[\], the buffer holds int32\[\]",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
