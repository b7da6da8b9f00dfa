"""PRNG keys in states: what every library can save, and the same draws from it."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import adamr
from adamr import buffers

P = {f"block_{i}": {"up": {"kernel": jnp.ones((3, 3))}} for i in range(6)}
TASKS = jax.tree.map(lambda x: jnp.stack([x, -0.5 * x, 0.3 * x - 0.6]), P)


def reservoir(key):
    return buffers.empty_reservoir(4, jnp.zeros(2), key)


def drawn_from_reservoir(buffer):
    buffer = buffers.add_to_reservoir(buffer, jnp.arange(20.0).reshape(10, 2))
    return buffers.sample(buffer, 3)


def ring(key):
    return buffers.empty_ring(2, 4, jnp.zeros(2), key)


def drawn_from_ring(buffer):
    buffer = buffers.add_to_ring(buffer, jnp.arange(20.0).reshape(10, 2), 1)
    return buffers.sample(buffer, 3)


def half(key):
    return adamr.protection.half_fine_tuning(optax.sgd(1.0), key).init(P)


def pcgrad(key):
    return adamr.pcgrad(key=key).init(P)


def surgery(state):
    return adamr.pcgrad(key=jax.random.key(9)).update(P, state, task_gradients=TASKS)


STATES = {
    "reservoir": (reservoir, drawn_from_reservoir),
    "ring": (ring, drawn_from_ring),
    "half_fine_tuning": (half, adamr.redraw_half),
    "pcgrad": (pcgrad, surgery),
}
each_state = pytest.mark.parametrize(("make", "use"), STATES.values(), ids=STATES)


def through_flax(state, like, folder):
    saved = flax.serialization.to_bytes(flax.serialization.to_state_dict(state))
    target = flax.serialization.to_state_dict(like)
    restored = flax.serialization.from_bytes(target, saved)
    found = flax.serialization.from_state_dict(like, restored)
    return jax.tree.map(jnp.asarray, found)  # flax restores NumPy arrays


def through_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "state", state)
        saver.wait_until_finished()
        return saver.restore(folder / "state", like)


def through_numpy(state, like, folder):
    leaves, treedef = jax.tree.flatten(state)
    np.savez(folder / "state.npz", *map(np.asarray, leaves))
    with np.load(folder / "state.npz") as saved:
        return jax.tree.unflatten(treedef, [jnp.asarray(saved[n]) for n in saved])


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.smoke
@pytest.mark.parametrize("save", [through_flax, through_orbax, through_numpy])
@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)])
@each_state
def test_states_are_saved_by_every_library(make, use, key, save, tmp_path):
    state = make(key)
    assert state.key.dtype == jnp.uint32
    restored = save(state, make(jax.random.key(2)), tmp_path)
    assert type(restored) is type(state)
    assert equal(restored, state) and equal(use(restored), use(state))


@each_state
def test_typed_and_raw_keys_give_the_same_draws(make, use):
    typed, raw = make(jax.random.key(5)), make(jax.random.PRNGKey(5))
    assert equal(typed, raw) and equal(use(typed), use(raw))
    assert not equal(make(jax.random.key(6)), raw)


@each_state
def test_keys_of_another_implementation_stay_typed(make, use):
    state = make(jax.random.key(5, impl="rbg"))
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    jax.block_until_ready(use(state))


@each_state
def test_keys_are_stored_under_jit(make, use):
    state = jax.jit(make)(jax.random.key(5))
    assert equal(state, make(jax.random.key(5)))
