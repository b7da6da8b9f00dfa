"""The pictures of several streams at once, from the results of each.

    python -m benchmarks._evidence.answers

They are drawn from what `benchmarks.forgetting` and `benchmarks.strength_rules` left in
benchmarks/results, as are those of each stream alone, `mechanism` and `interventions`.
"""

import json
from pathlib import Path

from benchmarks._evidence import panels, pictures, trade_off
from benchmarks._evidence.benches import BENCHES

__all__ = ["redraw"]

RESULTS = Path("benchmarks/results")
STREAMS = {
    "permuted-digits": "permuted digits",
    "split-cifar100": "Split CIFAR-100",
    "text-low-8": "8 domains that differ",
    "text-mixed-16": "16 domains",
    "text-installed": "installed text",
    "text-high-8": "8 similar novelists",
}
ROUTES = (
    {"Adam alone": "none/shared/adam"},
    {
        "shared routing": "gpm/shared/adam",
        "decoupled, v per entry": "gpm/decoupled/adam",
        "the same, adaptive α": "gpm/adaptive/adam",
    },
    {
        "shared v: the alias": "gpm/shared_v/adam",
        "two-sided": "gpm/two_sided/adam",
        "update projected": "gpm/update/adam",
    },
    {"plain SGD": "gpm/shared/sgd"},
)
METHODS = (
    {"Adam alone": "none/shared/adam"},
    {
        "gpm": "gpm/shared_v/adam",
        "si": "si/own/adam",
        "gpm_si": "gpm_si/own/adam",
    },
    {
        "gem, 1 % kept": "gem_mean/own/adam",
        "er, 1 % kept": "replay_1_weighted/own/adam",
    },
)
RULES = (
    {"α = 1": "rule/shared_v/full", "α = ½": "rule/shared_v/half"},
    {
        "α = ½ (1 − s̄), the paper's": "rule/shared_v/falling",
        "α = 1 − s̄": "rule/shared_v/falling_1",
        "α = ½ (1 − s̄), by leaf": "rule/shared_v/falling_leaf",
    },
    {
        "α = s̄": "rule/shared_v/rising",
        "α = s̄, by leaf": "rule/shared_v/rising_leaf",
    },
    {
        "1 in conflict, else 0": "rule/shared_v/conflict",
        "the same, by leaf": "rule/shared_v/conflict_leaf",
    },
)


def _path(what: str, stream: str, folder: Path) -> Path:
    return folder / f"{what}_{stream.replace('-', '_')}.json"


def _contents(what: str, folder: Path) -> dict[str, dict]:
    paths = {title: _path(what, name, folder) for name, title in STREAMS.items()}
    return {
        title: json.loads(path.read_text())
        for title, path in paths.items()
        if path.exists()
    }


def redraw(folder: Path) -> None:
    """Draws every picture of the evidence from the JSON files of a folder."""
    cells, rules = (_contents(w, folder) for w in ("forgetting", "strength_rules"))
    panels.draw(folder / "answer_routes.png", cells, ROUTES)
    panels.draw(folder / "answer_methods.png", cells, METHODS)
    panels.draw(folder / "answer_rules.png", rules, RULES)
    for what in ("forgetting", "strength_rules"):
        for stream, bench in BENCHES.items():
            path = _path(what, stream, folder)
            if path.exists():
                rows = json.loads(path.read_text())["rows"]
                trade_off.draw(path.with_suffix(".png"), stream, rows, bench.measure)
    pictures.redraw(folder)


if __name__ == "__main__":
    redraw(RESULTS)
