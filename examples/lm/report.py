"""Numbers: what is computed from a run, the table, and `results.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from adamr import metrics
from examples.harness.example import Done
from examples.harness.methods import named
from examples.harness.report import versions
from examples.harness.statistics import best_first, by_method
from examples.lm.methods import METHODS
from examples.streams.domains import Domain

DEFINITIONS = {
    "loss_matrix": "L[i][j]: mean negative log likelihood, in nats per byte, of domain "
    "j's held-out text after learning domain i; T domains, counted from 0",
    "accuracy_matrix": "the same for the share of held-out bytes predicted right",
    "final_loss": "mean over j of L[T-1][j]",
    "learned_loss": "mean over j of L[j][j]",
    "forgetting_by_domain": "L[T-1][j] - min of L[i][j] over j <= i < T-1, for j < T-1",
    "forgetting": "mean over j < T-1 of forgetting_by_domain; 0 for one domain",
    "perplexity": "exp of a mean loss, per byte",
    "intransigence_by_domain": "L[j][j] minus the loss of the reference on domain j",
    "intransigence": "mean over j of intransigence_by_domain",
    "anytime_loss": "the loss matrix at every evaluation: [i][h][j] at evaluation h "
    "while learning domain i; anytime_accuracy the same of accuracies",
    "curves.step": "optimizer steps at an evaluation; curves are means since the last",
    "curves.overlap": "|g - Pg|^2 / |g|^2 over all parameters, P the projection",
    "curves.strength": "applied share of g - Pg",
    "curves.leak": "|U'd| / |d| over the protected kernels, d the update, U the basis",
    "curves.used": "share of the protected kernels' input directions in the subspace",
    "null": "not a finite number: the run diverged",
}


def forgetting_by_domain(loss: np.ndarray) -> np.ndarray:
    """Loss gained since the best earlier value, for every domain except the last."""
    last = len(loss) - 1
    best = [loss[j:last, j].min() for j in range(last)]
    return loss[last, :last] - np.array(best)


def summarize(done: Done, run: int, steps: int) -> dict[str, Any]:
    """One row of `results.json`; see `DEFINITIONS`."""
    history = done.history
    loss, accuracy = history.loss[run][:, -1], history.accuracy[run][:, -1]
    forgotten = forgetting_by_domain(loss)
    final, learned = float(loss[-1].mean()), float(loss.diagonal().mean())
    tasks, evaluations = history.loss.shape[1:3]
    ends = np.arange(1, tasks * evaluations + 1) * (steps // evaluations)
    curves = {name: values[run].ravel() for name, values in history.curves.items()}
    row = {
        "method": done.name,
        "about": METHODS[done.name].about,
        "seed": run,
        "learning_rate": done.learning_rate,
        **named(METHODS[done.name], done.coefficient),
        "final_loss": final,
        "learned_loss": learned,
        "forgetting": float(forgotten.mean()) if len(forgotten) else 0.0,
        "final_perplexity": float(np.exp(final)),
        "learned_perplexity": float(np.exp(learned)),
        "final_accuracy": float(accuracy[-1].mean()),
        "forgetting_by_domain": forgotten.tolist(),
        "loss_matrix": loss.tolist(),
        "accuracy_matrix": accuracy.tolist(),
        "anytime_loss": history.loss[run].tolist(),
        "anytime_accuracy": history.accuracy[run].tolist(),
        "curves": {"step": ends.tolist()} | {k: x.tolist() for k, x in curves.items()},
        "seconds": done.seconds,
    }
    if done.reference is not None:
        lost = metrics.intransigence(-loss, -np.array(done.reference.loss[run]))
        row["intransigence_by_domain"] = lost.tolist()
        row["intransigence"] = float(lost.mean())
    return row


def describe(config: dict[str, Any], domains: Sequence[Domain]) -> dict[str, Any]:
    """All of `results.json` except its rows: settings, data, versions, definitions."""
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
        "versions": versions(),
        "definitions": DEFINITIONS,
    }


def mean_of(rows: list[dict], key: str) -> np.ndarray:
    """Mean over seeds of a number, vector or matrix of the rows."""
    return np.mean([row[key] for row in rows], axis=0)


def _cell(rows: list[dict], key: str, digits: int = 3) -> str:
    values = np.array([row[key] for row in rows])
    if not np.all(np.isfinite(values)):
        return "diverged"
    spread = f" ±{values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def largest_leak(rows: list[dict]) -> str:
    """The largest share of any step in protected directions, over the seeds."""
    leak = max(float(np.max(row["curves"]["leak"])) for row in rows)
    if not np.isfinite(leak):
        return "–"
    return f"{leak:.2f}" if leak > 0.01 else f"{leak:.0e}".replace("e-0", "e-")


def table(rows: list[dict]) -> Table:
    """Final table, best final loss first; means and deviations over seeds.

    Methods with a run that diverged come last.
    """
    groups = by_method(rows)
    made = Table(
        title="losses in nats per byte; ppl: per byte; rate: learning rate; leak: the "
        "largest share of a step in protected directions",
        caption="\n".join(f"{n}: {own[0]['about']}" for n, own in groups.items()),
        caption_justify="left",
    )
    columns = {
        "final\nloss": ("final_loss", 3),
        "learned\nloss": ("learned_loss", 3),
        "forgetting": ("forgetting", 3),
        "intrans-\nigence": ("intransigence", 3),
        "final\nppl": ("final_perplexity", 2),
        "seconds": ("seconds", 0),
    }
    columns = {k: column for k, column in columns.items() if column[0] in rows[0]}
    made.add_column("method", no_wrap=True)
    made.add_column("rate", justify="right")
    for heading in (*columns, "leak"):
        made.add_column(heading, justify="right", no_wrap=True)
    scores = {n: -float(mean_of(own, "final_loss")) for n, own in groups.items()}
    for name in best_first(scores):
        own = groups[name]
        cells = [_cell(own, key, digits) for key, digits in columns.values()]
        made.add_row(name, f"{own[0]['learning_rate']:g}", *cells, largest_leak(own))
    return made
