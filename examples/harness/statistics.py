"""From runs to numbers: the metrics of a run, intervals over seeds, paired tests."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from adamr import metrics

__all__ = [
    "METRICS",
    "best_first",
    "by_method",
    "comparisons",
    "diverged",
    "interval",
    "means",
    "paired",
    "summarize",
]

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


def diverged(row: dict, metric: str = "ACC") -> bool:
    """Whether a loss of the run, or its metric, is not finite (null in JSON)."""
    numbers = [row["metrics"][metric], *np.ravel(row.get("loss", []))]
    return not np.isfinite(np.array(numbers, float)).all()


def means(rows: list[dict], metric: str = "ACC") -> dict[str, float]:
    """Each method's mean over seeds; NaN where one of its runs diverged."""
    return {
        name: math.nan
        if any(diverged(row, metric) for row in own)
        else float(np.mean([row["metrics"][metric] for row in own]))
        for name, own in by_method(rows).items()
    }


def best_first(scores: dict[str, float]) -> list[str]:
    """Names by falling score; those without a finite score come last, in order."""
    known = {name: x if math.isfinite(x) else -math.inf for name, x in scores.items()}
    return sorted(known, key=lambda name: -known[name])


def comparisons(rows: list[dict], metric: str = "ACC") -> list[dict[str, Any]]:
    """Each method against the best one, on the seeds that both have.

    A method with a run that diverged is neither the best one nor compared.
    """
    scores = means(rows, metric)
    names = [name for name in scores if math.isfinite(scores[name])]
    if not names:
        return []
    groups, best = by_method(rows), max(names, key=lambda name: scores[name])
    values = {
        name: {row["seed"]: row["metrics"][metric] for row in groups[name]}
        for name in names
    }
    made = []
    for name in names:
        seeds = sorted(values[name].keys() & values[best].keys())
        if name != best and seeds:
            test = paired(*([values[m][s] for s in seeds] for m in (name, best)))
            made.append({"method": name, "best": best, "seeds": seeds, **test})
    return made
