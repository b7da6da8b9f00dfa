"""The lessons run as scripts, see what they say, and become notebooks of the docs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("equinox")
pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "examples").glob("0[1-9]_*.py"))


def run(lesson, folder):
    """What the lesson prints, started away from the sources as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", str(lesson)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def numbers(text, pattern):
    """The numbers of the one line that begins with the pattern."""
    (line,) = re.findall(rf"^{pattern}(.*)$", text, re.MULTILINE)
    return [float(x) for x in re.findall(r"-?\d+\.\d+(?:e-\d+)?", line)]


def lesson(name):
    (path,) = (path for path in LESSONS if path.stem == name)
    return path


def test_a_projection_keeps_the_first_task(tmp_path):
    told = run(lesson("01_protect"), tmp_path)
    adam, projected, kept = (
        numbers(told, name)
        for name in ("Adam  ", "projected gradient into Adam  ", "adamr.gpm  ")
    )
    assert min(adam[0], projected[0], kept[0]) > 0.85
    assert adam[1] < 0.75 < projected[1] < kept[1]
    assert kept[2] > 0.8
    assert numbers(told, "Seen: ") == pytest.approx(
        [before - after for before, after, _ in (adam, projected, kept)], abs=0.0015
    )


def test_three_libraries_see_the_same(tmp_path):
    told = run(lesson("02_any_library"), tmp_path)
    for name in ("Flax NNX  ", "Flax linen  ", "Equinox  "):
        before, after, kept_before, kept_after = numbers(told, name)
        assert min(before, kept_before) > 0.85
        assert before - after > 0.15 > 0.05 > kept_before - kept_after
    assert told.count("100.0% of the parameters") == 3


def test_a_modifier_works_on_a_route_alone(tmp_path):
    told = run(lesson("03_own_modifier"), tmp_path)
    none, before, route = (
        numbers(told, name)
        for name in ("no modifier", "slow_down, then Adam", "slow_down on a route")
    )
    assert none[0] == before[0] == route[0] > 0.85
    assert abs(none[1] - before[1]) < 0.15
    assert route[1] > 0.85 and min(none[2], before[2], route[2]) > 0.75


def test_eight_devices_end_where_one_ends(tmp_path):
    told = run(lesson("04_sharding"), tmp_path)
    (difference,) = numbers(told, "largest difference of a parameter")
    (inside,) = numbers(told, "share of the second task's change")
    assert 0 < difference < 1e-4 and inside < 1e-5
    assert "where it was put: True" in told
    assert re.search(r"mu hidden +P\(None, 'model'\)", told)
    assert re.search(r"bases 0 +P\('model', None, None\)", told)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    told = run(lesson("05_resume"), tmp_path)
    assert "start 1: crashed at step 70" in told
    assert "start 2: from step 60, told to stop at step 105" in told
    assert "start 3: from step 105 to the end" in told
    assert "Seen: stopped twice, the run ended with the same bits" in told


def test_replay_keeps_more(tmp_path):
    told = run(lesson("06_replay"), tmp_path)
    adam, agem, er = (
        numbers(told, name) for name in ("Adam  ", "adamr.agem  ", "adamr.er  ")
    )
    assert sum(er) > sum(agem) and sum(er) > sum(adam) + 0.2
    assert max(er[:3]) < 1 and all(a < b for a, b in zip(adam[:3], er, strict=False))


# In the documentation ------------------------------------------------------------

needs_nbformat = pytest.mark.skipif(
    importlib.util.find_spec("nbformat") is None, reason="needs the extra docs"
)


def extension():
    place = ROOT / "docs" / "_ext" / "lessons.py"
    spec = importlib.util.spec_from_file_location("lessons", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_nbformat
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_notebook_is_the_file(path):
    """No code gets lost or changed, text comes first, and one heading is the page's."""
    source = path.read_text()
    made = extension().notebook(source)
    code = [c.source for c in made.cells if c.cell_type == "code"]
    kept = [line for line in source.splitlines() if line and not line.startswith("#")]
    assert [x for x in "\n".join(code).splitlines() if x] == kept
    text = [c.source for c in made.cells if c.cell_type == "markdown"]
    assert made.cells[0].cell_type == "markdown"
    headings = [x for cell in text for x in cell.splitlines() if x.startswith("# ")]
    assert headings == [text[0].splitlines()[0]]
    assert all(cell.strip() for cell in code + text)


@needs_nbformat
def test_a_lesson_with_misplaced_code():
    notebook = extension().notebook
    with pytest.raises(ValueError, match="begins with 'x = 1'"):
        notebook("x = 1\n# %%\ny = 2\n")
    with pytest.raises(ValueError, match="text cell has 'x = 1'"):
        notebook("# %% [markdown]\n# # Title\nx = 1\n")


@needs_nbformat
def test_links_of_the_page_lead_to_the_notebooks():
    page = [(ROOT / "docs" / "lessons" / "index.md").read_text()]
    extension().link_notebooks(None, "lessons/index", page)
    for path in LESSONS:
        assert f"[{path.name}]({path.stem}.ipynb)" in page[0]
    assert "examples/0" not in page[0].replace("python examples/01_protect.py", "")


def test_every_lesson_is_listed():
    page = (ROOT / "docs" / "lessons" / "index.md").read_text()
    row = r"^\| \[(\w+)\.py\]\(\.\./\.\./examples/\1\.py\) \|"
    names = [path.stem for path in LESSONS]
    assert re.findall(row, page, re.MULTILINE) == names and len(names) == 6
    assert page.rstrip("`\n").split("\n\n")[-1].split() == names
