"""Every method on every stream: the loss when a task was learned, and at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks._evidence import labels
from benchmarks._pretrained.found import NAMES, REFERENCE, by_final, values
from examples.harness.pictures import COLOURS
from examples.harness.statistics import interval

__all__ = ["draw"]


def draw(path: Path, results: Mapping[str, dict[str, Any]]) -> None:
    """A panel a stream, a line a method, in the order of the first stream.

    Args:
      path: of the PNG.
      results: title of the panel -> what was measured on the stream.
    """
    first, *others = results.values()
    methods = by_final(first)
    for other in others:
        methods += [name for name in by_final(other) if name not in methods]
    size = 4.8 + 2.6 * len(results), 0.9 + 0.24 * len(methods)
    figure = Figure(figsize=size, layout="constrained")
    (panels,) = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for axes, (title, result) in zip(panels, results.items(), strict=True):
        for y, name in enumerate(methods):
            if name not in by_final(result):
                continue
            learned, _ = interval(values(result, name, "learned_loss"))
            end, half = interval(values(result, name, "final_loss"))
            colour = COLOURS[5] if name == REFERENCE else COLOURS[6]
            axes.plot([learned, end], [y, y], color=colour, linewidth=1.2)
            axes.plot(learned, y, "o", color=colour, markerfacecolor="white")
            axes.errorbar(end, y, xerr=np.nan_to_num(half), fmt="o", color=colour)
        lowest, _ = interval(values(result, by_final(result)[0], "final_loss"))
        axes.axvline(lowest, color="0.8", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("nats per token", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [NAMES[name] for name in methods])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    labels.save(figure, path)
