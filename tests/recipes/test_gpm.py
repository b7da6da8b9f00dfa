"""GPM, SGP, Adam-NSCL, TRGP and ROGO as whole optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from tests.contract.cases import gradients, orthonormal, params, subspace
from tests.references import core as reference
from tests.references import recipes as reference_recipes

RATE = 0.05


def run(tx, p, gs, state=None, scale=1.0):
    state = tx.init(p) if state is None else state
    for g in gs:
        g = jax.tree.map(lambda x: scale * x, g)
        step, state = tx.update(g, state, p)
        p = optax.apply_updates(p, step)
    return p, state


def noise(p, seeds):
    return [gradients(seed, p) for seed in seeds]


def scaled_noise(p, seeds):
    """Inputs of very different sizes: where element-wise Adam leaks most."""
    sizes = 10.0 ** jnp.arange(4)
    return [
        jax.tree.map(lambda x: x * sizes[:, None] if x.ndim == 2 else x, g)
        for g in noise(p, seeds)
    ]


# GPM and SGP ------------------------------------------------------------------------


def projected_sgd(learning_rate, s):
    """What the authors train with, as `gpm` documents it."""
    return optax.chain(adamr.project_out(s), optax.sgd(learning_rate, momentum=0.9))


@pytest.mark.parametrize(("recipe", "rate"), [(adamr.gpm, 1e-3), (projected_sgd, 1e-5)])
def test_t3_response_to_a_protected_input_never_changes(recipe, rate):
    """Inputs of rank 1 along a = (1,1,1,1)/2; another task's gradients follow."""
    a = np.full(4, 0.5, np.float32)
    p = {"b": jnp.zeros(3), "w": jax.random.normal(jax.random.key(0), (4, 3))}
    tx = recipe(rate, adamr.empty_subspace(p))
    p, state = run(tx, p, scaled_noise(p, range(5)))
    x = np.outer(np.arange(1.0, 6.0), a).astype(np.float32)
    grown = adamr.grow_subspace(adamr.get_subspace(state), {"b": None, "w": x})
    assert int(adamr.subspaces.rank(grown)[1]) == 1
    state = adamr.set_subspace(state, grown)
    before = a @ np.asarray(p["w"], np.float64)
    w = p["w"]
    if recipe is projected_sgd:  # its momentum is not adamr's: see set_subspace
        state = tx.init(p)
        state = adamr.set_subspace(state, grown)
    p, _ = run(tx, p, scaled_noise(p, range(5, 45)), state)
    np.testing.assert_allclose(a @ np.asarray(p["w"], np.float64), before, atol=1e-6)
    assert float(jnp.min(jnp.linalg.norm(p["w"] - w, axis=0))) > 1e-3


def test_t3_can_fail_adam_on_projected_gradients_moves_the_response():
    a = np.full(4, 0.5, np.float32)
    p = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}
    s = adamr.make_subspace(p, {"b": None, "w": a[:, None]})
    shared = optax.chain(adamr.project_out(s), optax.adam(1e-3))
    moved, _ = run(shared, p, scaled_noise(p, range(40)))
    assert float(jnp.max(jnp.abs(a @ moved["w"]))) > 1e-3


@pytest.mark.parametrize("recipe", [adamr.gpm, adamr.sgp, adamr.adam_nscl])
def test_the_first_task_is_plain_training(recipe):
    p = params()
    tx = recipe(RATE, adamr.empty_subspace(p))
    p_ours, _ = run(tx, p, noise(p, range(4)))
    if recipe is adamr.adam_nscl:
        plain = optax.adam(RATE)
    else:
        # v is shared along the fan-in from the first step on.
        plain = adamr.adamr(RATE, adamr.project_out(adamr.empty_subspace(p)))
    expected, _ = run(plain, p, noise(p, range(4)))
    for a, b in zip(jax.tree.leaves(p_ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recipe", [adamr.gpm, adamr.sgp])
def test_gpm_and_sgp_equal_their_float64_twin(recipe):
    p = jnp.zeros((6, 3))
    basis, lam = orthonormal(0, 6, 2), np.array([0.3, 1.0])
    if recipe is adamr.gpm:
        lam = np.ones(2)
    tx = recipe(RATE, adamr.make_subspace(p, basis, weights=lam), b1=0.8, b2=0.95)
    gs, state = noise(p, range(6)), tx.init(p)
    raw = [np.asarray(g, np.float64) for g in gs]
    kept = [reference.project(g, basis.astype(np.float64), lam) for g in raw]
    expected = reference.trajectory(kept, raw, b1=0.8, b2=0.95, shared_axes=(0,))
    for g, wanted in zip(gs, expected, strict=True):
        step, state = tx.update(g, state, p)
        np.testing.assert_allclose(step, -RATE * wanted, rtol=1e-4, atol=1e-7)


# GPM beside SI ----------------------------------------------------------------------


def small():
    """A head that no basis protects, a bias, and a kernel."""
    head, w = (jax.random.normal(jax.random.key(i), (4, 3)) for i in (0, 1))
    return {"b": jnp.zeros(3), "head": head, "w": w}


def unprotected():
    return adamr.empty_subspace(small(), unprotected=("head",))


def after_one_task(tx, p, moments="project"):
    """A task of ones, then one protected input and the path as importance."""
    p, state = run(tx, p, [jax.tree.map(jnp.ones_like, p)] * 5)
    inputs = {"b": None, "head": None, "w": jnp.full((1, 4), 0.5)}
    grown = adamr.grow_subspace(adamr.get_subspace(state), inputs)
    state = adamr.set_subspace(state, grown, moments=moments)
    return p, adamr.consolidate_si(state, p, damping=1e-3)


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


@pytest.mark.parametrize("moments", ["project", "reset", "keep"])
def test_gpm_si_keeps_the_protected_response_and_holds_what_is_open(moments):
    moved = []
    for c in (0.0, 1e6):
        tx = adamr.gpm_si(1e-3, unprotected(), c)
        p, state = after_one_task(tx, small(), moments)
        q, _ = run(tx, p, scaled_noise(p, range(5, 15)), state)
        a = np.full(4, 0.5)
        old, new = (a @ np.asarray(x["w"], np.float64) for x in (p, q))
        np.testing.assert_allclose(new, old, atol=1e-6)
        assert distance(q["w"], p["w"]) > 1e-5
        moved.append([distance(q[name], p[name]) for name in ("b", "head")])
    assert np.all(np.array(moved[1]) < 0.5 * np.array(moved[0]))


@pytest.mark.parametrize("moments", ["project", "reset", "keep"])
@pytest.mark.parametrize("c", [1e2, 1e6, 1e38])
def test_gpm_si_is_stable_at_any_strength(c, moments):
    """Under a schedule that starts at 0 and goes on over the boundary."""
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, 10, 100)
    tx = adamr.gpm_si(rate, unprotected(), c)
    p, state = after_one_task(tx, small(), moments)
    for g in scaled_noise(p, range(40)):
        q, state = run(tx, p, [g], state)
        assert distance(q, p) < 2 * RATE * optax.tree.size(p) ** 0.5
        p = q


def test_the_penalty_of_gpm_si_as_a_gradient_is_not_stable():
    penalty = optax.chain(
        adamr.quadratic_penalty(2e6), adamr.project_out(unprotected())
    )
    tx = adamr.penalties.track_si(
        optax.chain(
            adamr.route_first_moment(penalty),
            adamr.faithful_second_moment(share=unprotected()),
            optax.scale_by_learning_rate(RATE),
        )
    )
    p, state = after_one_task(tx, small())
    q, _ = run(tx, p, scaled_noise(p, range(40)), state)
    assert not distance(q, p) < 100


def test_gpm_si_never_ascends_at_its_anchor():
    """Where the gradient lies almost in the protected space, and Ω is uneven."""
    s = adamr.make_subspace(jnp.zeros((6, 3)), orthonormal(0, 6, 2))
    tx, p = adamr.gpm_si(RATE, s, c=10.0), jnp.ones((6, 3))
    omega = 10.0 ** np.random.default_rng(0).uniform(-2, 2, (6, 3))
    anchor = adamr.modifiers.Anchor(jnp.asarray(omega, jnp.float32), p)
    state = adamr.set_anchor(tx.init(p), anchor)
    inside = jnp.asarray(orthonormal(0, 6, 2), jnp.float32)
    for seed in range(20):
        g = gradients(seed, p) + 10 * inside @ gradients(seed, jnp.zeros((2, 3)))
        step, _ = tx.update(g, state, p)
        assert float(jnp.vdot(g, step)) < 0


def test_gpm_si_at_strength_0_has_the_steps_of_gpm():
    both = []
    for tx in (
        adamr.gpm_si(RATE, unprotected(), 0.0),
        adamr.penalties.track_si(adamr.gpm(RATE, unprotected())),
    ):
        p, state = run(tx, small(), scaled_noise(small(), range(5)))
        bases = {"b": None, "head": None, "w": orthonormal(0, 4, 2)}
        state = adamr.set_subspace(state, adamr.make_subspace(p, bases))
        both.append(run(tx, p, scaled_noise(p, range(5, 10)), state)[0])
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gpm_si_refuses_a_negative_strength():
    with pytest.raises(ValueError, match="gpm_si: c must not be negative, got -0.3"):
        adamr.gpm_si(RATE, unprotected(), -0.3)
    with pytest.raises(ValueError, match="si: c must not be negative, got -1"):
        adamr.si(RATE, -1)


def test_gpm_si_equals_its_float64_twin():
    p, basis = jax.random.normal(jax.random.key(1), (6, 3)), orthonormal(0, 6, 2)
    omega = 10.0 ** np.random.default_rng(0).uniform(-2, 2, (6, 3))
    s = adamr.make_subspace(p, basis)
    tx = adamr.gpm_si(RATE, s, c=1.5, b1=0.8, b2=0.95)
    anchor = adamr.modifiers.Anchor(jnp.asarray(omega, jnp.float32), p)
    gs, state = noise(p, range(6)), adamr.set_anchor(tx.init(p), anchor)
    start, raw = np.asarray(p, np.float64), [np.asarray(g, np.float64) for g in gs]
    expected = reference_recipes.gpm_si_trajectory(
        start, raw, RATE, 3.0 * omega, start, basis.astype(np.float64), 0.8, 0.95
    )
    for g, wanted in zip(gs, expected, strict=True):
        step, state = tx.update(g, state, p)
        p = optax.apply_updates(p, step)
        np.testing.assert_allclose(p, wanted, rtol=1e-4, atol=1e-6)


def test_gpm_si_keeps_three_numbers_per_parameter_and_bases_more_than_gpm():
    s = unprotected()
    pair, alone, si = (
        optax.tree.size(tx.init(small()))
        for tx in (adamr.gpm_si(RATE, s), adamr.gpm(RATE, s), adamr.si(RATE))
    )
    more = 3 * optax.tree.size(small()) + optax.tree.size(s)
    assert pair - alone == pytest.approx(more, abs=3)
    assert si > 5 * optax.tree.size(small())


def test_t4_ranks_grow_through_the_optimizer_state():
    """M = span(e1), energies 6 on it and 3, 1 off it; the step runs on."""
    p = {"w": jnp.zeros((4, 2))}
    x = {"w": np.diag(np.sqrt([6.0, 3.0, 1.0, 0.0])).astype(np.float32)}
    tx = adamr.gpm(RATE, adamr.make_subspace(p, {"w": np.eye(4)[:, :1]}))
    traces = []

    @jax.jit
    def update(g, state):
        traces.append(1)
        return tx.update(g, state, p)

    for threshold, rank in [(0.55, 1), (0.85, 2), (0.95, 3)]:
        state = tx.init(p)
        grown = adamr.grow_subspace(adamr.get_subspace(state), x, threshold=threshold)
        state = adamr.set_subspace(state, grown)
        step, state = update({"w": jnp.ones((4, 2))}, state)
        moved = np.abs(np.asarray(step["w"][:, 0])) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(4) >= rank)
    assert len(traces) == 1


def test_t4_the_paper_s_rank_not_the_code_s():
    p = {"w": jnp.zeros((4, 2))}
    spectrum = np.diag(np.sqrt([0.90, 0.06, 0.03, 0.01])).astype(np.float32)
    state = adamr.gpm(RATE, adamr.empty_subspace(p)).init(p)
    s = adamr.grow_subspace(adamr.get_subspace(state), {"w": spectrum}, threshold=0.95)
    assert (
        int(adamr.subspaces.rank(adamr.get_subspace(adamr.set_subspace(state, s)))[0])
        == 2
    )


@pytest.mark.smoke
def test_t5_step_is_scaled_by_importance():
    """α = 10, σ = (10, 5, 1): the step along direction i is 1 − λ_i of the free one."""
    p = {"w": jnp.zeros((3, 2))}
    x = {"w": np.diag([10.0, 5.0, 1.0]).astype(np.float32)}
    free = adamr.gpm(RATE, adamr.empty_subspace(p))
    s = adamr.grow_subspace(adamr.empty_subspace(p), x, threshold=1.0, scaling=10.0)
    np.testing.assert_allclose(s.weights[0][0, 0], [1, 0.91667, 0.55], atol=1e-5)
    tx = adamr.sgp(RATE, s)
    state, free_state = tx.init(p), free.init(p)
    third = {"w": jnp.zeros((3, 2)).at[2].set(1.0)}
    sgd = optax.chain(adamr.project_out(s), optax.sgd(1.0))
    alone, _ = sgd.update(third, sgd.init(p))
    np.testing.assert_allclose(jnp.linalg.norm(alone["w"][:, 0]), 0.45, atol=1e-5)
    for g in [third, *scaled_noise({"w": jnp.zeros((3, 2))}, [])] + noise(p, range(5)):
        step, state = tx.update(g, state, p)
        plain, free_state = free.update(g, free_state, p)
        share = np.array([0.0, 1 - 0.9166667, 0.45])[:, None]
        np.testing.assert_allclose(step["w"], share * plain["w"], atol=2e-7)


@pytest.mark.parametrize(("weight", "like"), [(1.0, "gpm"), (0.0, "free")])
def test_t5_weight_one_is_gpm_and_weight_zero_is_no_protection(weight, like):
    p = jnp.zeros((6, 3))
    basis = orthonormal(0, 6, 2)
    s = adamr.make_subspace(p, basis, weights=np.full(2, weight))
    other = adamr.make_subspace(p, basis) if like == "gpm" else adamr.empty_subspace(p)
    a, _ = run(adamr.sgp(RATE, s), p, noise(p, range(5)))
    b, _ = run(adamr.gpm(RATE, other), p, noise(p, range(5)))
    np.testing.assert_allclose(a, b, atol=1e-6)


# Adam-NSCL --------------------------------------------------------------------------


def t8_subspace(p):
    s = adamr.empty_subspace(p)
    x = np.sqrt(4.0) * np.diag(np.sqrt([4.0, 1.0, 0.0, 0.0])).astype(np.float32)
    c = adamr.subspaces.update_covariance(adamr.subspaces.empty_covariance(s), {"w": x})
    np.testing.assert_allclose(c.moments[0], np.diag([4.0, 1, 0, 0]), atol=1e-6)
    return adamr.subspaces.null_space_complement(c, s)


@pytest.mark.parametrize(
    ("as_in_code", "expected"), [(False, 1.0), (True, np.sqrt(0.5))]
)
def test_t8_update_in_the_null_space_and_as_in_code(as_in_code, expected):
    """Adam's first step is u = (1,1,1,1) itself; its decays of 1/2 are exact."""
    p = {"w": jnp.zeros((4, 1))}
    tx = adamr.adam_nscl(-1.0, t8_subspace(p), 0.5, 0.5, as_in_code=as_in_code)
    step, _ = tx.update({"w": jnp.ones((4, 1))}, tx.init(p), p)
    np.testing.assert_allclose(step["w"][:, 0], [0, 0, expected, expected], atol=1e-6)


@pytest.mark.parametrize("as_in_code", [False, True])
def test_t8_moments_are_those_of_plain_adam(as_in_code):
    p = params()
    tx = adamr.adam_nscl(RATE, subspace(), as_in_code=as_in_code)
    adam = optax.adam(RATE)
    gs = noise(p, range(6))
    _, state = run(tx, p, gs)
    _, plain = run(adam, p, gs)
    for name in ("mu", "nu", "count"):
        ours, theirs = optax.tree.get(state, name), optax.tree.get(plain, name)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("as_in_code", [False, True])
def test_adam_nscl_equals_its_float64_twin(as_in_code):
    p = jnp.zeros((6, 3))
    basis, lam = orthonormal(0, 6, 2).astype(np.float64), np.array([1.0, 0.4])
    tx = adamr.adam_nscl(
        RATE,
        adamr.make_subspace(p, basis, weights=lam, max_rank=4),
        b1=0.8,
        b2=0.95,
        as_in_code=as_in_code,
    )
    projector = np.eye(6) - basis @ np.diag(lam) @ basis.T
    if as_in_code:
        projector = projector / np.linalg.norm(projector)
    gs, state = noise(p, range(6)), tx.init(p)
    raw = [np.asarray(g, np.float64) for g in gs]
    expected = reference_recipes.nscl_steps(raw, projector, 0.8, 0.95, 1e-8)
    for g, wanted in zip(gs, expected, strict=True):
        step, state = tx.update(g, state, p)
        np.testing.assert_allclose(step, -RATE * wanted, rtol=1e-4, atol=1e-7)


def test_as_in_code_norm_of_every_slice_and_of_full_and_empty_bases():
    p = {"stack": jnp.zeros((3, 4, 2)), "free": jnp.zeros((4, 2))}
    eye = np.eye(4, dtype=np.float32)
    bases = np.stack([eye * 0, eye * [1, 1, 1, 0], eye])
    s = adamr.make_subspace(p, {"free": np.zeros((4, 0)), "stack": bases})
    tx = adamr.adam_nscl(-1.0, s, 0.5, 0.5, as_in_code=True)
    step, _ = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    np.testing.assert_allclose(step["free"], np.ones((4, 2)), atol=1e-6)
    np.testing.assert_allclose(step["stack"][0], np.ones((4, 2)), atol=1e-6)
    np.testing.assert_allclose(step["stack"][1, :, 0], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(step["stack"][2], np.zeros((4, 2)))
    # P = 0.4, a number: divided by its norm it is 1.
    p = {"w": jnp.zeros((1, 2))}
    s = adamr.make_subspace(p, {"w": np.eye(1)}, weights={"w": np.array([0.6])})
    tx = adamr.adam_nscl(-1.0, s, 0.5, 0.5, as_in_code=True)
    step, _ = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    np.testing.assert_allclose(step["w"], np.ones((1, 2)), atol=1e-6)


def test_as_in_code_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="subspace must be a Subspace"):
        adamr.adam_nscl(RATE, jnp.eye(3), as_in_code=True)
    tx = adamr.adam_nscl(RATE, subspace(), as_in_code=True)
    with pytest.raises(ValueError, match="made for 5 parameter leaves"):
        tx.init({"w": jnp.zeros((3, 2))})


# TRGP and ROGO ----------------------------------------------------------------------


def stream(seed, task):
    """Inputs near a three-dimensional space that shares one direction with task 0."""
    rng = np.random.default_rng(seed)
    basis = np.eye(8, dtype=np.float32)[:, [0, 1 + 2 * task, 2 + 2 * task]]
    x = rng.normal(size=(40, 3)).astype(np.float32) @ basis.T
    return jnp.asarray(x), jnp.asarray(x[:, :1] * (1.0 + task))


def mean_square(p, batch):
    x, y = batch
    return jnp.mean((x @ p["w"] + p["b"][None] - y) ** 2)


def train(tx, state, variables, loss, steps=40):
    @functools.partial(jax.jit, static_argnums=())
    def step(variables, state):
        step, state = tx.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, step), state

    for _ in range(steps):
        variables, state = step(variables, state)
    return variables, state


def test_old_tasks_are_unchanged():
    """Three tasks: each keeps its scales; its function on its own inputs stays."""
    p = {"b": jnp.zeros(1), "w": 0.1 * jnp.ones((8, 1))}
    memory = adamr.empty_subspace(p)
    tasks = [memory] * 3
    region = adamr.trust.trust_region(tasks, p)
    variables = {"params": p, "scales": adamr.trust.init_scales(region.subspaces)}
    frozen_bias = {"b": jnp.zeros(1)}
    tx = adamr.trgp(RATE, memory)
    state = tx.init(variables)
    kept, answers = [], []

    def respond(variables, own, x):
        return x @ adamr.trust.scaled_params(variables["params"], *own)["w"]

    for task in range(3):
        batch = stream(task, task)
        plain = variables["params"]
        region = adamr.trust.trust_region(tasks, jax.grad(mean_square)(plain, batch))
        variables["scales"] = adamr.trust.init_scales(region.subspaces)
        state = adamr.set_subspace(state, memory, moments="reset")

        def loss(v, region=region, batch=batch):
            w = adamr.trust.scaled_params(v["params"], region.subspaces, v["scales"])
            return mean_square(w | frozen_bias, batch)

        before = float(loss(variables))
        variables, state = train(tx, state, variables, loss)
        assert float(loss(variables)) < 0.5 * before
        kept.append((region.subspaces, variables["scales"]))
        answers.append(respond(variables, kept[task], batch[0]))
        samples = {"b": None, "w": batch[0]}
        tasks[task], memory = adamr.trust.grow_task_subspace(
            memory, samples, threshold=1.0
        )
    # The first trusts nobody, the others share a direction with the tasks before.
    assert int(region.tasks[1][0]) >= 0
    assert float(jnp.max(jnp.abs(kept[2][1][0][1] - jnp.eye(8)[None, None]))) > 0.01
    for task in range(3):
        x = stream(task, task)[0]
        now = respond(variables, kept[task], x)
        np.testing.assert_allclose(now, answers[task], atol=2e-6)


@pytest.mark.parametrize("recipe", [adamr.trgp, adamr.rogo])
def test_t7_with_identity_scales_rogo_is_gpm(recipe):
    p = params()
    s = subspace()
    tx = recipe(RATE, s, scale_optimizer=optax.set_to_zero(), weight_decay=0.01)
    scales = adamr.trust.init_scales(s)
    variables = {"params": p, "scales": scales}
    a, state, w = variables, tx.init(variables), p
    gpm = adamr.gpm(RATE, s, weight_decay=0.01)
    gpm_state = gpm.init(p)
    for seed in range(3):
        g = gradients(seed, p)

        def loss(v, g=g):
            w = adamr.trust.scaled_params(v["params"], s, v["scales"])
            return optax.tree.vdot(w, g)

        step, state = tx.update(jax.grad(loss)(a), state, a)
        a = optax.apply_updates(a, step)
        step, gpm_state = gpm.update(g, gpm_state, w)
        w = optax.apply_updates(w, step)
    for x, y in zip(jax.tree.leaves(a["params"]), jax.tree.leaves(w), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for x, y in zip(jax.tree.leaves(a["scales"]), jax.tree.leaves(scales), strict=True):
        np.testing.assert_array_equal(x, y)


def test_rogo_learns_inside_the_frozen_space_and_folds():
    """Everything the new task needs is frozen: GPM cannot move, ROGO can."""
    p = {"b": jnp.zeros(1), "w": jnp.ones((8, 1))}
    batch = stream(1, 1)
    memory = adamr.grow_subspace(
        adamr.empty_subspace(p), {"b": None, "w": np.eye(8)}, threshold=1.0
    )
    w_only = lambda p: mean_square(p | {"b": jnp.zeros(1)}, batch)  # noqa: E731
    before = float(w_only(p))
    gpm = adamr.gpm(RATE, memory)
    stuck, _ = train(gpm, gpm.init(p), p, w_only)
    assert float(w_only(stuck)) == before
    relaxed = adamr.trust.relaxing_subspace(memory, jax.grad(w_only)(p))
    assert 1 <= int(adamr.subspaces.rank(relaxed)[1]) <= 3
    variables = {"params": p, "scales": adamr.trust.init_scales(relaxed)}
    tx = adamr.rogo(RATE, memory)

    def loss(v):
        w = adamr.trust.scaled_params(v["params"], relaxed, v["scales"])
        return w_only(w) + adamr.trust.scale_penalty(v["scales"], 0.01)

    variables, state = train(tx, tx.init(variables), variables, loss)
    np.testing.assert_array_equal(variables["params"]["w"], p["w"])
    folded, scales = adamr.trust.fold_scales(
        variables["params"], relaxed, variables["scales"]
    )
    assert float(w_only(folded)) < 0.5 * before
    # Only the relaxed directions moved.
    rest = (
        adamr.subspaces.project(relaxed, folded)["w"]
        - adamr.subspaces.project(relaxed, p)["w"]
    )
    np.testing.assert_allclose(rest, jnp.zeros((8, 1)), atol=1e-6)


@pytest.mark.parametrize("recipe", [adamr.trgp, adamr.rogo])
def test_scaled_recipes_keep_the_optax_contract(recipe):
    """jit, scan, donation, wrappers, the boundary without recompilation, bfloat16."""
    p, s = params(jnp.bfloat16), subspace()
    variables = {"params": p, "scales": adamr.trust.init_scales(s)}
    g = jax.tree.map(jnp.ones_like, variables)
    tx = recipe(RATE, s)
    state = tx.init(variables)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    step, after = tx.update(g, state, variables, nobody=1.0)
    assert jax.tree.map(jnp.shape, step) == jax.tree.map(jnp.shape, g)
    assert jax.tree.map(jnp.result_type, step) == jax.tree.map(jnp.result_type, g)
    fast, _ = jax.jit(tx.update)(g, state, variables)
    for a, b in zip(jax.tree.leaves(step), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-5)

    def body(carry, _):
        step, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], step), state), None

    jax.block_until_ready(jax.lax.scan(body, (variables, state), None, length=2))
    grown = adamr.set_subspace(after, adamr.get_subspace(after), moments="reset")
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, state)
    wrapped = optax.apply_if_finite(
        optax.MultiSteps(tx, 2).gradient_transformation(), 3
    )
    outer = wrapped.init(variables)
    _, outer = wrapped.update(g, outer, variables)
    adamr.set_subspace(outer, s)
    with pytest.raises(ValueError, match=r"trains a dict \{'params'.*got \['w'\]"):
        tx.init({"w": p})
    with pytest.raises(ValueError, match=r"trains a dict \{'params'"):
        tx.update(p, state, variables)
