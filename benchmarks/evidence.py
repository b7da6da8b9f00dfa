"""All results of docs/evidence/ from one command, and whether a quick run agrees.

    python -m benchmarks.evidence --quick                  two cores, minutes, no data
    python -m benchmarks.evidence --data DIR               a night on two cores

`--quick` makes all benchmarks smaller, writes to `--out`, and compares the direction of
each headline with the committed results. Both continue where they were stopped.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import forgetting, interventions, mechanism, strength_rules
from benchmarks._evidence.benches import ON_TWO_CORES

COMMITTED = Path("benchmarks/results")


@dataclasses.dataclass
class Config:
    """The evidence: mechanism, causes, forgetting, strength rules."""

    quick: bool = False
    """Smaller, on the installed data, and compared with the committed results."""
    data: Path = Path("data")
    """Folder with `text/` and `vision/`, for the full run."""
    out: Path | None = None
    """Where results go. Default: benchmarks/results; runs/evidence with --quick."""


class Headline(NamedTuple):
    """A difference whose sign is the claim.

    Attributes:
      claim: what a positive sign says.
      stem: results file, without `_quick` and `.json`.
      difference: content -> number.
    """

    claim: str
    stem: str
    difference: Callable[[dict], float]


def _row(content: dict, **facts) -> dict:
    """The one row with these facts; ValueError where it has not been run."""
    (row,) = (row for row in content["rows"] if facts.items() <= row.items())
    return row


def _mean(content: dict, cell: str, name: str) -> float:
    runs = _row(content, cell=cell)["runs"]
    return float(np.mean([run[name] for run in runs]))


def _cells(better: str, worse: str, name: str = "final", sign: float = 1.0):
    return lambda content: (
        sign * (_mean(content, better, name) - _mean(content, worse, name))
    )


def _inflation(more: tuple[str, str], less: tuple[str, str]):
    """Of Adam's rate along old directions, on the quadratic at the largest α."""

    def at(content, v, route):
        row = _row(content, stream="quadratic", scale=1, optimizer="adam", v=v)
        return row[route]["inflation"][-1]

    return lambda content: at(content, *more) - at(content, *less)


def _gain(arm: str):
    """Of an arm over shared routing, on digits in the eigenbasis."""
    facts = {"stream": "digits", "v": "eigenbasis", "arm": arm}
    return lambda content: _row(content, **facts)["own"]["final - route_both"][
        "difference"
    ]


DIGITS, TEXT = "forgetting_permuted_digits", "forgetting_text_installed"
HEADLINES = [
    Headline(
        "in the eigenbasis shared routing inflates the rate, decoupled does not",
        "mechanism",
        _inflation(("eigenbasis", "shared"), ("eigenbasis", "decoupled")),
    ),
    Headline(
        "off the axes an element-wise v inflates less",
        "mechanism",
        _inflation(("eigenbasis", "shared"), ("element", "shared")),
    ),
    Headline(
        "in the eigenbasis at α = 0.9 decoupled routing ends above shared",
        "interventions",
        _gain("route_first"),
    ),
    Headline(
        "so does shared routing with the decoupled length along U",
        "interventions",
        _gain("both, rate of first"),
    ),
    Headline(
        "v shared along the fan-in ends above shared routing",
        DIGITS,
        _cells("gpm/shared_v/adam", "gpm/shared/adam"),
    ),
    Headline(
        "shared routing forgets more than SGD with the same projection",
        DIGITS,
        _cells("gpm/shared/adam", "gpm/shared/sgd", "forgetting"),
    ),
    Headline(
        "element-wise decoupled routing of a projection ends below v shared",
        DIGITS,
        _cells("gpm/shared_v/adam", "gpm/decoupled/adam"),
    ),
    Headline(
        "the overlap-adaptive rule ends below v shared at full strength",
        DIGITS,
        _cells("gpm/shared_v/adam", "gpm/adaptive/adam"),
    ),
    Headline(
        "the full projection forgets less than the falling rule",
        "strength_rules_permuted_digits",
        _cells("rule/shared_v/full", "rule/shared_v/falling", "forgetting", -1.0),
    ),
    Headline(
        "on text SI together with GPM ends below GPM alone",
        TEXT,
        _cells("gpm_si/own/adam", "gpm/shared_v/adam", sign=-1.0),
    ),
    Headline(
        "on text GEM, its memory strength divided by the tasks, ends below that",
        TEXT,
        _cells("gem_mean/own/adam", "gpm_si/own/adam", sign=-1.0),
    ),
    Headline(
        "so does replay, its weight swept",
        TEXT,
        _cells("replay_1_weighted/own/adam", "gpm_si/own/adam", sign=-1.0),
    ),
]


def _difference(headline: Headline, folder: Path) -> float | None:
    """From the smaller bench where there is one; None where it has not been run."""
    names = (f"{headline.stem}{end}.json" for end in ("_quick", ""))
    path = next(filter(Path.exists, map(folder.joinpath, names)), None)
    try:
        return path and headline.difference(json.loads(path.read_text()))
    except ValueError:
        return None


def compare(out: Path, committed: Path, console: Console) -> int:
    """Prints each headline in both results; the number of those that disagree."""
    table = Table(title="headlines: positive says that the claim holds")
    for heading in ("claim", "committed", "quick", ""):
        table.add_column(heading)
    wrong = 0
    for headline in HEADLINES:
        full = _difference(headline, committed)
        quick = _difference(headline, out)
        both = full is not None and quick is not None
        differs = both and full * quick <= 0
        wrong += differs
        shown = ["not run" if x is None else f"{x:+.3f}" for x in (full, quick)]
        table.add_row(headline.claim, *shown, "DIFFERS" if differs else "")
    console.print(table)
    return wrong


def main(config: Config) -> None:
    quick = config.quick
    out = config.out or (Path("runs/evidence") if quick else COMMITTED)
    text = None if quick else config.data / "text"
    mechanism.main(mechanism.Config(data=text, quick=quick, out=out))
    work = Path("runs/interventions.json")
    if quick:
        work = out / "interventions.part.json"
    interventions.main(interventions.Config(data=text, quick=quick, out=out, work=work))
    streams = ",".join(ON_TWO_CORES)
    forgetting.main(
        forgetting.Config(streams=streams, quick=quick, data=config.data, out=out)
    )
    strength_rules.main(
        strength_rules.Config(streams=streams, quick=quick, data=config.data, out=out)
    )
    if quick:
        raise SystemExit(compare(out, COMMITTED, Console(width=120)))


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.evidence"))
