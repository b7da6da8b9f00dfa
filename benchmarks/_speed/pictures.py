"""Pictures of `step_time` and `scaling`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
PANELS = {
    "elementwise / adam": "element-wise routed / optax.adam",
    "shared / adam": "v shared along the fan-in / optax.adam",
    "alias / chain": "adamr(project) / chain(project, adam)",
    "adaptive / chain": "the same, overlap-adaptive / chain(project, adam)",
}


def draw_step_time(results: dict[str, Any], path: Path) -> None:
    """Medians with 95 % intervals; the dashed line is the target."""
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7), sharex=True, layout="constrained"
    )
    for axis, (label, title) in zip(axes.flat, PANELS.items(), strict=True):
        groups = [g for g in results["groups"] if label in g["ratios"]]
        ranks = sorted({g["rank"] for g in groups}, key=lambda r: r or 0)
        for rank, colour in zip(ranks, COLOURS, strict=False):
            mine = [g for g in groups if g["rank"] == rank]
            found = [g["ratios"][label] for g in mine]
            middle = [f["median"] for f in found]
            errors = [
                [f["median"] - f["low"] for f in found],
                [f["high"] - f["median"] for f in found],
            ]
            axis.errorbar(
                [g["parameters"] for g in mine],
                middle,
                yerr=errors,
                marker="o",
                capsize=3,
                color=colour,
                label=None if rank is None else f"rank {rank}",
            )
        target = groups[0]["ratios"][label]["target"]
        axis.axhline(target, linestyle="--", color="0.4")
        axis.annotate(
            f"target {target:.2f}",
            (0.99, target),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="0.3",
        )
        axis.set(title=title, xscale="log", ylim=(0.65, 1.25))
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(ranks) > 1:
            axis.legend(frameon=False, ncols=2, loc="lower left")
    for axis in axes[:, 0]:
        axis.set_ylabel("time per step, ratio (below 1: faster)")
    for axis in axes[1]:
        axis.set_xlabel("parameters")
    machine = results["machine"]
    figure.suptitle(
        f"One optimizer step on {machine['device'].split(':')[0]}, "
        f"{machine['cores']} cores, jax {machine['jax']}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


QUANTITIES = {
    "milliseconds": "milliseconds",
    "state_bytes": "bytes of state",
    "compile_s": "seconds to trace and compile",
}


def draw_scaling(results: dict[str, Any], path: Path) -> None:
    """A column per sweep, a row per quantity, both axes logarithmic."""
    figure, grid = plt.subplots(
        len(QUANTITIES),
        len(results),
        figsize=(3.4 * len(results), 8),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (sweep, found) in zip(grid.T, results.items(), strict=True):
        for axis, (quantity, label) in zip(column, QUANTITIES.items(), strict=True):
            rivals = [r for r, of in found["points"][0].items() if quantity in of]
            for rival, colour, marker in zip(rivals, COLOURS, "osv^", strict=False):
                fit = found["fits"].get(f"{rival} {quantity}", {"exponent": 0.0})
                axis.plot(
                    found["x"],
                    [point[rival][quantity] for point in found["points"]],
                    marker=marker,
                    color=colour,
                    label=f"{rival}, p = {fit['exponent']:.2f}",
                )
            if not rivals:
                axis.set_visible(False)
                continue
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
        column[0].set_title(sweep)
        shown = [axis for axis in column if axis.get_visible()]
        shown[-1].set_xlabel(sweep)
        shown[-1].tick_params(labelbottom=True)
    machine = next(iter(results.values()))["machine"]
    figure.suptitle(
        f"Growth of one update, y = c xᵖ, on {machine['device'].split(':')[0]}, "
        f"{machine['cores']} cores, jax {machine['jax']}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
