"""Every measured cell: as CSV, and as one HTML page that sorts and filters.

The page is a table that reads without its script, and holds its style and its script:
nothing is loaded from anywhere.
"""

import csv
import html
import io
from pathlib import Path
from string import Template

import numpy as np

from benchmarks._evidence.benches import BENCHES
from benchmarks._evidence.pareto import compared, values
from benchmarks._pages.evidence.results import STREAMS, read, rows, sign, streams_of
from examples.harness.statistics import interval

__all__ = ["as_csv", "as_html", "cells"]

DEFAULT = {"forgetting": "gpm_si/own/adam", "strength_rules": "rule/shared_v/full"}
FILES = Path(__file__).parent
MEASURES = ("final", "learned", "forgetting")


def _row(benchmark: str, stream: str, row: dict, on_front: bool) -> dict:
    """One line; numbers are floats, and what was not measured is None."""
    first, route, last = row["cell"].split("/")
    rule = benchmark == "strength_rules"
    bench, default = BENCHES[stream], rows(benchmark, stream)[DEFAULT[benchmark]]
    factor = bench.sgd_factor if last == "sgd" else 1
    made = {
        "stream": stream,
        "modifier": "gpm" if rule else first,
        "route": route,
        "optimizer": "adam" if rule else last,
        "strength_rule": last if rule else "",
        "measure": bench.measure,
    }
    for name in MEASURES:
        mean, half = interval(values(row, name))
        made |= {name: mean, f"{name}_half_width": half}
    test = compared(row, default, "final")
    itself = row is default
    return made | {
        "final_minus_default": None if itself else test["difference"],
        "final_minus_default_half_width": None if itself else test["half_width"],
        "front": "front" if on_front else "",
        "learning_rate": row["learning_rate"] * factor,
        "coefficient": row["strength"] or None,
        "at_the_edge_of_the_sweep": "edge" if row["at_the_edge_of_the_sweep"] else "",
        "seeds": len(row["seeds"]),
    }


def cells() -> list[dict]:
    """All cells, stream by stream, the best final measure first."""
    made = []
    for benchmark in DEFAULT:
        for stream in streams_of(benchmark):
            content = read(f"{benchmark}_{stream}")
            front = set(content["pareto_front"])
            own = [
                _row(benchmark, stream, row, row["cell"] in front)
                for row in content["rows"]
            ]
            made += sorted(own, key=_badness)
    return made


def _badness(line: dict) -> float:
    bad = -sign(line["stream"]) * line["final"]
    return bad if np.isfinite(bad) else np.inf


def _plain(value: object) -> object:
    """A number with six digits; nothing for what is not one."""
    if isinstance(value, float):
        return f"{value:.6g}" if np.isfinite(value) else ""
    return "" if value is None else value


def as_csv(lines: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(x) for key, x in line.items()} for line in lines)
    return text.getvalue()


def _shown(line: dict, name: str) -> str:
    mean, half = line[name], line[f"{name}_half_width"]
    if mean is None:
        return ""
    if not np.isfinite(mean):
        return "diverged"
    return f"{mean:.3f}" + (f" <small>±{half:.3f}</small>" if np.isfinite(half) else "")


COLUMNS = {
    "modifier": "modifier",
    "route": "route",
    "optimizer": "optimizer",
    "strength_rule": "strength rule",
    "stream": "stream",
    "final": "final",
    "learned": "learned",
    "forgetting": "forgetting",
    "final_minus_default": "final − default",
    "front": "front",
    "learning_rate": "rate",
    "coefficient": "coefficient",
    "at_the_edge_of_the_sweep": "edge of sweep",
    "seeds": "seeds",
}
NUMBERS = (*MEASURES, "final_minus_default", "learning_rate", "coefficient", "seeds")


def _cell(line: dict, name: str) -> str:
    if f"{name}_half_width" in line:
        shown = _shown(line, name)
    elif name in NUMBERS:
        shown = "" if line[name] is None else f"{line[name]:g}"
    else:
        shown = html.escape(str(line[name]))
    return f"<td{' class=n' * (name in NUMBERS)}>{shown}</td>"


def as_html(lines: list[dict]) -> str:
    body = "\n".join(
        "<tr>" + "".join(_cell(line, name) for name in COLUMNS) + "</tr>"
        for line in lines
    )
    heads = "".join(
        f"<th scope=col{' class=n' * (name in NUMBERS)}>{about}</th>"
        for name, about in COLUMNS.items()
    )
    streams = "".join(
        f"<dt>{name}</dt><dd>{html.escape(about)}; {BENCHES[name].measure}</dd>"
        for name, about in STREAMS.items()
    )
    page = Template((FILES / "cells.html").read_text())
    return page.substitute(
        style=(FILES / "cells.css").read_text(),
        script=(FILES / "cells.js").read_text(),
        heads=heads,
        body=body,
        streams=streams,
        count=len(lines),
    )
