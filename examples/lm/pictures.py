"""Pictures of a `results.json`: matrices, forgetting, and what happened on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from examples.harness.pictures import COLOURS, MARKERS
from examples.harness.statistics import best_first, by_method
from examples.lm.report import mean_of


def _numbers(value: Any) -> Any:
    """Inverse of how `results.json` writes what is not finite."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float("nan") if value is None else value


def _style(groups: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    looks = zip(COLOURS * 9, MARKERS * 9, strict=True)
    return {
        name: {"color": colour, "marker": marker}
        for name, (colour, marker) in zip(groups, looks, strict=False)
    }


def _short(name: str) -> str:
    return name.replace("_", " ")


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def matrices(groups: dict[str, list[dict]], domains: list[str]) -> Figure:
    """One heat map per method: loss on every domain after learning each."""
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    side = max(3.0, 0.42 * len(domains))
    size = side * columns + 2.5, (side + 1.1) * lines + 0.8
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    losses = {name: mean_of(rows, "loss_matrix") for name, rows in groups.items()}
    shown = np.concatenate([loss.ravel() for loss in losses.values()])
    shown = shown[np.isfinite(shown)]
    span = np.quantile(shown, [0.02, 0.98]) if len(shown) else np.array([0.0, 1.0])
    names = [_short(domain) for domain in domains]
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for i, (axes, name) in enumerate(zip(grid.flat, groups, strict=False)):
        image = _heat_map(axes, losses[name], span)
        axes.set_title(f"{_short(name)}: {_final(groups, name):.2f} at the end")
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        first = i % columns == 0
        axes.set_yticks(range(len(names)), names if first else [], fontsize=8)
        axes.set_ylabel("after learning" if first else "")
    figure.suptitle(
        f"{_best_and_worst(groups)}\n"
        "held-out loss per domain (columns) after learning each domain (rows); "
        "framed: just learnt, below it: what is left"
    )
    label = "nats per byte: dark is bad"
    figure.colorbar(image, ax=grid, label=label, pad=0.01, aspect=40)
    return figure


def _least_first(groups: dict[str, list[dict]], key: str) -> list[str]:
    """Methods by a mean over seeds, without those that have a run that diverged."""
    means = {name: float(mean_of(rows, key)) for name, rows in groups.items()}
    names = best_first({name: -mean for name, mean in means.items()})
    return [name for name in names if np.isfinite(means[name])]


def _best_and_worst(groups: dict[str, list[dict]]) -> str:
    names = _least_first(groups, "final_loss")
    if not names:
        return "every method diverged"
    best, worst = names[0], names[-1]
    return (
        f"{_short(best)} ends best at {_final(groups, best):.2f} nats per byte, "
        f"{_short(worst)} worst at {_final(groups, worst):.2f} "
        f"(seeds: {len(groups[best])})"
    )


def _final(groups: dict[str, list[dict]], name: str) -> float:
    return float(mean_of(groups[name], "final_loss"))


def _heat_map(axes: Axes, loss: np.ndarray, span: np.ndarray):
    image = axes.imshow(loss, cmap="cividis_r", vmin=span[0], vmax=span[1])
    for i, j in np.ndindex(loss.shape):
        colour = "white" if loss[i, j] > span.mean() else "black"
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        axes.text(j, i, f"{loss[i, j]:.1f}", **style)
    for i in range(len(loss)):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False))
    return image


def forgetting(groups: dict[str, list[dict]], domains: list[str]) -> Figure:
    """What protection costs and buys, and which domains are forgotten."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    styles = _style(groups)
    for i, (name, rows) in enumerate(groups.items()):
        style = styles[name]
        x, y = ([row[key] for row in rows] for key in ("learned_loss", "forgetting"))
        label = f"{_short(name)} (rate {rows[0]['learning_rate']:g})"
        left.plot(x, y, linestyle="none", markersize=9, label=label, **style)
        lost = mean_of(rows, "forgetting_by_domain")
        place = np.arange(len(lost)) + 0.8 * (i + 0.5) / len(groups) - 0.4
        right.bar(place, lost, 0.8 / len(groups), color=style["color"])
    left.set_xlabel("loss when just learnt (nats per byte): left learns better")
    left.set_ylabel("forgetting (nats per byte): lower keeps more")
    orders = [_least_first(groups, key) for key in ("forgetting", "final_loss")]
    if all(orders):
        least, best = (_short(names[0]) for names in orders)
        left.set_title(f"{least} forgets least, {best} ends best")
    left.margins(0.15)
    names = [_short(domain) for domain in domains[:-1]]
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("forgetting (nats per byte)")
    right.set_title("forgetting by domain, in the order learnt")
    for axes in (left, right):
        _finish(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


_CURVES = {
    "loss": "training loss\n(nats per byte)",
    "overlap": "overlap: share of the\ngradient's energy in\nprotected directions",
    "strength": "strength: share of the\nprojection applied",
    "leak": "leak: share of the\nupdate in protected\ndirections",
}


def dynamics(groups: dict[str, list[dict]], domains: list[str]) -> Figure:
    """Loss, overlap, strength and leak over the steps of the stream."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(len(_CURVES), 1, sharex=True)
    styles = _style(groups)
    for axes, (curve, label) in zip(panels, _CURVES.items(), strict=True):
        for name, rows in groups.items():
            steps = np.array(rows[0]["curves"]["step"])
            values = np.mean([row["curves"][curve] for row in rows], axis=0)
            if curve == "leak":  # 0 while nothing is protected
                values = np.where(values > 0, values, np.nan)
            every = max(1, len(steps) // len(domains) // 2)
            axes.plot(
                steps, values, label=_short(name), markevery=every, markersize=4,
                linewidth=1.4, **styles[name],
            )  # fmt: skip
        if curve == "leak":
            axes.set_yscale("log")
            axes.set_ylim(1e-8, 2)
        elif curve != "loss":
            axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel(label)
        _finish(axes)
        length = steps[-1] / len(domains)
        for task in range(1, len(domains)):
            axes.axvline(task * length, color="0.6", linestyle=":", linewidth=1)
    panels[0].set_xlim(0, steps[-1])
    for task, domain in enumerate(domains):
        where = ((task + 0.5) / len(domains), 1.03)
        panels[0].text(
            *where,
            _short(domain),
            ha="center",
            transform=panels[0].transAxes,
            fontsize=9,
        )
    panels[-1].set_xlabel("optimizer step")
    figure.suptitle(_leak_finding(groups))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8,
        frameon=False,
    )  # fmt: skip
    return figure


def _leak_finding(groups: dict[str, list[dict]]) -> str:
    """Names the methods whose updates stay out of the protected directions."""
    tight = [
        _short(name)
        for name, rows in groups.items()
        if name != "adam" and np.max([row["curves"]["leak"] for row in rows]) < 1e-3
    ]
    if not tight:
        return "Every method's updates leak into the protected directions"
    return f"Updates stay out of the protected directions only with: {', '.join(tight)}"


def draw(folder: Path) -> list[Path]:
    """Draws all pictures of `folder/results.json` beside it and returns their paths."""
    results = _numbers(json.loads((folder / "results.json").read_text()))
    groups = by_method(results["methods"])
    domains = [domain["name"] for domain in results["domains"]]
    paths = []
    for make in (matrices, forgetting, dynamics):
        paths.append(folder / f"{make.__name__}.png")
        make(groups, domains).savefig(paths[-1], dpi=130)
    return paths
