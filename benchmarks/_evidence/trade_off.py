"""Picture of forgetting against plasticity: a few cells by name, all others in grey."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks._evidence import labels
from benchmarks._evidence.pareto import values
from examples.harness.pictures import COLOURS, MARKERS
from examples.harness.statistics import interval

__all__ = ["draw", "named_cells"]

BLACK, ORANGE, SKY, PINK, GREEN, RED, BLUE, GREY = COLOURS


class Mark(NamedTuple):
    label: str
    colour: str
    marker: str = "o"


NAMED = {
    "none/shared/adam": Mark("Adam alone", BLACK),
    "gpm/shared/adam": Mark("GPM, shared routing", ORANGE, "s"),
    "gpm/decoupled/adam": Mark("GPM, decoupled", SKY, "v"),
    "gpm/shared_v/adam": Mark("GPM, the alias", BLUE, "D"),
    "si/own/adam": Mark("SI", PINK, "P"),
    "gpm_si/own/adam": Mark("gpm_si", BLUE, "*"),
    "gem_mean/own/adam": Mark("GEM, 1 % kept", GREEN, "^"),
    "replay_1_weighted/own/adam": Mark("replay, 1 % kept", RED, "X"),
    # of benchmarks.strength_rules; squares have a strength for every leaf
    "rule/shared_v/full": Mark("α = 1", BLUE),
    "rule/shared_v/half": Mark("α = ½", BLACK),
    "rule/shared_v/falling": Mark("α = ½ (1 − s̄), the paper's", RED),
    "rule/shared_v/falling_1": Mark("α = 1 − s̄", RED),
    "rule/shared_v/rising": Mark("α = s̄", GREEN),
    "rule/shared_v/rising_leaf": Mark("α = s̄, by leaf", GREEN, "s"),
    "rule/shared_v/conflict": Mark("in conflict", ORANGE),
    "rule/shared_v/conflict_leaf": Mark("in conflict, by leaf", ORANGE, "s"),
}


def named_cells(cells: list[str]) -> dict[str, Mark]:
    """The cells with a name; all of them where they are eight at most."""
    if len(cells) <= len(COLOURS):
        looks = zip(cells, COLOURS, MARKERS, strict=False)
        return {cell: Mark(cell, colour, marker) for cell, colour, marker in looks}
    return {cell: NAMED[cell] for cell in NAMED if cell in cells}


def _limits(means: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """A range that single outliers do not stretch, except those in `kept`."""
    low, high = np.quantile(means, (0.25, 0.75))
    far = 3 * (high - low) or np.inf
    shown = means[kept | ((means >= low - far) & (means <= high + far))]
    pad = max(0.06 * float(np.ptp(shown)), 1e-3)
    return float(shown.min()) - pad, float(shown.max()) + pad


def draw(path: Path, bench: str, rows: list[dict], measure: str) -> None:
    """Forgetting (less is up) against plasticity (more is right), one mark a cell."""
    cells = [row["cell"] for row in rows]
    named = named_cells(cells)
    x, y = (
        np.array([interval(values(row, name)) for row in rows])
        for name in ("learned", "forgetting")
    )
    finite = np.isfinite(x[:, 0] + y[:, 0])
    is_named = np.array([cell in named for cell in cells])
    grey = finite & ~is_named
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(x[grey, 0], y[grey, 0], "o", color="0.8", markersize=4, zorder=1)
    places = {}
    for cell, mark in named.items():
        at = cells.index(cell)
        if not finite[at]:
            continue
        (learned, dx), (lost, dy) = x[at], y[at]
        axes.errorbar(
            learned, lost, xerr=dx, yerr=dy, color=mark.colour, marker=mark.marker,
            markersize=11 if mark.marker == "*" else 7, linewidth=1, zorder=3,
        )  # fmt: skip
        places[mark.label] = (learned, lost)
    outside = int(np.sum(~finite))
    if finite.any():
        known = is_named[finite]
        (left, right), (top, bottom) = (_limits(z[finite, 0], known) for z in (x, y))
        a, b = x[finite, 0], y[finite, 0]
        outside += int(np.sum((a < left) | (a > right) | (b < top) | (b > bottom)))
        axes.set_xlim((left, right) if measure == "accuracy" else (right, left))
        axes.set_ylim(bottom, top)
    axes.set_xlabel(f"{measure} just after learning (better to the right)")
    axes.set_ylabel(f"forgetting of {measure} (less is up)")
    axes.set_title(
        f"{bench}, {len(rows)} methods, each at its own best rate"
        + (f" ({outside} outside the picture)" if outside else ""),
        fontsize=9.5,
    )
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if places:
        labels.beside(axes, places, np.column_stack([x[grey, 0], y[grey, 0]]))
    labels.save(figure, path)
