"""Numbers: what is computed from a run, the table, and `results.json`."""

from typing import Any

import numpy as np
from rich.table import Table

from examples.harness.methods import Coefficient
from examples.harness.report import versions
from examples.harness.statistics import best_first, by_method, interval
from examples.llm import measures
from examples.llm.methods import METHODS
from examples.llm.stream import History

__all__ = ["DEFINITIONS", "describe", "row", "table"]

DEFINITIONS = {
    "loss_matrix": "L[i][j]: nats per answer token of task j's test rows after "
    "learning task i, j <= i; T tasks, counted from 0; of plain text per token",
    "final_loss": "mean over j of L[T-1][j]",
    "learned_loss": "mean over j of L[j][j]",
    "forgetting": "mean over j < T-1 of L[T-1][j] - min of L[i][j] over i < T-1",
    "general": "loss on general text before the first task and after each; the method "
    "never learns it",
    "general_loss_before, general_loss_after": "the first and the last of these",
    "kl": "KL(base model || model at the end) on general text, nats per token",
    "score_matrix": "R[i][j]: the metric of task j on generated answers after task i",
    "OP": "mean over j of R[T-1][j]",
    "BWT": "mean over j < T-1 of R[T-1][j] - R[j][j]; BWT/T divides by T",
    "peak_memory": "bytes when the last task ended, of the processes that learned it; "
    "what they did before counts",
    "null": "not measured, or not a finite number: the run diverged",
}


def _named(coefficient: Coefficient | None, value: float) -> dict[str, float]:
    return {} if coefficient is None else {coefficient.name: value}


def row(
    name: str,
    seed: int,
    rate: float,
    coefficient: float,
    history: History,
    seconds: float,
) -> dict[str, Any]:
    """One row of `results.json`; see `DEFINITIONS`."""
    method = METHODS[name]
    losses = np.array(history["loss_matrix"], float)
    scores = np.array(history["score_matrix"], float)
    answered = np.isfinite(scores[-1]).all()
    steps = history["step_seconds"]
    return {
        "method": name,
        "about": method.about,
        "seed": seed,
        "learning_rate": rate,
        **_named(method.coefficient, coefficient),
        **{"forgetting": 0.0, **measures.of_losses(losses)},
        **({"metrics": measures.of_scores(scores)} if answered else {}),
        "general_loss_before": history["general"][0],
        "general_loss_after": history["general"][-1],
        "seconds": seconds,
        "seconds_per_step": float(np.median(steps)) if steps else None,
        **history,
    }


def describe(config: dict[str, Any], loaded: Any) -> dict[str, Any]:
    """All of `results.json` except its rows: settings, data, model, definitions."""
    return {
        "config": config,
        "model": {
            "name": loaded.model.folder.name,
            "dtype": str(loaded.model.dtype),
            "vocabulary": loaded.model.vocabulary,
        },
        "context": loaded.context,
        "tasks": [
            {
                "name": part.task.name,
                "metric": part.task.metric,
                "source": part.task.source,
                "train_rows": len(part.train.tokens),
                "test_rows": len(part.test.tokens),
                "answered_rows": len(part.prompts),
            }
            for part in loaded.stream.parts
        ],
        "general": loaded.stream.general.task.source,
        "versions": versions(),
        "definitions": DEFINITIONS,
    }


def _cell(own: list[dict], of: Any, digits: int = 3) -> str:
    values = [of(each) for each in own]
    if any(v is None or not np.isfinite(v) for v in values):
        return "–"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def table(rows: list[dict]) -> Table:
    """Best final loss first; with seeds, 95 % intervals."""
    groups = by_method(rows)
    seeds = max(len(own) for own in groups.values())
    made = Table(
        title="nats per answer token; general text: before -> after"
        + (f"; {seeds} seeds, ± 95 %" * (seeds > 1)),
        caption="\n".join(f"{name}: {own[0]['about']}" for name, own in groups.items()),
        caption_justify="left",
    )
    columns = {
        "final": lambda r: r["final_loss"],
        "learned": lambda r: r["learned_loss"],
        "forgetting": lambda r: r["forgetting"],
        "general": lambda r: r["general_loss_after"],
        "KL": lambda r: r["kl"],
    }
    if all("metrics" in r for r in rows):
        columns["OP"] = lambda r: r["metrics"]["OP"]
        columns["BWT"] = lambda r: r["metrics"].get("BWT")
    made.add_column("method", no_wrap=True)
    made.add_column("rate", justify="right")
    for heading in (*columns, "s/step", "GB"):
        made.add_column(heading, justify="right", no_wrap=True)
    scores = {
        n: -float(np.mean([r["final_loss"] for r in g])) for n, g in groups.items()
    }
    for name in best_first(scores):
        own = groups[name]
        cells = [_cell(own, of) for of in columns.values()]
        at = list(columns).index("general")
        cells[at] = f"{own[0]['general_loss_before']:.3f} -> {cells[at]}"
        made.add_row(
            name,
            f"{own[0]['learning_rate']:g}",
            *cells,
            _cell(own, lambda r: r["seconds_per_step"], 2),
            f"{own[-1]['peak_memory']['resident'] / 1e9:.1f}",
        )
    return made
