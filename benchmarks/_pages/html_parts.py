"""The look of the report: style, heat maps and curves without any script or network."""

import html
import math

import numpy as np

__all__ = ["curves", "matrices", "page"]

# Okabe and Ito's colours; the first is the text colour, black or white.
COLOURS = (
    "currentColor", "#E69F00", "#56B4E9", "#CC79A7",
    "#009E73", "#D55E00", "#4D8FD6", "#999999",
)  # fmt: skip
DASHES = ("", "6 3", "2 3")

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --paper: #fff; --line: #d9dbe1;
  --soft: #f4f5f7; --good: 40, 120, 200; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --paper: #16171b;
  --line: #393b43; --soft: #1f2127; --good: 90, 160, 235; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.2rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { margin: 1.8rem 0 .3rem; font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
tbody tr:nth-child(even) td, tbody tr:nth-child(even) th { background: var(--soft); }
small { opacity: .7; }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; font-weight: 600; }
.heat { width: 100%; table-layout: fixed; }
.heat td { padding: 0; height: 1.35rem; text-align: center; font-size: .68rem; }
.heat tr:nth-child(even) td { background: none; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px;
  fill: currentColor; } polyline { vector-effect: non-scaling-stroke; }
.axis { margin: 0 0 .5rem; text-align: center; font-size: .9rem; }
@media (max-width: 600px) { svg text { font-size: 28px; } }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; }
.legend svg { display: inline; width: 2rem; height: .8rem; }
details { margin: .6rem 0; } pre { overflow-x: auto; background: var(--soft);
  padding: .8rem; font-size: .8rem; } dt { font-weight: 600; }
"""


def page(body: str) -> str:
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>adamr: what was learnt and what was forgotten</title>
<style>{STYLE}</style></head><body>
<h1>What was learnt and what was forgotten</h1>{body}
</body></html>
"""


def _heat(matrix: np.ndarray, low: float, high: float, better: str) -> str:
    rows = []
    for i, values in enumerate(matrix):
        cells = []
        for j, value in enumerate(values):
            if j > i or not math.isfinite(value):
                cells.append("<td></td>")
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            share = share if better == "higher" else 1.0 - share
            text = f"{100 * value:.0f}" if better == "higher" else f"{value:.1f}"
            text = text if len(matrix) <= 10 else ""
            paint = f"background:rgba(var(--good),{0.05 + 0.75 * share:.2f})"
            cells.append(f'<td style="{paint}" title="{value:.3f}">{text}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table class=heat><tbody>{''.join(rows)}</tbody></table>"


def matrices(matrices: dict[str, np.ndarray], better: str) -> str:
    """One heat map per method, on one scale; numbers up to ten tasks."""
    seen = [m[np.tri(len(m), dtype=bool)] for m in matrices.values()]
    shown = np.concatenate(seen)
    shown = shown[np.isfinite(shown)]
    low, high = 0.0, 1.0
    if better == "lower" and len(shown):
        low, high = shown.min(), shown.max()
    return "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>"
        f"{_heat(matrix, low, high, better)}</figure>"
        for name, matrix in matrices.items()
    )


def _look(index: int) -> str:
    colour = COLOURS[index % len(COLOURS)]
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{colour}" stroke-dasharray="{dash}"'


def curves(curves: dict[str, list[tuple[float, float]]], tasks: int, label: str) -> str:
    """Means with bands of (mean, half-width), over the stream."""
    width, height, left, bottom = 1000, 360, 72, 34
    values = np.array([m for curve in curves.values() for m, _ in curve])
    values = values[np.isfinite(values)]
    if not len(values):
        return "<p>no finite values</p>"
    low = 0.0 if values.min() >= 0 else float(values.min())
    high = 1.0 if low == 0.0 and values.max() <= 1 else float(values.max())

    def place(share, value):
        x = left + (width - left - 8) * share
        y = 8 + (height - bottom - 8) * (1 - (value - low) / (high - low or 1.0))
        return f"{x:.1f},{min(max(y, 0), height):.1f}"

    parts = []
    for tick in np.linspace(low, high, 5):
        x, y = place(0, tick).split(",")
        parts.append(
            f'<line x1="{x}" x2="{width - 8}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{float(y) + 4:.0f}" text-anchor="end">{tick:.2f}'
            "</text>"
        )
    for task in range(tasks + 1):
        x = place(task / tasks, low).split(",")[0]
        if tasks <= 20 or task % 5 == 0:
            parts.append(
                f'<text x="{x}" y="{height - 8}" text-anchor="middle">{task}</text>'
            )
    for i, curve in enumerate(curves.values()):
        xs = (np.arange(len(curve)) + 1) / len(curve)
        pairs = list(zip(xs, curve, strict=True))
        if all(math.isfinite(half) for _, (_, half) in pairs):
            upper = [place(x, min(m + h, high)) for x, (m, h) in pairs]
            lower = [place(x, max(m - h, low)) for x, (m, h) in pairs]
            parts.append(
                f'<polygon points="{" ".join(upper + lower[::-1])}" opacity="0.12" '
                f'fill="{COLOURS[i % len(COLOURS)]}"/>'
            )
        line = " ".join(place(x, m) for x, (m, _) in pairs if math.isfinite(m))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke-width="2" {_look(i)}/>'
        )
    legend = "".join(
        f'<span><svg viewBox="0 0 32 12"><line x1="0" x2="32" y1="6" y2="6" '
        f'stroke-width="3" {_look(i)}/></svg> {html.escape(name)}</span>'
        for i, name in enumerate(curves)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><p class=axis>tasks learnt</p>"
        f"<div class=legend>{legend}</div>"
    )
