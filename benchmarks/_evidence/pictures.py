"""Pictures of `mechanism` and `interventions`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks._evidence import labels
from benchmarks._evidence.inflation import ESTIMATORS
from examples.harness.pictures import COLOURS, MARKERS

__all__ = [
    "ARMS", "draw_interventions", "draw_mechanism", "draw_motion", "draw_over_time",
    "redraw",
]  # fmt: skip

BLACK, ORANGE, SKY, PINK, GREEN, RED, BLUE, GREY = COLOURS
STREAMS = {
    "coordinate": "one coordinate is old",
    "quadratic": "rotated quadratic",
    "language": "transformer, text to text",
}
CURVES = {  # (optimizer, way to keep v, route) -> name, colour, marker
    ("adam", "eigenbasis", "shared"): ("Adam, v in the eigenbasis", BLUE, "D"),
    ("muon", "element", "shared"): ("Muon", PINK, "X"),
    ("lion", "element", "shared"): ("Lion", GREEN, "P"),
    ("adam", "element", "shared"): ("Adam, v per entry", ORANGE, "o"),
    ("adam", "element", "decoupled"): ("the same, decoupled", BLACK, "v"),
    ("adam", "fan_in", "shared"): ("Adam, shared v", SKY, "s"),
}
VARIANTS = {
    "element": ("v per entry", ORANGE, "o"),
    "fan_in": ("shared v", SKY, "s"),
    "eigenbasis": ("v in the eigenbasis", BLUE, "D"),
}
ARMS = {
    "none": "plain Adam",
    "route_both": "shared routing",
    "route_first": "decoupled",
    "route_second": "reverse: m from g, v from f",
    "v from mixture": "v from f and g",
    "v from c g": "v from 0.1 g",
    "unguarded": "decoupled, no guard",
    "both, rate of first": "shared, moves as decoupled does",
    "first, rate of both": "decoupled, moves as shared does",
    "both, weak": "shared, α = 0.5",
    "first, weak": "decoupled, α = 0.5",
    "both, adaptive": "shared, adaptive α",
    "first, adaptive": "decoupled, adaptive α",
}
OVER_TIME = {
    "adam, element": "Adam, v per entry",
    "adam, eigenbasis": "Adam, v in the eigenbasis",
    "amsgrad, eigenbasis": "AMSGrad, v in the eigenbasis",
}
MEASURED = {
    "digits": ("permuted digits", "accuracy"),
    "text": ("text domains", "loss"),
}


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def draw_mechanism(content: dict[str, Any], path: Path) -> None:
    """Measured inflation against 1 / (1 − α), by stream; other optimizers in grey."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    grid, predicted = figure.subplots(1, 3, sharey=True), content["predicted"]
    for axes, (stream, about) in zip(grid, STREAMS.items(), strict=True):
        axes.plot(predicted, predicted, color="0.85", linewidth=7, zorder=0)
        for row in content["rows"]:
            if row["stream"] != stream or row["scale"] != 1:
                continue
            for route in ("shared", "decoupled"):
                look = CURVES.get((row["optimizer"], row["v"], route))
                if look is not None:
                    _, colour, marker = look
                    style = {"color": colour, "marker": marker, "zorder": 3}
                elif row["optimizer"] in ESTIMATORS and route in row:
                    style = {"color": "0.75", "linewidth": 0.7, "zorder": 1}
                else:
                    continue
                found = row[route]["inflation"]
                axes.plot(predicted, found, markersize=4, **style)
        axes.set(xscale="log", yscale="log", ylim=(0.7, 160), xlim=(1, 115))
        axes.set_title(about, fontsize=9)
        axes.set_xlabel("1 / (1 − α)", fontsize=8.5)
        _plain(axes)
    grid[0].set_ylabel("inflation of the rate along\nold directions", fontsize=8.5)
    grid[0].annotate("grey band:\n1 / (1 − α)", (7, 5), fontsize=8.5, va="top")
    last = {
        CURVES[key][0]: (row[key[2]]["inflation"][-1], CURVES[key][1])
        for row in content["rows"]
        for key in [(row["optimizer"], row["v"], r) for r in ("shared", "decoupled")]
        if key in CURVES and row["stream"] == "language"
    }
    low, high = np.log(0.7), np.log(160)
    labels.at_ends(
        grid[-1],
        {name: ((np.log(y) - low) / (high - low), colour)
         for name, (y, colour) in last.items()},
        gap=0.07,
    )  # fmt: skip
    labels.save(figure, path)


def draw_over_time(content: dict[str, Any], path: Path) -> None:
    """Energy of v along old directions, and the gain there, after protection begins."""
    kept = content["over_time"]
    looks = {"raw": (BLACK, ":"), "decoupled": (BLUE, "-"), "shared": (ORANGE, "-")}
    names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in kept["curves"]))
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    grid = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in zip(grid.T, names, strict=True):
        for route, (colour, dash) in looks.items():
            curve = kept["curves"][f"{name}, {route}"]
            steps = range(-kept["since"], len(curve["energy"]) - kept["since"])
            style = {"color": colour, "linestyle": dash}
            column[0].plot(steps, curve["energy"], **style)
            if "gain" in curve:
                column[1].plot(steps, curve["gain"], **style)
        column[0].set_title(OVER_TIME.get(name, name), fontsize=9)
        column[1].axhline(1 / (1 - kept["alpha"]), color="0.85", linewidth=5, zorder=0)
        column[1].set_yscale("log")
        column[1].set_xlabel("steps since protection began", fontsize=8.5)
        for axes in column:
            axes.axvline(0, color="0.7", linewidth=1)
            _plain(axes)
    grid[0][0].set_ylabel("share of v along\nold directions", fontsize=8.5)
    grid[1][0].set_ylabel("gain of D there", fontsize=8.5)
    low, high = grid[0][-1].get_ylim()
    ends = {
        told: (kept["curves"][f"{names[-1]}, {route}"]["energy"][-1], looks[route][0])
        for route, told in (("shared", "shared routing"), ("decoupled", "decoupled"),
                            ("raw", "no modifier"))
    }  # fmt: skip
    labels.at_ends(
        grid[0][-1],
        {
            name: ((y - low) / (high - low), colour)
            for name, (y, colour) in ends.items()
        },
        gap=0.09,
    )
    grid[1][-1].annotate(
        "1 / (1 − α)", (1.02, 1 / (1 - kept["alpha"])), va="center", fontsize=8.5,
        xycoords=("axes fraction", "data"), color="0.4",
    )  # fmt: skip
    labels.save(figure, path)


def draw_interventions(content: dict[str, Any], path: Path) -> None:
    """What each arm ends with at its own learning rate."""
    known = {row["arm"] for row in content["rows"]}
    arms = [arm for arm in ARMS if arm in known]
    figure = Figure(figsize=(7.4, 1.0 + 0.33 * len(arms)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, (stream, (about, measure)) in zip(grid, MEASURED.items(), strict=True):
        for at, (variant, (_, colour, marker)) in enumerate(VARIANTS.items()):
            for row in content["rows"]:
                if (row["stream"], row["v"]) != (stream, variant):
                    continue
                found = row["own"]["final"]
                axes.errorbar(
                    found["mean"], arms.index(row["arm"]) + 0.24 * (at - 1),
                    xerr=found["half_width"], color=colour, marker=marker,
                    markersize=4.5, linewidth=1,
                )  # fmt: skip
        axes.set_title(about, fontsize=9)
        axes.set_xlabel(f"final {measure} (better to the right)", fontsize=8.5)
        _plain(axes)
        if measure == "loss":
            axes.invert_xaxis()
    grid[0].set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
    grid[0].set_ylim(len(arms) - 0.5, -0.5)
    for at, (about, colour, marker) in enumerate(VARIANTS.values()):
        place = (0.06, 0.3 - 0.06 * at)
        grid[0].plot(
            *place, marker, color=colour, markersize=5, transform=grid[0].transAxes
        )
        grid[0].annotate(
            about, place, xycoords="axes fraction", xytext=(8, 0), va="center",
            textcoords="offset points", fontsize=8.5,
        )  # fmt: skip
    labels.save(figure, path)


CAUSE = {  # arms with a name in the picture of motion, all with an element-wise v
    "none": ("plain Adam", BLACK),
    "route_both": ("shared routing", ORANGE),
    "route_first": ("decoupled", BLUE),
    "route_second": ("reverse", RED),
    "both, weak": ("shared, α = 0.5", PINK),
    "first, adaptive": ("decoupled, adaptive α", GREEN),
}


def draw_motion(content: dict[str, Any], path: Path) -> None:
    """Forgetting against motion along old directions, at one learning rate."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    grid = figure.subplots(1, 2)
    for axes, (stream, (about, measure)) in zip(grid, MEASURED.items(), strict=True):
        marks, others = {}, []
        for row in content["rows"]:
            found = row["common"]
            place = (found["motion"]["mean"], found["forgetting"]["mean"])
            if row["stream"] != stream or None in place:
                continue
            if row["v"] == "element" and row["arm"] in CAUSE:
                name, colour = CAUSE[row["arm"]]
                marks[name] = place
                axes.plot(*place, MARKERS[len(marks)], color=colour, zorder=3)
            else:
                others.append(place)
        if others:
            axes.plot(*zip(*others, strict=True), "o", color="0.75", markersize=4)
        axes.set_xscale("log")
        axes.set_title(about, fontsize=9)
        axes.set_xlabel("motion along old directions", fontsize=8.5)
        axes.set_ylabel(f"forgetting of {measure}", fontsize=8.5)
        _plain(axes)
        labels.beside(axes, marks, others)
    labels.save(figure, path)


def redraw(folder: Path) -> None:
    """All pictures of this file, from the JSON files of a folder."""
    mechanism = json.loads((folder / "mechanism.json").read_text())
    draw_mechanism(mechanism, folder / "mechanism.png")
    draw_over_time(mechanism, folder / "mechanism_over_time.png")
    causes = json.loads((folder / "interventions.json").read_text())
    draw_interventions(causes, folder / "interventions.png")
    draw_motion(causes, folder / "interventions_motion.png")
