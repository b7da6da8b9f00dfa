"""examples.vision and the shared loop: results, resume, seeds, arguments."""

import functools
import itertools
import json
import signal

import jax
import numpy as np
import optax
import pytest

from tests.processes import example_kills

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from rich.console import Console

import adamr
from examples import streams
from examples.harness import loop, pictures, report, statistics
from examples.harness.cli import TUNING_TASKS
from examples.harness.methods import METHODS
from examples.harness.problem import Data, loss_of
from examples.harness.replay import Memory, memory_gradients
from examples.harness.setting import setting_for
from examples.vision.__main__ import Config, main, prepare
from examples.vision.problem import feed, problem, union

TINY = ["--tasks", "2", "--steps", "4", "--evaluations", "2", "--limit", "100"]


def run(out, *more):
    return main([*TINY, "--out", str(out), *more])


def learn(name, seeds, tasks=2, resume_after=None, steps=6, convolves=False):
    """The method's last state and history; maybe stopped and resumed on the way."""
    stream = streams.load("permuted-digits", tasks=tasks, limit=100)
    made, axes = problem("mlp", stream.train.x.shape[2:], 10)
    made = made._replace(convolves=convolves)
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(params, axes, tasks=tasks, samples=20, new_directions=5)
    options = dict(
        rates=[1e-3] * len(seeds),
        coefficients=[0.5] * len(seeds),
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


def test_a_step_a_call_is_the_scan():
    _, scanned, history = learn("er", [0])
    _, called, other = learn("er", [0], convolves=True)
    for a, b in zip(bits(scanned.params), bits(called.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    for a, b in zip(history, other, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), a, b)


def test_replay_takes_adams_steps_while_the_memory_is_empty():
    g = {"kernel": np.array([[1.0, -2.0]], np.float32)}
    none = jax.tree.map(np.zeros_like, g)
    tx = METHODS["er"].build(1e-3, 1.0, None)
    step, _ = tx.update(g, tx.init(g), g, memory_gradient=none)
    adam = optax.adam(1e-3)
    expected, _ = adam.update(g, adam.init(g), g)
    np.testing.assert_allclose(step["kernel"], expected["kernel"], rtol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("convolves", [False, True])  # one by one, or side by side
def test_memory_gradients_are_those_of_the_tasks_seen(convolves, parts):
    made = problem("mlp", (1, 8, 8), 10)[0]._replace(convolves=convolves)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, 5, 1, 8, 8)).astype(np.float32)
    data = Data(inputs, rng.integers(0, 10, (3, 5)), np.ones((3, 10), bool))
    params = made.init(jax.random.key(0))
    memory = Memory(data, np.array([True, False, True]))
    gradients = functools.partial(memory_gradients, made, key=None, parts=parts)
    found = jax.jit(gradients)(params, memory)
    np.testing.assert_array_equal(found["memory_mask"], np.repeat(memory.seen, parts))
    size = 5 // parts
    for task, part in itertools.product((0, 2), range(parts)):
        here = slice(part * size, (part + 1) * size)
        own = Data(data.inputs[task, here], data.labels[task, here], data.classes[task])
        expected = jax.grad(lambda p, own=own: loss_of(made, p, own))(params)
        row = parts * task + part
        each = jax.tree.map(lambda g, row=row: g[row], found["memory_gradients"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            each, expected,
        )  # fmt: skip


@pytest.mark.parametrize("parts", [0, 6])
def test_a_memory_has_as_many_parts_as_examples_at_most(parts):
    made = problem("mlp", (1, 8, 8), 10)[0]
    images, labels = np.zeros((3, 5, 1, 8, 8)), np.zeros((3, 5), int)
    memory = Memory(Data(images, labels, np.ones((3, 10), bool)), np.ones(3, bool))
    with pytest.raises(ValueError, match=f"parts is {parts}, expected 1 to 5"):
        memory_gradients(made, None, memory, None, parts=parts)


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


def test_other_hyperparameters_and_versions_are_refused_by_name(
    tmp_path, capsys, monkeypatch
):
    assert run(tmp_path, "--method", "adam") == 0
    more = ("--learning-rate", "0.5", "--limit", "90")
    assert run(tmp_path, "--method", "adam", *more) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert "config/limit: 100, 90" in message
    assert "config/rates: [0.001], [0.5]" in message
    monkeypatch.setattr(adamr, "__version__", "0.0.1")
    assert run(tmp_path, "--method", "adam") == 2
    assert "version/adamr: " in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tmp_path, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def lockf(*arguments):
        raise BlockingIOError  # as if another process had the lock

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run(tmp_path, "--method", "adam") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "in use" in message


def test_the_grid_takes_its_best_on_validation(tmp_path):
    more = ("--method", "adam,l2", "--steps", "40", "--lr-grid", "1e-9,1e-2")
    assert run(tmp_path, *more, "--coefficient-grid", "0,1e3") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    low, high = found["tuning"]["adam"]["candidates"]  # adam has no coefficient
    assert low["score"] < high["score"] and found["tuning"]["adam"]["best"] == high
    assert high == {"learning_rate": 1e-2, "score": high["score"]}
    tried = found["tuning"]["l2"]["candidates"]
    pairs = [(one["learning_rate"], one["strength"]) for one in tried]
    assert pairs == [(1e-9, 0.0), (1e-9, 1e3), (1e-2, 0.0), (1e-2, 1e3)]
    best = found["tuning"]["l2"]["best"]
    assert best["score"] == max(one["score"] for one in tried) > tried[0]["score"]
    chosen = [(1e-2, None), (best["learning_rate"], best["strength"])]
    assert [(r["learning_rate"], r.get("strength")) for r in found["runs"]] == chosen


def test_tuning_sees_the_first_tasks_validation_images_alone(tmp_path):
    bench = prepare(Config(tasks=4, limit=100), Console(quiet=True))
    stream = streams.load("permuted-digits", tasks=4, limit=100)
    first = bench.tuning()
    assert len(first.names) == TUNING_TASKS == 3
    np.testing.assert_array_equal(first.test.inputs, stream.valid.x[:3])
    np.testing.assert_array_equal(first.weight, stream.valid.weight[:3])


@pytest.mark.parametrize("kind", ["single", "joint"])
def test_a_reference_gives_intransigence(tmp_path, kind):
    more = ("--method", "adam,gpm", "--seeds", "2", "--reference", kind)
    assert run(tmp_path, *more) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["reference"]["kind"] == kind
    for row in found["runs"]:
        lost = found["reference"]["accuracy"][row["seed"]] - np.diag(row["matrix"])
        np.testing.assert_allclose(row["metrics"]["intransigence"], lost.mean())
        if row["method"] == "adam":
            assert lost[0] == 0  # nothing came before: the reference is the run itself


def test_a_union_draws_from_its_tasks_and_masks_each_ones_classes():
    stream = streams.load("split-digits", tasks=5, scenario="task")
    joint = union(stream, 200, [0, 3])
    whole, rows = joint.train(0), joint.batches(0, 0, 0, 4)
    tasks = rows // stream.train.weight.shape[1]
    assert set(tasks.ravel()) == {0, 3}
    made, _ = problem("mlp", stream.train.x.shape[2:], stream.class_mask.shape[1])
    batch = made.batch(jax.tree.map(np.asarray, whole), rows[0])
    np.testing.assert_array_equal(batch.classes, stream.class_mask[tasks[0]])
    assert batch.classes[np.arange(200), batch.labels].all()
    np.testing.assert_array_equal(joint.test.inputs[0], stream.test.x[3])
    assert np.isfinite(loss_of(made, made.init(jax.random.key(0)), batch))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    more = ("--method", "adam,gpm", "--seeds", "2")
    assert run(tmp_path / "whole", *more) == 0
    learn, left = loop.learn, 6  # after two chunks of the second method

    def signalled(*arguments, **options):
        nonlocal left
        for chunk in learn(*arguments, **options):
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGTERM)
            yield chunk

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "learn", signalled)
    assert run(tmp_path / "stopped", *more, "--save-every", "1000") == 143
    rows = json.loads((tmp_path / "stopped/results.json").read_text())["runs"]
    assert {row["method"] for row in rows} == {"adam"}
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(tmp_path / "stopped", *more) == 0
    kinds = ("whole", "stopped")
    found = [json.loads((tmp_path / k / "results.json").read_text()) for k in kinds]
    for a, b in zip(*(f["runs"] for f in found), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    events = [(tmp_path / kind / "events/gpm.jsonl").read_text() for kind in kinds]
    assert events[0] == events[1]


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
    data = Data(images, np.arange(20) % 5, np.ones(5, bool))
    objective = jax.jit(lambda p: loss_of(made, p, data))
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
        (["--lr-grid", "1,1"], ["--lr-grid", "twice"]),
        (["--lr-grid", "1,2", "--learning-rate", "1"], ["--lr-grid", "both"]),
        (["--learning-rate", "-1"], ["--learning-rate", "-1", "positive"]),
        (["--coefficient-grid", "1,-1"], ["--coefficient-grid", "-1", "0 or more"]),
        (["--coefficient", "2", "--method", "adam"], ["adam have none", "expected"]),
        (["--coefficient", "2", "--method", "ewc,er"], ["strength of ewc, weight of"]),
        (["--coefficient", "nan"], ["--coefficient", "nan", "0 or more"]),
        (["--save-every", "0"], ["--save-every", "0", "positive"]),
        (["--scenario", "task", "--tasks", "0"], ["--tasks", "0", "at least 1"]),
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
    mean, half = statistics.interval([0.1, 0.2, 0.3])
    np.testing.assert_allclose([mean, half], [0.2, 4.302653 * 0.1 / 3**0.5], rtol=1e-5)
    assert np.isnan(statistics.interval([0.5])[1])
    same = statistics.paired([0.5, 0.5], [0.4, 0.4])
    np.testing.assert_allclose(same["difference"], 0.1)
    assert np.isnan(same["p"]) or same["p"] < 1e-6
    test = statistics.paired([0.9, 0.8, 0.95], [0.5, 0.6, 0.4])
    np.testing.assert_allclose(test["p"], 0.063, atol=0.02)


def row(method, seed, acc, loss=0.1):
    metrics = {"ACC": acc, "LA": acc, "forgetting": 0.0}
    common = {"learning_rate": 0.1, "seconds": 1.0, "loss": [[[0.1, loss]]]}
    tensor = {"matrix": [[acc]], "anytime": [[[acc]]]}
    return {"method": method, "seed": seed, "metrics": metrics, **common, **tensor}


@pytest.mark.smoke
@pytest.mark.parametrize("loss", [np.nan, np.inf, None])
@pytest.mark.parametrize("acc", [0.99, np.nan])
def test_a_run_that_diverged_is_never_ranked(loss, acc):
    rows = [row("broken", 0, acc, loss), row("broken", 1, 0.98)]
    rows += [row("worse", s, 0.5 + s / 10) for s in (0, 1)]
    rows += [row("better", s, 0.7 + s / 5) for s in (0, 1)]
    assert statistics.diverged(rows[0]) and not statistics.diverged(rows[1])
    means = statistics.means(rows)
    assert np.isnan(means["broken"])
    assert statistics.best_first(means) == ["better", "worse", "broken"]
    (test,) = statistics.comparisons(rows)
    assert (test["method"], test["best"]) == ("worse", "better")
    table = report.table(rows)
    names, _, accuracies = (list(column.cells) for column in table.columns[:3])
    assert names == ["better", "worse", "broken"]
    assert accuracies[2] == "1 of 2 diverged"
    assert list(table.columns[3].cells)[2] == list(table.columns[4].cells)[2] == "–"
    assert (
        "better ends at 0.800, worse at 0.550"
        in pictures.matrices(rows, ["a"]).get_suptitle()
    )


def test_nothing_is_ranked_where_every_run_diverged():
    rows = [row("one", 0, 0.5, np.nan), row("two", 0, 0.4, np.nan)]
    assert statistics.comparisons(rows) == []
    assert [*report.table(rows).columns[2].cells] == ["diverged", "diverged"]
    assert "all diverged" in pictures.matrices(rows, ["a"]).get_suptitle()


def test_methods_that_did_not_diverge_are_compared_as_ever():
    rows = [row("a", s, 0.5 + s / 10) for s in (0, 1, 2)]
    rows += [row("b", s, 0.7 + s / 5) for s in (0, 1)]
    (test,) = statistics.comparisons(rows)
    assert (test["method"], test["best"], test["seeds"]) == ("a", "b", [0, 1])
    expected = statistics.paired([0.5, 0.6], [0.7, 0.9])
    for key, value in expected.items():
        np.testing.assert_allclose(test[key], value, rtol=1e-12)


def test_the_accuracy_of_a_run_that_diverged_is_nan(tmp_path):
    more = ("--method", "adam,sgd", "--seeds", "2", "--learning-rate", "1e30")
    assert run(tmp_path, *more) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(r["metrics"]["ACC"] is None for r in found["runs"])
    assert found["comparisons"] == []


def test_tuning_does_not_take_a_rate_that_diverges(tmp_path):
    assert run(tmp_path, "--method", "sgd", "--lr-grid", "1e30,1e-3") == 0
    found = json.loads((tmp_path / "results.json").read_text())["tuning"]["sgd"]
    assert found["best"]["learning_rate"] == 1e-3
    assert found["candidates"][0]["score"] is None


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    arguments = ["--method", "gpm,er", "--tasks", "3", "--steps", "100"]
    return example_kills.Example(
        "examples.vision", arguments, tmp_path_factory.mktemp("vision")
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_in_the_same_numbers(example, how):
    example_kills.check_random_moments(example, how, kills=6)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), example_kills.PLACES[:4])
def test_killed_at_a_boundary_or_in_a_save(example, where, count):
    example_kills.check_place(example, where, count)


def test_a_run_that_diverges_leaves_the_others_alone():
    stream = streams.load("permuted-digits", tasks=2, limit=40)
    made, axes = problem("mlp", (64,), 10)
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(params, axes, tasks=2, samples=8)

    def learn(rates):
        *_, (_, runs, history) = loop.learn(
            made, METHODS["gpm_sgd"], setting, feed(stream, 4), rates=rates,
            coefficients=[0.0] * len(rates), seeds=[0] * len(rates), steps=8,
        )  # fmt: skip
        return runs.params, history.loss

    params, loss = learn([0.1, 1e30])
    alone, _ = learn([0.1])
    assert np.isnan(loss[1, -1]).all() and np.isfinite(loss[0]).all()
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x[0], y[0])
