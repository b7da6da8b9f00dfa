"""The committed results by name: streams, cells, gains over a rival."""

import fnmatch
import functools
import json
from pathlib import Path

import numpy as np

from benchmarks._evidence.benches import BENCHES
from benchmarks._evidence.pareto import compared, values

__all__ = [
    "RESULTS", "ROOT", "STREAMS", "cell_names", "gain", "means", "read", "rows",
    "sign", "streams_of",
]  # fmt: skip

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"

STREAMS = {
    "permuted-digits": "permuted digits, 10 tasks",
    "text-low-8": "text, 8 domains that differ",
    "text-mixed-16": "text, 16 domains of both kinds",
    "text-installed": "text, 8 installed domains",
    "split-cifar100": "Split CIFAR-100, 20 tasks, MLP",
    "text-high-8": "text, 8 novelists",
    "split-digits": "split digits, 5 tasks",
}


@functools.cache
def read(stem: str) -> dict:
    """benchmarks/results/<stem>.json, where the stem may have hyphens."""
    return json.loads((RESULTS / f"{stem.replace('-', '_')}.json").read_text())


def streams_of(benchmark: str) -> list[str]:
    """The streams that have results, in the order of `STREAMS`."""
    names = [*STREAMS, *(name for name in BENCHES if name not in STREAMS)]
    return [
        name for name in names
        if (RESULTS / f"{benchmark}_{name.replace('-', '_')}.json").exists()
    ]  # fmt: skip


def _benchmark(cell: str) -> str:
    return "strength_rules" if cell.startswith("rule/") else "forgetting"


@functools.cache
def rows(benchmark: str, stream: str) -> dict[str, dict]:
    """Every cell of a stream by its name."""
    return {row["cell"]: row for row in read(f"{benchmark}_{stream}")["rows"]}


def sign(stream: str) -> float:
    """1 where more of the measure is better, -1 for a loss."""
    return 1.0 if BENCHES[stream].measure == "accuracy" else -1.0


def cell_names(stream: str, patterns: str) -> list[str]:
    """The measured cells that match one of the patterns and none after a `!`.

    Args:
      patterns: by commas. `modifier/route` means with Adam.
    """

    def whole(pattern: str) -> str:
        return pattern if pattern.count("/") == 2 else f"{pattern}/adam"

    wanted, unwanted, names = [], [], []
    for pattern in patterns.split(","):
        (unwanted if pattern[0] == "!" else wanted).append(whole(pattern.strip("!")))
    for pattern in wanted:
        known = rows(_benchmark(pattern), stream)
        found = fnmatch.filter(known, pattern)
        if not found:
            raise ValueError(f"{stream} has no cell {pattern}.")
        names += found
    out = {name for pattern in unwanted for name in fnmatch.filter(names, pattern)}
    return [name for name in dict.fromkeys(names) if name not in out]


def means(stream: str, patterns: str, measure: str) -> list[float]:
    """Of every matching cell, the mean over its seeds; NaN where a run diverged."""
    return [
        float(np.mean(values(rows(_benchmark(name), stream)[name], measure)))
        for name in cell_names(stream, patterns)
    ]


def gain(stream: str, cell: str, rival: str, measure: str) -> tuple[float, float]:
    """How much better a cell is than its rival, and the interval's half-width.

    Args:
      rival: `*` stands for the modifier of the cell.
    """
    rival = rival.replace("*", cell.split("/")[0])
    (rival,) = cell_names(stream, rival)
    own, other = (rows(_benchmark(name), stream)[name] for name in (cell, rival))
    test = compared(own, other, measure)
    better = -1.0 if measure == "forgetting" else sign(stream)
    return better * test["difference"], test["half_width"]
