"""LiNeS and temporal ensembles: closed forms, dtypes, donation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamr import averaging


def block(name):
    found = re.search(r"blocks/(\d+)/", name)
    return int(found[1]) if found else None


def model(value, dtype=jnp.float32):
    return {
        "blocks": [{"kernel": jnp.full((2, 3), value, dtype)} for _ in range(4)],
        "embed": jnp.full(3, value, dtype),
        "frozen": None,
    }


def scales(*arguments, **keywords):
    tree = averaging.lines_scaling(
        model(0.0), model(1.0), *arguments, block=block, **keywords
    )
    blocks = [float(b["kernel"][0, 0]) for b in tree["blocks"]]
    return blocks, float(tree["embed"][0])


@pytest.mark.smoke
def test_scale_by_depth():
    assert scales(0.25) == ([0.25, 0.5, 0.75, 1.0], 0.25)
    blocks, outside = scales(0.5, 0.9)
    np.testing.assert_allclose(blocks, [0.5, 0.8, 1.1, 1.4], rtol=1e-6)
    assert outside == 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ends_are_exact(dtype):
    before, after = model(0.1, dtype), model(0.7, dtype)
    same = averaging.lines_scaling(before, after, 1.0, block=block)
    jax.tree.map(np.testing.assert_array_equal, same, after)
    none = averaging.lines_scaling(before, after, 0.0, 0.0, block=block)
    jax.tree.map(np.testing.assert_array_equal, none, before)
    assert all(x.dtype == dtype for x in jax.tree.leaves(same))


def test_lines_under_jit():
    run = jax.jit(lambda a, b: averaging.lines_scaling(a, b, 0.25, block=block))
    assert run(model(0.0), model(1.0))["blocks"][1]["kernel"][0, 0] == 0.5


def test_lines_mistakes_are_named():
    with pytest.raises(ValueError, match="block must number .*'embed': None"):
        averaging.lines_scaling(model(0.0), model(1.0), 0.5, block=lambda name: None)
    with pytest.raises(ValueError, match="block must number"):
        averaging.lines_scaling(model(0.0), model(1.0), 0.5, block=lambda name: -1)
    with pytest.raises(ValueError, match="finetuned has the structure"):
        averaging.lines_scaling(model(0.0), {"embed": jnp.ones(3)}, 0.5, block=block)


def test_a_constant_is_its_own_average():
    ema, p = averaging.ema_weights(), {"w": jnp.array([0.3, -2.0])}
    state = ema.init(p)
    for _ in range(5):
        state = ema.update(state, p)
    np.testing.assert_allclose(state.weights["w"], p["w"], rtol=1e-6)


@pytest.mark.smoke
def test_against_the_equation_with_warmup():
    ema = averaging.ema_weights(decay=0.9, warmup_steps=3)
    values = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)

    def step(state, p):
        state = ema.update(state, p)
        return state, state.weights

    _, averages = jax.lax.scan(step, ema.init(values[0]), values)
    np.testing.assert_array_equal(averages[:3], values[:3])
    expected = values[2]
    for value, average in zip(values[3:], averages[3:], strict=True):
        expected = 0.9 * expected + 0.1 * value
        np.testing.assert_allclose(average, expected, rtol=1e-5)


def test_half_precision_is_averaged_in_float32_and_integers_are_copied():
    ema = averaging.ema_weights(decay=0.999)
    state = ema.init({"w": jnp.ones(1, jnp.bfloat16), "n": jnp.array(1)})
    for n in range(2, 5):
        state = ema.update(state, {"w": jnp.zeros(1, jnp.bfloat16), "n": jnp.array(n)})
    assert state.weights["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.weights["w"], 0.999**3, rtol=1e-6)
    assert state.weights["n"] == 4 and state.weights["n"].dtype == jnp.int32


def test_the_average_shares_no_buffer_and_can_be_donated():
    ema, p = averaging.ema_weights(), {"w": jnp.ones(4)}
    state = ema.init(p)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, p))]
    assert len(set(pointers)) == len(pointers)
    update = jax.jit(ema.update, donate_argnums=0)
    for _ in range(3):
        state = update(state, p)
    assert update._cache_size() == 1
    assert state.count == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
    ],
)
def test_ema_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        averaging.ema_weights(**arguments)


def test_what_fine_tuning_left_alone_stays_to_the_bit():
    x = jax.random.normal(jax.random.key(0), (1000,)).astype(jnp.bfloat16)
    tree = {"blocks": [{"kernel": x} for _ in range(3)], "embed": x}
    same = averaging.lines_scaling(tree, tree, 0.3, block=block)
    jax.tree.map(np.testing.assert_array_equal, same, tree)


def test_scale_zero_needs_nothing_of_what_fine_tuning_made():
    before, after = model(0.5), model(jnp.inf)
    found = averaging.lines_scaling(before, after, 0.0, block=block)
    np.testing.assert_array_equal(found["embed"], before["embed"])


def test_lines_of_other_shapes():
    after = model(1.0) | {"embed": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"finetuned has shape \(2, 3\) at embed"):
        averaging.lines_scaling(model(0.0), after, 0.5, block=block)
