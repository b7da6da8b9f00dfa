"""Puts the committed results into their page and the README.

    python -m benchmarks._pages.evidence

Every number of a table there comes from a file in benchmarks/results; the page names
the command that made it.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._evidence.benches import BENCHES
from benchmarks._evidence.cells import CELLS, MODIFIERS, Cell
from benchmarks._evidence.pareto import compared, front, values
from benchmarks._pages.tables import table, written
from examples.harness.statistics import interval

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DEFAULT = "gpm_si/own/adam"
AGAINST = "final - route_both"  # of the interventions


def _file(stem: str) -> Path:
    return RESULTS / f"{stem.replace('-', '_')}.json"


def _read(stem: str) -> dict:
    return json.loads(_file(stem).read_text())


def _by_cell(content: dict) -> dict[str, dict]:
    return {row["cell"]: row for row in content["rows"]}


def _found(what: str) -> list[str]:
    """The benches that have results."""
    return [name for name in BENCHES if _file(f"{what}_{name}").exists()]


def _number(mean: float | None, half: float | None) -> str:
    if mean is None or not np.isfinite(mean):
        return "diverged"
    known = half is not None and np.isfinite(half)
    return f"{mean:.3f}" + (f" ±{half:.3f}" if known else "")


def _cells(content: dict, default: str) -> str:
    """One stream: final, learned, forgetting, and the difference to the default."""
    measure, rows = content["bench"]["measure"], content["rows"]
    sign, best = 1.0 if measure == "accuracy" else -1.0, front(rows, measure)
    sgd_factor = content["bench"]["sgd_factor"]
    own = _by_cell(content)

    def final(row):
        mean = np.mean(values(row, "final"))
        return -sign * mean if np.isfinite(mean) else np.inf

    lines = []
    for row in sorted(rows, key=final):
        name = row["cell"]
        rate = row["learning_rate"] * (sgd_factor if name.endswith("/sgd") else 1)
        against = ""
        if name != default and default in own:
            test = compared(row, own[default], "final")
            against = _number(test["difference"], test["half_width"])
        lines.append(
            [
                f"`{name}`" + (" **front**" if name in best else ""),
                *(
                    _number(*interval(values(row, key)))
                    for key in ("final", "learned", "forgetting")
                ),
                against,
                f"{rate:g}"
                + (f", {row['strength']:g}" if row["strength"] else "")
                + "!" * row["at_the_edge_of_the_sweep"],
            ]
        )
    heads = ["cell", "final", "learned", "forgetting", "final − default",
             "rate, coefficient"]  # fmt: skip
    return table(heads, lines)


def _of(what: str, default: str) -> str:
    parts = []
    for name in _found(what):
        content = _read(f"{what}_{name}")
        bench = content["bench"]
        counts = sorted({len(row["seeds"]) for row in content["rows"]})
        parts.append(
            f"**{name}** ({bench['measure']}, {bench['steps']} steps a task of "
            f"{bench['batch']}, {' or '.join(map(str, counts))} seeds, sweep of "
            f"{len(bench['rates'])} configurations; threshold {bench['threshold']}):"
        )
        parts.append(f"![{name}](../benchmarks/results/{what}_"
                     f"{name.replace('-', '_')}.png)")  # fmt: skip
        parts.append("<details><summary>The table</summary>")
        parts.append(_cells(content, default))
        parts.append("</details>")
    return "\n\n".join(parts)


def forgetting() -> str:
    return _of("forgetting", DEFAULT)


def _gains(pairs: list[tuple[str, Cell, Cell]]) -> str:
    """What each cell gains in the final measure over its rival, by stream.

    Args:
      pairs: (label, cell, rival); a rival's own line gives its final measure.
    """
    streams = _found("forgetting")
    contents = [_read(f"forgetting_{name}") for name in streams]
    rows = list(map(_by_cell, contents))

    def entry(cell: Cell, rival: Cell, content: dict, own: dict[str, dict]) -> str:
        if cell.name not in own or rival.name not in own:
            return ""
        if cell == rival:
            return _number(np.mean(values(own[rival.name], "final")), None)
        test = compared(own[cell.name], own[rival.name], "final")
        sign = 1.0 if content["bench"]["measure"] == "accuracy" else -1.0
        gain, half = sign * test["difference"], test["half_width"]
        if not np.isfinite(gain):
            return _number(gain, half)
        told = f"{gain:+.3f} ±{half:.3f}"
        return f"**{told}**" if abs(gain) > half else told

    lines = [
        [f"`{label}`", *map(functools.partial(entry, *cells), contents, rows)]
        for label, *cells in pairs
    ]
    return table(["", *streams], lines)


def routes() -> str:
    """What every route gains over shared routing."""
    return _gains(
        [
            (f"{c.modifier}/{c.routing}", c, Cell(c.modifier))
            for c in CELLS
            if c.optimizer == "adam"
            and c.modifier != "none"
            and Cell(c.modifier) in CELLS
        ]
    )


def sgd() -> str:
    """What plain SGD gains over Adam; over the recipe where shared was not tried."""
    pairs = []
    for modifier in MODIFIERS:
        shared, recipe = Cell(modifier), Cell(modifier, "own")
        adam = shared if shared in CELLS else recipe
        pairs += [
            (f"{modifier}/{adam.routing}/adam", adam, adam),
            (f"{modifier}/sgd", Cell(modifier, "shared", "sgd"), adam),
        ]
    return _gains(pairs)


def strength() -> str:
    return _of("strength_rules", "rule/shared_v/full")


def mechanism() -> str:
    """At α = 0.9, where 1 / (1 − α) is 10."""
    content = _read("mechanism")
    at = content["alphas"].index(0.9)
    lines = []
    for row in content["rows"]:
        if row["scale"] != 1:
            continue
        shared, decoupled = row["shared"], row.get("decoupled")
        explained = shared.get("explained")
        lines.append(
            [
                f"{row['stream']}, {row['optimizer']}, {row['v']}",
                f"{shared['inflation'][at]:.2f}",
                f"{100 * shared['error']:.2f} %",
                f"{explained[at]:.2f}" if explained else "",
                f"{decoupled['inflation'][at]:.2f}" if decoupled else "",
            ]
        )
    heads = [
        "stream, optimizer, v", "shared", "worst error of 1/(1−α)", "explained",
        "decoupled",
    ]  # fmt: skip
    return table(heads, lines)


def causes() -> str:
    """Each arm at its own rate, and against shared routing at the rate of all arms."""
    content = _read("interventions")
    lines = []
    for row in content["rows"]:
        own, common = row["own"], row["common"]
        lines.append(
            [
                f"{row['stream']}, {row['v']}",
                f"{row['about']} (`{row['arm']}`)",
                *(
                    _number(own[key]["mean"], own[key]["half_width"])
                    for key in ("final", "learned", "forgetting", "motion")
                ),
                *(
                    _number(test["difference"], test["half_width"])
                    for test in (own[AGAINST], common[AGAINST])
                ),
            ]
        )
    heads = [
        "stream, v", "arm", "final", "learned", "forgetting", "motion along U",
        "final − shared", "the same at one rate for all",
    ]  # fmt: skip
    return table(heads, lines)


HEADLINES = {
    "Adam alone": "none/shared/adam",
    "shared": "gpm/shared/adam",
    "decoupled": "gpm/decoupled/adam",
    "adaptive": "gpm/adaptive/adam",
    "SGD": "gpm/shared/sgd",
    "the alias": "gpm/shared_v/adam",
    "SI": "si/own/adam",
    "`gpm_si`": DEFAULT,
    "GEM": "gem_mean/own/adam",
    "replay": "replay_1_weighted/own/adam",
}
STREAMS = {
    "permuted-digits": "permuted digits, 10 tasks",
    "text-low-8": "text, 8 domains that differ",
    "text-mixed-16": "text, 16 domains of both kinds",
    "text-installed": "text, 8 installed domains",
    "split-cifar100": "Split CIFAR-100, 20 tasks, MLP",
    "text-high-8": "text, 8 novelists",
}


def headlines() -> str:
    """The mean final measures of a few cells, the best of a stream in bold."""
    lines = []
    for name, about in STREAMS.items():
        content = _read(f"forgetting_{name}")
        best = max if content["bench"]["measure"] == "accuracy" else min
        own = _by_cell(content)
        means = [np.mean(values(own[cell], "final")) for cell in HEADLINES.values()]
        told = (f"**{x:.3f}**" if x == best(means) else f"{x:.3f}" for x in means)
        lines.append([about, *told])
    return table(["stream", *HEADLINES], lines)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "answer": (PAGE, headlines),
    "mechanism": (PAGE, mechanism),
    "causes": (PAGE, causes),
    "routes": (PAGE, routes),
    "sgd": (PAGE, sgd),
    "forgetting": (PAGE, forgetting),
    "strength": (PAGE, strength),
    "headlines": (README, headlines),
}


def main() -> None:
    for name, (page, make) in TABLES.items():
        page.write_text(written(page.read_text(), name, make()))


if __name__ == "__main__":
    main()
