"""Pairs that stay beside a base that cannot be merged; O-LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from adamr import lora as room_of
from tests.contract.compilations import nothing_compiles
from tests.lora.layers import largest, normal, optimizer, trained
from tests.references import lora as twin

SCALE, TASKS, R = 0.1, 3, 2


def quantized():
    """A layer with an int8 kernel and room for three tasks of rank 2."""
    base = {"w": jnp.int8(40 * normal(0, 9, 5)), "scale": jnp.float32(0.01)}
    lora = {"w_lora_a": normal(1, 9, TASKS * R), "w_lora_b": jnp.zeros((TASKS * R, 5))}

    def forward(lora, base, x):
        y = x @ (base["scale"] * base["w"].astype(jnp.float32))
        return y + SCALE * (x @ lora["w_lora_a"] @ lora["w_lora_b"])

    return forward, base, lora


def decaying(s):
    tx = adamr.adamr(0.1, adamr.project_out(s), weight_decay=0.1)
    return room_of.train_block(tx, R)


def test_three_tasks_beside_an_int8_kernel():
    """Each response stays, each finished block stays to the bit, nothing recompiles."""
    forward, base, lora = quantized()
    xs = [normal(20 + t, 2, 9) for t in range(TASKS)]
    tx = optimizer(forward, base, lora, xs[0], decaying)
    grad = jax.grad(lambda p, x: jnp.mean((forward(p, base, x) - 1) ** 2))

    @jax.jit
    def step(lora, state, x):
        updates, state = tx.update(grad(lora, x), state, lora)
        return optax.apply_updates(lora, updates), state

    state, ends = jax.jit(tx.init)(lora), []
    lora, state = step(*step(lora, state, xs[0]), xs[0])
    for t, x in enumerate(xs):
        with nothing_compiles():
            for _ in range(10):
                lora, state = step(lora, state, x)
        if t == TASKS - 1:
            break
        before = forward(lora, base, x)
        finished = lora["w_lora_a"][:, : R * t + R], lora["w_lora_b"][: R * t + R]
        ends.append((x, before, finished))
        inputs = adamr.layer_inputs(
            lambda p, x: forward(p, base, x), lora, x, kind="rows"
        )
        lora, state = room_of.start_block(
            lora, state, inputs, jax.random.key(t), threshold=1.0
        )
        assert largest(before, forward(lora, base, x)) < 1e-6
        fresh = lora["w_lora_a"][:, R * t + R : R * t + 2 * R]
        basis = adamr.get_subspace(state).bases[0][:, 0]
        assert jnp.any(fresh) and jnp.max(jnp.abs(basis.T @ fresh)) < 1e-6
    for x, before, (a, b) in ends:
        assert largest(before, forward(lora, base, x)) < 1e-5
        np.testing.assert_array_equal(a, lora["w_lora_a"][:, : a.shape[1]])
        np.testing.assert_array_equal(b, lora["w_lora_b"][: len(b)])
    assert jnp.any(lora["w_lora_b"][-R:] != 0)
    with pytest.raises(ValueError, match="all 3 blocks of r = 2"):
        room_of.start_block(lora, state, inputs, jax.random.key(5))


@pytest.mark.smoke
def test_general_text_takes_no_block():
    forward, base, lora = quantized()
    x = normal(2, 3, 9)
    tx = optimizer(forward, base, lora, x, decaying)
    inputs = adamr.layer_inputs(lambda p, x: forward(p, base, x), lora, x)
    boundary = functools.partial(room_of.start_block, threshold=1.0)
    for run in (boundary, jax.jit(boundary)):
        new, state = run(lora, tx.init(lora), inputs, jax.random.key(0))
        assert state.block == 0
        np.testing.assert_array_equal(new["w_lora_a"][:, R:], lora["w_lora_a"][:, R:])
        assert jnp.max(jnp.abs(x @ new["w_lora_a"][:, :R])) < 1e-5
    full = lora | {"w_lora_b": lora["w_lora_b"].at[0].set(1.0)}
    _, state = jax.jit(boundary)(full, state, inputs, jax.random.key(0))
    assert state.block == 1
    with pytest.raises(ValueError, match="numbers in the unused rows of 'w_lora_b'"):
        wrong = lora | {"w_lora_b": lora["w_lora_b"].at[-1].set(1.0)}
        boundary(wrong, tx.init(lora), inputs, jax.random.key(0))
    with pytest.raises(ValueError, match="0 BlockStates"):
        boundary(lora, optax.adam(0.1).init(lora), inputs, jax.random.key(0))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        room_of.train_block(optax.sgd(0.1), 0)


def test_columns_that_are_no_block_do_not_train_under_jit():
    lora = {"w_lora_a": jnp.ones((3, 5)), "w_lora_b": jnp.zeros((5, 1))}
    tx = room_of.train_block(optax.sgd(1.0), rank=2)
    state, ones = tx.init(lora), jax.tree.map(jnp.ones_like, lora)

    @jax.jit
    def next_task(lora, state):
        steps, state = tx.update(ones, state, lora)
        lora = optax.apply_updates(lora, steps)
        return room_of.start_block(lora, state, None, jax.random.key(0))

    for _ in range(2):
        lora, state = next_task(lora, state)
    steps, _ = tx.update(ones, state, lora)
    assert not any(jnp.any(step) for step in jax.tree.leaves(steps))
    np.testing.assert_array_equal(lora["w_lora_b"][4:], 0.0)


def test_peft_blocks_are_cut_along_their_own_axes():
    lora = {"q.lora_A.weight": jnp.ones((4, 3)), "q.lora_B.weight": jnp.ones((2, 4))}
    tx = room_of.train_block(optax.sgd(1.0), 2)
    step, _ = tx.update(lora, tx.init(lora), lora)
    np.testing.assert_array_equal(step["q.lora_A.weight"][:, 0], [-1, -1, 0, 0])
    np.testing.assert_array_equal(step["q.lora_B.weight"][0], [-1, -1, 0, 0])


def test_o_lora_equals_its_float64_twin():
    _, _, lora = quantized()
    state = room_of.train_block(optax.adam(0.1), R).init(lora)
    blocks = np.split(np.asarray(lora["w_lora_a"], np.float64), TASKS, axis=1)
    for t in range(TASKS):
        at = state._replace(block=jnp.array(t))
        found, grad = jax.value_and_grad(room_of.orthogonality)(lora, at)
        np.testing.assert_allclose(found, twin.orthogonality(blocks[: t + 1]), 1e-5)
        expected = np.zeros((9, TASKS * R))
        for old in blocks[:t]:
            pull = old @ np.sign(old.T @ blocks[t])
            expected[:, t * R : t * R + R] += pull
        np.testing.assert_allclose(grad["w_lora_a"], expected, rtol=1e-4, atol=1e-5)


def test_o_lora_with_explicit_axes():
    _, _, lora = quantized()
    state = room_of.train_block(optax.adam(0.1), R).init(lora)
    state = state._replace(block=jnp.array(1))
    lora = lora | {"w_lora_a": normal(4, 8, TASKS * R)}
    expected = jax.value_and_grad(room_of.orthogonality)(lora, state)
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        lora["w_lora_a"] = jax.device_put(lora["w_lora_a"], jax.P("fsdp"))
        for call in (room_of.orthogonality, jax.jit(room_of.orthogonality)):
            found = jax.value_and_grad(call)(lora, state)
            for a, b in zip(
                jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_o_lora_turns_new_columns_away_from_old_ones():
    forward, base, lora = quantized()
    tx = room_of.train_block(optax.adam(0.05), R)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), normal(2, 3, 9), 3)
    lora, state = room_of.start_block(lora, state, None, jax.random.key(0))
    assert state.block == 1
    start = room_of.orthogonality(lora, state)

    @jax.jit
    def step(lora, state):
        g = jax.grad(room_of.orthogonality)(lora, state)
        updates, state = tx.update(g, state, lora)
        return optax.apply_updates(lora, updates), state

    for _ in range(30):
        lora, state = step(lora, state)
    assert room_of.orthogonality(lora, state) < 0.5 * start


def test_a_boundary_without_inputs_keeps_what_is_protected():
    forward, base, lora = quantized()
    x = normal(2, 3, 9)
    tx = optimizer(forward, base, lora, x, decaying)
    inputs = adamr.layer_inputs(lambda p, x: forward(p, base, x), lora, x, kind="rows")
    boundary = functools.partial(room_of.start_block, threshold=1.0)
    lora, state = boundary(lora, tx.init(lora), inputs, jax.random.key(0))
    lora = lora | {"w_lora_b": lora["w_lora_b"].at[:R].set(1.0)}
    lora, state = boundary(lora, state, None, jax.random.key(1))
    assert state.block == 1
    assert jnp.any(lora["w_lora_a"][:, R : 2 * R])
    assert jnp.max(jnp.abs(x @ lora["w_lora_a"][:, : 2 * R])) < 1e-5
