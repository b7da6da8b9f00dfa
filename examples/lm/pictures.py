"""Pictures of a `results.json`: what is kept, matrices, forgetting, and the way there.

Adam is grey, and of the others the six that end best have a colour.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from examples.harness.statistics import best_first, by_method
from examples.lm.report import mean_of

_NEUTRAL = "#808080"  # legible on white and on black
_OTHER = {"color": "#c8c8c8", "marker": "."}
# Okabe and Ito's colours, told apart by the colour-blind; markers help in print.
_LOOKS = (
    ("#D55E00", "s"), ("#0072B2", "v"), ("#009E73", "^"), ("#CC79A7", "D"),
    ("#E69F00", "P"), ("#56B4E9", "X"),
)  # fmt: skip


def _numbers(value: Any) -> Any:
    """Inverse of how `results.json` writes what is not finite."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float("nan") if value is None else value


def _styles(groups: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method."""
    best = [name for name in _least_first(groups, "final_loss") if name != "adam"]
    chosen = sorted(best[: len(_LOOKS)], key=list(groups).index)
    styles = {name: _OTHER for name in groups}
    for name, (colour, marker) in zip(chosen, _LOOKS, strict=False):
        styles[name] = {"color": colour, "marker": marker}
    if "adam" in groups:
        styles["adam"] = {"color": _NEUTRAL, "marker": "o"}
    return styles


def _short(name: str) -> str:
    return name.replace("_", " ")


def _name(method: str) -> str:
    return {"adam": "Adam", "shared": "shared routing"}.get(method, method)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_NEUTRAL, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)


def _label(axes: Axes, heights: dict[str, float], styles: dict[str, dict]) -> None:
    """Names right of the axes, at these values of y, apart from each other."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high = np.log(low), np.log(high)
        heights = {name: np.log(y) for name, y in heights.items()}
    sound = {name: y for name, y in heights.items() if np.isfinite(y)}
    names = sorted(sound, key=sound.get)
    places = [(sound[name] - low) / (high - low) for name in names]
    gap = 13 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for i in range(1, len(names)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(names))):
        places[i] = min(places[i], 1 - gap * (len(names) - 1 - i))
    for name, place in zip(names, places, strict=True):
        axes.text(
            1.01, place, _name(name), transform=axes.transAxes, va="center",
            color=styles[name]["color"], fontsize=10, fontweight="bold",
        )  # fmt: skip


def _mark_domains(axes: Axes, domains: list[str], steps: int) -> None:
    """Lines where the domain changes, and the names above."""
    length = steps / len(domains)
    for task, domain in enumerate(domains):
        if task:
            axes.axvline(task * length, color=_NEUTRAL, linestyle=":", linewidth=1)
        axes.text(
            (task + 0.5) * length, 1.02, _short(domain), ha="center", fontsize=9,
            color=_NEUTRAL, transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(0, steps)


def kept(groups: dict[str, list[dict]], domains: list[str]) -> Figure:
    """Loss on the earlier domains while each further one is learned."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, styles, ends = figure.subplots(), _styles(groups), {}
    for name, rows in groups.items():
        steps, style = rows[0]["curves"]["step"], styles[name]
        loss = mean_of(rows, "anytime_loss")
        tasks, evaluations = loss.shape[:2]
        for task in range(1, tasks):
            x = steps[task * evaluations : (task + 1) * evaluations]
            y = loss[task, :, :task].mean(-1)
            axes.plot(x, y, markersize=5, linewidth=2, **style)
        ends[name] = float(loss[-1, -1, :-1].mean()) if tasks > 1 else np.nan
    _mark_domains(axes, domains, steps[-1])
    _finish(axes)
    _label(axes, ends, styles)
    axes.set_title(
        "How well the earlier domains are still predicted while the next is learned",
        color=_NEUTRAL, fontsize=11, pad=18,
    )  # fmt: skip
    axes.set_xlabel("optimizer step; above: the domain that is learned")
    axes.set_ylabel("loss on all earlier domains\n(nats per byte, lower keeps more)")
    for part in (axes.xaxis, axes.yaxis):
        part.label.set_color(_NEUTRAL)
    axes.tick_params(colors=_NEUTRAL)
    axes.spines[:].set_color(_NEUTRAL)
    return figure


def matrices(groups: dict[str, list[dict]], domains: list[str]) -> Figure:
    """One heat map per method: loss on every domain after learning each."""
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    side = max(3.0, 0.42 * len(domains))
    size = side * columns + 2.5, (side + 1.6) * lines + 0.8
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
        axes.set_title(f"{_name(name)}: {_final(groups, name):.2f} at the end")
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        first = i % columns == 0
        axes.set_yticks(range(len(names)), names if first else [], fontsize=8)
        axes.set_ylabel("after learning" if first else "")
    figure.suptitle(
        f"{_best_and_worst(groups)}\n"
        "held-out loss per domain (columns) after learning each domain (rows); "
        "framed: just learned, below it: what is left"
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
        f"{_name(best)} ends best at {_final(groups, best):.2f} nats per byte, "
        f"{_name(worst)} worst at {_final(groups, worst):.2f} "
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
    styles = _styles(groups)
    coloured = [name for name in groups if styles[name] is not _OTHER]
    for name, rows in groups.items():
        x, y = ([row[key] for row in rows] for key in ("learned_loss", "forgetting"))
        left.plot(x, y, linestyle="none", markersize=9, **styles[name])
    left.margins(0.15)
    means = {name: float(mean_of(rows, "forgetting")) for name, rows in groups.items()}
    _label(left, means, styles)
    for i, name in enumerate(coloured):
        lost = mean_of(groups[name], "forgetting_by_domain")
        place = np.arange(len(lost)) + 0.8 * (i + 0.5) / len(coloured) - 0.4
        right.bar(place, lost, 0.8 / len(coloured), color=styles[name]["color"])
    left.set_xlabel("loss when just learned (nats per byte): left learns better")
    left.set_ylabel("forgetting (nats per byte): lower keeps more")
    orders = [_least_first(groups, key) for key in ("forgetting", "final_loss")]
    if all(orders):
        left.set_title(_least_and_best(*(names[0] for names in orders)))
    names = [_short(domain) for domain in domains[:-1]]
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("forgetting (nats per byte)")
    right.set_title("forgetting by domain, in the order learned")
    for axes in (left, right):
        _finish(axes)
    return figure


def _least_and_best(least: str, best: str) -> str:
    least, best = _name(least), _name(best)
    if least == best:
        return f"{best} forgets least and ends best"
    return f"{least} forgets least, {best} ends best"


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
    styles = _styles(groups)
    for axes, (curve, label) in zip(panels, _CURVES.items(), strict=True):
        ends = {}
        for name, rows in groups.items():
            steps = np.array(rows[0]["curves"]["step"])
            values = np.mean([row["curves"][curve] for row in rows], axis=0)
            if curve == "leak":  # 0 while nothing is protected
                values = np.where(values > 0, values, np.nan)
            every = max(1, len(steps) // len(domains) // 2)
            axes.plot(
                steps, values, markevery=every, markersize=4, linewidth=1.4,
                **styles[name],
            )  # fmt: skip
            ends[name] = float(values[-1])
        if curve == "leak":
            axes.set_yscale("log")
            axes.set_ylim(1e-8, 2)
        elif curve != "loss":
            axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel(label)
        _finish(axes)
        _mark_domains(
            axes, domains if axes is panels[0] else [""] * len(domains), steps[-1]
        )
        _label(axes, ends, styles)
    panels[-1].set_xlabel("optimizer step")
    figure.suptitle(_leak_finding(groups))
    return figure


def _leak_finding(groups: dict[str, list[dict]]) -> str:
    """Names the methods whose updates stay out of the protected directions."""
    tight = [
        name
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
    for make in (matrices, forgetting, dynamics, kept):
        paths.append(folder / f"{make.__name__}.png")
        make(groups, domains).savefig(paths[-1], dpi=130)
    return paths
