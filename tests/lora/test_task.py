"""Old responses do not move, whatever B does; the boundary changes no response."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adamr
from adamr import lora as room_of
from adamr.lora import draw
from tests.contract.compilations import nothing_compiles
from tests.lora.layers import LAYERS, S, largest, layer, normal, optimizer, trained
from tests.references import lora as twin


@pytest.mark.parametrize("name", LAYERS)
def test_old_responses_do_not_move(name):
    forward, base, lora, x = layer(name)
    tx = optimizer(forward, base, lora, x)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 4)
    before = forward(lora, base, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), scaling=S, threshold=1.0
    )
    assert largest(before, forward(lora, base, x)) < 1e-6
    assert not jnp.any(lora["w_lora_b"])
    fresh = normal(6, *x.shape)
    then = forward(lora, base, fresh)
    lora, state = trained(tx, forward, base, lora, state, fresh, 7, steps=20)
    assert largest(then, forward(lora, base, fresh)) > 0.1
    assert largest(before, forward(lora, base, x)) < 1e-5
    wild = lora | {"w_lora_b": 100 * normal(8, *lora["w_lora_b"].shape)}
    none = lora | {"w_lora_b": jnp.zeros_like(lora["w_lora_b"])}
    old, new = (
        jnp.max(jnp.abs(forward(wild, base, y) - forward(none, base, y)))
        for y in (x, fresh)
    )
    assert new > 10 and old < 1e-6 * new


def test_every_task_of_a_stream_is_kept():
    """Four tasks of two inputs fill 8 of 12 directions; each keeps its response."""
    base = {"w": normal(0, 12, 5)}
    lora = {"w_lora_a": normal(1, 12, 2), "w_lora_b": jnp.zeros((2, 5))}

    def forward(lora, base, x):
        return x @ base["w"] + S * (x @ lora["w_lora_a"] @ lora["w_lora_b"])

    xs = [normal(40 + t, 2, 12) for t in range(4)]
    tx = optimizer(forward, base, lora, xs[0])
    grad = jax.grad(lambda p, base, x: jnp.mean((forward(p, base, x) - 1) ** 2))

    @jax.jit
    def step(lora, base, state, x):
        updates, state = tx.update(grad(lora, base, x), state, lora)
        return optax.apply_updates(lora, updates), state

    state, ends = jax.jit(tx.init)(lora), []
    for t, x in enumerate(xs):
        before = jnp.mean((forward(lora, base, x) - 1) ** 2)
        for _ in range(30):
            lora, state = step(lora, base, state, x)
        ends.append(forward(lora, base, x))
        assert jnp.mean((ends[-1] - 1) ** 2) < 0.5 * before
        inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
        base, lora, state = room_of.start_task(
            base, lora, state, inputs, jax.random.key(t), scaling=S, threshold=1.0
        )
    assert room_of.room(state, lora)["w_lora_a"] == (4, 4)
    for x, end in zip(xs, ends, strict=True):
        assert largest(end, forward(lora, base, x)) < 1e-5


def nnx_model():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.second = nnx.LoRA(
                8, 3, 4, base_module=nnx.Linear(8, 4, rngs=rngs), rngs=rngs
            )

        def __call__(self, x):
            return self.second(jnp.tanh(self.norm(self.first(x))))

    graph, lora, base = nnx.split(Model(nnx.Rngs(0)), nnx.LoRAParam, ...)
    return lambda lora, base, x: nnx.merge(graph, lora, base)(x), base, lora


def test_nnx_lora_linear():
    """Two layers in a row: the input of the second stays, because the first's does."""
    forward, base, lora = nnx_model()
    x, new = normal(3, 2, 6), normal(4, 5, 6)
    tx = optimizer(forward, base, lora, x)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 5)
    before = forward(lora, base, x)
    inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), threshold=1.0
    )
    assert largest(before, forward(lora, base, x)) < 1e-6
    then = forward(lora, base, new)
    lora, state = trained(tx, forward, base, lora, state, new, 6, steps=20)
    assert largest(then, forward(lora, base, new)) > 0.1
    assert largest(before, forward(lora, base, x)) < 1e-5
    left = room_of.room(state, lora)
    assert {name: int(x.directions) for name, x in left.items()} == {
        "first/lora/lora_a/value": 4,
        "second/lora_a/value": 6,
    }


@pytest.mark.parametrize("wrap", ["chain", "multi_steps", "inject", "gpm", "gpm_si"])
def test_in_any_wrapper_without_recompiling(wrap):
    forward, base, lora, x = layer("dense")

    def make(s):
        if wrap == "gpm":
            return adamr.gpm(0.1, s, weight_decay=0.1)
        if wrap == "gpm_si":
            return adamr.gpm_si(0.1, s)
        if wrap == "inject":
            rate = optax.inject_hyperparams(lambda rate: adamr.gpm(rate, s))
            return rate(rate=0.1)
        inner = adamr.adamr(0.1, adamr.project_out(s))
        if wrap == "chain":
            return optax.chain(optax.clip_by_global_norm(1.0), inner)
        return optax.MultiSteps(inner, 2)

    tx = optimizer(forward, base, lora, x, make)
    grad = jax.grad(lambda lora, base, x: jnp.sum(forward(lora, base, x) ** 2))

    @jax.jit
    def step(lora, base, state, x):
        updates, state = tx.update(grad(lora, base, x), state, lora)
        return optax.apply_updates(lora, updates), state

    state = jax.jit(tx.init)(lora)
    for _ in range(2):
        lora, state = step(lora, base, state, x)
    if wrap == "gpm_si":
        state = adamr.consolidate_si(state, lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    before = forward(lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), scaling=S, threshold=1.0
    )
    if wrap == "gpm_si":
        anchor = adamr.get_anchor(state)
        jax.tree.map(np.testing.assert_array_equal, anchor.anchor, lora)
        assert all(jnp.any(x) for x in jax.tree.leaves(anchor.importance))
        assert not any(jnp.any(x) for x in jax.tree.leaves(state.omega))
    new = normal(9, 3, 8)
    with nothing_compiles():
        for _ in range(4):
            lora, state = step(lora, base, state, new)
    assert largest(before, forward(lora, base, x)) < 1e-5
    assert jnp.any(lora["w_lora_b"] != 0)


def test_an_unfinished_group_of_micro_steps_is_dropped():
    """Its gradients are those of the old pairs."""
    forward, base, lora, x = layer("dense")

    def make(s):
        return optax.MultiSteps(adamr.adamr(0.1, adamr.project_out(s)), 2)

    tx = optimizer(forward, base, lora, x, make)
    grad = jax.grad(lambda lora, base, x: jnp.sum(forward(lora, base, x) ** 2))

    def after(count):
        pairs, kernels, state = lora, base, tx.init(lora)
        for _ in range(count):
            _, state = tx.update(grad(pairs, kernels, x), state, pairs)
        inputs = adamr.layer_inputs(forward, pairs, kernels, x)
        kernels, pairs, state = room_of.start_task(
            kernels, pairs, state, inputs, jax.random.key(5), scaling=S
        )
        for seed in (1, 2):
            g = grad(pairs, kernels, normal(seed, 3, 8))
            updates, state = tx.update(g, state, pairs)
        return updates

    assert any(jnp.any(x) for x in jax.tree.leaves(after(0)))
    jax.tree.map(np.testing.assert_array_equal, after(1), after(0))


def test_no_momentum_of_old_pairs_is_left():
    forward, base, lora, x = layer("dense")

    def make(s):
        return optax.chain(adamr.project_out(s), optax.sgd(0.1, momentum=0.9))

    tx = optimizer(forward, base, lora, x, make)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 4)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), scaling=S
    )
    step, _ = tx.update(jax.tree.map(jnp.zeros_like, lora), state, lora)
    assert not any(jnp.any(z) for z in jax.tree.leaves(step))


def test_rows_may_be_constants_of_the_compiled_program():
    forward, base, lora, x = layer("dense")
    state = optimizer(forward, base, lora, x).init(lora)
    rows = {"w_lora_a": x, "w_lora_b": None}
    key = jax.random.key(0)
    run = jax.jit(lambda *tree: room_of.start_task(*tree, rows, key, scaling=S))
    _, pairs, state = run(base, lora, state)
    assert jnp.max(jnp.abs(x @ pairs["w_lora_a"])) < 1e-5
    start = jax.jit(lambda *tree: room_of.inflora(*tree, rows | {"w_lora_a": x + 1}))
    assert jnp.any(start(pairs, state)["w_lora_a"])


def test_kernels_as_numpy_arrays():
    """As safetensors gives them."""
    forward, base, lora, x = layer("dense")
    state = optimizer(forward, base, lora, x).init(lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    call = functools.partial(room_of.start_task, key=jax.random.key(0), scaling=S)
    same = call(jax.tree.map(np.asarray, base), lora, state, inputs)
    expected = call(base, lora, state, inputs)
    jax.tree.map(np.testing.assert_array_equal, same, expected)


METHODS = ("free", "a", "b", "both", "complement")


def one_layer(method, steps=60, n=32, out=16, rank=4, count=6):
    """The library's way through `references.lora.one_layer`, from its numbers."""
    rng = np.random.default_rng(0)
    x, new = jnp.float32(rng.normal(size=(2, count, n)))
    y, target = jnp.float32(rng.normal(size=(2, count, out)))
    base = {"w": jnp.zeros((n, out))}
    a = jnp.float32(rng.normal(size=(n, rank)) / np.sqrt(n))
    lora = {"w_lora_a": a, "w_lora_b": jnp.zeros((rank, out))}

    def forward(lora, base, x):
        return x @ base["w"] + x @ lora["w_lora_a"] @ lora["w_lora_b"]

    axes = adamr.contracted_axes(forward, lora, base, x)
    held = {"complement": "a", "free": "", "both": "ab"}.get(method, method)
    axes = {k: v if k[-1] in held else None for k, v in axes.items()}
    tx = adamr.adamr(1e-2, adamr.project_out(adamr.empty_subspace(lora, axes=axes)))
    update = jax.jit(tx.update)
    loss = lambda p, base, x, y: jnp.sum((forward(p, base, x) - y) ** 2) / 2 / count  # noqa: E731
    grad = jax.jit(jax.grad(loss))

    def trained(lora, base, state, x, y):
        for _ in range(steps):
            step, state = update(grad(lora, base, x, y), state, lora)
            lora = optax.apply_updates(lora, step)
        return lora, state

    lora, state = trained(lora, base, tx.init(lora), x, y)
    before = forward(lora, base, x)
    if method != "free":
        inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    if method == "complement":
        fresh = rng.normal(size=(n, rank)) / np.sqrt(n)
        base, lora, state = room_of.start_task(
            base, lora, state, inputs, jax.random.key(0), threshold=1.0,
            init=lambda key, shape, dtype: jnp.asarray(fresh, dtype),
        )  # fmt: skip
    else:
        if held:
            state = adamr.protect_inputs(state, inputs, threshold=1.0)
        state = adamr.reset_moments(state)
    start = loss(lora, base, new, target)
    lora, state = trained(lora, base, state, new, target)
    moved = jnp.linalg.norm(forward(lora, base, x) - before) / jnp.linalg.norm(before)
    return float(moved), float(loss(lora, base, new, target) / start)


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_moves_as_its_float64_twin(method):
    moved, left = one_layer(method)
    expected = twin.one_layer(method)
    np.testing.assert_allclose([moved, left], expected, rtol=2e-3, atol=2e-6)


def test_what_each_way_of_projecting_forgets_and_learns():
    """Only the complement keeps the old response and still learns the new task."""
    found = {method: twin.one_layer(method) for method in METHODS}
    moved, left = ({m: x[i] for m, x in found.items()} for i in (0, 1))
    assert moved["a"] > 0.9 and moved["free"] > 0.9 and 0.2 < moved["b"] < 0.9
    assert moved["both"] < 1e-12 and moved["complement"] < 1e-12
    assert left["complement"] < 1.2 * left["free"] < 0.5 * left["both"]


@pytest.mark.smoke
def test_boundary_equals_its_float64_twin():
    forward, base, lora, x = layer("dense")
    state = optimizer(forward, base, lora, x).init(lora)
    basis = np.zeros((8, 0))
    fresh = np.asarray(normal(12, 8, 2), np.float64)
    for seed, threshold in ((10, 0.6), (11, 0.97)):
        inputs = {"w_lora_a": normal(seed, 4, 8), "w_lora_b": None}
        arrays = [base["w"], *lora.values()]
        w, a, b, basis = twin.start_task(
            *(np.asarray(z, np.float64) for z in arrays),
            basis,
            np.asarray(inputs["w_lora_a"], np.float64),
            fresh,
            scaling=S,
            threshold=threshold,
        )
        base, lora, state = room_of.start_task(
            base, lora, state, inputs, jax.random.key(0), scaling=S,
            threshold=threshold, init=lambda key, shape, dtype: jnp.float32(fresh),
        )  # fmt: skip
        np.testing.assert_allclose(base["w"], w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lora["w_lora_a"], a, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(lora["w_lora_b"], b)
        left = room_of.room(state, lora)["w_lora_a"]
        assert left == (8 - basis.shape[1], 8 - basis.shape[1])
        lora["w_lora_b"] = normal(seed, 2, 5)


sizes = st.tuples(st.sampled_from([1, 3, 9]), st.just(2), st.integers(0, 9))


@settings(max_examples=10)
@given(sizes, st.integers(0, 2**31 - 1), st.sampled_from([1e-4, 1.0, 1e4]))
def test_fresh_columns_are_outside_and_as_long_as_drawn(sizes, seed, scale):
    n, rank, count = sizes
    rng = np.random.default_rng(seed)
    count = min(count, n)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0][:, :count]
    a = np.float32(scale * rng.normal(size=(n, rank)))
    s = adamr.make_subspace({"w": jnp.asarray(a)}, {"w": basis})
    found = np.asarray(draw.outside(s.bases[0], s.weights[0], jnp.asarray(a)))
    length = np.linalg.norm(a, axis=0)
    if count == n:
        assert not found.any()
    elif n > 1:
        expected = twin.outside(basis, a.astype(np.float64))
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4 * scale)
        np.testing.assert_allclose(np.linalg.norm(found, axis=0), length, rtol=1e-5)
        assert np.max(np.abs(basis.T @ found) / length, initial=0) < 1e-6


def test_a_full_basis_gives_zeros_and_room_says_so():
    forward, base, lora, x = layer("dense")
    state = optimizer(forward, base, lora, x).init(lora)
    inputs = {"w_lora_a": jnp.eye(8), "w_lora_b": None}
    with pytest.warns(UserWarning, match="all inputs of w_lora_a are protected"):
        base, lora, state = room_of.start_task(
            base, lora, state, inputs, jax.random.key(0), threshold=1.0
        )
    assert not jnp.any(lora["w_lora_a"])
    assert room_of.room(state, lora)["w_lora_a"] == (0, 0)


def test_columns_inside_the_protected_space_become_zero():
    s = adamr.make_subspace({"w": jnp.zeros((4, 2))}, {"w": jnp.eye(4)[:, :2]})
    a = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = draw.outside(s.bases[0], s.weights[0], a)
    np.testing.assert_array_equal(found, a.at[:, 0].set(0))


@pytest.mark.parametrize("name", ["dense", "stacked", "experts"])
def test_jit_equals_no_jit(name):
    forward, base, lora, x = layer(name)
    state = optimizer(forward, base, lora, x).init(lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    boundary = functools.partial(room_of.start_task, scaling=S, threshold=0.9)
    here = boundary(base, lora, state, inputs, jax.random.key(1))
    there = jax.jit(boundary)(base, lora, state, inputs, jax.random.key(1))
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for a, b, old in zip(*map(jax.tree.leaves, (here, there, (base, lora, state)))):  # noqa: B905
        assert a.dtype == b.dtype == old.dtype and a.shape == b.shape == old.shape
    # A sign of a basis vector is free, its span is not.
    np.testing.assert_allclose(here[0]["w"], there[0]["w"], rtol=1e-6, atol=1e-6)
    for a, b in zip(here[1].values(), there[1].values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_vmap_over_seeds():
    forward, base, lora, x = layer("dense")
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    keys = jax.random.split(jax.random.key(2), 2)

    def boundary(lora, key):
        return room_of.start_task(base, lora, tx.init(lora), inputs, key, scaling=S)

    both = jax.tree.map(lambda z: jnp.stack([z, 2 * z]), lora)
    many = jax.jit(jax.vmap(boundary))(both, keys)
    second = jax.jit(boundary)(jax.tree.map(lambda z: 2 * z, lora), keys[1])
    for a, b in zip(
        jax.tree.leaves(many[:2]), jax.tree.leaves(second[:2]), strict=True
    ):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5)


def test_general_text_is_kept_from_the_first_task_on():
    forward, base, lora, x = layer("dense")
    lora = lora | {"w_lora_b": jnp.zeros((2, 5))}
    tx = optimizer(forward, base, lora, x)
    before, state = forward(lora, base, x), tx.init(lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    held, lora, state = room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), threshold=1.0
    )
    np.testing.assert_array_equal(held["w"], base["w"])
    lora, state = trained(tx, forward, base, lora, state, normal(6, 4, 8), 7, steps=20)
    assert largest(before, forward(lora, base, x)) < 1e-5


def in_bf16(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def test_masters_of_a_bf16_model():
    """One rounding per boundary; the pairs leak no more than in float32."""
    forward, base, lora, x = layer("dense")
    base, narrow = in_bf16(base), in_bf16(lora)
    lora = room_of.masters(narrow)
    assert {z.dtype for z in lora.values()} == {jnp.dtype("float32")}
    other = room_of.masters(base | {"count": jnp.int32(3)})
    assert (other["w"].dtype, other["count"].dtype) == (jnp.float32, jnp.int32)
    dropout = base | {"key": jax.random.key(0)}
    back = room_of.cast_like(room_of.masters(dropout), dropout)
    assert all(back[name].dtype == x.dtype for name, x in dropout.items())
    state = optimizer(forward, base, lora, x).init(lora)
    inputs = adamr.layer_inputs(forward, lora, base, x.astype(jnp.float32))
    with pytest.raises(ValueError, match="bfloat16 at 'w_lora_a'.*lora.masters"):
        room_of.start_task(base, narrow, state, inputs, jax.random.key(0))
    merged, _, _ = room_of.start_task(
        base, lora, state, inputs, jax.random.key(0), scaling=S
    )
    assert merged["w"].dtype == jnp.bfloat16
    wide = [np.asarray(z, np.float64) for z in (base["w"], *lora.values())]
    exact = wide[0] + S * wide[1] @ wide[2]
    error = np.abs(np.asarray(merged["w"], np.float64) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) + 1e-6)
    assert np.mean(error / np.abs(exact)) > 2.0**-11


def test_what_a_cast_to_bf16_lets_through():
    forward, base, lora, x = layer("dense")
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    base, lora, _ = room_of.start_task(
        base, lora, tx.init(lora), inputs, jax.random.key(5), threshold=1.0
    )
    a = room_of.cast_like(lora, in_bf16(lora))["w_lora_a"].astype(jnp.float32)
    size = jnp.linalg.norm(x, axis=1)[:, None] * jnp.linalg.norm(a, axis=0)[None]
    share = jnp.max(jnp.abs(x @ a) / size)
    assert 1e-5 < share < 2.0**-8


@pytest.mark.slow
def test_bf16_pairs_leak_and_masters_do_not():
    """Of what A moves in 50 steps, the share inside the protected space."""
    forward, base, lora, x = layer("dense")
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    base, lora, state = room_of.start_task(
        base, lora, tx.init(lora), inputs, jax.random.key(5), threshold=1.0
    )
    leaks = []
    for change in (lambda tree: tree, in_bf16):
        start = change(lora)
        end, _ = trained(tx, forward, base, start, tx.init(start) if change is in_bf16
                         else state, normal(6, 4, 8), 7, steps=50)  # fmt: skip
        moved = np.float64(end["w_lora_a"]) - np.float64(start["w_lora_a"])
        basis = np.float64(adamr.get_subspace(state).bases[0][:, 0])
        leaks.append(np.linalg.norm(basis.T @ moved) / np.linalg.norm(moved))
    assert leaks[0] < 1e-5 and leaks[1] > 1e-3


def test_orbax_round_trip(tmp_path):
    import orbax.checkpoint as ocp

    forward, base, lora, x = layer("dense")
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    held = room_of.start_task(base, lora, tx.init(lora), inputs, jax.random.key(5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "held", held)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "held", held)
    assert jax.tree.structure(back) == jax.tree.structure(held)
    jax.tree.map(np.testing.assert_array_equal, back, held)


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
@pytest.mark.parametrize("where", ["in", "out"])
def test_sharded_pairs_equal_one_device(kind, where):
    spec = jax.sharding.PartitionSpec
    forward, base, lora, x = layer("dense")
    lora = {"w_lora_a": lora["w_lora_a"], "w_lora_b": normal(2, 2, 8)}
    base = {"w": normal(0, 8, 8)}
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    boundary = functools.partial(room_of.start_task, scaling=S, threshold=0.9)
    alone = boundary(base, lora, tx.init(lora), inputs, jax.random.key(1))
    mesh = jax.make_mesh((2, 4), ("in", "out"), axis_types=(kind, kind))
    places = {
        "w": spec("in", "out"),
        "w_lora_a": spec("in") if where == "in" else spec(),
        "w_lora_b": spec(None, "out") if where == "out" else spec(),
    }

    def place(tree):
        return {
            k: jax.device_put(z, jax.sharding.NamedSharding(mesh, places[k]))
            for k, z in tree.items()
        }

    with jax.set_mesh(mesh):
        base, lora = place(base), place(lora)
        at = adamr.state_shardings(tx, lora)
        state = jax.jit(tx.init, out_shardings=at)(lora)
        old = base, lora, state
        # Growing in a trace along explicit axes needs a fan-in that is not sharded.
        in_trace = where == "out" or kind.name == "Auto"
        for run in (boundary, jax.jit(boundary))[: 1 + in_trace]:
            new = run(*old, inputs, jax.random.key(1))
            if run is boundary:
                same = jax.tree.map(
                    lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
                    old,
                    new,
                )
                assert all(jax.tree.leaves(same))
            for a, b in zip(
                jax.tree.leaves(alone[:2]), jax.tree.leaves(new[:2]), strict=True
            ):
                np.testing.assert_allclose(a, np.asarray(b), rtol=1e-3, atol=1e-5)


def test_bad_input_is_named():
    forward, base, lora, x = layer("dense")
    state = optimizer(forward, base, lora, x).init(lora)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    call = functools.partial(room_of.start_task, key=jax.random.key(0))
    narrow = adamr.subspaces.cast_bases(adamr.get_subspace(state), jnp.bfloat16)
    with pytest.raises(ValueError, match="bases of bfloat16, expected float32"):
        call(base, lora, adamr.project_out(narrow).init(lora), inputs)
    with pytest.raises(ValueError, match="int8 at 'w', which cannot take.*start_block"):
        call({"w": jnp.ones((8, 5), jnp.int8)}, lora, state, inputs)
    with pytest.raises(ValueError, match="uint8 at 'w', which cannot.*start_block"):
        call({"w": jnp.ones((20, 1), jnp.uint8)}, lora, state, inputs)  # nf4
    flat = {"w.qvalue": jnp.ones((8, 5), jnp.int8), "w.scale": jnp.ones(5)}
    with pytest.raises(ValueError, match="in parts.*w.qvalue.*start_block"):
        call(flat, lora, state, inputs)
    parts = {"w": {"qvalue": jnp.ones((8, 5), jnp.int8), "scale": jnp.ones(5)}}
    with pytest.raises(ValueError, match="in parts.*w/qvalue.*start_block"):
        call(parts, lora, state, inputs)
    with pytest.raises(ValueError, match="holds no Subspace"):
        call(base, lora, optax.adam(0.1).init(lora), inputs)
    whole = adamr.ogd(0.1, adamr.empty_directions(lora, 4)).init(lora)
    for refused in (call, lambda *_: room_of.room(whole, lora)):
        with pytest.raises(TypeError, match="holds Directions.*expected a Subspace"):
            refused(base, lora, whole, inputs)
    both = adamr.contracted_axes(forward, lora, base, x)
    wrong = adamr.project_out(adamr.empty_subspace(lora, axes=both)).init(lora)
    with pytest.raises(ValueError, match="protects the B's.*w_lora_b.*lora.axes"):
        call(base, lora, wrong, inputs)
    none = adamr.empty_subspace(lora, unprotected=["lora"])
    with pytest.raises(ValueError, match="protects no A"):
        call(base, lora, adamr.project_out(none).init(lora), inputs)
    with pytest.raises(ValueError, match="contracts none of the A's"):
        room_of.axes(lambda p, x: x @ p["w_lora_b"], lora, jnp.ones((1, 2)))


def test_holes_are_left_out():
    """One tree of which the base has the kernels and lora the pairs."""
    forward, base, lora, x = layer("dense")
    nothing = {"w": None, "w_lora_a": None, "w_lora_b": None, "norm": None}
    split = nothing | base | {"norm": jnp.ones(3)}, nothing | lora
    run = lambda lora, base, x: forward(lora, base, x)  # noqa: E731
    tx = optimizer(run, *split, x)
    inputs = adamr.layer_inputs(run, split[1], split[0], x)
    held = room_of.start_task(*split, tx.init(split[1]), inputs, jax.random.key(0))
    tx = optimizer(forward, base, lora, x)
    inputs = adamr.layer_inputs(forward, lora, base, x)
    plain = room_of.start_task(base, lora, tx.init(lora), inputs, jax.random.key(0))
    for old, new in zip(plain[:2], held[:2], strict=True):
        for name, z in old.items():
            np.testing.assert_array_equal(z, new[name])
    assert held[0]["w_lora_a"] is None and held[1]["norm"] is None


def ended(lora, base=None, state=None, x=None, **options):
    """`start_task` of the dense layer with some arguments replaced."""
    forward, usual, _, rows = layer("dense")
    base, x = usual if base is None else base, rows if x is None else x
    if state is None:
        state = optimizer(forward, base, lora, x, **options).init(lora)
    inputs = adamr.layer_inputs(forward, lora, usual, x, kind="rows")
    return room_of.start_task(
        base, lora, state, inputs, jax.random.key(5), threshold=1.0
    )


@pytest.mark.parametrize(
    ("b", "dtype"), [(jnp.nan, jnp.float32), (1e6, jnp.float16), (1e39, jnp.float32)]
)
def test_a_merge_that_is_not_finite_is_refused(b, dtype):
    _, base, lora, _ = layer("dense")
    base = {"w": base["w"].astype(dtype)}
    bad = lora | {"w_lora_b": lora["w_lora_b"].at[0, 0].set(b)}
    with pytest.raises(ValueError, match="NaN or infinite entries at 'w'"):
        ended(bad, base)


def test_full_bases_and_missing_inputs_are_told():
    forward, base, lora, x = layer("dense")
    with pytest.warns(UserWarning, match="bases of w_lora_a are full"):
        ended(lora, max_rank=2)
    two = {"u": base["w"], "w": base["w"]}
    pairs = {f"{n}_lora_{h}": lora[f"w_lora_{h}"] for n in "uw" for h in "ab"}

    def both(p, base, x):
        return sum(x @ base[n] + x @ p[f"{n}_lora_a"] @ p[f"{n}_lora_b"] for n in "uw")

    state = optimizer(both, two, pairs, x).init(pairs)
    inputs = adamr.layer_inputs(both, pairs, two, x, kind="rows")
    inputs = inputs | {"u_lora_a": None}
    with pytest.warns(UserWarning, match="inputs has None at u_lora_a:"):
        room_of.start_task(two, pairs, state, inputs, jax.random.key(0))


def test_adan_starts_anew_and_schedule_free_is_refused():
    forward, base, lora, x = layer("dense")
    subspace = adamr.empty_subspace(lora, axes=room_of.axes(forward, lora, base, x))
    tx = optax.chain(adamr.project_out(subspace), optax.adan(0.1))
    lora, state = trained(tx, forward, base, lora, tx.init(lora), x, 4)
    _, new, state = ended(lora, base, state)
    step, _ = tx.update(jax.tree.map(jnp.zeros_like, new), state, new)
    assert not any(jnp.any(u) for u in jax.tree.leaves(step))
    inputs = adamr.layer_inputs(forward, lora, base, x)
    copies = [optax.contrib.schedule_free_adamw(0.1), optax.contrib.cocob()]
    if hasattr(optax.contrib, "madgrad"):
        copies.append(optax.contrib.madgrad(0.1))
    for free in copies:
        state = optax.chain(adamr.project_out(subspace), free).init(lora)
        with pytest.raises(ValueError, match="State, which steps from a copy of"):
            ended(lora, base, state)
        with pytest.raises(ValueError, match="a copy of the old pairs"):
            room_of.inflora(lora, state, inputs)
