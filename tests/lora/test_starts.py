"""A's from the new task's inputs (InfLoRA) or its gradient (KeepLoRA)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from adamr import lora as room_of
from adamr.subspaces import columns
from tests.lora.layers import S, largest, layer, normal, optimizer, trained
from tests.references import lora as twin


def protecting(name):
    """A layer whose boundary has protected two old rows."""
    forward, base, lora, x = layer(name)
    tx = optimizer(forward, base, lora, x, lambda s: room_of.train_b(adamr.gpm(0.1, s)))
    inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    base, lora, state = room_of.start_task(
        base, lora, tx.init(lora), inputs, jax.random.key(3), scaling=S, threshold=0.5
    )
    return forward, base, lora, x, tx, state


def span(a):
    return a @ np.linalg.pinv(a)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("kind", ["rows", "gram"])
def test_inflora_equals_its_float64_twin(form, kind):
    forward, base, lora, _, _, state = protecting("dense")
    new = normal(31, 20, 8) * jnp.arange(1.0, 9.0)[None]
    inputs = adamr.layer_inputs(forward, lora, base, new, kind=kind)
    found = room_of.inflora(lora, state, inputs, form=form)["w_lora_a"]
    basis = np.asarray(adamr.get_subspace(state).bases[0][:, 0], np.float64)
    basis = basis[:, np.any(basis, axis=0)]
    expected = twin.inflora(basis, np.asarray(new, np.float64), 2, form)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(2) / 3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["dense", "heads", "out of heads", "stacked", "experts"]
)
def test_keeplora_equals_its_float64_twin(name):
    forward, base, lora, x, _, state = protecting(name)
    gradient = {"w": normal(32, *base["w"].shape)}
    found = room_of.keeplora(base, lora, state, gradient)["w_lora_a"]
    basis = adamr.get_subspace(state).bases[0]
    if name in ("stacked", "experts"):
        cases = [(gradient["w"][i], basis[i, :, 0], found[i]) for i in range(3)]
    else:
        n = 8
        cases = [
            (gradient["w"].reshape(n, -1), basis.reshape(n, -1), found.reshape(n, 2))
        ]
    for g, u, a in cases:
        u = np.asarray(u, np.float64)[:, np.any(u, axis=0)]
        expected = twin.keeplora(u, np.asarray(g, np.float64), 2)
        np.testing.assert_allclose(span(a), span(expected), rtol=1e-3, atol=1e-4)
        assert np.max(np.abs(u.T @ a)) < 1e-6


def test_keeplora_in_pefts_order():
    base = {"q.weight": normal(0, 5, 8)}
    lora = {"q.lora_A.weight": normal(1, 2, 8), "q.lora_B.weight": normal(2, 5, 2)}
    axes = {"q.lora_A.weight": adamr.Axes((1,)), "q.lora_B.weight": None}
    state = adamr.project_out(adamr.empty_subspace(lora, axes=axes)).init(lora)
    gradient = normal(3, 5, 8)
    new = room_of.keeplora(base, lora, state, {"q.weight": gradient})
    expected = twin.keeplora(np.zeros((8, 0)), np.asarray(gradient.T, np.float64), 2)
    np.testing.assert_allclose(
        np.abs(new["q.lora_A.weight"].T), np.abs(expected), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["rows", "gram"])
def test_wide_layers_start_from_nearly_all_of_the_energy_that_eigh_finds(kind):
    n, r = 300, 4
    lora = {"w_lora_a": jnp.ones((n, r)), "w_lora_b": jnp.zeros((r, 2))}
    spread = 0.9 ** jnp.arange(n)[None]
    old, new = (normal(seed, 400, n) * spread for seed in (41, 42))
    subspace = adamr.empty_subspace(lora, unprotected=["lora_b"])
    state = adamr.project_out(subspace).init(lora)
    state = adamr.protect_inputs(state, {"w_lora_a": old, "w_lora_b": None})
    inputs = adamr.layer_inputs(lambda p, x: x @ p["w_lora_a"], lora, new, kind=kind)
    a = np.asarray(room_of.inflora(lora, state, inputs)["w_lora_a"], np.float64)
    basis = np.asarray(adamr.get_subspace(state).bases[0][:, 0], np.float64)
    basis = basis[:, np.any(basis, axis=0)]
    expected = twin.inflora(basis, np.asarray(new, np.float64), r, "paper")
    energy = [np.sum(np.square(new @ x)) for x in (a, expected)]
    assert energy[0] > 0.999 * energy[1]
    np.testing.assert_allclose(a.T @ a, np.eye(r) / 3, atol=1e-5)
    assert np.max(np.abs(basis.T @ a)) < 1e-6


def test_a_wide_layer_without_room_starts_at_zero():
    lora = {"w_lora_a": jnp.ones((300, 2)), "w_lora_b": jnp.zeros((2, 2))}
    bases = {"w_lora_a": jnp.eye(300)[:, :299], "w_lora_b": None}
    subspace = adamr.make_subspace(lora, bases)
    state = adamr.project_out(subspace).init(lora)
    inputs = {"w_lora_a": normal(43, 20, 300), "w_lora_b": None}
    a = np.asarray(room_of.inflora(lora, state, inputs)["w_lora_a"])
    np.testing.assert_allclose(np.abs(a[:, 0]), np.eye(300)[299] / 3**0.5, atol=1e-5)
    assert not np.any(a[:, 1])


@pytest.mark.smoke
def test_inflora_trains_b_alone_and_keeps_old_responses():
    forward, base, lora, x, tx, state = protecting("dense")
    basis = adamr.get_subspace(state).bases[0][:, 0]
    old = (basis @ basis.T @ x.T).T  # the part of the inputs that is protected
    before, new = forward(lora, base, old), normal(31, 6, 8)
    lora = room_of.inflora(
        lora, state, adamr.layer_inputs(forward, lora, base, new, kind="rows")
    )
    assert largest(before, forward(lora, base, old)) < 1e-6
    end, _ = trained(tx, forward, base, lora, state, new, 7, steps=20)
    np.testing.assert_array_equal(end["w_lora_a"], lora["w_lora_a"])
    assert jnp.any(end["w_lora_b"] != 0)
    assert largest(before, forward(end, base, old)) < 1e-5


def test_columns_without_evidence_are_zero():
    forward, base, lora, x, tx, state = protecting("dense")
    basis = adamr.get_subspace(state).bases[0][:, 0]
    inside = {"w_lora_a": basis[:, :1].T, "w_lora_b": None}
    assert not jnp.any(room_of.inflora(lora, state, inside)["w_lora_a"])
    one = {"w": jnp.outer(jnp.ones(8), jnp.ones(5))}
    found = room_of.keeplora(base, lora, state, one)["w_lora_a"]
    assert jnp.any(found[:, 0]) and not jnp.any(found[:, 1])


def test_jit_equals_no_jit():
    forward, base, lora, x, tx, state = protecting("stacked")
    inputs = adamr.layer_inputs(forward, lora, base, normal(9, 3, 6, 8))
    gradient = {"w": normal(32, *base["w"].shape)}
    for start in (
        lambda lora, state: room_of.inflora(lora, state, inputs),
        lambda lora, state: room_of.keeplora(base, lora, state, gradient),
    ):
        here, there = start(lora, state), jax.jit(start)(lora, state)
        for a, b in zip(here["w_lora_a"], there["w_lora_a"], strict=True):
            np.testing.assert_allclose(span(a), span(b), rtol=1e-2, atol=1e-3)


def test_pairs_of_several_ranks_share_an_input():
    lora = {
        f"{name}_lora_{half}": jnp.ones((4, rank) if half == "a" else (rank, 5))
        for name, rank in (("q", 3), ("v", 2))
        for half in "ab"
    }

    def forward(lora, x):
        return sum(x @ lora[f"{n}_lora_a"] @ lora[f"{n}_lora_b"] for n in "qv")

    x = normal(3, 6, 4)
    subspace = adamr.empty_subspace(lora, axes=room_of.axes(forward, lora, x))
    state = adamr.project_out(subspace).init(lora)
    found = room_of.inflora(lora, state, adamr.layer_inputs(forward, lora, x))
    q, v = found["q_lora_a"], found["v_lora_a"]
    np.testing.assert_allclose(np.abs(q[:, :2]), np.abs(v), atol=1e-5)


def test_bad_input_is_named():
    forward, base, lora, x, tx, state = protecting("dense")
    nothing = {"w_lora_a": None, "w_lora_b": None}
    with pytest.raises(ValueError, match="None at the A 'w_lora_a'"):
        room_of.inflora(lora, state, nothing)
    with pytest.raises(ValueError, match="form is 'book'"):
        room_of.inflora(lora, state, nothing, form="book")
    with pytest.raises(ValueError, match=r"shape \(8, 4\) at the kernel 'w'"):
        room_of.keeplora(base, lora, state, {"w": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match="NaN or infinite entries at 'w'"):
        room_of.keeplora(base, lora, state, {"w": jnp.full((8, 5), jnp.nan)})
    with pytest.raises(ValueError, match="holds no Subspace"):
        room_of.inflora(lora, optax.adam(0.1).init(lora), nothing)
    gram = adamr.layer_inputs(forward, lora, base, x)
    bad = jax.tree.map(lambda m: m * jnp.nan, gram)
    with pytest.raises(ValueError, match="NaN or infinite entries at 'w_lora_a'"):
        room_of.inflora(lora, state, bad)
    subspace = adamr.get_subspace(state)
    penalty = adamr.gpm_si(0.1, subspace).init(lora)
    with pytest.raises(ValueError, match="the anchor of a penalty"):
        room_of.inflora(lora, penalty, nothing)
    blocks = room_of.train_block(tx, 2).init(lora)
    with pytest.raises(ValueError, match="finished blocks would be lost"):
        room_of.inflora(lora, blocks, nothing)
    with pytest.raises(ValueError, match="finished blocks would be lost"):
        room_of.keeplora(base, lora, blocks, {"w": jnp.ones((8, 5))})


def test_inputs_of_another_tree_are_refused():
    forward, base, lora, x, tx, state = protecting("dense")
    other = {"embed": jnp.ones((8, 2)), "u": jnp.ones((8, 2)), "v": jnp.ones((8, 2))}
    gram = adamr.layer_inputs(lambda p, x: [x @ w for w in p.values()], other, x)
    with pytest.raises(ValueError, match="Covariance of 3 parameter leaves, expected"):
        room_of.inflora(lora, state, gram)


def test_a_rank_of_more_than_half_the_fan_in_under_jit():
    n, r = 260, 150
    lora = {"w_lora_a": jnp.ones((n, r)), "w_lora_b": jnp.zeros((r, 2))}
    subspace = adamr.empty_subspace(lora, unprotected=["lora_b"])
    state = adamr.project_out(subspace).init(lora)
    inputs = {"w_lora_a": normal(44, 400, n), "w_lora_b": None}
    for start in (room_of.inflora, jax.jit(room_of.inflora)):
        a = start(lora, state, inputs)["w_lora_a"]
        np.testing.assert_allclose(a.T @ a, np.eye(r) / 3, atol=1e-5)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_more_columns_than_inputs_are_zero_under_jit(form):
    lora = {"w_lora_a": jnp.ones((20, 6)), "w_lora_b": jnp.zeros((6, 2))}
    subspace = adamr.empty_subspace(lora, unprotected=["lora_b"])
    state = adamr.project_out(subspace).init(lora)
    inputs = {"w_lora_a": normal(45, 3, 20), "w_lora_b": None}
    start = functools.partial(room_of.inflora, form=form)
    for run in (start, jax.jit(start)):
        a = run(lora, state, inputs)["w_lora_a"]
        assert jnp.sum(jnp.any(a != 0, axis=0)) == 3


def test_bfloat16_evidence_where_jax_has_no_cpu(monkeypatch):
    monkeypatch.setattr(columns, "_host", lambda: None)
    forward, base, lora, x, tx, state = protecting("dense")
    gradient = {"w": normal(32, 8, 5).astype(jnp.bfloat16)}
    found = room_of.keeplora(base, lora, state, gradient)["w_lora_a"]
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-5)
    rows = {"w_lora_a": normal(33, 6, 8).astype(jnp.bfloat16), "w_lora_b": None}
    found = room_of.inflora(lora, state, rows)["w_lora_a"]
    np.testing.assert_allclose(found.T @ found, np.eye(2) / 3, atol=1e-5)
