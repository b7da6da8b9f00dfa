"""What a command leaves behind: `results.json`, and the table on the terminal."""

import json
import math
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.harness.statistics import (
    best_first,
    by_method,
    comparisons,
    diverged,
    interval,
    means,
)

__all__ = ["commit", "finite", "outcome", "table", "versions", "write"]


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


def outcome(own: list[dict], metric: str = "ACC") -> str | None:
    """What a table says of a method with runs that diverged, in place of a number."""
    count = sum(diverged(row, metric) for row in own)
    if not count:
        return None
    return "diverged" if count == len(own) else f"{count} of {len(own)} diverged"


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
    """Final table, best ACC first, with 95 % intervals over seeds.

    Methods with a run that diverged come last, without numbers.
    """
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
    for name in best_first(means(rows)):
        own, failed = groups[name], outcome(groups[name])
        if failed is None:
            cells = [_cell(own, metric) for metric in shown]
        else:
            cells = [failed, *["–"] * (len(shown) - 1)]
        p = tests.get(name, math.nan)
        made.add_row(
            name,
            f"{own[0]['learning_rate']:g}",
            *cells,
            *["" if math.isnan(p) else f"{p:.3f}"] * (seeds > 1),
            f"{own[0]['seconds']:.0f}",
        )
    return made
