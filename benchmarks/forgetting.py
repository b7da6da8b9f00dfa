"""What every modifier forgets, and learns, under every routing and optimizer.

    python -m benchmarks.forgetting --quick            installed data, main cells
    python -m benchmarks.forgetting --streams text-low-8 --cells 'gpm/*/adam'
    python -m benchmarks.forgetting --all              every cell, on an accelerator

Each cell (`_evidence/cells.py`) has its own sweep, with the same budget for all, and
its seeds (`_evidence/runner.py`), five for those of the headlines.
`<out>/forgetting_<stream>.json` grows with each finished cell, and the command
continues from there: two processes can share the streams. A picture shows forgetting
against plasticity.
"""

import dataclasses
import fnmatch
import functools
from pathlib import Path

import tyro

from benchmarks._evidence.benches import BENCHES, Made
from benchmarks._evidence.cells import CELLS, MODIFIERS, Cell, method
from benchmarks._evidence.runner import quicker, run_cell, run_cells
from examples.harness.setting import DIRECTIONS

HEADLINE = (
    "none/shared/sgd none/shared/adam gpm/shared/sgd gpm/*/adam "
    "gpm_si/own/adam si/own/adam gem_mean/own/adam replay_1_weighted/own/adam"
)
HEADLINE_SEEDS = 5
MAIN = (
    f"{HEADLINE} gpm_si/*/adam sgp/*/adam ogd/*/adam "
    "*/shared/adam */own/adam */decoupled/adam"
)
QUICK = {
    "permuted-digits": "none/shared/adam gpm/shared/sgd gpm/shared/adam "
    "gpm/decoupled/adam gpm/adaptive/adam gpm/shared_v/adam gpm/two_sided/adam",
    "text-installed": "none/shared/adam gpm/shared_v/adam gpm_si/own/adam "
    "gem_mean/own/adam replay_1_weighted/own/adam",
}


@dataclasses.dataclass
class Config:
    """Forgetting and plasticity of modifier × routing × optimizer, tuned alike."""

    streams: str = "permuted-digits,split-digits"
    """By commas; digits and text-installed need no --data."""
    cells: str = MAIN
    """Patterns of modifier/routing/optimizer, by blanks, in the order to run them."""
    all: bool = False
    """Every cell on every stream."""
    quick: bool = False
    """Digits and installed text with half the steps, the cells of the headlines."""
    data: Path = Path("data")
    """Folder with `text/` and `vision/`."""
    out: Path = Path("benchmarks/results")
    """Where results and pictures go; finished cells there are not run again."""


def chosen(patterns: str) -> list[Cell]:
    """The cells that match, pattern by pattern."""
    names = {cell.name: cell for cell in CELLS}
    found: dict[str, Cell] = {}
    for pattern in patterns.split():
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ValueError(
                f"--cells: got {pattern!r}, expected a pattern of "
                "modifier/routing/optimizer, such as gpm/*/adam."
            )
        found |= {name: names[name] for name in matches}
    return list(found.values())


def run(cell: Cell, made: Made, row: dict | None, seeds: int) -> dict:
    modifier = MODIFIERS[cell.modifier]
    return run_cell(
        made,
        row,
        seeds,
        method=method(cell, made.bench.sgd_factor),
        coefficients=made.bench.strengths.get(cell.modifier),
        memory=modifier.memory,
        directions=DIRECTIONS if cell.modifier == "ogd" else 0,
    )


def main(config: Config) -> None:
    names = list(BENCHES) if config.all else config.streams.split(",")
    if config.quick:
        names = list(QUICK)
    for name in names:
        if name not in BENCHES:
            raise SystemExit(
                f"--streams: got {name!r}, expected some of {', '.join(BENCHES)}."
            )
    seeds = dict.fromkeys((cell.name for cell in chosen(HEADLINE)), HEADLINE_SEEDS)
    for name in names:
        bench = quicker(name) if config.quick else name
        patterns = QUICK[name] if config.quick else "*" if config.all else config.cells
        work = [(c.name, functools.partial(run, c)) for c in chosen(patterns)]
        run_cells(
            "forgetting", bench, config.data, work, config.out,
            seeds=None if config.quick else seeds,
        )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.forgetting"))
