"""Forgetting against plasticity: intervals, and the front within them."""

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.harness.statistics import interval, paired

__all__ = ["compared", "front", "report", "values"]


def values(row: dict, name: str) -> list[float]:
    """One number per seed."""
    return [np.nan if run[name] is None else run[name] for run in row["runs"]]


def compared(a: dict, b: dict, name: str) -> dict[str, float]:
    """`paired` differences on the seeds that both rows have, which are the first."""
    count = min(len(a["runs"]), len(b["runs"]))
    return paired(values(a, name)[:count], values(b, name)[:count])


def _beats(a: dict, b: dict, name: str, sign: float) -> bool:
    """Whether a has more of sign · `name` than b, by more than the interval."""
    test = compared(a, b, name)
    return sign * test["difference"] > (test["half_width"] or 0.0)


def front(rows: list[dict], measure: str) -> list[str]:
    """Cells that no other cell beats in plasticity and in forgetting."""
    sign = 1.0 if measure == "accuracy" else -1.0
    sound = [r for r in rows if np.all(np.isfinite(values(r, "final")))]

    def beaten(row):
        return any(
            _beats(other, row, "learned", sign) and _beats(other, row, "forgetting", -1)
            for other in sound
            if other is not row
        )

    return [row["cell"] for row in sound if not beaten(row)]


def report(bench: str, rows: list[dict], measure: str) -> None:
    """Prints the table, best final value first."""
    made = Table(
        title=f"{bench}: {measure}, ± 95 % intervals over seeds; * on the front"
    )
    for heading in ("cell", "final", "learned", "forgetting", "rate", "coefficient"):
        made.add_column(heading, no_wrap=True)
    sign, best = 1.0 if measure == "accuracy" else -1.0, front(rows, measure)

    def final(row):
        mean = np.mean(values(row, "final"))
        return -sign * mean if np.isfinite(mean) else np.inf

    for row in sorted(rows, key=final):
        cells = []
        for name in ("final", "learned", "forgetting"):
            mean, half = interval(values(row, name))
            cells.append(f"{mean:.3f} ±{half:.3f}")
        edge = "!" if row["at_the_edge_of_the_sweep"] else ""
        star = " *" if row["cell"] in best else ""
        made.add_row(
            row["cell"] + star, *cells, f"{row['learning_rate']:g}{edge}",
            f"{row['strength']:g}",
        )  # fmt: skip
    Console(width=120).print(made)
