"""The evidence benchmarks: closed forms come out, every part runs when it is small."""

import functools
import itertools

import jax
import jax.flatten_util
import numpy as np
import optax
import pytest

import adamr
from adamr.diagnostics import effective_learning_rate
from benchmarks import interventions, mechanism
from benchmarks._evidence.arms import method_for
from benchmarks._evidence.gradients import along_adam, coordinate, quadratic
from benchmarks._evidence.inflation import NORMALIZERS, measure, predict, with_mixing

ALPHAS = np.array(mechanism.ALPHAS)


def inflation(source, optimizer, variant, route):
    found = measure(source, optimizer, variant, route, (0.0, *ALPHAS))
    motion = mechanism._late(found.motion)
    return motion[1:] / motion[0] / (1.0 - ALPHAS)


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", mechanism.ESTIMATORS)
def test_one_coordinate_inflates_by_the_closed_form(optimizer):
    source = coordinate(200, seed=1)
    for route, expected in (("shared", 1 / (1 - ALPHAS)), ("decoupled", 1.0)):
        found = inflation(source, optimizer, "element", route)
        np.testing.assert_allclose(found, expected * np.ones(8), rtol=0.01)


@pytest.mark.parametrize("optimizer", ["lion", "muon, converged"])
def test_normalizers_cancel_by_construction(optimizer):
    assert optimizer in NORMALIZERS
    found = inflation(coordinate(20, seed=1), optimizer, "element", "shared")
    np.testing.assert_allclose(found, 1 / (1 - ALPHAS), rtol=0.01)


@pytest.mark.parametrize("variant", ["element", "fan_in"])
def test_rotated_directions_are_explained_by_second_moments_and_mixing(variant):
    """Where 1 / (1 − α) is wrong by half and more, the refined prediction is not."""
    source = quadratic(200, seed=1, size=(32, 64), rank=4)
    found = inflation(source, "adam", variant, "shared")
    mixed = 0.0
    if variant == "element":
        motion = measure(source, "adam", variant, "shared", (0.0, 1.0)).motion
        mixed = float(np.divide(*mechanism._late(motion)[::-1]))
    plain = predict(along_adam(source), source.subspace, variant, ALPHAS)
    np.testing.assert_allclose(found, with_mixing(ALPHAS, plain, mixed), rtol=0.15)
    assert np.max(np.abs(found * (1 - ALPHAS) - 1)) > 0.3


def test_mechanism_writes_its_results_and_pictures(tmp_path, monkeypatch):
    source = quadratic(4, seed=0, size=(8, 8), rank=2)
    record = {"w": source.given}
    language = source._replace(given=record, old=record, learning_rate=0.0)
    small = {
        "coordinate": coordinate(4, seed=0),
        "quadratic": source,
        "language": language._replace(gradient=lambda params, now: now),
    }
    monkeypatch.setattr(mechanism, "sources", lambda config: small)
    monkeypatch.setattr(mechanism, "QUICK", ("adam",))
    monkeypatch.setattr(mechanism, "VARIANTS", ("element",))
    monkeypatch.setattr(mechanism, "NORMALIZERS", {"lion": None})
    time = {"adam, element": ("adam", "element")}
    monkeypatch.setattr(mechanism, "OVER_TIME", time)
    mechanism.main(mechanism.Config(quick=True, out=tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "mechanism.json", "mechanism.png", "mechanism_over_time.png",
    }  # fmt: skip


@functools.cache
def scene():
    made = interventions.digits(tasks=2, steps=10)
    return made._replace(rates=(1e-3, 3e-3))


@functools.cache
def gradient_and_setting():
    """A random gradient, half of whose directions are old."""
    made = scene()
    shapes = jax.eval_shape(made.problem.init, jax.random.key(0))
    g = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), shapes)
    samples = jax.tree.map(lambda x: x.T, g)
    subspace = adamr.grow_subspace(made.setting.subspace, samples, threshold=0.5)
    return g, made.setting._replace(subspace=subspace)


def first_step(name, variant):
    g, setting = gradient_and_setting()
    tx = method_for(name, variant).build(1e-3, 0.0, setting)
    return jax.jit(lambda g: tx.update(g, tx.init(g), g))(g)


def test_denominator_reaches_only_the_second_moment():
    """m is the same to the bit whatever v is fed; v is not."""
    mu, nu = [], []
    for name in ("route_first", "route_both", "v from c g", "v from mixture"):
        _, state = first_step(name, "element")
        mu.append(optax.tree.get(state, "mu"))
        nu.append(jax.flatten_util.ravel_pytree(optax.tree.get(state, "nu"))[0])
    for other in mu[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, mu[0])
    for one, other in itertools.combinations(nu, 2):
        assert np.max(np.abs(one - other) / one) > 0.1


def test_matched_arm_moves_along_old_directions_as_the_other_does():
    g, setting = gradient_and_setting()

    def motion(name):
        step, _ = first_step(name, "element")
        return float(effective_learning_rate(g, step, setting.subspace).total)

    shared, decoupled = motion("route_both"), motion("route_first")
    assert shared > 1.2 * decoupled
    np.testing.assert_allclose(motion("both, rate of first"), decoupled, rtol=1e-4)
    np.testing.assert_allclose(motion("first, rate of both"), shared, rtol=1e-4)


def test_interventions_choose_a_rate_resume_and_compare(tmp_path, monkeypatch):
    """The bookkeeping alone: runs are made up, better at one rate and for one arm."""

    def made_up(scene, stream, method, rates, seeds):
        rates = np.asarray(rates)
        final = 0.5 - np.abs(rates - 3e-3) + 1e-4 * np.asarray(seeds)
        final = final + 0.25 * (method.about == "plain Adam")
        return dict.fromkeys(interventions.MEASURES, final)

    monkeypatch.setattr(interventions, "_runs", made_up)
    config = interventions.Config(seeds=2, work=tmp_path / "work.json")
    cells = [("digits", "element", name) for name in ("none", "route_both")]
    monkeypatch.setattr(interventions, "cells", lambda config: cells)
    rows = interventions.run(config, {"digits": scene()})
    assert [row["own"]["rate"] for row in rows] == [3e-3, 3e-3]
    assert rows[0]["common"]["rate"] == scene().common
    monkeypatch.setattr(interventions, "measure", None)  # nothing is left to measure
    assert interventions.run(config, {"digits": scene()}) == rows
    interventions._paired(rows, "route_both")
    difference = rows[0]["own"]["final - route_both"]["difference"]
    np.testing.assert_allclose(difference, 0.25)


@pytest.mark.slow
def test_interventions_run(tmp_path):
    scenes = {"digits": scene(), "text": interventions.text(2, 10, None)}
    config = interventions.Config(
        quick=True, seeds=2, only=("route_both",), work=tmp_path / "work.json"
    )
    rows = interventions.run(config, scenes)
    assert [row["stream"] for row in rows] == ["digits"] * 2 + ["text"] * 2
    for row in rows:
        assert all(
            np.isfinite(row["own"][m]["values"]).all() for m in ("final", "motion")
        )
