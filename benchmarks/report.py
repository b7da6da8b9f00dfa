"""One self-contained HTML page of finished runs.

    python -m benchmarks.report RUNS... [--out report.html]

RUNS are folders with a `results.json` of `examples.vision` or `examples.lm`. The page
needs no network: tables with 95 % intervals over seeds, accuracy (or loss) of every
task after every task, curves over the stream, what each method cost, configuration,
commit.
"""

import dataclasses
import html
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks._pages import html_parts
from examples.harness.report import outcome
from examples.harness.statistics import (
    best_first,
    by_method,
    comparisons,
    interval,
    means,
)


@dataclasses.dataclass
class Config:
    """One self-contained HTML page of finished runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with a results.json."""
    out: Path = Path("report.html")
    """The page."""


@dataclasses.dataclass
class Report:
    """A run folder in one form, whichever example wrote it.

    Attributes:
      title: of its section.
      rows: one per method and seed: method, seed, learning_rate, metrics, loss, matrix,
        curve (one number per evaluation), seconds.
      tasks: names.
      better: "higher" or "lower", for the matrix and the first metric.
      curve: what the curves show.
      about: method -> one line.
      results: all of `results.json`.
    """

    title: str
    rows: list[dict]
    tasks: list[str]
    better: str
    curve: str
    about: dict[str, str]
    results: dict[str, Any]


def _numbers(value: Any) -> Any:
    """NaN where JSON has null."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _vision(path: Path, found: dict) -> Report:
    rows = []
    for row in found["runs"]:
        tensor = np.array(_numbers(row["anytime"]), float)
        places = np.ndindex(tensor.shape[:2])
        rows.append(
            {
                **{k: row[k] for k in ("method", "seed", "learning_rate", "seconds")},
                "metrics": {k: _numbers(v) for k, v in row["metrics"].items()},
                "loss": row.get("loss", []),
                "matrix": _numbers(row["matrix"]),
                "curve": [float(tensor[t, h, : t + 1].mean()) for t, h in places],
            }
        )
    stream = found["stream"]
    return Report(
        title=f"{stream['name']}, {stream['scenario']}-incremental",
        rows=rows,
        tasks=found["tasks"],
        better="higher",
        curve="accuracy on the tasks seen so far",
        about={row["method"]: row["about"] for row in found["runs"]},
        results=found,
    )


def _lm(path: Path, found: dict) -> Report:
    names = ("final_loss", "learned_loss", "forgetting", "final_accuracy")
    rows = [
        {
            **{k: row[k] for k in ("method", "seed", "learning_rate", "seconds")},
            "metrics": {k: _numbers(row[k]) for k in names},
            "loss": row["loss_matrix"],
            "matrix": _numbers(row["loss_matrix"]),
            "curve": _numbers(row["curves"]["loss"]),
        }
        for row in found["methods"]
    ]
    return Report(
        title=f"text, {len(found['domains'])} domains, nats per byte",
        rows=rows,
        tasks=[domain["name"] for domain in found["domains"]],
        better="lower",
        curve="training loss",
        about={row["method"]: row["about"] for row in found["methods"]},
        results=found,
    )


def read(folder: Path) -> Report:
    """The results in a run folder.

    Raises:
      ValueError: if there are none, or they are of an unknown form.
    """
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no results to report: {error}.") from error
    if "runs" in found:
        return _vision(folder, found)
    if "methods" in found:
        return _lm(folder, found)
    raise ValueError(f"{path}: got keys {sorted(found)}, expected runs or methods.")


def _ordered(report: Report) -> dict[str, list[dict]]:
    """Rows by method, the best first; those with a run that diverged come last."""
    groups, sign = by_method(report.rows), 1 if report.better == "higher" else -1
    scores = means(report.rows, next(iter(report.rows[0]["metrics"])))
    names = best_first({name: sign * x for name, x in scores.items()})
    return {name: groups[name] for name in names}


def _cell(own: list[dict], metric: str) -> str:
    mean, half = interval([row["metrics"][metric] for row in own])
    spread = "" if math.isnan(half) else f" <small>±{half:.3f}</small>"
    return f"{mean:.3f}{spread}" if math.isfinite(mean) else "–"


def _table(report: Report, groups: dict[str, list[dict]]) -> str:
    metrics = list(report.rows[0]["metrics"])
    tests = {}
    if report.better == "higher":
        tests = {c["method"]: c["p"] for c in comparisons(report.rows, metrics[0])}
    lines = []
    for name, own in groups.items():
        about, label = html.escape(report.about[name]), html.escape(name)
        cells = [f'<th scope=row title="{about}">{label}</th>']
        cells.append(f"<td>{own[0]['learning_rate']:g}</td>")
        failed = outcome(own, metrics[0])
        if failed is None:
            cells += [f"<td>{_cell(own, metric)}</td>" for metric in metrics]
        else:
            cells += [f"<td>{failed}</td>", *["<td>–</td>"] * (len(metrics) - 1)]
        p = tests.get(name, math.nan)
        cells.append(f"<td>{'' if math.isnan(p) else f'{p:.3f}'}</td>")
        cells.append(f"<td>{own[0]['seconds']:.0f}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["method", "rate", *metrics, "p", "seconds"]
    head = "".join(f"<th scope=col>{h.replace('_', ' ')}</th>" for h in heads)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _escaped(report: Report, names: Any) -> list[tuple[str, str]]:
    return [(html.escape(name), html.escape(report.about[name])) for name in names]


def _banded(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width; no band for two seeds, whose interval dwarfs the axis."""
    mean, half = interval(values)
    return mean, half if len(values) > 2 else math.nan


def section(report: Report) -> str:
    groups = _ordered(report)
    seeds = max(len(own) for own in groups.values())
    matrices = {
        name: np.mean([row["matrix"] for row in own], axis=0)
        for name, own in groups.items()
    }
    curves = {
        name: [_banded(values) for values in np.transpose([r["curve"] for r in own])]
        for name, own in groups.items()
    }
    config = json.dumps(
        {key: report.results.get(key) for key in ("config", "versions", "tuning")},
        indent=1,
    )
    commit = report.results.get("versions", {}).get("git_commit") or "no commit"
    about = [f"<dt>{n}</dt><dd>{text}</dd>" for n, text in _escaped(report, groups)]
    return f"""
<section>
<h2>{html.escape(report.title)}</h2>
<p>{len(report.tasks)} tasks, {seeds} seed(s), commit <code>{commit[:12]}</code>.
{report.better.capitalize()} is better. ± is half of Student's 95 % interval over
seeds; p is the paired test of the first metric against the best method.</p>
<div class=scroll>{_table(report, groups)}</div>
<h3>{report.curve}</h3>
{html_parts.curves(curves, len(report.tasks), report.curve)}
<h3>every task after every task</h3>
<p>Rows: after learning a task. Columns: on which task.</p>
<div class=grid>{html_parts.matrices(matrices, report.better)}</div>
<details><summary>methods</summary><dl>{"".join(about)}</dl></details>
<details><summary>configuration and versions</summary>
<pre>{html.escape(config)}</pre></details>
</section>"""


def main(config: Config) -> int:
    """Returns the exit code: 0, or 2 if a folder has no results."""
    try:
        reports = [read(folder) for folder in config.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config.out.write_text(html_parts.page("".join(map(section, reports))))
    print(f"written: {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.report")))
