"""Pictures of `mechanism` and `interventions`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks._evidence.inflation import ESTIMATORS
from examples.harness.pictures import COLOURS, MARKERS

__all__ = ["draw_interventions", "draw_mechanism", "draw_over_time"]

STREAMS = {
    "coordinate": "one coordinate is old",
    "quadratic": "rotated anisotropic quadratic",
    "language": "transformer, from text to text",
}
VARIANTS = {
    "element": "v element by element",
    "fan_in": "v shared along the fan-in",
    "eigenbasis": "v in the eigenbasis of U",
}


def _inflation_panel(axes: Any, rows: list[dict], predicted: list[float]) -> None:
    axes.plot(predicted, predicted, color="0.75", linewidth=5, zorder=0)
    axes.axhline(1.0, color="0.75", linewidth=1, zorder=0)
    for row in rows:
        at = [*ESTIMATORS, "lion", "muon", "muon, converged"].index(row["optimizer"])
        rotated = row["optimizer"] not in ESTIMATORS and row["v"] == "eigenbasis"
        style = {"color": COLOURS[at], "marker": MARKERS[at], "markersize": 5}
        scaled = row["scale"] > 1
        name = row["optimizer"] + ", eigenbasis" * rotated
        name += f", gradients × {row['scale']}" * scaled
        axes.plot(
            predicted, row["shared"]["inflation"], linewidth=1 - (rotated or scaled),
            label=name, fillstyle="none" if rotated or scaled else "full", **style,
        )  # fmt: skip
        if "decoupled" in row:
            axes.plot(
                predicted, row["decoupled"]["inflation"], linewidth=0.6, linestyle=":",
                fillstyle="none", **style,
            )  # fmt: skip
        if row["optimizer"] == "adam" and row["v"] != "eigenbasis":
            axes.plot(predicted, row["shared"]["explained"], "r--", linewidth=1.5)
            axes.plot(predicted, row["decoupled"]["explained"], "r--", linewidth=1)
    axes.set(xscale="log", yscale="log", ylim=(0.6, 150))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_mechanism(content: dict[str, Any], path: Path) -> None:
    """Measured inflation against 1 / (1 − α), by stream and by how v is kept."""
    figure = Figure(figsize=(15, 10.5), layout="constrained")
    grid = figure.subplots(3, 4, sharex=True, sharey=True)
    for line, (stream, about) in zip(grid, STREAMS.items(), strict=True):
        own = [row for row in content["rows"] if row["stream"] == stream]
        panels = [
            [r for r in own if r["v"] == v and r["optimizer"] in ESTIMATORS]
            for v in VARIANTS
        ]
        panels.append([r for r in own if r["optimizer"] not in ESTIMATORS])
        for axes, rows in zip(line, panels, strict=True):
            _inflation_panel(axes, rows, content["predicted"])
        line[0].set_ylabel(f"{about}\ninflation of the old directions' rate")
    for axes, title in zip(
        grid[0], [*VARIANTS.values(), "normalized without v"], strict=True
    ):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("1 / (1 − α)")
    for axes in (grid[0][0], grid[0][3], grid[2][2]):
        if axes.lines[2:]:
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(
        "Shared routing (solid) inflates the effective learning rate along attenuated "
        "directions by 1 / (1 − α) (grey) where v is theirs;\n"
        "decoupled routing (dotted) does not. Red: what second moments of the gradient "
        "and mixing by D explain, for Adam"
    )
    figure.savefig(path, dpi=110)


def draw_over_time(content: dict[str, Any], path: Path) -> None:
    """Energy of v along old directions, and the gain there, after protection begins."""
    kept = content["over_time"]
    names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in kept["curves"]))
    figure = Figure(figsize=(4.4 * len(names), 7), layout="constrained")
    grid = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in zip(grid.T, names, strict=True):
        for at, route in enumerate(("raw", "decoupled", "shared")):
            curve = kept["curves"][f"{name}, {route}"]
            steps = range(-kept["since"], len(curve["energy"]) - kept["since"])
            style = {"color": COLOURS[at], "label": route}
            column[0].plot(steps, curve["energy"], **style)
            if "gain" in curve:
                column[1].plot(steps, curve["gain"], **style)
        column[0].set_title(name)
        column[1].axhline(1 / (1 - kept["alpha"]), color="0.7", linewidth=4, zorder=0)
        column[1].set(xlabel="steps since protection began", yscale="log")
        for axes in column:
            axes.axvline(0, color="0.7", linewidth=1)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("share of v along old directions")
    grid[1][0].set_ylabel("gain uᵀDu over that of raw routing")
    grid[0][0].legend(frameon=False)
    figure.suptitle(
        f"Moments of the old task kept, then α = {kept['alpha']:g}: v forgets the old "
        f"directions under shared routing in about 1 / (1 − b2) = "
        f"{1 / (1 - kept['b2']):.0f} steps (grey: 1 / (1 − α))"
    )
    figure.savefig(path, dpi=110)


def _dots(axes: Any, rows: list[dict], arms: list[str]) -> None:
    """Final values of every arm, at its own rate (full) and the common one (hollow)."""
    for at, variant in enumerate(VARIANTS):
        for row in (r for r in rows if r["v"] == variant):
            y = arms.index(row["arm"]) + 0.25 * (at - 1)
            for which, fill in (("own", "full"), ("common", "none")):
                found = row[which]["final"]
                axes.errorbar(
                    found["mean"], y, xerr=found["half_width"], color=COLOURS[at + 1],
                    marker=MARKERS[at], fillstyle=fill, markersize=5, capsize=2,
                    linewidth=1,
                )  # fmt: skip
    axes.set_yticks(range(len(arms)), [f"{i + 1} {a}" for i, a in enumerate(arms)])
    axes.invert_yaxis()


def _cause(axes: Any, rows: list[dict], arms: list[str]) -> None:
    """Forgetting against motion along old directions, all at one learning rate."""
    for at, (variant, about) in enumerate(VARIANTS.items()):
        own = [r for r in rows if r["v"] == variant and r["arm"] in arms]
        x = [r["common"]["motion"]["mean"] for r in own]
        y = [r["common"]["forgetting"]["mean"] for r in own]
        style = {"color": COLOURS[at + 1], "marker": MARKERS[at], "linestyle": ""}
        axes.plot(x, y, label=about, **style)
        for r, place in zip(own, zip(x, y, strict=True), strict=True):
            number = str(arms.index(r["arm"]) + 1)
            axes.annotate(
                number, place, xytext=(4, 2), textcoords="offset points", fontsize=8
            )
    axes.set(xscale="log", xlabel="‖UᵀΔ‖ / ‖Uᵀg‖ per unit of learning rate")
    axes.set_ylabel("forgetting at the common learning rate")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_interventions(content: dict[str, Any], path: Path) -> None:
    """What each arm reaches, and forgetting against motion along old directions."""
    arms = list(dict.fromkeys(row["arm"] for row in content["rows"]))
    labels = {
        "digits": "permuted digits: final accuracy (right is better)",
        "text": "text domains: final loss, nats per byte (left is better)",
    }
    figure = Figure(figsize=(14, 1.5 + 0.85 * len(arms)), layout="constrained")
    grid = figure.subplots(2, 2)
    for (left, right), (stream, label) in zip(grid, labels.items(), strict=True):
        rows = [row for row in content["rows"] if row["stream"] == stream]
        finite = [r for r in rows if r["common"]["motion"]["mean"] is not None]
        _dots(left, rows, arms)
        _cause(right, finite, arms)
        left.set_xlabel(label)
        left.grid(axis="x", alpha=0.25)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"α = {content['config']['alpha']:g}, {content['config']['seeds']} seeds, 95 % "
        "intervals. Full: each arm's own learning rate; hollow: one rate for all"
    )
    figure.savefig(path, dpi=110)
