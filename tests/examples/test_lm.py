"""examples.lm: data, arguments, results, interruption."""

import json
import signal

import numpy as np
import pytest
from rich.console import Console

from tests.processes import example_kills

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tyro")

from examples.harness import loop
from examples.harness.example import Done
from examples.lm import pictures, problem, report
from examples.lm.__main__ import main
from examples.lm.methods import DEFAULT, METHODS
from examples.lm.model import PRESETS
from examples.streams import installed
from examples.streams.domains import load_folder, sample_windows, spaced_windows


def write_text(made):
    """Two domains as pairs, one plain."""
    made.mkdir()
    for name, line in (("abc", "abcdefgh\n"), ("digits", "0123456789\n")):
        (made / f"{name}.train.txt").write_text(line * 60)
        (made / f"{name}.valid.txt").write_text(line * 20)
    (made / "words.txt").write_text("the quick brown fox\n" * 60)
    return made


@pytest.fixture
def folder(tmp_path):
    return write_text(tmp_path / "text")


def _run(folder, out, *more):
    common = ["--data", str(folder), "--out", str(out), "--preset", "tiny"]
    return main([*common, *more])


def test_results_pictures_and_definitions(folder, tmp_path):
    out = tmp_path / "out"
    names = ["adam", "adaptive", "update"]
    more = ("--methods", ",".join(names), "--steps", "6", "--evaluations", "2")
    assert _run(folder, out, *more) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == names
    assert [d["name"] for d in results["domains"]] == ["abc", "digits", "words"]
    assert results["domains"][0]["train_bytes"] == 540
    assert results["config"]["preset"]["steps"] == 6
    for row in results["methods"]:
        loss = np.array(row["loss_matrix"])
        assert loss.shape == np.shape(row["accuracy_matrix"]) == (3, 3)
        np.testing.assert_allclose(row["final_loss"], loss[-1].mean())
        np.testing.assert_allclose(row["learned_loss"], loss.diagonal().mean())
        lost = [loss[2, 0] - min(loss[0, 0], loss[1, 0]), loss[2, 1] - loss[1, 1]]
        np.testing.assert_allclose(row["forgetting"], np.mean(lost))
        np.testing.assert_allclose(row["final_perplexity"], np.exp(row["final_loss"]))
        assert row["seed"] == 0 and row["learning_rate"] > 0
        assert row["curves"]["step"] == [3, 6, 9, 12, 15, 18]
        assert all(len(c) == 6 for c in row["curves"].values())
        np.testing.assert_array_equal(np.array(row["anytime_loss"])[:, -1], loss)
        used = row["curves"]["used"]
        assert used[0] == used[1] == 0 and 0 < used[2] <= used[4] <= 1
    leaks = {r["method"]: max(r["curves"]["leak"]) for r in results["methods"]}
    assert leaks["update"] < 1e-4 < 1e-2 < leaks["adam"]
    strengths = {r["method"]: r["curves"]["strength"] for r in results["methods"]}
    assert set(strengths["adam"]) == {0.0} and set(strengths["update"]) == {1.0}
    assert 0.3 < strengths["adaptive"][-1] < 0.5
    for picture in ("matrices", "forgetting", "dynamics", "kept"):
        start = (out / f"{picture}.png").read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n"


def test_seeds_share_methods_and_domain_order(folder, tmp_path):
    out = tmp_path / "out"
    more = ("--method", "fixed", "--seeds", "2", "--domains", "words,abc")
    more = (*more, "--learning-rate", "0.01", "--steps", "2", "--evaluations", "1")
    assert _run(folder, out, *more) == 0
    results = json.loads((out / "results.json").read_text())
    assert [d["name"] for d in results["domains"]] == ["words", "abc"]
    assert [row["seed"] for row in results["methods"]] == [0, 1]
    assert {row["learning_rate"] for row in results["methods"]} == {0.01}
    first, second = (row["final_loss"] for row in results["methods"])
    assert first != second
    assert results["methods"][0]["curves"]["strength"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "adam,ewc2"], ["--method", "ewc2", *METHODS]),
        (["--methods", ""], ["--method"]),
        (["--method", "adam,adam"], ["--method", "twice"]),
        (["--domains", "abc,latin"], ["--domains", "latin", "digits"]),
        (["--domains", "abc,abc"], ["--domains", "twice"]),
        (["--steps", "0"], ["--steps", "0", "at least 1"]),
        (["--seeds", "-1"], ["--seeds", "-1", "at least 1"]),
        (["--learning-rate", "-1"], ["--learning-rate", "-1.0", "positive"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan", "positive"]),
        (["--threshold", "1.5"], ["--threshold", "1.5", "from 0 to 1"]),
        (["--evaluations", "4"], ["--steps", "10", "multiple of the 4"]),
    ],
)
def test_bad_arguments(folder, tmp_path, capsys, arguments, expected):
    assert _run(folder, tmp_path / "out", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    for part in expected:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert _run(folder, tmp_path / "out") == 2
    assert f"error: --out: got {tmp_path / 'out'}" in capsys.readouterr().err


def test_bad_folders(folder, tmp_path, capsys):
    def message(where=folder):
        assert _run(where, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "folder that exists" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no text" in message(tmp_path / "empty")
    (folder / "abc.valid.txt").write_text("")
    error = message()
    assert "valid text of domain 'abc'" in error and "has 0 bytes" in error
    (folder / "abc.valid.txt").write_text("x" * 16)
    assert "has 16 bytes, expected at least 17" in message()
    (folder / "abc.valid.txt").unlink()
    assert "'abc'" in (error := message()) and "lacks abc.valid.txt" in error
    (folder / "abc.train.txt").rename(folder / "abc.valid.txt")
    assert "lacks abc.train.txt" in message()


def test_unknown_preset_exits_with_2(folder, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        _run(folder, tmp_path / "out", "--preset", "huge")
    assert stopped.value.code == 2


@pytest.mark.smoke
def test_plain_file_is_split_by_position(tmp_path):
    text = bytes(range(200)) * 5
    (tmp_path / "a.txt").write_bytes(text)
    (domain,) = load_folder(tmp_path)
    assert domain.train.tobytes() == text[:900]
    assert domain.valid.tobytes() == text[900:]


def test_windows_stay_inside_the_text():
    text = np.arange(18, dtype=np.uint8)
    rng = np.random.default_rng(0)
    windows = sample_windows(text, (50, 4), 16, rng)
    assert windows.shape == (50, 4, 17) and set(windows[..., 0].ravel()) == {0, 1}
    spaced = spaced_windows(text, 3, 16)
    assert spaced[:, 0].tolist() == [0, 0, 1] and spaced[-1, -1] == 17


def test_default_data():
    domains, messages = installed.load_installed()
    assert len(domains) + len(messages) == len(installed.SOURCES) == 8
    assert len(domains) >= 6
    for domain in domains:
        assert not set(domain.files["train"]) & set(domain.files["valid"])
        assert len(domain.train) >= installed.FEWEST_BYTES
        assert (
            0 < len(domain.valid) <= installed.VALID_BYTES + len(domain.files["valid"])
        )
    again, _ = installed.load_installed([domains[0].name])
    assert again[0].train.tobytes() == domains[0].train.tobytes()


def test_repeated_text_is_dropped(tmp_path):
    licence = "Permission is granted to anyone to do anything with this.\n\n"
    for name, own in (("a", "first file " * 9), ("b", ""), ("c", "third file " * 9)):
        (tmp_path / name).write_text(licence + own)
    texts = installed.read_files({name: tmp_path / name for name in "abc"})
    assert sum("Permission" in text for text in texts.values()) == 1
    assert "".join(texts.values()).count("third file") == 9


def test_missing_domain_is_skipped_with_a_message(monkeypatch):
    monkeypatch.setattr(installed, "package_files", dict)
    domains, messages = installed.load_installed(["python", "translations"])
    assert [domain.name for domain in domains] == ["python"]
    assert "skipped translations" in messages[0]


def test_diverged_run_makes_valid_json():
    history = loop.empty_history(problem.problem(PRESETS["tiny"]), 1, 2, 1)
    history.loss[:, :, 0] = [[2.0, np.nan], [3.0, np.nan]]
    row = report.summarize(Done("adam", 1e-3, 0.0, history, 1.0, None), 0, 10)
    assert np.isnan(row["final_loss"]) and row["forgetting"] == 1.0
    assert "diverged" in report._cell([row], "final_loss")


def test_the_table_has_the_largest_leak_and_fits_a_terminal():
    rows = []
    for name, leaks in {"adam": [0.0, 0.957], "shared": [0.0, 3.2e-7]}.items():
        history = loop.empty_history(problem.problem(PRESETS["tiny"]), 1, 2, 1)
        history.loss[:] = 2.5
        row = report.summarize(Done(name, 1e-3, 0.0, history, 1234.0, None), 0, 10)
        row["curves"]["leak"] = leaks
        rows.append(row)
    console = Console(width=80, record=True)
    console.print(report.table(rows))
    text = console.export_text()
    ends = [line.split("│")[-2].strip() for line in text.splitlines() if "│" in line]
    assert sorted(ends) == ["0.96", "3e-7"] and "…" not in text


def test_batches_do_not_depend_on_how_they_are_asked_for(folder):
    feed = problem.feed(load_folder(folder), PRESETS["tiny"])
    whole = feed.batches(1, 7, 0, 6)
    parts = [feed.batches(1, 7, first, 2) for first in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.shape == (6, 4, 17) and whole.dtype == np.uint8
    assert (feed.batches(1, 8, 0, 6) != whole).any()
    assert set(whole.ravel()) == set(b"0123456789\n")


def test_a_union_mixes_its_domains_alone(folder):
    feed = problem.feed(load_folder(folder), PRESETS["tiny"], [[0, 1]])
    windows = feed.batches(0, 0, 0, 50).reshape(-1, 17)
    letters = np.isin(windows, list(b"abcdefgh")).any(-1)
    digits = np.isin(windows, list(b"0123456789")).any(-1)
    assert (letters != digits).all() and 0.3 < letters.mean() < 0.7
    assert not np.isin(windows, list(b"xyz ")).any()
    assert feed.names == ["digits"] and set(np.unique(feed.test.inputs)) <= set(
        b"0123456789\n"
    )


def test_tuning_never_sees_held_out_text(folder):
    domains = load_folder(folder)
    for whole, part in zip(domains, problem.for_tuning(domains), strict=True):
        assert len(part.valid) == int(0.1 * len(whole.train))
        again = np.concatenate([part.train, part.valid])
        np.testing.assert_array_equal(again, whole.train)


def test_grid_and_reference(folder, tmp_path):
    more = ("--method", "adam", "--seeds", "2", "--reference", "joint", "--lr-grid")
    assert _run(folder, tmp_path, *more, "1e-9,1e-2") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    low, high = found["tuning"]["adam"]["candidates"]
    assert low["score"] < high["score"] and found["tuning"]["adam"]["best"] == high
    assert {row["learning_rate"] for row in found["methods"]} == {1e-2}
    assert found["reference"]["kind"] == "joint"
    for row in found["methods"]:
        loss = np.diag(row["loss_matrix"]) - found["reference"]["loss"][row["seed"]]
        np.testing.assert_allclose(row["intransigence_by_domain"], loss, atol=1e-6)
        np.testing.assert_allclose(row["intransigence"], loss.mean(), atol=1e-6)
        assert loss[0] == 0  # nothing came before: the reference is the run itself
        assert loss[1] != 0


def test_text_that_has_changed_is_refused(folder, tmp_path, capsys):
    more = ("--method", "adam", "--domains", "abc")
    assert _run(folder, tmp_path, *more) == 0
    (folder / "abc.train.txt").write_text("other text\n" * 60)
    assert _run(folder, tmp_path, *more) == 2
    assert "config/domains/abc: " in capsys.readouterr().err


def test_default_methods():
    """Adam, the projection in both of its moments, and what the README recommends."""
    assert DEFAULT == ("adam", "shared", "gpm_si") and set(DEFAULT) < set(METHODS)


def test_all_methods_by_either_spelling(folder, tmp_path):
    """Eleven methods: those that have no colour of their own are grey."""
    out = tmp_path / "out"
    more = ("--methods", "all", "--steps", "2", "--evaluations", "1")
    assert _run(folder, out, *more, "--domains", "abc,words") == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == list(METHODS)
    groups = {row["method"]: [row] for row in results["methods"]}
    figure = pictures.kept(groups, ["abc", "words"])
    (axes,) = figure.axes
    shown = {text.get_text() for text in axes.texts}
    assert set(METHODS) - {"adam", "shared"} < shown
    lines = {line.get_color() for line in axes.lines if len(line.get_xdata()) == 1}
    assert 3 < len(lines) <= 8


ARGUMENTS = ["--preset", "tiny", "--steps", "40", "--methods", "adaptive,alias"]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    arguments = [*ARGUMENTS, "--data", write_text(folder / "text")]
    return example_kills.Example("examples.lm", arguments, folder)


@pytest.mark.slow
def test_interrupt_leaves_finished_rows(example):
    out = example.folder / "stopped"
    process = example.start(out, "--seeds", "40")
    example_kills.wait_for(out / "results.json", process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    rows = json.loads((out / "results.json").read_text())["methods"]
    assert {row["method"] for row in rows} == {"adaptive"} and len(rows) == 40
    assert "what was finished" in printed and "adaptive" in printed
    assert (out / "matrices.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_in_the_same_numbers(example, how):
    example_kills.check_random_moments(example, how, kills=6)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), example_kills.PLACES)
def test_killed_at_a_boundary_or_in_a_save(example, where, count):
    example_kills.check_place(example, where, count)
