"""Pictures of accuracies: what is left of each task, and how it got there."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.harness.report import outcome
from examples.harness.statistics import best_first, by_method, interval, means

# Okabe and Ito's colours, told apart by the colour-blind; markers help in print.
COLOURS = (
    "#000000", "#E69F00", "#56B4E9", "#CC79A7",
    "#009E73", "#D55E00", "#0072B2", "#999999",
)  # fmt: skip
MARKERS = "osv^DPX*"


def matrices(rows: list[dict], tasks: list[str]) -> Figure:
    """One heat map per method: accuracy on every task after learning each."""
    groups, ends = by_method(rows), means(rows)
    names = best_first(ends)
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = Figure(
        figsize=(3.2 * columns + 1, 3.4 * lines + 0.8), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    image = None
    for axes, name in zip(grid.flat, names, strict=False):
        matrix = np.mean([row["matrix"] for row in groups[name]], axis=0)
        seen = np.tri(len(matrix), dtype=bool)
        shown = np.where(seen, matrix, np.nan)
        image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1)
        if len(matrix) <= 10:
            for i, j in np.argwhere(seen):
                colour = "black" if matrix[i, j] > 0.6 else "white"
                text = f"{100 * matrix[i, j]:.0f}"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=7, color=colour
                )
        known = math.isfinite(ends[name])
        end = f"{ends[name]:.3f} at the end" if known else outcome(groups[name])
        axes.set_title(f"{name}: {end}", fontsize=10)
        axes.set_xlabel("accuracy (%) on task", fontsize=8)
        axes.set_ylabel("after learning task", fontsize=8)
        places = range(0, len(matrix), 1 + len(matrix) // 11)
        axes.set_xticks(places)
        axes.set_yticks(places)
        axes.tick_params(labelsize=7)
    sound = [name for name in names if math.isfinite(ends[name])]
    told = f"{sound[0]} ends at {ends[sound[0]]:.3f}" if sound else "all diverged"
    if len(sound) > 1:
        told += f", {sound[-1]} at {ends[sound[-1]]:.3f}"
    figure.suptitle(f"{told}, over {len(tasks)} tasks")
    figure.colorbar(image, ax=grid, pad=0.01, aspect=40)
    return figure


def anytime(rows: list[dict], tasks: list[str]) -> Figure:
    """Accuracy over the tasks seen so far at every evaluation, with intervals."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, own) in enumerate(by_method(rows).items()):
        curves = []
        for row in own:
            tensor = np.asarray(row["anytime"], float)
            curves.append(
                [tensor[t, h, : t + 1].mean() for t, h in np.ndindex(tensor.shape[:2])]
            )
        each = [interval(values) for values in zip(*curves, strict=True)]
        middle, half = map(np.array, zip(*each, strict=True))
        evaluations = len(middle) // len(tasks)
        x = (np.arange(len(middle)) + 1) / evaluations
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            x, middle, label=name, color=colour, linewidth=1.5, markersize=5,
            marker=MARKERS[i // len(COLOURS) % len(MARKERS)],
            markevery=(evaluations - 1, evaluations),
        )  # fmt: skip
        if len(own) > 2:  # the interval of two seeds is wider than the axis
            axes.fill_between(
                x, middle - half, middle + half, color=colour, alpha=0.12, linewidth=0
            )
    for task in range(1, len(tasks)):
        axes.axvline(task, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlim(0, len(tasks) + 0.05)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(0, len(tasks) + 1, 1 + len(tasks) // 21))
    seeds = max(len(own) for own in by_method(rows).values())
    band = ", 95 % intervals" if seeds > 2 else ""
    axes.set_title(f"Accuracy while the tasks are learnt ({seeds} seed(s){band})")
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel("accuracy on the tasks seen so far")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Draws both pictures beside `results.json`."""
    paths = []
    for make in (matrices, anytime):
        paths.append(folder / f"{make.__name__}.png")
        make(results["runs"], results["tasks"]).savefig(paths[-1], dpi=130)
    return paths
