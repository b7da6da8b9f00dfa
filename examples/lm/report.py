"""Numbers: what is computed from a run, the table, and `results.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from examples import results
from examples.lm.data import Domain
from examples.lm.methods import METHODS
from examples.lm.train import Run
from examples.results import by_method

DEFINITIONS = {
    "loss_matrix": "L[i][j]: mean negative log likelihood, in nats per byte, of domain "
    "j's held-out text after learning domain i; T domains, counted from 0",
    "accuracy_matrix": "the same for the share of held-out bytes predicted right",
    "final_loss": "mean over j of L[T-1][j]",
    "learned_loss": "mean over j of L[j][j]",
    "forgetting_by_domain": "L[T-1][j] - min of L[i][j] over j <= i < T-1, for j < T-1",
    "forgetting": "mean over j < T-1 of forgetting_by_domain; 0 for one domain",
    "perplexity": "exp of a mean loss, per byte",
    "used_directions": "after each domain: used share of the input directions of the "
    "protected kernels, their mean",
    "curves.overlap": "|g - Pg|^2 / |g|^2 over all parameters, P the projection; mean "
    "over a chunk of steps, as the other curves",
    "curves.strength": "applied share of g - Pg",
    "curves.leak": "|U'd| / |d| over the protected kernels, d the update, U the basis",
    "null": "not a finite number: the run diverged",
}


def forgetting_by_domain(loss: np.ndarray) -> np.ndarray:
    """Loss gained since the best earlier value, for every domain but the last."""
    last = len(loss) - 1
    best = [loss[j:last, j].min() for j in range(last)]
    return loss[last, :last] - np.array(best)


def summarize(name: str, seed: int, learning_rate: float, run: Run) -> dict[str, Any]:
    """One row of `results.json`; see `DEFINITIONS`."""
    loss = np.array(run.loss)
    forgotten = forgetting_by_domain(loss)
    final, learned = float(loss[-1].mean()), float(loss.diagonal().mean())
    return {
        "method": name,
        "about": METHODS[name].about,
        "seed": seed,
        "learning_rate": learning_rate,
        "final_loss": final,
        "learned_loss": learned,
        "forgetting": float(forgotten.mean()) if len(forgotten) else 0.0,
        "final_perplexity": float(np.exp(final)),
        "learned_perplexity": float(np.exp(learned)),
        "final_accuracy": float(np.mean(run.accuracy[-1])),
        "forgetting_by_domain": forgotten.tolist(),
        "loss_matrix": run.loss,
        "accuracy_matrix": run.accuracy,
        "used_directions": run.used,
        "curves": run.curves,
        "seconds": run.seconds,
    }


def describe(config: dict[str, Any], domains: Sequence[Domain]) -> dict[str, Any]:
    """All of `results.json` but its rows: settings, data, versions, definitions."""
    return {
        "config": config,
        "domains": [
            {
                "name": d.name,
                "source": d.source,
                "train_bytes": len(d.train),
                "valid_bytes": len(d.valid),
                "train_files": len(d.files["train"]),
                "valid_files": len(d.files["valid"]),
            }
            for d in domains
        ],
        "versions": results.versions(),
        "definitions": DEFINITIONS,
    }


def write_results(out: Path, about: dict[str, Any], rows: list[dict]) -> Path:
    """Writes `results.json` so that a reader never meets half a file."""
    path = out / "results.json"
    results.write(path, {**about, "methods": rows})
    return path


def mean_of(rows: list[dict], key: str) -> np.ndarray:
    """Mean over seeds of a number, vector or matrix of the rows."""
    return np.mean([row[key] for row in rows], axis=0)


def _cell(rows: list[dict], key: str, digits: int = 3) -> str:
    values = np.array([row[key] for row in rows])
    if not np.all(np.isfinite(values)):
        return "diverged"
    spread = f" ±{values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def table(rows: list[dict]) -> Table:
    """Final table, best final loss first; means and deviations over seeds."""
    groups = by_method(rows)
    made = Table(
        title="losses in nats per byte; ppl: per byte; rate: learning rate",
        caption="\n".join(f"{n}: {own[0]['about']}" for n, own in groups.items()),
        caption_justify="left",
    )
    columns = {
        "final\nloss": ("final_loss", 3),
        "learned\nloss": ("learned_loss", 3),
        "forgetting": ("forgetting", 3),
        "final\nppl": ("final_perplexity", 2),
        "learned\nppl": ("learned_perplexity", 2),
        "seconds": ("seconds", 0),
    }
    made.add_column("method", no_wrap=True)
    made.add_column("rate", justify="right")
    for heading in columns:
        made.add_column(heading, justify="right", no_wrap=True)
    ordered = sorted(groups, key=lambda name: mean_of(groups[name], "final_loss"))
    for name in ordered:
        own = groups[name]
        cells = [_cell(own, key, digits) for key, digits in columns.values()]
        made.add_row(name, f"{own[0]['learning_rate']:g}", *cells)
    return made
