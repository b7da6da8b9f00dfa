"""Pictures with a panel a stream and a line a method: what each ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks._evidence import labels
from benchmarks._evidence.pareto import values
from examples.harness.pictures import COLOURS, MARKERS
from examples.harness.statistics import interval

__all__ = ["draw"]


def draw(
    path: Path,
    contents: Mapping[str, dict],
    groups: Sequence[Mapping[str, str | None]],
    columns: int = 3,
) -> None:
    """Final measures with intervals; in every panel, better is to the right.

    Args:
      path: of the PNG.
      contents: title -> results of a stream.
      groups: each maps the label of a line to its cell; groups differ in colour and
        mark. The first line of the first group is the one that all are compared with.
      columns: panels side by side.
    """
    lines = [
        (label, cell, COLOURS[at], MARKERS[at])
        for at, group in enumerate(groups)
        for label, cell in group.items()
    ]
    count = -(-len(contents) // columns)
    size = (7.4, count * (0.75 + 0.21 * len(lines)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(count, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(contents) :]:
        axes.set_visible(False)
    for axes, (title, content) in zip(grid.flat, contents.items(), strict=False):
        found = {row["cell"]: row for row in content["rows"]}
        for y, (_, cell, colour, marker) in enumerate(lines):
            if cell not in found:
                continue
            mean, half = interval(values(found[cell], "final"))
            if y == 0:
                axes.axvline(mean, color="0.8", linewidth=1, zorder=0)
            axes.errorbar(
                mean, y, xerr=np.nan_to_num(half), color=colour, marker=marker,
                markersize=5.5, linewidth=1.2,
            )  # fmt: skip
        loss = content["bench"]["measure"] == "loss"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("final loss" if loss else "final accuracy", fontsize=8)
        if loss:
            axes.invert_xaxis()
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(lines)), [label for label, *_ in lines])
    grid[0][0].set_ylim(len(lines) - 0.5, -0.5)
    labels.save(figure, path)
