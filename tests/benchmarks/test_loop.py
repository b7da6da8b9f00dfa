"""The benchmarks of the shared loop run, and mean what they say."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tyro")

from adamr import get_anchor
from benchmarks import avalanche, throughput
from examples.harness.problem import Data, loss_of
from examples.vision.problem import problem

MADE, _ = problem("mlp", (6,), 3, hidden=(5, 4))


def batches(count, size, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count * size, 6)).astype(np.float32)
    labels = rng.integers(0, 3, count * size).astype(np.int32)
    return Data(inputs, labels, np.ones(3, bool))


def test_fisher_is_the_mean_square_of_batch_gradients():
    data, params = batches(3, 4), MADE.init(jax.random.key(0))
    found = avalanche.fisher_of_batches(MADE, params, data, 4)
    gradient = jax.grad(lambda p, part: loss_of(MADE, p, part))
    wanted = 0.0
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        part = Data(data.inputs[rows], data.labels[rows], data.classes)
        leaves = jax.tree.leaves(gradient(params, part))
        wanted = wanted + np.concatenate([np.ravel(g) ** 2 for g in leaves]) / 3
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)


def test_ewc_is_sgd_on_the_sum_of_the_tasks_penalties():
    method, rate, strength = avalanche.methods(4, 6)["ewc"], 0.1, 3.0
    tx, params = method.build(rate, strength, None), MADE.init(jax.random.key(0))
    state, penalties = tx.init(params), []
    for seed in (1, 2):
        data = batches(2, 4, seed)
        params = jax.tree.map(lambda p, s=seed: p + 0.1 * s, params)
        state = method.boundary(MADE, None, params, state, data, None)
        fisher = avalanche.fisher_of_batches(MADE, params, data, 4)
        penalties.append((fisher, params))
    assert jax.tree.leaves(get_anchor(state))
    params = jax.tree.map(lambda p: p - 0.3, params)

    def loss(p):  # Avalanche's λ is half of our strength
        parts = [
            jax.tree.map(lambda f, a, b: (f * (a - b) ** 2).sum(), f, p, anchor)
            for f, anchor in penalties
        ]
        return strength / 2 * sum(jax.tree.leaves(parts))

    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, state, params)
    wanted = jax.tree.map(lambda g: -rate * g, jax.grad(loss)(params))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.smoke
def test_what_is_compared():
    ours = [
        {"accuracy": [[0.9, 0.1], [0.7, a]], "seconds": [9.0, 1.0], "everything": 10.0}
        for a in (0.8, 0.9)
    ]
    theirs = [{**run, "seconds": [1.0, 4.0], "everything": 5.0} for run in ours]
    found = avalanche.compared(ours, theirs, steps=100)
    assert found["ratio"] == 4.0 and found["ratio, everything"] == 0.5
    assert found["steps per second"] == {"ours": 100.0, "avalanche": 25.0}
    np.testing.assert_allclose(found["accuracy"]["ours"][0], 0.775)
    assert found["accuracy, ours - avalanche"]["difference"] == 0.0


@pytest.mark.slow
def test_throughput_times_all_four(tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    throughput.main(throughput.Config(quick=True, widths=(8,), out=tmp_path))
    found = json.loads((tmp_path / "throughput.json").read_text())["by width"]["8"]
    speed = found["steps per second"]
    assert speed.keys() == {"plain", "logged", "loop", "seeds"}
    ratio = found["loop / plain, in steps per second"]
    np.testing.assert_allclose(ratio, speed["loop"] / speed["plain"])
    operations = 2 * 10 * (3 * (64 * 8 + 8 * 8 + 8 * 10) - 64 * 8)
    assert 0.1 < operations / found["products, seconds per step"] / 1e9 < 1e4
