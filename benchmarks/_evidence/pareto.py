"""Forgetting against plasticity: intervals, the front within them, the picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks._evidence.cells import ESTIMATORS
from examples.harness.statistics import interval, paired

__all__ = ["compared", "draw", "front", "report", "values"]


def values(row: dict, name: str) -> list[float]:
    """One number per seed."""
    return [np.nan if run[name] is None else run[name] for run in row["runs"]]


def compared(a: dict, b: dict, name: str) -> dict[str, float]:
    """`paired` differences on the seeds that both rows have, which are the first."""
    count = min(len(a["runs"]), len(b["runs"]))
    return paired(values(a, name)[:count], values(b, name)[:count])


def _beats(a: dict, b: dict, name: str, sign: float) -> bool:
    """Whether a has more of sign · `name` than b, by more than the interval."""
    test = compared(a, b, name)
    return sign * test["difference"] > (test["half_width"] or 0.0)


def front(rows: list[dict], measure: str) -> list[str]:
    """Cells that no other cell beats in plasticity and in forgetting."""
    sign = 1.0 if measure == "accuracy" else -1.0
    sound = [r for r in rows if np.all(np.isfinite(values(r, "final")))]

    def beaten(row):
        return any(
            _beats(other, row, "learned", sign) and _beats(other, row, "forgetting", -1)
            for other in sound
            if other is not row
        )

    return [row["cell"] for row in sound if not beaten(row)]


def report(bench: str, rows: list[dict], measure: str) -> None:
    """Prints the table, best final value first."""
    made = Table(
        title=f"{bench}: {measure}, ± 95 % intervals over seeds; * on the front"
    )
    for heading in ("cell", "final", "learned", "forgetting", "rate", "coefficient"):
        made.add_column(heading, no_wrap=True)
    sign, best = 1.0 if measure == "accuracy" else -1.0, front(rows, measure)

    def final(row):
        mean = np.mean(values(row, "final"))
        return -sign * mean if np.isfinite(mean) else np.inf

    for row in sorted(rows, key=final):
        cells = []
        for name in ("final", "learned", "forgetting"):
            mean, half = interval(values(row, name))
            cells.append(f"{mean:.3f} ±{half:.3f}")
        edge = "!" if row["at_the_edge_of_the_sweep"] else ""
        star = " *" if row["cell"] in best else ""
        made.add_row(
            row["cell"] + star, *cells, f"{row['learning_rate']:g}{edge}",
            f"{row['strength']:g}",
        )  # fmt: skip
    Console(width=120).print(made)


COLOURS = {
    "none": "#777777", "gpm": "#0b62a4", "sgp": "#4aa3df", "ogd": "#7b3294",
    "ewc": "#d95f02", "si": "#e6ab02", "gpm_si": "#8c510a",
    "agem": "#1b9e77", "gem": "#66a61e",
    "gem_mean": "#1b7837", "p_mgem": "#a6d854", "p_mgem_mean": "#4d9221",
    "d_mgem_mean": "#00441b",
    "replay_0.5": "#e7298a", "replay_1": "#b3004b",
    "replay_0.5_weighted": "#f4a6cd", "replay_1_weighted": "#67001f",
    # of benchmarks.strength_rules
    "full": "#0b62a4", "half": "#777777", "falling": "#b3004b",
    "falling_1": "#e7298a", "falling_leaf": "#d95f02", "rising": "#1b9e77",
    "rising_leaf": "#66a61e", "conflict": "#7b3294", "conflict_leaf": "#c2a5cf",
}  # fmt: skip
MARKERS = {
    "shared": "o", "decoupled": "v", "adaptive": "^", "shared_v": "s",
    "eigenbasis": "D", "update": "P", "two_sided": "X", "own": "*",
}  # fmt: skip

RELATIVES = set(ESTIMATORS) - {"adam"}


def _coloured(cell: str) -> str:
    """The modifier, or the rule of a `rule/routing/name`."""
    first, *_, last = cell.split("/")
    return last if first == "rule" else first


def _limits(means: np.ndarray, halves: np.ndarray) -> tuple[float, float]:
    """A range that single outliers do not stretch, with room for the intervals."""
    low, high = np.quantile(means, (0.25, 0.75))
    far = 8 * (high - low) or np.inf
    kept = means[(means >= low - far) & (means <= high + far)]
    half = float(np.median(np.nan_to_num(halves)))  # one seed has no interval
    pad = max(0.08 * float(np.ptp(kept)), half, 1e-3)
    return float(kept.min()) - pad, float(kept.max()) + pad


def draw(path: Path, bench: str, rows: list[dict], measure: str) -> None:
    """Forgetting (less is up) against plasticity (more is right), one mark a cell."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes, best = figure.subplots(), front(rows, measure)
    x, y = (
        np.array([interval(values(row, name)) for row in rows])
        for name in ("learned", "forgetting")
    )
    finite = np.isfinite(x[:, 0] + y[:, 0])
    for row, known, (at, dx), (lost, dy) in zip(rows, finite, x, y, strict=True):
        routing = row["cell"].split("/")[1]
        if not known:
            continue
        optimizer = row["cell"].split("/")[-1]
        axes.errorbar(
            at, lost, xerr=dx, yerr=dy,
            color=COLOURS.get(_coloured(row["cell"]), "black"),
            marker=MARKERS.get(routing, "."), linewidth=0.7, alpha=0.9,
            markersize=5.5 if optimizer in RELATIVES else 9,
            fillstyle="bottom" if optimizer == "sgd" else "full",
            markerfacecoloralt="white",
            markeredgecolor="black" if row["cell"] in best else None,
        )  # fmt: skip
    for kind in dict.fromkeys(_coloured(row["cell"]) for row in rows):
        axes.plot([], [], "o", color=COLOURS.get(kind, "black"), label=kind)
    for routing in dict.fromkeys(row["cell"].split("/")[1] for row in rows):
        axes.plot([], [], MARKERS.get(routing, "."), color="black", label=routing)
    outside = np.sum(~finite)
    if finite.any():
        x, y = x[finite], y[finite]
        (left, right), (top, bottom) = _limits(*x.T), _limits(*y.T)
        x, y = x[:, 0], y[:, 0]
        outside += np.sum((x < left) | (x > right) | (y < top) | (y > bottom))
        axes.set_xlim((left, right) if measure == "accuracy" else (right, left))
        axes.set_ylim(bottom, top)
    axes.set_xlabel(f"learned {measure} (plasticity: better to the right)")
    axes.set_ylabel(f"forgetting of {measure} (less is up)")
    axes.set_title(
        f"{bench}: every cell at its own best rate\n"
        "black edge: on the front; half: SGD; small: neither Adam nor SGD"
        + (f"; {outside} outside" if outside else ""),
        fontsize=9,
    )
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
