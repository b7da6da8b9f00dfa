"""The command: tiny models learn real formats, resume, and refuse what cannot be used.

Needs the extra `llm`.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import adamr
from adamr._nodes import find_nodes
from adamr.subspaces.axes import MAX_FAN_IN

pytest.importorskip("tunix")
pytest.importorskip("qwix")

from examples.harness.resume import Stopped  # noqa: E402
from examples.llm import __main__ as command  # noqa: E402
from examples.llm import measures, plans, runs  # noqa: E402
from examples.llm.methods import METHODS  # noqa: E402
from examples.llm.options import Config  # noqa: E402
from examples.llm.tiny import write_tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.usefixtures("rank_promotion"),
]

SMALL = {
    "steps": 2,
    "batch": 2,
    "context": 40,
    "scored": 4,
    "captured": 4,
    "general": 4,
    "memory": 2,
    "generated": 0,
}


def rows(word: str, count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{word} {i}?\n", "answer": f"{word[::-1]} {i % 3}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks and general text in TRACE's layout."""
    folder = tmp_path_factory.mktemp("data")
    for word in ("upper", "lower", "General"):
        (folder / word).mkdir()
        for part in ("train", "eval", "test"):
            content = json.dumps(rows(word, 12))
            (folder / word / f"{part}.json").write_text(content)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


def flags(**options) -> list[str]:
    return [
        part
        for name, value in {**SMALL, **options}.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def run(data, model, out, **options) -> int:
    where = {"data": data, "model": model, "out": out}
    return command.main(flags(**where, **options))


def planned(data, model, method="adam", **options):
    config = Config(data=data, model=model, **{**SMALL, **options})
    loaded = plans.load_all(config, lambda _: None)
    return loaded, config, plans.planner(loaded, config)(method)


def test_results_tell_what_was_learned_and_forgotten(data, model, tmp_path, capsys):
    names = "adam,lora_complement"
    assert run(data, model, tmp_path, method=names, generated=2, new_tokens=3) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in found["methods"]] == names.split(",")
    for row in found["methods"]:
        losses = np.array(row["loss_matrix"], float)
        assert row["final_loss"] == pytest.approx(losses[1].mean())
        assert row["learned_loss"] == pytest.approx(losses.diagonal().mean())
        assert row["forgetting"] == pytest.approx(losses[1, 0] - losses[0, 0])
        assert len(row["general"]) == 3
        assert row["general_loss_after"] == row["general"][-1]
        assert row["kl"] >= 0
        assert set(row["metrics"]) == {"OP", "BWT", "BWT/T", "forgetting"}
        assert [len(x) for x in row["train_loss"]] == [2, 2]
    adam, protected = found["methods"]
    # General text was protected first, and both began from the same model.
    assert adam["general"][0] == protected["general"][0]
    moved = [abs(r["general_loss_after"] - r["general"][0]) for r in (adam, protected)]
    assert moved[1] < moved[0] / 5
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "balance.png").stat().st_size > 10_000
    assert "lora_complement" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora_complement", "er"])
def test_a_stopped_run_ends_with_the_same_bits(data, model, tmp_path, method):
    loaded, config, plan = planned(data, model, method)
    plan = plan._replace(sizes=plan.sizes._replace(steps=(1, 3)))
    options = {
        "rate": 1e-2,
        "coefficient": 0.5,
        "seed": 3,
        "identity": plans.identity(loaded, config, method),
        "every": 1e-5,  # after each step
    }

    def learned(folder, stop_after=None):
        seen = []

        def report(position, history):
            seen.append(position)
            if len(seen) == stop_after:
                raise Stopped

        return runs.learn(tmp_path / folder, plan, report=report, **options)[0]

    whole = learned("whole")
    for steps in (3, 2, 3):  # at the end of the first task, then within the second
        with pytest.raises(Stopped):
            learned("parts", stop_after=steps)
    parts = learned("parts")
    for measured in ("loss_matrix", "general", "kl", "train_loss"):
        assert parts[measured] == whole[measured]


def test_a_checkpoint_of_other_data_is_refused(data, model, tmp_path, capsys):
    assert run(data, model, tmp_path, method="adam", tasks="upper") == 0
    assert run(data, model, tmp_path, method="adam", tasks="lower") == 2
    assert "tasks" in capsys.readouterr().err


def test_a_run_depends_on_all_that_it_reads(data, model):
    loaded, config, _ = planned(data, model)
    known = plans.identity(loaded, config, "adam")
    (first, *others), general = loaded.tasks.tasks, loaded.tasks.general
    for part in ("train", "valid", "test"):
        fewer = {part: getattr(first, part)[1:]}
        for changed in (
            loaded.tasks._replace(tasks=(first._replace(**fewer), *others)),
            loaded.tasks._replace(general=general._replace(**fewer)),
        ):
            other = loaded._replace(tasks=changed)
            assert plans.identity(other, config, "adam") != known


def test_the_rate_is_chosen_on_validation_rows(data, model, tmp_path):
    assert run(data, model, tmp_path, method="adam", lr_grid="1e-9,3e-2") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    tuned = found["tuning"]["adam"]
    assert [c["learning_rate"] for c in tuned["candidates"]] == [1e-9, 3e-2]
    best = min(tuned["candidates"], key=lambda c: c["final_loss"])
    assert tuned["best"] == best
    assert found["methods"][0]["learning_rate"] == best["learning_rate"]


def test_of_a_rate_that_was_tried_no_model_is_kept(data, model, tmp_path, capsys):
    options = {"method": "adam", "lr_grid": "1e-9,3e-2", "seeds": 1}
    found = []
    for _ in range(2):
        assert run(data, model, tmp_path, **options) == 0
        found.append(json.loads((tmp_path / "results.json").read_text())["tuning"])
    assert found[0] == found[1]
    kept = {path.name for path in (tmp_path / "checkpoints/adam/tuning").iterdir()}
    assert kept == {"rate-1e-09.json", "rate-0.03.json"}
    assert run(data, model, tmp_path, **options | {"batch": 3}) == 2
    assert "with another batch: give another --out" in capsys.readouterr().err


def test_epochs_are_those_of_trace(data, model, tmp_path, capsys):
    trace = tmp_path / "trace"
    for name, source in (("FOMC", "upper"), ("C-STANCE", "lower")):
        shutil.copytree(data / source, trace / name)
    loaded, *_ = planned(trace, model, epochs=True)
    assert [p.task.name for p in loaded.stream.parts] == ["C-STANCE", "FOMC"]
    assert loaded.steps == (5 * 12 // 2, 3 * 12 // 2)
    assert command.main([*flags(data=data, model=model, out=tmp_path), "--epochs"]) == 2
    assert "no number of epochs is known for lower" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["adam", "lora_complement"])
def test_tasks_rates_and_seeds_share_one_compiled_step(data, model, tmp_path, method):
    before = runs.stream.train_step._cache_size()
    options = {"method": method, "lr_grid": "1e-3,1e-2", "seeds": 2}
    assert run(data, model, tmp_path, **options) == 0
    assert runs.stream.train_step._cache_size() == before + 1


def test_replay_before_a_task_is_finished_changes_nothing(data, model):
    _, _, plain = planned(data, model, "adam")
    _, _, replay = planned(data, model, "er")
    losses = []
    for plan in (plain, replay):
        steps = runs.stream.learn(plan, rate=1e-2, coefficient=0.5, seed=0)
        losses.append([next(steps)[2]["train_loss"][0] for _ in range(3)][-1])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("method", ["lora_complement", "gpm_full"])
def test_a_run_that_diverges_is_told_and_the_next_one_begins(
    data, model, tmp_path, method
):
    options = {"method": f"{method},adam", "lr_grid": "1e25,1e-3", "steps": 3}
    for _ in range(2):  # the second command reads what the first one finished
        assert run(data, model, tmp_path, **options) == 0
        found = json.loads((tmp_path / "results.json").read_text())
        diverged, usable = found["tuning"][method]["candidates"]
        assert diverged["final_loss"] is None and usable["final_loss"] > 0
        assert found["tuning"][method]["best"] == usable
        assert [np.isfinite(row["final_loss"]) for row in found["methods"]] == [1, 1]
    options = {"method": method, "learning_rate": 1e25, "steps": 3}
    assert run(data, model, tmp_path / "alone", **options) == 0
    (row,) = json.loads((tmp_path / "alone" / "results.json").read_text())["methods"]
    assert row["final_loss"] is None and row["forgetting"] is None


def test_the_peak_of_a_finished_run_is_kept(data, model, tmp_path, monkeypatch):
    peaks = []
    for resident in (7, 5):
        known = {"resident": resident, "device": None}
        monkeypatch.setattr(measures, "peak_memory", lambda before, x=known: x)
        assert run(data, model, tmp_path, method="adam", steps=1) == 0
        (row,) = json.loads((tmp_path / "results.json").read_text())["methods"]
        peaks.append(row["peak_memory"]["resident"])
    assert peaks == [7, 7]


def test_an_embedding_of_its_own_is_not_protected(data, tmp_path, recwarn):
    """One with more words than a basis may have inputs, as Llama's."""
    model = write_tiny(
        tmp_path / "model", tie_word_embeddings=False, vocab_size=MAX_FAN_IN + 1
    )
    protected = []
    for method in ("gpm_full", "osft"):
        _, _, plan = planned(data, model, method)
        (*_, (_, end, _)) = runs.stream.learn(plan, rate=1e-4, coefficient=0.0, seed=0)
        for node in find_nodes(end.opt_state, adamr.Subspace):
            tree = jax.tree.unflatten(jax.tree.structure(end.trained), node.weights)
            protected.append((tree["embedder"], tree["lm_head"]))
    assert protected
    for embedding, head in protected:
        assert jax.tree.leaves(embedding) == [] and len(jax.tree.leaves(head)) == 1
    assert not [str(w.message) for w in recwarn if "unprotected" in str(w.message)]


def test_mofo_filters_whole_matrices(data, model):
    """A tenth of each, of those with heads as well; norms move everywhere."""
    _, _, plan = planned(data, model, "mofo", steps=1)
    learned = runs.stream.learn(plan, rate=1e-3, coefficient=0.1, seed=0)
    before = jax.tree.map(np.asarray, plan.learner.trained)
    run = next(run for position, run, _ in learned if position.step == 1)
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.asarray(a) != b, run.trained, before)
    ):
        if moved.ndim > 1:
            assert moved.sum() <= moved.size // 10, path
            share = moved.reshape(len(moved), -1).sum(axis=1)
            assert len(set(share.tolist())) > 1, path
        else:
            assert moved.mean() > 0.5, path


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(data, model, tmp_path, method):
    assert run(data, model, tmp_path, method=method) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert np.isfinite(row["final_loss"])


BAD = {
    "no_such_task": ({"tasks": "upper,sideways"}, "sideways"),
    "general": ({"tasks": "General"}, "never trained on"),
    "no_such_method": ({"method": "adamw"}, "lora_complement"),
    "no_steps": ({"steps": 0}, "--steps"),
    "negative": ({"general": -1}, "--general"),
    "beyond_the_model": ({"context": 1000}, "256"),
    "no_context": ({"context": 1}, "--context: got 1"),
    "nothing_left": ({"context": 3}, "--context"),
    "another_number": ({"coefficient": 5.0}, "adam have none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_told(data, model, tmp_path, capsys, case):
    options, told = BAD[case]
    assert run(data, model, tmp_path, **{"method": "adam", **options}) == 2
    assert told in capsys.readouterr().err


def test_rows_that_were_cut_are_counted(data, model, tmp_path, capsys):
    # A prompt has 8 or 9 tokens of one byte; its answer begins within 12.
    assert run(data, model, tmp_path, method="adam", tasks="upper", context=12) == 0
    assert "12 rows were shortened" in capsys.readouterr().out


def test_a_broken_task_is_named(data, model, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    (broken / "lower" / "test.json").unlink()
    assert run(broken, model, tmp_path / "out") == 2
    assert "test.json" in capsys.readouterr().err
    content = rows("lower", 3)
    content[1]["answer"] = " "
    (broken / "lower" / "test.json").write_text(json.dumps(content))
    assert run(broken, model, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "row 1" in error and "empty" in error


def test_a_tokenizer_of_another_model_is_refused(data, tmp_path, capsys):
    small = write_tiny(tmp_path / "small", vocab_size=100)
    assert run(data, small, tmp_path / "out") == 2
    assert "tokenizer" in capsys.readouterr().err
