"""Pictures of the evidence: few marks with names, and names that can be read."""

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from benchmarks._evidence import labels, panels, trade_off
from benchmarks._pages.evidence.results import rows, streams_of


def _row(cell, final, forgetting=0.1):
    runs = [
        {"final": final + x, "learned": 0.9 + x, "forgetting": forgetting}
        for x in (0.0, 0.01)
    ]
    return {"cell": cell, "runs": runs}


@pytest.mark.parametrize("benchmark", ["forgetting", "strength_rules"])
def test_eight_cells_at_most_have_a_name(benchmark):
    for stream in streams_of(benchmark):
        cells = list(rows(benchmark, stream))
        named = trade_off.named_cells(cells)
        assert len(named) == 8 and set(named) <= set(cells)
        looks = {(mark.colour, mark.marker) for mark in named.values()}
        assert benchmark != "forgetting" or len(looks) == len(named)


def test_a_few_cells_all_have_a_name():
    assert list(trade_off.named_cells(["x/y/z", "a/b/c"])) == ["x/y/z", "a/b/c"]


def test_heights_are_moved_apart_around_where_they_were():
    moved = labels.spread([0.5, 0.5, 0.9], 0.1)
    assert np.diff(moved).min() > 0.0999
    assert moved[0] == pytest.approx(0.45) and moved[2] == 0.9


def test_names_of_close_marks_do_not_overlap():
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    marks = {f"a name {i}": (0.5 + 0.01 * i, 0.5) for i in range(5)}
    labels.beside(axes, marks)
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Text's own extent: an annotation's has its line as well.
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == len(marks)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_runs_that_diverged_are_left_out(tmp_path):
    path = tmp_path / "x.png"
    trade_off.draw(path, "small", [_row("a/b/c", np.nan, np.nan)], "loss")
    assert path.stat().st_size > 5000


def test_a_panel_for_every_stream(tmp_path):
    path = tmp_path / "x.png"
    content = {"bench": {"measure": "accuracy"}, "rows": [_row("a/b/c", 0.5)]}
    sizes = []
    for count in (3, 4):
        contents = {str(i): content for i in range(count)}
        panels.draw(path, contents, [{"one": "a/b/c", "not run": "d/e/f"}])
        with Image.open(path) as image:
            sizes.append(image.size)
    (width, height), (same, twice) = sizes
    assert width == same and twice == pytest.approx(2 * height, abs=2)
