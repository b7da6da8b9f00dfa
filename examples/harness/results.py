"""From runs to numbers: metrics, intervals, paired tests, `results.json`, the table."""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from adamr import metrics

METRICS = {
    "ACC": "accuracy over all tasks at the end of the stream",
    "LA": "accuracy on each task just after it was learnt",
    "BWT": "mean over old tasks of accuracy at the end minus accuracy when learnt",
    "FWT": "accuracy before a task is learnt minus that of the untrained model",
    "forgetting": "mean over old tasks of the best earlier accuracy minus the last",
    "AAA": "accuracy on the tasks so far, averaged over all evaluations",
    "min-ACC": "mean over old tasks of the lowest accuracy since they were learnt",
    "intransigence": "mean over tasks of a reference's accuracy minus that when learnt",
    "WC-ACC": "last task's accuracy and min-ACC, weighted 1/T and 1 - 1/T",
}


def summarize(
    accuracy: np.ndarray, baseline: np.ndarray, reference: Sequence[float] | None = None
) -> dict[str, float]:
    """The metrics of one run.

    Args:
      accuracy: the anytime tensor (tasks, evaluations, tasks).
      baseline: (tasks,) accuracy of the untrained model.
      reference: (tasks,) accuracy of a model that did not learn them in sequence.
    """
    matrix = accuracy[:, -1]
    out = {
        "ACC": metrics.average_accuracy(matrix),
        "LA": metrics.learning_accuracy(matrix),
        "AAA": metrics.average_anytime_accuracy(accuracy),
        "WC-ACC": metrics.worst_case_accuracy(accuracy),
    }
    if len(matrix) > 1:
        out["BWT"] = metrics.backward_transfer(matrix)
        out["FWT"] = metrics.forward_transfer(matrix, baseline)
        out["forgetting"] = metrics.forgetting(matrix)
        out["min-ACC"] = metrics.min_accuracy(accuracy)
    if reference is not None:
        out["intransigence"] = metrics.intransigence(matrix, reference).mean()
    return {name: float(out[name]) for name in METRICS if name in out}


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's confidence interval; NaN for one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    spread = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(
        spread * stats.t.ppf((1 + level) / 2, len(values) - 1)
    )


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Mean of a - b over common seeds, its interval's half-width, and Student's p."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    mean, half = interval(difference)
    p = math.nan
    if len(difference) > 1 and difference.std() > 0:
        p = float(stats.ttest_1samp(difference, 0.0).pvalue)
    return {"difference": mean, "half_width": half, "p": p}


def by_method(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows grouped by method, in the order of their first run."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def comparisons(rows: list[dict], metric: str = "ACC") -> list[dict[str, Any]]:
    """Each method against the best one, on the seeds that both have."""
    groups = by_method(rows)
    values = {
        name: {row["seed"]: row["metrics"][metric] for row in own}
        for name, own in groups.items()
    }
    best = max(values, key=lambda name: np.mean(list(values[name].values())))
    made = []
    for name in groups:
        seeds = sorted(values[name].keys() & values[best].keys())
        if name != best and seeds:
            test = paired(*([values[m][s] for s in seeds] for m in (name, best)))
            made.append({"method": name, "best": best, "seeds": seeds, **test})
    return made


def commit() -> str | None:
    """The project's git commit, or None outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "git_commit": commit(),
    }


def finite(value: Any) -> Any:
    """The same structure with None where a number is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a reader never meets half a file."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    os.replace(draft, path)


def _cell(own: list[dict], name: str) -> str:
    values = [row["metrics"].get(name, math.nan) for row in own]
    mean, half = interval(values)
    if not math.isfinite(mean):
        return "–"
    return _short(mean) + ("" if math.isnan(half) else f" ±{_short(half)}")


def _short(x: float) -> str:
    """Three digits, no zero before the point: a row has to fit into a terminal."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{x:.3f}")


SHOWN = ("ACC", "LA", "forgetting", "intransigence", "AAA", "min-ACC")


def table(rows: list[dict]) -> Table:
    """Final table, best ACC first, with 95 % intervals over seeds."""
    groups = by_method(rows)
    seeds = max(len(own) for own in groups.values())
    made = Table(
        title=f"accuracies, {seeds} seed(s)"
        + (", ± 95 % intervals; p: paired test of ACC against the best" * (seeds > 1))
    )
    made.add_column("method", no_wrap=True)
    made.add_column("rate", justify="right", no_wrap=True)
    shown = [name for name in SHOWN if name in rows[0]["metrics"]]
    for heading in (*shown, *["p"] * (seeds > 1), "s"):
        made.add_column(heading, justify="right", no_wrap=True)
    tests = {c["method"]: c["p"] for c in comparisons(rows)}
    order = sorted(
        groups, key=lambda n: -np.mean([r["metrics"]["ACC"] for r in groups[n]])
    )
    for name in order:
        own = groups[name]
        p = tests.get(name, math.nan)
        made.add_row(
            name,
            f"{own[0]['learning_rate']:g}",
            *(_cell(own, metric) for metric in shown),
            *["" if math.isnan(p) else f"{p:.3f}"] * (seeds > 1),
            f"{own[0]['seconds']:.0f}",
        )
    return made
