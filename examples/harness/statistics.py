"""From runs to numbers: the metrics of a run, intervals over seeds, paired tests."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from adamr import metrics

__all__ = ["METRICS", "by_method", "comparisons", "interval", "paired", "summarize"]

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
