"""Tables of the pages, one function each; `{{ table NAME }}` in the prose."""

from collections.abc import Callable

import numpy as np

from benchmarks._evidence.cells import CELLS, MODIFIERS, Cell
from benchmarks._evidence.inflation import ESTIMATORS
from benchmarks._evidence.pareto import values
from benchmarks._evidence.pictures import ARMS
from benchmarks._pages.evidence import pretrained_tables
from benchmarks._pages.evidence.results import (
    STREAMS,
    gain,
    means,
    read,
    rows,
    sign,
    streams_of,
)
from benchmarks._pages.tables import table

__all__ = ["TABLES", "headlines", "number"]

HEADLINES = {
    "Adam alone": "none/shared/adam",
    "shared": "gpm/shared/adam",
    "decoupled": "gpm/decoupled/adam",
    "adaptive": "gpm/adaptive/adam",
    "SGD": "gpm/shared/sgd",
    "the alias": "gpm/shared_v/adam",
    "SI": "si/own/adam",
    "`gpm_si`": "gpm_si/own/adam",
    "GEM": "gem_mean/own/adam",
    "replay": "replay_1_weighted/own/adam",
}
HEADS = {  # short names for the heads of columns; on split digits all are level
    "permuted-digits": "permuted digits",
    "text-low-8": "8 domains",
    "text-mixed-16": "16 domains",
    "text-installed": "installed text",
    "split-cifar100": "CIFAR-100",
    "text-high-8": "novelists",
}
RULES = {  # of benchmarks.strength_rules
    "full": "α = 1",
    "half": "α = ½",
    "falling": "α = ½ (1 − s̄), the paper's",
    "falling_1": "α = 1 − s̄",
    "falling_leaf": "α = ½ (1 − s̄), leaf by leaf",
    "rising": "α = s̄",
    "rising_leaf": "α = s̄, leaf by leaf",
    "conflict": "1 in conflict, else 0",
    "conflict_leaf": "1 in conflict, else 0, leaf by leaf",
}
OPTIMIZERS = {
    "adam": "Adam",
    "amsgrad": "AMSGrad",
    "adafactor": "Adafactor",
    "rmsprop": "RMSProp",
    "yogi": "Yogi",
    "lion": "Lion",
    "muon": "Muon",
    "muon, converged": "Muon, converged",
}
SOURCES = {
    "coordinate": "one coordinate",
    "quadratic": "quadratic",
    "language": "transformer",
}
KEPT = {
    "element": "per entry",
    "fan_in": "shared v",
    "eigenbasis": "eigenbasis",
}


def number(mean: float | None, half: float | None = None) -> str:
    if mean is None or not np.isfinite(mean):
        return "diverged"
    known = half is not None and np.isfinite(half)
    return f"{mean:.3f}" + (f" ±{half:.3f}" if known else "")


def headlines() -> str:
    """The mean final measures of a few cells, the best of a stream in bold."""
    lines = []
    for stream in HEADS:
        finals = [means(stream, cell, "final")[0] for cell in HEADLINES.values()]
        best = max(finals, key=lambda x: sign(stream) * x)
        told = (f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in finals)
        lines.append([STREAMS[stream], *told])
    return table(["stream", *HEADLINES], lines)


def _entry(stream: str, cell: Cell, rival: Cell) -> str:
    """Its final measure where a cell is its own rival, else what it gains."""
    own = rows("forgetting", stream)
    if cell.name not in own or rival.name not in own:
        return ""
    if cell == rival:
        return number(np.mean(values(own[cell.name], "final")))
    better, half = gain(stream, cell.name, rival.name, "final")
    if not np.isfinite(better):
        return "diverged"
    told = f"{better:+.3f} ±{half:.3f}"
    return f"**{told}**" if abs(better) > half else told


def _gains(pairs: list[tuple[str, Cell, Cell]]) -> str:
    """What each cell gains in the final measure over its rival, by stream.

    Args:
      pairs: (label, cell, rival); a rival's own line gives its final measure.
    """
    streams = [stream for stream in streams_of("forgetting") if stream in HEADS]
    lines = [
        [f"`{label}`", *(_entry(stream, cell, rival) for stream in streams)]
        for label, cell, rival in pairs
    ]
    return table(["", *(HEADS[s] for s in streams)], lines)


def _routes(*modifiers: str) -> str:
    """What every route gains over shared routing."""
    return _gains(
        [
            (f"{c.modifier}/{c.routing}", c, Cell(c.modifier))
            for modifier in modifiers
            for c in CELLS
            if c.optimizer == "adam" and c.modifier == modifier
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


def _strength(routing: str) -> str:
    """The mean final measure at every rule, the best of a stream in bold."""
    streams = [
        stream for stream in streams_of("strength_rules")
        if stream in HEADS and f"rule/{routing}/full" in rows("strength_rules", stream)
    ]  # fmt: skip
    found = {
        (stream, rule): means(stream, f"rule/{routing}/{rule}", "final")[0]
        for stream in streams
        for rule in RULES
    }
    best = {s: max(sign(s) * found[s, rule] for rule in RULES) for s in streams}

    def told(stream: str, rule: str) -> str:
        mean = found[stream, rule]
        shown = f"{mean:.3f}" if np.isfinite(mean) else "diverged"
        return f"**{shown}**" if sign(stream) * mean == best[stream] else shown

    lines = [
        [about, *(told(s, rule) for s in streams)] for rule, about in RULES.items()
    ]
    return table(["strength", *(HEADS[s] for s in streams)], lines)


def _mechanism(stream: str) -> str:
    """Inflation at α = 0.9 of shared routing, and of decoupled where there is a v."""
    content = read("mechanism")
    at = content["alphas"].index(0.9)
    found = {
        (row["optimizer"], row["v"]): row
        for row in content["rows"]
        if row["stream"] == stream and row["scale"] == 1
    }

    def told(optimizer: str, v: str, route: str) -> str:
        row = found.get((optimizer, v), {})
        return f"{row[route]['inflation'][at]:.2f}" if route in row else ""

    lines = [
        [OPTIMIZERS[optimizer], *(told(optimizer, v, "shared") for v in KEPT),
         *(told(optimizer, v, "decoupled") for v in KEPT)]
        for optimizer in dict.fromkeys(optimizer for optimizer, _ in found)
    ]  # fmt: skip
    routes = ("shared", "decoupled")
    heads = [f"{route} routing: {v}" for route in routes for v in KEPT.values()]
    return table(["optimizer", *heads], lines)


def explained() -> str:
    """Shared routing at α = 0.9: measured, worst error of 1 / (1 − α), explained."""
    content = read("mechanism")
    at = content["alphas"].index(0.9)
    lines = []
    for row in content["rows"]:
        if row["scale"] != 1 or row["optimizer"] not in ESTIMATORS[:1]:
            continue
        shared = row["shared"]
        lines.append(
            [
                f"{SOURCES[row['stream']]}, {KEPT[row['v']]}",
                f"{shared['inflation'][at]:.2f}",
                f"{100 * shared['error']:.2f} %",
                f"{shared['explained'][at]:.2f}",
                f"{100 * shared['explained_error']:.2f} %",
            ]
        )
    heads = ["stream, Adam", "measured", "worst error of 1 / (1 − α)", "explained",
             "its worst error"]  # fmt: skip
    return table(heads, lines)


def _causes(stream: str) -> str:
    """Each arm at its own rate, and against shared routing at the rate of all arms."""
    against, lines = "final - route_both", []
    for row in read("interventions")["rows"]:
        if row["stream"] != stream:
            continue
        own, common = row["own"], row["common"]
        lines.append(
            [
                ARMS[row["arm"]],
                KEPT[row["v"]],
                *(number(own[key]["mean"], own[key]["half_width"])
                  for key in ("final", "learned", "forgetting")),
                f"{own['motion']['mean']:.1f}",
                *(number(test["difference"], test["half_width"])
                  for test in (own[against], common[against])),
            ]
        )  # fmt: skip
    heads = ["variant", "v", "final", "learned", "forgetting", "motion",
             "final − shared", "the same at one rate"]  # fmt: skip
    return table(heads, lines)


TABLES: dict[str, Callable[..., str]] = {
    "headlines": headlines,
    "routes": _routes,
    "sgd": sgd,
    "strength": _strength,
    "mechanism": _mechanism,
    "explained": explained,
    "causes": _causes,
    **pretrained_tables.TABLES,
}
