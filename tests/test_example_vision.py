"""examples.vision and the shared loop: results, resume, seeds, arguments."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from examples import loop, results, streams
from examples.methods import METHODS, setting_for
from examples.vision.__main__ import main
from examples.vision.problem import feed, problem

ROOT = Path(__file__).parents[1]
TINY = ["--tasks", "2", "--steps", "4", "--evaluations", "2", "--limit", "100"]


def run(out, *more):
    return main([*TINY, "--out", str(out), *more])


def learn(name, seeds, tasks=2, resume_after=None, steps=6):
    """The method's last state and history; maybe stopped and resumed on the way."""
    stream = streams.load("permuted-digits", tasks=tasks, limit=100)
    made, axes = problem("mlp", stream.train.x.shape[2:], 10)
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(params, axes, tasks=tasks, samples=20, new_directions=5)
    options = dict(
        rates=[1e-3] * len(seeds),
        strengths=[1.0] * len(seeds),
        seeds=seeds,
        steps=steps,
        evaluations=2,
        memory_size=10,
    )
    arguments = (made, METHODS[name], setting, feed(stream, 10))
    chunks = loop.learn(*arguments, **options)
    if resume_after is not None:
        *_, stopped = itertools.islice(chunks, resume_after)
        chunks = loop.learn(*arguments, **options, resume=stopped)
    *_, last = chunks
    return last


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def bits(tree):
    def plain(x):
        keys = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if keys else x)

    return [plain(x) for x in jax.tree.leaves(tree)]


FAST = ["ewc", "er"]
SLOW = [name for name in METHODS if name not in FAST]


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_every_method_learns_and_resumes_bit_for_bit(name):
    position, runs, history = learn(name, [0])
    assert position == (1, 6)
    assert np.isfinite(history.accuracy).all() and np.isfinite(history.loss).all()
    for stop in (1, 2):  # inside the first task, and after its boundary
        _, again, other = learn(name, [0], resume_after=stop)
        for a, b in zip(bits(runs), bits(again), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(history.accuracy, other.accuracy)


def test_runs_side_by_side_equal_runs_alone():
    _, together, history = learn("ewc", [3, 4])
    for i, seed in enumerate((3, 4)):
        _, alone, own = learn("ewc", [seed])
        exact = jax.default_backend() == "cpu"  # elsewhere the products are batched
        for a, b in zip(bits(together.params), bits(alone.params), strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=0, atol=0 if exact else 2e-4)
        np.testing.assert_allclose(history.loss[i], own.loss[0], atol=1e-3)


def test_one_program_serves_the_whole_stream():
    before = loop._train._cache_size()
    learn("adam", [0], tasks=4, steps=10)
    assert loop._train._cache_size() == before + 1


def test_results_hold_together(tmp_path):
    assert run(tmp_path, "--method", "adam,gpm", "--seeds", "2") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in found["runs"]] == ["adam", "adam", "gpm", "gpm"]
    assert [row["seed"] for row in found["runs"]] == [0, 1, 0, 1]
    assert found["stream"]["scenario"] == "domain" and len(found["tasks"]) == 2
    for row in found["runs"]:
        tensor = np.array(row["anytime"])
        assert tensor.shape == np.shape(row["loss"]) == (2, 2, 2)
        np.testing.assert_array_equal(tensor[:, -1], row["matrix"])
        np.testing.assert_allclose(row["metrics"]["ACC"], tensor[-1, -1].mean())
        forgotten = tensor[0, -1, 0] - tensor[1, -1, 0]
        np.testing.assert_allclose(row["metrics"]["BWT"], -forgotten, atol=1e-6)
        assert len(row["curves"]["loss"]) == 4
    (test,) = found["comparisons"]
    assert {test["method"], test["best"]} == {"adam", "gpm"} and test["seeds"] == [0, 1]
    events = lines(tmp_path / "events/gpm.jsonl")
    assert [(e["run"], e["step"]) for e in events] == [
        (r, s) for s in (2, 4, 6, 8) for r in (0, 1)
    ]
    for picture in ("matrices", "anytime"):
        assert (tmp_path / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    first = [row["matrix"] for row in found["runs"]]
    assert run(tmp_path, "--method", "adam,gpm", "--seeds", "2") == 0  # nothing to do
    again = json.loads((tmp_path / "results.json").read_text())
    assert first == [row["matrix"] for row in again["runs"]]
    assert lines(tmp_path / "events/gpm.jsonl") == events


def test_other_hyperparameters_are_refused_by_name(tmp_path, capsys):
    assert run(tmp_path, "--method", "adam") == 0
    assert run(tmp_path, "--method", "adam", "--learning-rate", "0.5") == 2
    assert "rates" in capsys.readouterr().err


def test_the_grid_takes_its_best_on_validation(tmp_path):
    more = ("--method", "adam", "--lr-grid", "1e-9,1e-2", "--steps", "40")
    assert run(tmp_path, *more) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tuning"]["adam"]["best"] == 1e-2
    assert found["runs"][0]["learning_rate"] == 1e-2
    low, high = found["tuning"]["adam"]["accuracy"]
    assert low < high


def test_a_class_incremental_stream_and_the_linen_twin(tmp_path):
    more = ("--stream", "split-digits", "--scenario", "class", "--model", "linen_mlp")
    assert run(tmp_path, "--method", "agem", *more) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["stream"]["scenario"] == "class"
    # A later task's classes do not compete before it is learnt.
    assert all(np.array(row["matrix"])[0, 0] > 0 for row in found["runs"])


@pytest.mark.slow
def test_linen_layers_are_captured(tmp_path):
    assert run(tmp_path, "--method", "gpm", "--model", "linen_mlp") == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "alexnet"])
def test_the_convolutional_networks_learn(model):
    images = np.random.default_rng(0).normal(size=(20, 32, 32, 3)).astype(np.float32)
    made, axes = problem(model, (32, 32, 3), 5)
    params = made.init(jax.random.key(0))
    data = loop.Data(images, np.arange(20) % 5, np.ones(5, bool))
    objective = jax.jit(lambda p: loop.loss_of(made, p, data))
    slope = jax.jit(jax.grad(objective))
    before = float(objective(params))
    for _ in range(20):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, slope(params))
    assert float(objective(params)) < before - 0.1
    samples = made.capture(params, images[:2])
    assert sum(x is not None for x in jax.tree.leaves(samples)) > 5
    assert jax.tree.leaves(axes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "ewc2"], ["--method", "ewc2", "gpm"]),
        (["--method", "gpm,gpm"], ["twice"]),
        (["--steps", "5"], ["--steps", "multiple"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--lr-grid", "a"], ["--lr-grid", "a"]),
        (["--learning-rate", "-1"], ["positive"]),
        (["--stream", "permuted-nothing"], ["permuted-nothing", "permuted-digits"]),
        (["--stream", "split-cifar100"], ["split-cifar100", "--data"]),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, expected):
    assert run(tmp_path / "out", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for part in expected:
        assert part in message


def test_intervals_and_paired_tests():
    mean, half = results.interval([0.1, 0.2, 0.3])
    np.testing.assert_allclose([mean, half], [0.2, 4.302653 * 0.1 / 3**0.5], rtol=1e-5)
    assert np.isnan(results.interval([0.5])[1])
    same = results.paired([0.5, 0.5], [0.4, 0.4])
    np.testing.assert_allclose(same["difference"], 0.1)
    assert np.isnan(same["p"]) or same["p"] < 1e-6
    test = results.paired([0.9, 0.8, 0.95], [0.5, 0.6, 0.4])
    np.testing.assert_allclose(test["p"], 0.063, atol=0.02)


def _start(out, *more):
    command = [sys.executable, "-m", "examples.vision", "--save-every", "0.001"]
    more = ["--method", "gpm,er", "--tasks", "3", "--out", str(out), *more]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*command, *more], cwd=ROOT, **quiet)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_in_the_same_numbers(tmp_path, how):
    assert _start(tmp_path / "whole").wait() == 0
    wanted = json.loads((tmp_path / "whole/results.json").read_text())["runs"]
    rng = np.random.default_rng(int(how))
    for _ in range(4):
        process = _start(tmp_path / "killed")
        time.sleep(rng.uniform(4, 15))
        os.kill(process.pid, how)
        assert process.wait() in (0, -how, 143)
    assert _start(tmp_path / "killed").wait() == 0
    found = json.loads((tmp_path / "killed/results.json").read_text())["runs"]
    for a, b in zip(wanted, found, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
