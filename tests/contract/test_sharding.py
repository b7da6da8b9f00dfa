"""Many devices: what one device computes, placement that stays, and what is sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamr
from adamr.sharding import state_shardings
from tests.contract.cases import CASES, COMPOSED, gradients, params, subspace
from tests.contract.collectives import collectives

# name: mesh, and the axes along which batch, fan-in (layers of a stack) and fan-out lie
LAYOUTS = {
    "data": ({"data": 8}, "data", None, None),
    "fsdp": ({"fsdp": 8}, "fsdp", None, "fsdp"),
    "fan-in": ({"data": 4, "tensor": 2}, None, "tensor", None),
    "fan-out": ({"tensor": 8}, None, None, "tensor"),
    "data x fsdp": ({"data": 4, "fsdp": 2}, ("data", "fsdp"), "fsdp", None),
    "fsdp x tensor": ({"fsdp": 2, "tensor": 4}, "fsdp", "fsdp", "tensor"),
}
DAILY = "fsdp x tensor"
FEW = ("adamr_adaptive", "two_sided", "in_eigenbasis", "project_out_directions", "sgp")


# Solves an r × r system per output, which magnifies rounding by its condition.
TOLERANCE = {"oblique_second_moment": 3e-5}


def marked(case, layout, explicit):
    daily = layout == DAILY and not explicit and case.name not in COMPOSED
    daily |= case.name in FEW and (explicit or layout == "data x fsdp")
    name = f"{case.name}-{layout}{'-explicit' * explicit}"
    marks = [] if daily else [pytest.mark.slow]
    return pytest.param(case, layout, explicit, id=name, marks=marks)


def mesh_of(axes, explicit=False):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes))


def spec(x, fan_in, fan_out):
    if x.ndim < 2:
        return PartitionSpec(*[fan_out] * x.ndim)
    return PartitionSpec(fan_in, *[None] * (x.ndim - 2), fan_out)


def place(tree, mesh, *where):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(x, *where))), tree
    )


def assert_close(a, b, rtol=1e-6, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x), np.asarray(y)
        most = max(1.0, np.max(np.abs(y)))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol * most)


def batch_of_gradients():
    """One gradient per example; the mean of all of them is what a step takes."""
    each = [gradients(seed) for seed in range(8)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def mean(batch):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), batch)


def stepping(tx, case):
    def step(batch, state, p):
        g = mean(batch)
        return tx.update(g, state, p, **case.extra_args(g))

    return jax.jit(step)


@functools.cache
def alone(name):
    """Two steps on one device."""
    case = next(case for case in CASES if case.name == name)
    tx, p, batch = case.build(subspace())(), params(), batch_of_gradients()
    update, state = stepping(tx, case), tx.init(p)
    first, state = update(batch, state, p)
    return jax.device_get((first, update(batch, state, p)[0]))


@pytest.mark.parametrize(
    "case, layout, explicit",
    [marked(c, l, e) for c in CASES for l in LAYOUTS for e in (False, True)],  # noqa: E741
)
def test_layouts_equal_one_device(case, layout, explicit):
    """Sums in another order: 1e-6 of the largest step; and the placement stays."""
    axes, data, *where = LAYOUTS[layout]
    mesh = mesh_of(axes, explicit)
    tx = case.build(subspace())()
    with jax.set_mesh(mesh):
        p = place(params(), mesh, *where)
        batch = jax.device_put(
            batch_of_gradients(), NamedSharding(mesh, PartitionSpec(data))
        )
        places = state_shardings(tx, p)
        state = jax.jit(tx.init, out_shardings=places)(p)
        update, steps = stepping(tx, case), []
        for _ in range(2):
            step, state = update(batch, state, p)
            steps.append(step)
            here = jax.tree.map(lambda x: x.sharding, state)
            same = jax.tree.map(
                lambda a, b, x: a.is_equivalent_to(b, x.ndim), here, places, state
            )
            assert all(jax.tree.leaves(same)), (here, places)
    rtol = atol = TOLERANCE.get(case.name, 1e-6)
    assert_close(jax.device_get(steps), list(alone(case.name)), rtol, atol)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name not in FEW))
        for c in CASES
    ],
)
def test_pmap_equals_one_device(case):
    """The legacy way to train on many devices: the state is replicated as it is."""
    tx, p = case.build(subspace())(), params()

    def update(g, state, p):
        g = jax.lax.pmean(g, "data")
        return tx.update(g, state, p, **case.extra_args(g))

    update = jax.pmap(update, axis_name="data", in_axes=(0, None, None))
    step, state = update(batch_of_gradients(), tx.init(p), p)
    rtol = atol = TOLERANCE.get(case.name, 1e-6)
    for device in (0, 5):
        here = jax.tree.map(lambda x, d=device: x[d], step)
        assert_close(jax.device_get(here), alone(case.name)[0], rtol, atol)


# What a step sends. 32 x 64 kernels, rank 4, everything that can be is sharded.

IN, OUT, RANK = 32, 64, 4


def kernels(mesh, *where, count=1):
    tree = {str(i): jnp.ones((IN, OUT)) for i in range(count)}
    return place(tree, mesh, *where)


def sent(tx, p, **extra_args):
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, p))(p)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra_args))
    return collectives(update.lower(p, state, p).compile())


def chain(s, *links, **options):
    route = adamr.route_first_moment(adamr.project_out(s))
    return optax.chain(route, *links, adamr.faithful_second_moment(**options))


def reduced(*numbers):
    return [("all-reduce", *numbers)]


OVERLAP = adamr.overlap_adaptive_scale()
SENT = {
    # name: (link, by a kernel sharded along its fan-in, along its fan-out)
    "project_out": (adamr.project_out, reduced(RANK * OUT), []),
    "protect_update": (
        lambda s: optax.chain(optax.scale_by_adam(), adamr.protect_update(s)),
        reduced(RANK * OUT),
        [],
    ),
    "element-wise v": (chain, reduced(RANK * OUT), []),
    "shared v": (  # one number per output, its mean over the fan-in
        lambda s: chain(s, share="fan_in"),
        reduced(RANK * OUT, OUT),
        [],
    ),
    "alias with decay": (  # the decay is projected too
        lambda s: adamr.adamr(0.1, adamr.project_out(s), weight_decay=0.1),
        reduced(RANK * OUT, RANK * OUT, OUT),
        [],
    ),
    # ‖g‖² from the means that v takes too, all in one message. Where its square leaves
    # the range of float32, and only there, the sums in two other units follow.
    "overlap": (
        lambda s: adamr.adamr(0.1, adamr.project_out(s), strength=OVERLAP),
        [*reduced(OUT, OUT), *reduced(RANK * OUT, OUT, OUT)],
        [*reduced(1, 1), *reduced(1, 1, 1, 1)],
    ),
    "overlap of a clip": (
        lambda s: optax.chain(
            adamr.route_first_moment(optax.clip(0.5)),
            OVERLAP,
            adamr.faithful_second_moment(share="fan_in"),
        ),
        [*reduced(OUT, OUT, 1), *reduced(OUT, OUT, 1, 1)],
        [*reduced(1, 1), *reduced(1, 1, 1, 1)],
    ),
    "two_sided": (
        adamr.two_sided,
        [*reduced(RANK * OUT), *reduced(RANK * OUT)],
        [],
    ),
    "in_eigenbasis": (
        lambda s: adamr.in_eigenbasis(optax.scale_by_adam(), s),
        [*reduced(RANK * OUT), *reduced(RANK * OUT)],
        [],
    ),
    "sgp": (
        lambda s: adamr.sgp(0.1, s),
        reduced(RANK * OUT, OUT),
        [],
    ),
}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", SENT)
def test_what_a_step_sends(name, explicit):
    make, by_fan_in, by_fan_out = SENT[name]
    mesh = mesh_of({"x": 8}, explicit)
    with jax.set_mesh(mesh):
        for where, expected in ((("x", None), by_fan_in), ((None, "x"), by_fan_out)):
            p = kernels(mesh, *where)
            assert sent(make(adamr.empty_subspace(p, max_rank=RANK)), p) == expected


@pytest.mark.smoke
def test_what_a_step_sends_on_two_axes():
    """Each group of fan-in shards reduces its own columns, all kernels at once."""
    mesh = mesh_of({"fsdp": 2, "tensor": 4})
    p = kernels(mesh, "fsdp", "tensor", count=3)
    s = adamr.empty_subspace(p, max_rank=RANK)
    local = OUT // 4
    tx = adamr.adamr(0.1, adamr.project_out(s), strength=OVERLAP)
    assert sent(tx, p) == [
        ("all-reduce", *[1] * 6),
        ("all-reduce", *[1] * 12),  # this and the next only in other units
        ("all-reduce", *[local] * 6),
        ("all-reduce", *[RANK * local] * 3, *[local] * 6),
    ]


@pytest.mark.parametrize("explicit", [False, True])
def test_an_adapter_sends_its_coordinates(explicit):
    """More directions than outputs: another order of the products, the same message."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((IN, RANK)))[0]
    p = {"a": jnp.asarray(rng.standard_normal((IN, 2)), jnp.float32)}
    tx = adamr.project_out(adamr.make_subspace(p, {"a": basis}, max_rank=RANK))
    alone = tx.update(p, tx.init(p))[0]
    mesh = mesh_of({"x": 2}, explicit)
    with jax.set_mesh(mesh):
        for where, expected in ((("x", None), reduced(RANK * 2)), ((None, "x"), [])):
            here = place(p, mesh, *where)
            assert sent(tx, here) == expected
            state = jax.jit(tx.init, out_shardings=state_shardings(tx, here))(here)
            assert_close(jax.jit(tx.update)(here, state)[0], alone)


@pytest.mark.parametrize("where", [("x", None), (None, "x")])
def test_what_directions_and_constraints_send(where):
    """Inner products of whole vectors: one number per direction or pair of tasks."""
    mesh = mesh_of({"x": 8})
    p = kernels(mesh, *where, count=2)
    d = adamr.empty_directions(p, 3)
    assert sent(adamr.project_out(d), p) == reduced(3, 3)
    memory = {"memory_gradient": p}
    assert sent(adamr.agem_constraint(), p, **memory) == reduced(1, 1)


# Muon multiplies a matrix by itself, so the compiler gathers it.
STAYING = [case for case in CASES if case.name != "muon"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fan-in", "fan-out", "fsdp x tensor"])
@pytest.mark.parametrize("case", STAYING, ids=lambda case: case.name)
def test_no_step_moves_a_leaf(case, layout):
    """Sums cross devices, parameters and state do not."""
    axes, _, *where = LAYOUTS[layout]
    mesh = mesh_of(axes)
    p = place(params(), mesh, *where)
    tx = case.build(subspace())()
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, p))(p)
    places = jax.tree.map(lambda x: x.sharding, (p, state))

    def update(g, state, p):
        return tx.update(g, state, p, **case.extra_args(g))

    lowered = jax.jit(update, out_shardings=places).lower(p, state, p)
    sent = collectives(lowered.compile())
    assert {kind for kind, *_ in sent} <= {"all-reduce"}, sent
