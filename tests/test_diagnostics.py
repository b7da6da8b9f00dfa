"""Diagnostics against float64 twins, and Proposition 1 measured by them.

The twins see a protected leaf as (slices, fan-in, outputs) and its basis as (slices,
fan-in, rank), take one output unit at a time, and build the matrix that the merging
link multiplies m̂ by.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamr
from adamr.diagnostics import effective_learning_rate, moment_statistics, update_leak
from tests.contract.cases import bases, gradients, orthonormal, params, subspace

ALPHAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
B1, B2, EPS, EPS_ROOT, STEPS = 0.8, 0.95, 1e-2, 1e-3, 4
DECAYS = {"b1": B1, "b2": B2}
NUMBERS = {**DECAYS, "eps": EPS, "eps_root": EPS_ROOT}
SLICED = {0: (1, 12, 8), 2: (1, 6, 8), 4: (2, 5, 8)}  # conv, dense, stack
KEEP = {"dense": {"bias": True, "kernel": True}, "conv": False, "scale": False}
KEEP["stack"] = True
KEPT = jax.tree.leaves(KEEP)
FIRST = adamr.route_first_moment
statistics = jax.jit(moment_statistics)  # decays and eps may be traced


def float64(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def columns():
    """Bases by leaf position, (slices, fan-in, rank)."""
    conv, dense, stack = (np.asarray(u, np.float64) for u in jax.tree.leaves(bases()))
    return {0: conv[None], 2: dense[None], 4: stack}


def weighted(value):
    """The subspace of the tests with λ < 1."""
    lam = jax.tree.map(lambda u: np.full(u.shape[-1], value, np.float32), bases())
    return adamr.make_subspace(params(), bases(), max_rank=4, weights=lam)


@functools.cache
def stream(dtype=jnp.float32):
    """Shrinking gradients, so that the largest v̂ is not the last."""
    p = params(dtype)
    return [
        jax.tree.map(lambda x, t=t: x * 4.0**-t, gradients(t, p)) for t in range(STEPS)
    ]


def trained(tx, gs=None):
    gs = stream() if gs is None else gs
    state, update = tx.init(gs[0]), jax.jit(tx.update)
    for g in gs:
        _, state = update(g, state, gs[0])
    return state


# Twins -------------------------------------------------------------------------------


def kept_moments(firsts, seconds, estimator="adam", axes=()):
    """m, m̂, v and v̂ of one leaf after the last step, v spread out."""
    m = np.full(firsts[0].shape, 1e-6 if estimator == "yogi" else 0.0)
    v = np.full(m.shape, {"yogi": 1e-6, "adagrad": 0.1}.get(estimator, 0.0))
    largest = np.zeros(m.shape)
    for t, (f, g) in enumerate(zip(firsts, seconds, strict=True), start=1):
        square = np.broadcast_to((g**2).mean(axes, keepdims=True), m.shape)
        m = B1 * m + (1 - B1) * f
        decay = min(B2, 1 - t**-0.8) if estimator == "adafactor" else B2
        if estimator == "adagrad":
            v = v + square
        elif estimator == "yogi":
            v = v - (1 - B2) * np.sign(v - square) * square
        else:
            v = decay * v + (1 - decay) * square
        plain = estimator in ("rmsprop", "adagrad", "adafactor")
        v_hat = v if plain else v / (1 - B2**t)
        largest = np.maximum(largest, v_hat)
    return m, m / (1 - B1**t), v, largest if estimator == "amsgrad" else v_hat


def one_leaf(u, *blocks):
    """What a leaf adds, from its (m, m̂, v, v̂), or from two of them if rotated."""
    m, m_hat, v, v_hat = (
        np.concatenate([x.ravel() for x in each]) for each in zip(*blocks, strict=True)
    )
    found = {"m": m, "v": v, "ratio": np.abs(m_hat) / np.sqrt(v_hat)}
    if u is None:
        return found
    slices, n, rank = u.shape
    energy, old, trace = [], [], []
    for i in range(slices):
        for o in range(blocks[0][0].shape[-1]):
            kept = [[x[i, :, o] for x in block] for block in blocks]
            d = [np.diag(1 / (np.sqrt(x[3] + EPS_ROOT) + EPS)) for x in kept]
            if len(blocks) == 1:
                operator, along = d[0], u[i].T ** 2
            else:
                off, along = np.eye(n) - u[i] @ u[i].T, np.eye(rank)
                operator = u[i] @ d[0] @ u[i].T + off @ d[1] @ off
            energy.append((along @ kept[0][2]).sum())
            old += [c @ operator @ c for c in u[i].T]
            trace += list(np.diag(operator))
    return {**found, "energy": np.array(energy), "old": np.array(old), "trace": trace}


EVERY_LEAF = {
    "mu_norm": lambda x: np.linalg.norm(x["m"]),
    "nu_mean": lambda x: x["v"].mean(),
    "nu_min": lambda x: x["v"].min(),
    "nu_max": lambda x: x["v"].max(),
    "largest_ratio": lambda x: x["ratio"].max(),
}
PROTECTED = {
    "old_energy": lambda x: x["energy"].sum() / x["v"].sum(),
    "old_learning_rate": lambda x: x["old"].mean(),
    "base_learning_rate": lambda x: np.mean(x["trace"]),
}


def check(got, leaves, rtol=3e-5):
    """`leaves` as from `one_leaf`, None in holes."""
    for table, key in ((EVERY_LEAF, "v"), (PROTECTED, "old")):
        there = [x if x and key in x else None for x in leaves]
        group = [x for x in there if x]
        shared = set.intersection(*map(set, group))
        pooled = {k: np.concatenate([x[k] for x in group]) for k in shared}
        for name, function in table.items():
            total, per_leaf = getattr(got, name)
            np.testing.assert_allclose(total, function(pooled), rtol, err_msg=name)
            assert [x is None for x in per_leaf] == [x is None for x in there], name
            for a, b in zip(per_leaf, there, strict=True):
                if b:
                    assert a.shape == () and a.dtype == jnp.float32
                    np.testing.assert_allclose(a, function(b), rtol, err_msg=name)


def twin(estimator="adam", share=False, project=True, rotate=False, keep=(1,) * 5):
    """Leaves for `check` after `stream()`: m of projected gradients, v of raw ones."""
    kept = functools.partial(kept_moments, estimator=estimator)
    leaves = []
    for i, raw in enumerate(zip(*map(float64, stream()), strict=True)):
        u = columns().get(i)
        if not keep[i]:
            leaves.append(None)
        elif u is None:
            leaves.append(one_leaf(None, kept(raw, raw)))
        else:
            raw = [g.reshape(SLICED[i]) for g in raw]
            along = [u.swapaxes(1, 2) @ g for g in raw]
            rest = [g - u @ c for g, c in zip(raw, along, strict=True)]
            if rotate:
                first = [0 * c for c in along] if project else along
                leaves.append(one_leaf(u, kept(first, along), kept(rest, rest)))
            else:
                first, axes = rest if project else raw, (1,) if share else ()
                leaves.append(one_leaf(u, kept(first, raw, axes=axes)))
    return leaves


# Steps -------------------------------------------------------------------------------


def lengths(tree):
    """‖Uᵀx‖² and ‖x‖² per protected leaf."""
    pairs = []
    for i, u in columns().items():
        x = float64(tree)[i].reshape(SLICED[i])
        pairs.append(((np.einsum("lik,lio->lko", u, x) ** 2).sum(), (x**2).sum()))
    return np.array(pairs)


def assert_measured(got, parts, wholes):
    np.testing.assert_allclose(got.total, (sum(parts) / sum(wholes)) ** 0.5, rtol=1e-5)
    assert [i for i, x in enumerate(got.per_leaf) if x is not None] == list(SLICED)
    each = [x for x in got.per_leaf if x is not None]
    np.testing.assert_allclose(each, (parts / wholes) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("s", [subspace(), weighted(0.25)], ids=["λ=1", "λ<1"])
def test_steps_equal_float64(dtype, s):
    f, step = (gradients(seed, params(dtype)) for seed in (1, 2))
    inside, whole = lengths(step).T
    assert_measured(jax.jit(update_leak)(step, s), inside, whole)
    got = jax.jit(effective_learning_rate)(f, step, s)
    assert_measured(got, inside, lengths(f)[:, 0])


def test_degenerate_steps_are_defined():
    g, s = gradients(1), subspace()
    zero, nan = (jax.tree.map(lambda x, c=c: x * c, g) for c in (0.0, jnp.nan))
    assert update_leak(zero, s).total == 0
    assert jnp.isnan(update_leak(nan, s).total)
    assert effective_learning_rate(zero, zero, s).total == 0
    assert jnp.isinf(effective_learning_rate(zero, g, s).total)
    assert jnp.isnan(effective_learning_rate(g, nan, s).total)
    assert jnp.isnan(effective_learning_rate(nan, zero, s).total)
    assert update_leak(g, adamr.empty_subspace(params(), max_rank=2)).total == 0
    nothing = adamr.make_subspace(params(), jax.tree.map(lambda x: None, g))
    assert update_leak(g, nothing) == (0, (None,) * 5)


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_holes_do_not_shift_steps(hole):
    g, s = gradients(1), subspace()
    some = {**g, "conv": hole}
    (_, _, *rest), part = update_leak(g, s).per_leaf, update_leak(some, s)
    assert part.per_leaf == (None, None, *rest)
    inside, whole = lengths(g)[1:].sum(axis=0)
    np.testing.assert_allclose(part.total, (inside / whole) ** 0.5, rtol=1e-5)
    for pair in ((g, some), (some, g)):
        got = effective_learning_rate(*pair, s)
        assert got.per_leaf == (None, None, 1, None, 1) and got.total == 1


# Moments -----------------------------------------------------------------------------


def merged(estimator="adam", **kwargs):
    link = adamr.faithful_second_moment(
        B1, B2, EPS, EPS_ROOT, estimator=estimator, guard=False, **kwargs
    )
    return optax.chain(FIRST(adamr.project_out(subspace())), link)


ESTIMATORS = ("adam", "amsgrad", "rmsprop", "adagrad", "yogi", "adafactor")
UNCORRECTED = ("rmsprop", "adagrad")


@pytest.mark.parametrize(
    "estimator, share",
    [*((name, None) for name in ESTIMATORS), ("adam", "fan_in"), ("amsgrad", "fan_in"),
     ("adafactor", "fan_in")],
)  # fmt: skip
def test_moment_statistics_equal_float64(estimator, share):
    state = trained(merged(estimator, share=share))
    numbers = {**NUMBERS, "b2": None if estimator in UNCORRECTED else B2}
    got = statistics(state, **numbers)
    check(got, twin(estimator, share=bool(share)))
    assert got.count == STEPS and got.count.dtype == jnp.int32


@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_plain_optax_under_update_projection(name):
    """The link's Subspace is found; m and v are those of the raw gradient."""
    link = getattr(optax, f"scale_by_{name}")(B1, B2)
    state = trained(optax.chain(link, adamr.protect_update(subspace())))
    check(statistics(state, **NUMBERS), twin(name, project=False))
    state = trained(link)
    leaves = twin(name, project=False)
    check(statistics(state, weighted(0.25), **NUMBERS), leaves)
    assert moment_statistics(state).old_energy is None


@pytest.mark.parametrize("estimator", ["adam", "adagrad", "amsgrad", "optax"])
def test_eigenbasis(estimator):
    """Capacity 4 over ranks 3, 2, 2: the zero columns have no moments."""
    s, ours = weighted(0.25), estimator != "optax"
    link = optax.scale_by_adam(B1, B2)
    if ours:
        link = adamr.faithful_second_moment(B1, B2, estimator=estimator, guard=False)
    tx = adamr.in_eigenbasis(link, s)
    tx = optax.chain(FIRST(adamr.project_out(subspace())), tx) if ours else tx
    state = trained(tx)
    numbers = {**NUMBERS, "b2": None if estimator in UNCORRECTED else B2}
    got = statistics(state, **numbers)
    name = estimator if ours else "adam"
    check(got, twin(name, project=ours, rotate=True))


# Wrappers: a part of the leaves, of optimizers, or of the steps ----------------------

LABELS = jax.tree.map(lambda k: "a" if k else "b", KEEP)


def partition(other):
    return lambda tx: optax.partition({"a": tx, "b": other}, LABELS)


WRAPPERS = {
    "masked": (lambda tx: optax.masked(tx, KEEP), KEPT),
    "partition": (partition(optax.sgd(0.1)), KEPT),
    "partition of two": (partition(merged()), (1,) * 5),
    "partition with optax": (partition(optax.scale_by_adam(B1, B2)), (1,) * 5),
    "multi_steps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), (1,) * 5,
    ),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(
            lambda rate: optax.chain(tx, optax.scale_by_learning_rate(rate))
        )(rate=0.1),
        (1,) * 5,
    ),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), (1,) * 5),
}  # fmt: skip


ELEMENT_WISE = [("masked", None), ("partition of two", None)]


@pytest.mark.parametrize(
    "wrapper, share", [*ELEMENT_WISE, *((name, "fan_in") for name in WRAPPERS)]
)
def test_wrappers(wrapper, share):
    wrap, keep = WRAPPERS[wrapper]
    gs = [g for g in stream() for _ in range(2 if wrapper == "multi_steps" else 1)]
    state = trained(wrap(merged(share=share)), gs)
    leaves = twin(share=bool(share), keep=keep)
    if wrapper.startswith("partition "):
        others = twin(project=wrapper == "partition of two")
        leaves = [a if k else b for k, a, b in zip(KEPT, leaves, others, strict=True)]
    got = statistics(state, **NUMBERS)
    check(got, leaves)
    assert got.count == STEPS


def test_eigenbasis_in_a_partition():
    tx = adamr.in_eigenbasis(optax.scale_by_adam(B1, B2), subspace())
    state = trained(partition(optax.scale_by_adam(B1, B2))(tx))
    rotated, plain = (twin(project=False, rotate=r) for r in (True, False))
    leaves = [a if k else b for k, a, b in zip(KEPT, rotated, plain, strict=True)]
    check(statistics(state, **NUMBERS), leaves)


class Tree(nnx.Module):
    """A module with the leaves of `params`."""

    def __init__(self, tree):
        for name, x in tree.items():
            setattr(self, name, Tree(x) if isinstance(x, dict) else nnx.Param(x))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("estimator", ["adam", "amsgrad", "adafactor"])
def test_nnx_optimizer(estimator, rotate):
    link = adamr.faithful_second_moment(B1, B2, estimator=estimator, guard=False)
    tx = adamr.in_eigenbasis(link, subspace()) if rotate else link
    tx = optax.chain(FIRST(adamr.project_out(subspace())), tx)
    model = Tree(params())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda optimizer, model, g: optimizer.update(model, g))
    for g in stream():
        update(optimizer, model, nnx.state(Tree(g), nnx.Param))
    leaves = twin(estimator, rotate=rotate)
    check(statistics(optimizer.opt_state, **NUMBERS), leaves)


@pytest.mark.parametrize("share", [None, "fan_in"])
def test_factored_moments(share):
    """v̂ = row mean × column mean / mean, over the two largest axes; not if shared."""
    shapes = {"factored": (130, 128), "slices": (2, 128, 131), "small": (6, 4)}
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    u = orthonormal(3, 130, 2)
    s = adamr.make_subspace(zeros, {**dict.fromkeys(shapes), "factored": u}, max_rank=2)
    link = adamr.faithful_second_moment(B1, B2, estimator="adafactor", share=share)
    gs = [gradients(seed, zeros) for seed in range(3)]
    leaves = []
    for name, basis in zip(shapes, (u[None], None, None), strict=True):
        raw = [np.asarray(g[name], np.float64) for g in gs]
        axes = (-2,) if share else ()
        m, m_hat, v, _ = kept_moments(raw, raw, "adafactor", axes)
        if name != "small" and not share:
            row, column = v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)
            v = row * column / v.mean((-1, -2), keepdims=True)
        leaves.append(one_leaf(basis, [x[None] for x in (m, m_hat, v, v)]))
    tx = optax.chain(FIRST(optax.identity()), link)
    check(statistics(trained(tx, gs), s, **NUMBERS), leaves)
    before = statistics(tx.init(zeros), s, **NUMBERS)
    assert before.nu_mean.total == before.largest_ratio.total == 0


def test_bfloat16_state_is_read_in_float32():
    state = trained(merged(), stream(jnp.bfloat16))
    cast = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))
    got, wide = (statistics(x, **NUMBERS) for x in (state, jax.tree.map(cast, state)))
    jax.tree.map(np.testing.assert_array_equal, got, wide)
    assert {x.dtype for x in jax.tree.leaves(got[1:])} == {jnp.dtype(jnp.float32)}


def test_vmap_equals_a_loop():
    tx = merged()
    states = [tx.init(params()), trained(tx)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    got = jax.jit(jax.vmap(lambda x: moment_statistics(x, **NUMBERS)))(stacked)
    for i, state in enumerate(states):
        alone = statistics(state, **NUMBERS)
        np.testing.assert_allclose(
            *([float(x) for x in jax.tree.leaves(y)]
              for y in (jax.tree.map(lambda x, i=i: x[i], got), alone)), rtol=1e-6
        )  # fmt: skip


def test_sharded_leaves():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    s, state, g = subspace(), trained(optax.scale_by_adam(B1, B2)), gradients(1)
    expected = statistics(state, s, **NUMBERS), update_leak(g, s)

    def shard(x):
        spec = [None] * (x.ndim - 1) + ["x"] if x.ndim else []
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        got = statistics(jax.tree.map(shard, state), s, **NUMBERS)
        got = got, jax.jit(update_leak)(jax.tree.map(shard, g), s)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# Degenerate states -------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["adam", "amsgrad", "adafactor"])
def test_before_the_first_step(estimator):
    state = merged(estimator).init(params())
    got = statistics(state, **NUMBERS)
    assert got.count == 0
    for name in (*EVERY_LEAF, "old_energy"):
        assert not any(map(float, jax.tree.leaves(getattr(got, name)))), name
    for field in (got.old_learning_rate, got.base_learning_rate):
        for x in jax.tree.leaves(field):
            np.testing.assert_allclose(x, 1 / (EPS_ROOT**0.5 + EPS), rtol=1e-5)


@pytest.mark.smoke
def test_v_of_zero_is_inf_and_never_nan():
    """U = e_1: the coordinate that never fires has no part in it."""
    g = {"w": jnp.ones((3, 2)).at[2].set(0.0)}
    s = adamr.make_subspace(g, {"w": jnp.eye(3)[:, :1]})
    state = trained(optax.scale_by_adam(), [g])
    got = moment_statistics(state, s, eps=0.0)
    np.testing.assert_allclose(got.old_learning_rate.total, 1.0, rtol=1e-5)
    assert jnp.isinf(got.base_learning_rate.total)
    np.testing.assert_allclose(got.largest_ratio.total, 1.0, rtol=1e-5)
    state = state._replace(mu={"w": state.mu["w"] + 1.0})
    assert jnp.isinf(moment_statistics(state, s).largest_ratio.total)
    rotated = trained(adamr.in_eigenbasis(optax.scale_by_adam(), s), [g])
    got = moment_statistics(rotated, eps=0.0)
    np.testing.assert_allclose(got.old_learning_rate.total, 1.0, rtol=1e-5)


def test_an_eigenbasis_counts_its_own_directions_only():
    """Not those of another, nor what `moments="keep"` leaves behind in its padding."""
    state = trained(adamr.in_eigenbasis(optax.scale_by_adam(), subspace()))
    other = statistics(state, adamr.empty_subspace(params(), max_rank=4))
    jax.tree.map(np.testing.assert_array_equal, other, statistics(state))

    def stale(tree, value):
        return tuple(
            x._replace(along=x.along.at[..., columns()[i].shape[-1] :, :].set(value))
            if i in SLICED
            else x
            for i, x in enumerate(tree)
        )

    inner = state.inner
    inner = inner._replace(mu=stale(inner.mu, 7.0), nu=stale(inner.nu, 1e-12))
    got = statistics(state._replace(inner=inner))
    jax.tree.map(np.testing.assert_array_equal, got, statistics(state))
    inner = inner._replace(nu=stale(inner.nu, 1e12))
    got = statistics(state._replace(inner=inner))
    jax.tree.map(np.testing.assert_array_equal, got, statistics(state))


def test_a_full_eigenbasis_leaves_no_rest():
    """Rounding leaves a little off U, and D of a little is large."""
    g = {"w": gradients(0)["dense"]["kernel"]}
    for basis in (np.eye(6, dtype=np.float32), orthonormal(0, 6, 6)):
        s = adamr.make_subspace(g, {"w": basis})
        state = trained(adamr.in_eigenbasis(optax.scale_by_adam(), s), [g])
        got = statistics(state, eps=0.0)
        expected = np.mean(1 / np.abs(basis.T @ np.asarray(g["w"])))
        np.testing.assert_allclose(got.old_learning_rate.total, expected, rtol=1e-4)
        np.testing.assert_allclose(got.base_learning_rate.total, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "outputs", [2, pytest.param(20000, marks=pytest.mark.as_users)]
)
def test_nan_stays_nan(outputs):
    """Also in a long leaf, where XLA's maximum passes over it on a CPU."""
    g = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, outputs)).at[1, 1].set(jnp.nan)}
    s = adamr.make_subspace(g, {name: np.full((3, 1), 3**-0.5) for name in g})
    for tx in (optax.scale_by_adam(), adamr.in_eigenbasis(optax.scale_by_adam(), s)):
        got = statistics(trained(tx, [g]), s)
        for name, field in zip(got._fields[1:], got[1:], strict=True):
            assert jnp.isnan(field.total) and jnp.isnan(field.per_leaf[1]), name
            assert jnp.isfinite(field.per_leaf[0]), name


def test_leaves_without_entries_and_trees_without_leaves():
    p = {"empty": jnp.zeros((0, 3)), "w": jnp.ones(2)}
    got = moment_statistics(trained(optax.scale_by_adam(), [p]))
    assert got.nu_mean.per_leaf[0] is None and got.nu_mean.total > 0
    got = moment_statistics(optax.scale_by_adam().init({}))
    assert got.largest_ratio == (0, ())


def test_parameters_may_have_the_names_of_the_states_fields():
    class Names(NamedTuple):
        row: jax.Array
        nu_max: jax.Array

    p = Names(jnp.ones(2), jnp.ones(3))
    state = trained(optax.scale_by_adam(B1, B2), [p])
    np.testing.assert_allclose(moment_statistics(state).nu_mean.total, 1 - B2, 1e-5)


def test_errors():
    p, s = params(), subspace()
    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match="holds no state with count, mu and nu"):
        moment_statistics(optax.sgd(0.1).init(p))
    with pytest.raises(ValueError, match="several moments of one leaf"):
        moment_statistics(optax.chain(adam, adam).init(p))
    rotated = adamr.in_eigenbasis(adam, s).init(p)
    with pytest.raises(ValueError, match="pass the whole EigenbasisState"):
        moment_statistics(rotated.inner)
    two = optax.chain(adam, *(adamr.protect_update(subspace(0, r)) for r in (3, 4)))
    with pytest.raises(ValueError, match="subspaces of different shapes"):
        moment_statistics(two.init(p))
    assert moment_statistics(two.init(p), s).count == 0
    with pytest.raises(ValueError, match="made for 5 parameter leaves"):
        moment_statistics(adam.init(p["dense"]), s)
    for pair in ((p, p["dense"]), (p["dense"], p)):
        with pytest.raises(ValueError, match="made for 5 parameter leaves"):
            effective_learning_rate(*pair, s)
    for call in (
        lambda: update_leak(s, p),
        lambda: effective_learning_rate(p, s, p),
        lambda: moment_statistics(adam.init(p), p),
    ):
        with pytest.raises(TypeError, match="must be a Subspace, got dict"):
            call()


# Proposition 1 -----------------------------------------------------------------------


def inflation(alpha, basis, wrap, gs):
    """Effective learning rate along U, shared over decoupled, late in a stream."""
    s = adamr.make_subspace(gs[0], basis)

    def rate(route):
        modifier = optax.chain(adamr.project_out(s))
        links = [route(modifier), adamr.constant_scale(alpha)]
        tx = optax.chain(*links, wrap(adamr.faithful_second_moment(b2=0.99), s))
        first = lambda g: g - alpha * (g - adamr.subspaces.project(s, g))  # noqa: E731

        def body(state, g):
            step, state = tx.update(g, state)
            return state, effective_learning_rate(first(g), step, s).total

        return jax.lax.scan(body, tx.init(gs[0]), gs)[1][-100:].mean()

    return rate(adamr.route_both_moments) / rate(adamr.route_first_moment)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_proposition_1_along_one_coordinate(alpha):
    """Constant-variance gradients, protected coordinate axis: inflation 1/(1 − α)."""
    rng = np.random.default_rng(0)
    gs = jnp.asarray(rng.normal(1.0, 0.3, size=(400, 5, 1)), jnp.float32)
    basis = np.eye(5, dtype=np.float32)[:, :1]
    got = inflation(alpha, basis, lambda merge, s: merge, gs)
    np.testing.assert_allclose(got, 1 / (1 - alpha), rtol=0.01)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_proposition_1_on_a_rotated_anisotropic_stream(alpha):
    """The axes are not the coordinates: it holds in the eigenbasis."""
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    scale = 2.0 ** np.arange(6)[:, None]
    gs = rotation @ (scale * rng.normal(0.5, 1.0, size=(400, 6, 3)))
    gs = jnp.asarray(gs, jnp.float32)
    got = inflation(alpha, rotation[:, :2].astype(np.float32), adamr.in_eigenbasis, gs)
    np.testing.assert_allclose(got, 1 / (1 - alpha), rtol=0.01)
