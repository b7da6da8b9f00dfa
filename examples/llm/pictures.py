"""Pictures of a `results.json`: what is left of each task, and at what price."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.harness.pictures import COLOURS, MARKERS
from examples.harness.statistics import best_first, by_method

__all__ = ["draw"]

COLUMNS = 4


def _matrix(own: list[dict]) -> np.ndarray:
    return np.mean([np.array(row["loss_matrix"], float) for row in own], axis=0)


def _final(own: list[dict]) -> float:
    return float(np.mean([row["final_loss"] for row in own]))


def _ordered(groups: dict[str, list[dict]]) -> list[str]:
    return best_first({name: -_final(own) for name, own in groups.items()})


def curves(groups: dict[str, list[dict]], tasks: list[str]) -> Figure:
    """Loss of every task from when it is learned to the end, one panel a task."""
    columns = min(len(tasks) + 1, COLUMNS)
    lines = -(-(len(tasks) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(tasks) + 1 :]:
        axes.set_visible(False)
    handles = {}
    for i, name in enumerate(_ordered(groups)):
        own = groups[name]
        look = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
        }
        matrix = _matrix(own)
        for j, axes in enumerate(grid.flat[: len(tasks)]):
            places = range(j, len(tasks))
            (handles[name],) = axes.plot(places, matrix[j:, j], label=name, **look)
        general = np.mean([row["general"] for row in own], axis=0)
        grid.flat[len(tasks)].plot(range(-1, len(tasks)), general, **look)
    for axes, title in zip(grid.flat, [*tasks, "general text"], strict=False):
        axes.set_title(title, fontsize=10)
        first = -1 if title == "general text" else 0
        names = ["before", *tasks][first + 1 :]
        places = range(first, len(tasks))
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=7)
        axes.set_xlim(-1.2, len(tasks) - 0.8)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    figure.legend(
        handles.values(), handles, loc="outside lower center", frameon=False, ncols=4
    )
    figure.supylabel("nats per token", fontsize=9)
    figure.suptitle("What is left of each task, after learning the task below the axis")
    return figure


def balance(groups: dict[str, list[dict]]) -> Figure:
    """Learning, forgetting and general text, each method a mark with its name."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "forgetting", "forgetting of the tasks (nats)"),
        (right, "general", "loss on general text above the pretrained model's (nats)"),
    )
    for axes, what, label in panels:
        for i, name in enumerate(_ordered(groups)):
            own = groups[name]
            x = np.mean([row["learned_loss"] for row in own])
            y = np.mean(
                [
                    row["forgetting"]
                    if what == "forgetting"
                    else row["general_loss_after"] - row["general_loss_before"]
                    for row in own
                ]
            )
            axes.plot(
                x, y, linestyle="none", markersize=8, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
            )  # fmt: skip
            axes.annotate(
                name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8
            )
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel("loss when learned (nats): further left is better")
        axes.set_ylabel(f"{label}:\nlower is better")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Draws both beside `results.json`; methods that diverged are left out."""
    groups = {
        name: own
        for name, own in by_method(content["methods"]).items()
        if all(np.isfinite(row["final_loss"] or np.nan) for row in own)
    }
    if not groups:
        return []
    tasks = [task["name"] for task in content["tasks"]]
    figures = {"curves": curves(groups, tasks), "balance": balance(groups)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths
