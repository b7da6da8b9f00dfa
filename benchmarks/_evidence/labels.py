"""Labels beside the marks of a picture, in place of a legend."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

__all__ = ["at_ends", "beside", "save"]

DPI = 150
SIZE = 8.5
WAYS = [
    (radius * x, radius * y)
    for radius in (7, 13, 22, 34, 48, 64)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8),
                 (-0.8, 0.8), (-0.8, -0.8))
]  # fmt: skip


def save(figure: Figure, path: Any) -> None:
    """Writes a PNG of 256 colours, a third of the size and to the eye the same."""
    from PIL import Image

    figure.savefig(path, dpi=DPI)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def _placed(axes: Any, text: str, place: Any, offset: Any, arrow: bool) -> Any:
    x, y = offset
    return axes.annotate(
        text, place, xytext=offset, textcoords="offset points", fontsize=SIZE,
        ha="left" if x > 1 else "right" if x < -1 else "center",
        va="bottom" if y > 1 else "top" if y < -1 else "center",
        zorder=5, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.6, "shrinkB": 3}
        if arrow else None,
    )  # fmt: skip


def beside(axes: Any, marks: dict[str, tuple[float, float]], others: Any = ()) -> None:
    """Puts every name near its mark, off the other names and the other marks.

    Args:
      axes: with limits and a layout that do not change afterwards.
      marks: name -> (x, y).
      others: (x, y) of marks without a name, which names cover less gladly.
    """
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    frame = axes.get_window_extent(renderer)
    to_pixels = axes.transData.transform
    named = to_pixels(np.array(list(marks.values())))
    grey = to_pixels(np.array(others)) if len(others) else np.zeros((0, 2))
    taken: list[Bbox] = []
    for name, place in marks.items():
        best, least = None, np.inf
        for offset in WAYS:
            far = np.hypot(*offset) > 15
            label = _placed(axes, name, place, offset, arrow=False)
            box = label.get_window_extent(renderer)
            label.remove()
            cost = 0.04 * np.hypot(*offset) + 1e3 * (
                box.x0 < frame.x0 or box.x1 > frame.x1
                or box.y0 < frame.y0 or box.y1 > frame.y1
            )  # fmt: skip
            cost += 100 * sum(box.overlaps(other) for other in taken)
            cost += 20 * box.padded(4).count_contains(named)
            cost += 0.5 * box.count_contains(grey)
            if cost < least:
                best, least = (offset, far, box), cost
        offset, far, box = best
        _placed(axes, name, place, offset, arrow=far)
        taken.append(box)


def at_ends(axes: Any, ends: dict[str, tuple[float, str]], gap: float) -> None:
    """Puts the names of curves to the right of the axes, at their last values.

    Args:
      ends: name -> (height in the fraction of the axes, colour).
      gap: least distance of two names, as a fraction of the axes.
    """
    names = sorted(ends, key=lambda name: ends[name][0])
    places = spread([ends[name][0] for name in names], gap)
    for name, y in zip(names, places, strict=True):
        axes.annotate(
            name, (1.02, y), xycoords="axes fraction", va="center", fontsize=SIZE,
            color=0.65 * np.array(to_rgb(ends[name][1])),
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved apart to at least `gap`, around where they were."""
    places = list(heights)
    for _ in range(200):
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-6:
                places[i] -= short / 2
                places[i + 1] += short / 2
    return places
