"""Masks on coordinates and on leaves: T20, exact zeros, frozen moments, rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamr
from adamr._nodes import find_nodes
from adamr.modifiers.mask import DisruptionState
from adamr.protection.half import HalfFineTuningState
from adamr.routing.carrier import Routed
from tests.contract.cases import gradients, params, subspace
from tests.references import mask as reference


def apply(tx, g, **evidence):
    return tx.update(g, tx.init(g), g, **evidence)[0]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# Disruption mask ---------------------------------------------------------------------


@pytest.mark.smoke
def test_t20_disruption_mask():
    g, r = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, -1.0])
    step = apply(adamr.modifiers.disruption_mask(), g, retain_gradient=r)
    np.testing.assert_allclose(step, [0.26726, 0.0, 0.0], atol=5e-6)
    raw = apply(adamr.modifiers.disruption_mask(normalize=False), g, retain_gradient=r)
    np.testing.assert_array_equal(raw, [1.0, 0.0, 0.0])


def test_disruption_mask_matches_its_twin_over_steps():
    gs, retains = normal(0, 2, 8, 30)
    for kwargs in ({}, {"decay": 0.5}, {"normalize": False}):
        tx = adamr.modifiers.disruption_mask(**kwargs)
        tree = lambda x: {"a": jnp.asarray(x[:10]), "b": jnp.asarray(x[10:])}  # noqa: E731
        state = tx.init(tree(gs[0]))
        twin = reference.disruption(*np.float64([gs, retains]), **kwargs)
        for g, r, expected in zip(gs, retains, twin, strict=True):
            step, state = tx.update(tree(g), state, retain_gradient=tree(r))
            step = np.concatenate([step["a"], step["b"]])
            np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 999))
def test_masked_gradient_disrupts_no_coordinate(seed):
    gs, retains = normal(seed, 2, 3, 20)
    tx = adamr.modifiers.disruption_mask()
    state = tx.init(jnp.zeros(20))
    for g, r in zip(gs, retains, strict=True):
        step, state = tx.update(jnp.asarray(g), state, retain_gradient=jnp.asarray(r))
        assert jnp.all(step * state.retain >= 0)
        assert jnp.linalg.norm(step) <= 1 + 1e-6
        kept = step != 0
        scaled = g / np.linalg.norm(g)
        np.testing.assert_allclose(step[kept], scaled[kept], rtol=1e-5)
        np.testing.assert_array_equal(kept, np.sign(g) == np.sign(state.retain))


def test_norm_is_global_over_leaves_and_before_the_mask():
    g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    r = {"a": jnp.array([1.0]), "b": jnp.array([-1.0])}
    step = apply(adamr.modifiers.disruption_mask(), g, retain_gradient=r)
    np.testing.assert_allclose(step["a"], [0.6], rtol=1e-6)
    np.testing.assert_array_equal(step["b"], [0.0])


def test_degenerate_evidence():
    tx = adamr.modifiers.disruption_mask()
    g, zeros = jnp.array([1.0, -2.0]), jnp.zeros(2)
    np.testing.assert_array_equal(apply(tx, zeros, retain_gradient=g), zeros)
    np.testing.assert_array_equal(apply(tx, g, retain_gradient=zeros), zeros)
    np.testing.assert_array_equal(apply(tx, zeros, retain_gradient=zeros), zeros)
    _, state = tx.update(g, tx.init(g), retain_gradient=jnp.array([1.0, 1.0]))
    odd = jnp.array([jnp.nan, -jnp.inf])
    step, after = tx.update(g, state, retain_gradient=odd)
    np.testing.assert_array_equal(after.retain, state.retain)
    np.testing.assert_allclose(step, [1 / np.sqrt(5), 0.0], rtol=1e-6)


def test_retain_average_is_float32_under_bf16():
    g = jnp.ones(2, jnp.bfloat16)
    tx = adamr.modifiers.disruption_mask()
    step, state = tx.update(g, tx.init(g), retain_gradient=g)
    assert step.dtype == jnp.bfloat16 and state.retain.dtype == jnp.float32


def test_disruption_bad_input():
    g = {"w": jnp.ones(3)}
    tx = adamr.modifiers.disruption_mask()
    with pytest.raises(ValueError, match="needs retain_gradient"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match="retain_gradient at 'w' has shape"):
        tx.update(g, tx.init(g), retain_gradient={"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="decay must lie in"):
        adamr.modifiers.disruption_mask(1.5)
    with pytest.raises(TypeError, match="takes a plain gradient tree"):
        tx.update(Routed(g, g, g), tx.init(g), retain_gradient=g)


# Frozen where masked -----------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "chained": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.lion(0.1), optax.add_decayed_weights(0.1)
    ),
    "partitioned": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)},
        {
            "dense": {"bias": "a", "kernel": "b"},
            "conv": "a",
            "scale": "b",
            "stack": "b",
        },
    ),
    "amsgrad": lambda: optax.chain(
        adamr.route_both_moments(optax.identity()),
        adamr.faithful_second_moment(estimator="amsgrad"),
    ),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_step_is_zero_exactly_where_masked(name):
    """Against momentum and decay; elsewhere the step is the optimizer's own."""
    tx, plain, p = adamr.freeze_masked(OPTIMIZERS[name]()), OPTIMIZERS[name](), params()
    state = tx.init(p)
    assert bits(state) == bits(plain.init(p))
    for seed in range(4):
        g = gradients(seed)
        if seed:
            mask = jax.tree.map(lambda x: x > 0.3, gradients(seed + 10))
            g = jax.tree.map(lambda x, k: jnp.where(k, x, 0.0), g, mask)
        step, after = jax.jit(tx.update)(g, state, p)
        own, _ = plain.update(g, state.inner, p)
        for s, o, x in zip(*map(jax.tree.leaves, (step, own, g)), strict=True):
            assert not np.any(np.asarray(s)[np.asarray(x == 0)])
            kept = np.asarray(x != 0)
            np.testing.assert_allclose(
                np.asarray(s)[kept], np.asarray(o)[kept], rtol=1e-5, atol=1e-7
            )
            if seed == 3 and x.ndim > 1:
                assert np.any(np.asarray(o)[~kept])  # what the wrapper is there for
        p, state = optax.apply_updates(p, step), after


def test_frozen_adam_matches_its_twin():
    gs = normal(0, 9, 40)
    masks = np.random.default_rng(1).random(gs.shape) < 0.5
    masks[:4, :10] = False  # freed late
    masks[:, 10:13] = False  # never
    tx = adamr.freeze_masked(optax.scale_by_adam(b1=0.8, b2=0.95))
    state = tx.init(jnp.zeros(40))
    twin = reference.adam_where(np.float64(gs * masks), masks, b1=0.8, b2=0.95)
    for g, mask, expected in zip(gs, masks, twin, strict=True):
        before = state.inner
        step, state = tx.update(jnp.asarray(g * mask), state)
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-6)
        for field in ("mu", "nu"):
            old, new = (np.asarray(getattr(x, field)) for x in (before, state.inner))
            np.testing.assert_array_equal(new[~mask], old[~mask])
            assert np.all(new[mask] != old[mask])
    assert not np.any(state.inner.mu[10:13])


@pytest.mark.parametrize("b2, factor", [(0.999, 3.162), (0.99, 1.0)])
def test_a_coordinate_freed_late_starts_with_a_bounded_step(b2, factor):
    tx = adamr.freeze_masked(optax.scale_by_adam(b2=b2))
    g = jnp.array([1.0, 0.0])
    late = jax.lax.fori_loop(0, 10_000, lambda i, s: tx.update(g, s)[1], tx.init(g))
    step, _ = tx.update(jnp.array([1.0, 1.0]), late)
    np.testing.assert_allclose(step, [1.0, factor], rtol=2e-3)


def test_behind_a_decoupled_route_zeros_of_the_first_gradient_count():
    g, r = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, -1.0])
    tx = optax.chain(
        adamr.route_first_moment(adamr.modifiers.disruption_mask(0.0, normalize=False)),
        adamr.freeze_masked(adamr.faithful_second_moment()),
    )
    state = tx.init(g)
    _, state = tx.update(g, state, retain_gradient=g)
    before = state[1].inner
    step, state = tx.update(g, state, retain_gradient=r)
    np.testing.assert_allclose(step, [1.0, 0.0, 0.0], rtol=1e-4)
    for field in ("mu", "nu"):
        old, new = getattr(before, field), getattr(state[1].inner, field)
        np.testing.assert_array_equal(new[1:], old[1:])
        assert new[0] != old[0]


def test_masking_only_the_gradient_leaks_and_mudman_does_not():
    g, agree, against = jnp.ones(2), jnp.ones(2), jnp.array([1.0, -1.0])
    leaky = optax.chain(adamr.modifiers.disruption_mask(0.0), optax.adam(0.1))
    for tx, leaks in ((leaky, True), (adamr.mudman(0.1, 0.0), False)):
        _, state = tx.update(g, tx.init(g), retain_gradient=agree)
        step, state = tx.update(g, state, retain_gradient=against)
        assert (step[1] != 0) == leaks
        np.testing.assert_allclose(step[0], -0.1, rtol=1e-3)


@given(st.integers(0, 99))
def test_mudman_never_raises_the_retained_loss_to_first_order(seed):
    tx, p = adamr.mudman(0.1), jnp.zeros(20)
    state = tx.init(p)
    for g, r in zip(*normal(seed, 2, 5, 20), strict=True):
        step, state = tx.update(jnp.asarray(g), state, retain_gradient=jnp.asarray(r))
        (retain,) = find_nodes(state, DisruptionState)
        masked = np.sign(g) != np.sign(retain.retain)
        np.testing.assert_array_equal(step[masked], 0.0)


# Half fine-tuning --------------------------------------------------------------------


def transformer(layers=4):
    keys = iter(jax.random.split(jax.random.key(7), 100))
    leaf = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731

    def block():
        names = ("query", "key", "value", "out")
        return {
            "attention": {n: {"kernel": leaf(3, 3), "bias": leaf(3)} for n in names},
            "mlp": {n: {"kernel": leaf(3, 3)} for n in ("gate", "up", "down")},
            "norm_1": {"scale": leaf(3)},
        }

    return {
        "embed": {"embedding": leaf(5, 3)},
        "lm_head": {"kernel": leaf(3, 5)},
        **{f"block_{i}": block() for i in range(layers)},
    }


def frozen_by_name(tree, state):
    (node,) = find_nodes(state, HalfFineTuningState)
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    return {n: not t for n, t in zip(names, node.trained, strict=True)}


def counts(tree, state):
    """(frozen, all) per category."""
    result, frozen = {}, frozen_by_name(tree, state)
    for name, x in zip(frozen, jax.tree.leaves(tree), strict=True):
        category = adamr.protection.default_groups(name, x.shape)
        part, whole = result.get(category, (0, 0))
        result[category] = (part + frozen[name], whole + 1)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_exactly_half_of_every_category_in_every_round(seed):
    p = transformer(4)
    tx = adamr.protection.half_fine_tuning(optax.sgd(0.1), jax.random.key(seed))
    state, draws = tx.init(p), set()
    for _ in range(5):
        per = counts(p, state)
        for i in range(4):
            assert per[f"block_{i}/attention kernel"] == (2, 4)
            assert per[f"block_{i}/attention bias"] == (2, 4)
        assert per["mlp"] == (6, 12) and per["norm"] == (2, 4)
        assert per[None] == (0, 2) and len(per) == 11
        draws.add(tuple(frozen_by_name(p, state).values()))
        state = adamr.redraw_half(state)
    assert len(draws) == 5


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_odd_categories_freeze_the_smaller_half_and_every_leaf_alike(size):
    p = {f"w{i}": jnp.ones((2, 2)) for i in range(size)}
    tx = adamr.protection.half_fine_tuning(
        optax.sgd(0.1), jax.random.key(0), lambda path, shape: "all"
    )
    state, often = tx.init(p), np.zeros(size)
    redraw = jax.jit(adamr.redraw_half)
    for _ in range(400):
        frozen = np.array(list(frozen_by_name(p, state).values()))
        assert frozen.sum() == size // 2
        often += frozen
        state = redraw(state)
    rate = (size // 2) / size
    sigma = np.sqrt(400 * rate * (1 - rate))
    np.testing.assert_allclose(often, 400 * rate, atol=4.5 * sigma + 1e-9)


def test_groups_are_any_function_of_name_and_shape():
    p = params()
    seen = []

    def groups(path, shape):
        seen.append((path, shape))
        return ("two", len(shape)) if len(shape) > 1 else None

    tx = adamr.protection.half_fine_tuning(optax.sgd(0.1), jax.random.key(0), groups)
    state = tx.init(p)
    assert seen[:3] == [
        ("conv", (2, 2, 3, 8)),
        ("dense/bias", (8,)),
        ("dense/kernel", (6, 8)),
    ]
    np.testing.assert_array_equal(state.groups, [0, -1, 1, -1, 2])
    assert jnp.all(state.trained)  # one leaf in each category


@pytest.mark.parametrize(
    "path, shape, category",
    [
        ("embedder/embedding", (9, 4), None),
        ("pos_embed", (9, 4), None),
        ("lm_head/kernel", (4, 9), None),
        ("logits/bias", (9,), None),
        ("final_norm/scale", (4,), "norm"),
        ("h/0/ln_1/bias", (4,), "norm"),
        ("LayerNorm_0/scale", (4,), "norm"),
        ("layers/3/self_attn/q_proj/kernel", (4, 4), "layers/3/self_attn kernel"),
        ("h/1/attn/c_attn/kernel", (4, 12), "h/1/attn kernel"),
        ("block/attention/value/kernel/value", (4, 4), "block/attention kernel"),
        ("block/attention/out/bias", (4,), "block/attention bias"),
        ("layers/3/mlp/down_proj/kernel", (4, 4), "mlp"),
        ("Dense_0/kernel", (4, 4), "mlp"),
        ("Dense_0/bias", (4,), "bias"),
        ("w", (4, 4), "mlp"),
    ],
)
def test_default_groups(path, shape, category):
    assert adamr.protection.default_groups(path, shape) == category


FULL = {
    **OPTIMIZERS,
    "shared v": lambda: optax.chain(
        adamr.route_first_moment(adamr.project_out(subspace())),
        adamr.faithful_second_moment(share="fan_in"),
        optax.add_decayed_weights(0.1),
    ),
    "shared amsgrad": lambda: optax.chain(
        adamr.route_both_moments(optax.identity()),
        adamr.faithful_second_moment(estimator="amsgrad", share="fan_in"),
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_frozen_half_is_bit_identical_after_a_round(name):
    """Weights and moments, under momentum and decay; the other half moves."""
    p = params()
    tx = adamr.protection.half_fine_tuning(
        FULL[name](), jax.random.key(1), lambda path, shape: 0
    )
    state = tx.init(p)
    update = jax.jit(tx.update)

    def moments(state, i):
        """What the state holds in the shape of leaf i, or in its shared shape."""
        found = []
        shared = (adamr.routing.FaithfulSecondMomentState,)
        for node in find_nodes(
            state, *shared, optax.ScaleByAdamState, optax.TraceState
        ):
            for field in ("mu", "nu", "trace"):
                leaves = jax.tree.leaves(getattr(node, field, ()))
                whole = len(jax.tree.leaves(p))
                for start in range(0, len(leaves), whole):
                    if len(leaves) - start >= whole:
                        found.append(np.asarray(leaves[start + i]))
        return bits(found)

    for task in range(3):
        frozen = ~np.asarray(state.trained)
        assert frozen.sum() == 2
        before = jax.tree.leaves(p)
        old = [moments(state, i) for i in range(5)]
        for seed in range(4):
            step, state = update(gradients(4 * task + seed), state, p)
            p = optax.apply_updates(p, step)
        for i, x in enumerate(jax.tree.leaves(p)):
            assert (bits(x) == bits(before[i])) == frozen[i]
            if name != "partitioned" and old[i]:
                assert (moments(state, i) == old[i]) == frozen[i]
        state = adamr.redraw_half(state)


def test_frozen_leaves_do_not_enter_a_norm_inside():
    p = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0))
    tx = adamr.protection.half_fine_tuning(inner, jax.random.key(0))
    g = {"a": 100 * p["a"], "b": 100 * p["b"]}
    step, _ = tx.update(g, tx.init(p), p)
    np.testing.assert_allclose(sorted(float(x[0, 0]) for x in step.values()), [-1, 0])


def test_trained_half_takes_the_optimizers_own_step():
    p, tx = params(), adamr.hft(0.1, jax.random.key(3))
    plain = optax.adamw(0.1, weight_decay=0.0)
    state, plain_state = tx.init(p), plain.init(p)
    for seed in range(3):
        g = gradients(seed)
        step, state = tx.update(g, state, p)
        own, plain_state = plain.update(g, plain_state, p)
        pairs = zip(jax.tree.leaves(step), jax.tree.leaves(own), strict=True)
        for (s, o), trained in zip(pairs, state.trained, strict=True):
            np.testing.assert_array_equal(s, o if trained else jnp.zeros_like(o))


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(
        tx, lambda p: jax.tree.map(lambda x: x.ndim > 0, p)
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: adamr.protection.half_fine_tuning(
            optax.sgd(rate), jax.random.key(0)
        )
    )(0.1),
    "partition": lambda tx: optax.partition(
        {True: tx, False: optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: x.ndim > 0, p),
    ),
}


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("legacy_key", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_redraw_through_wrappers_without_recompilation(wrapper, legacy_key, committed):
    key = (jax.random.PRNGKey if legacy_key else jax.random.key)(2)
    tx = adamr.protection.half_fine_tuning(optax.adam(0.1), key, lambda path, shape: 0)
    tx, p = WRAPPERS[wrapper](tx), params()
    device = jax.devices()[0] if committed else None
    p, state = jax.device_put((p, tx.init(p)), device)
    g = jax.device_put(gradients(0), device)
    update = jax.jit(tx.update, donate_argnums=1)
    draws = set()
    for _ in range(6):
        (node,) = find_nodes(state, HalfFineTuningState)
        draws.add(tuple(np.asarray(node.trained)))
        before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        _, state = update(g, state, p)
        state = adamr.redraw_half(state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert len(draws) > 1 and update._cache_size() == 1


def test_a_rounds_draws_come_from_the_key_alone():
    p = params()
    rounds = []
    for jitted in (False, True):
        tx = adamr.hft(0.1, jax.random.key(5), lambda path, shape: 0)
        redraw = jax.jit(adamr.redraw_half) if jitted else adamr.redraw_half
        state = tx.init(p)
        drawn = []
        for seed in range(4):
            _, state = tx.update(gradients(seed if jitted else 0), state, p)
            drawn.append(tuple(np.asarray(state.trained)))
            state = redraw(state)
        rounds.append(drawn)
    assert rounds[0] == rounds[1]


def test_a_fresh_optimizer_for_every_round():
    p, tx = params(), adamr.hft(0.1, jax.random.key(0), lambda path, shape: 0)
    state = tx.init(p)
    for seed in range(3):
        _, state = tx.update(gradients(seed), state, p)
    state = adamr.reset_moments(adamr.redraw_half(state))
    step, state = tx.update(gradients(9), state, p)
    for s, trained in zip(jax.tree.leaves(step), state.trained, strict=True):
        np.testing.assert_allclose(np.abs(s), 0.1 if trained else 0.0, rtol=1e-4)


def test_nan_in_a_frozen_leaf_does_no_harm():
    p, tx = params(), adamr.hft(0.1, jax.random.key(0), lambda path, shape: 0)
    state = tx.init(p)
    leaves, treedef = jax.tree.flatten(gradients(0))
    leaves = [
        x if trained else x * jnp.nan
        for x, trained in zip(leaves, state.trained, strict=True)
    ]
    step, state = tx.update(jax.tree.unflatten(treedef, leaves), state, p)
    finite = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and jnp.isnan(x).any()  # noqa: E731
    assert not any(finite(x) for x in jax.tree.leaves((step, state.inner)))


def test_half_fine_tuning_bad_input():
    g = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="holds no state of half_fine_tuning"):
        adamr.redraw_half(optax.adam(0.1).init(g))
    tx = adamr.protection.half_fine_tuning(optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(TypeError, match="takes a plain gradient tree"):
        tx.update(Routed(g, g, g), tx.init(g))


def test_redraw_inside_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")

    class Tiny(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.two = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    model = Tiny()
    optimizer = nnx.Optimizer(model, adamr.hft(0.1, jax.random.key(0)), wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    draws = set()
    for _ in range(8):
        before = jax.tree.map(jnp.copy, jax.tree.leaves(nnx.state(model, nnx.Param)))
        optimizer.update(model, g)
        after = jax.tree.leaves(nnx.state(model, nnx.Param))
        same = tuple(bits(a) == bits(b) for a, b in zip(before, after, strict=True))
        assert sum(same) == 2  # one of two kernels, one of two biases
        draws.add(same)
        optimizer.opt_state = adamr.redraw_half(optimizer.opt_state)
    assert len(draws) > 1
