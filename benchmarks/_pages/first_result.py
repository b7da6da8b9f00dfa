"""Puts a run of `python -m examples.lm` into the README: a table and a picture.

    python -m examples.lm
    python -m benchmarks._pages.first_result runs/lm/results.json

keeps what they show of the run in `benchmarks/results/lm.json`. Without an argument
both are made again from there.
"""

import hashlib
import json
import sys
from pathlib import Path

from matplotlib import rc_context

from benchmarks._pages.tables import table, written
from examples.lm.methods import DEFAULT
from examples.lm.pictures import kept
from examples.lm.report import largest_leak

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "lm.json"
PICTURE = ROOT / "docs" / "pictures" / "first_result.svg"
COMMAND = "python -m examples.lm"
NAMES = {
    "adam": "Adam",
    "shared": "[shared routing](docs/glossary.md#shared-routing) of a projection",
    "gpm_si": "`adamr.gpm_si`",
}

__all__ = ["PICTURE", "README", "RESULTS", "checksum", "first_result"]


def keep(run: dict) -> dict:
    """What table and picture need of a `results.json`, and where it comes from."""
    rows = {row["method"]: row for row in run["methods"]}
    if tuple(rows) != DEFAULT or len(rows) < len(run["methods"]):
        raise ValueError(f"results have {list(rows)}, expected one run of {DEFAULT}.")

    def kept_of(row: dict) -> dict:
        names = ("method", "learning_rate", "learned_loss", "final_loss", "forgetting")
        curves = {name: row["curves"][name] for name in ("step", "leak")}
        more = {"anytime_loss": row["anytime_loss"], "curves": curves}
        return {name: row[name] for name in names} | more

    config = {k: v for k, v in run["config"].items() if k not in ("out", "data")}
    return {
        "command": COMMAND,
        "config": config,
        "domains": run["domains"],
        "versions": run["versions"],
        "methods": [kept_of(row) for row in rows.values()],
    }


def first_result(content: dict) -> str:
    """The table; the best of each column in bold."""
    keys = ("learned_loss", "final_loss", "forgetting")
    rows = content["methods"]
    best = {key: min(row[key] for row in rows) for key in keys}
    lines = []
    for row in rows:
        losses = [
            f"**{row[key]:.2f}**" if row[key] == best[key] else f"{row[key]:.2f}"
            for key in keys
        ]
        lines.append([NAMES[row["method"]], *losses, largest_leak([row])])
    heads = ["", "loss when learned", "loss at the end", "forgetting", "leak"]
    return table(heads, lines)


def checksum() -> str:
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


def draw(content: dict) -> None:
    """Without a background, for light pages and dark ones; it names its results."""
    groups = {row["method"]: [row] for row in content["methods"]}
    style = {"svg.hashsalt": "adamr", "svg.fonttype": "none"}
    with rc_context(style):
        kept(groups, [domain["name"] for domain in content["domains"]]).savefig(
            PICTURE, transparent=True, metadata={"Date": None, "Source": checksum()}
        )


def main(arguments: list[str]) -> None:
    if arguments:
        content = keep(json.loads(Path(arguments[0]).read_text()))
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(RESULTS.read_text())
    page = written(README.read_text(), "first result", first_result(content))
    README.write_text(page)
    draw(content)


if __name__ == "__main__":
    main(sys.argv[1:])
