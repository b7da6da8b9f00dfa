"""What a pretrained model forgets under every method, tuned alike.

    python -m benchmarks.pretrained --streams installed
    python -m benchmarks.pretrained --streams instruct --data DIR --methods adam,ewc

SmolLM2-135M learns one task after the other (`_pretrained/streams.py`): low-rank pairs
of rank 8, or all parameters. Each method takes the best of three learning rates, and
then of three values of the coefficient that it has, on validation rows of the first two
tasks with a seed that no result uses; the reversed order takes what was best in the
first. Reported are losses and scores on test rows, general text that no task has, and
where the change of the weights went (`_pretrained/change.py`).

`<out>/pretrained_<stream>.json` grows with each finished method, and the command
continues an interrupted one from the last rate or seed. `--methods levers` are the
protected pairs with one setting changed, at the rate that was best for them; those that
are given no general text are tuned anew, too.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks._pretrained import cell, picture
from benchmarks._pretrained.cell import Job
from benchmarks._pretrained.streams import (
    LEVERS,
    STREAMS,
    TITLES,
    TUNED_ON,
    VARIANTS,
    arms,
    settings,
)
from benchmarks._speed import timing
from examples.harness.report import versions, write
from examples.llm.methods import METHODS
from examples.llm.report import DEFINITIONS

MORE_DEFINITIONS = {
    "sweep": "[learning rate, coefficient, final loss] on validation rows of the first "
    "two tasks, seed 1000",
    "change": "of the kernels of attention and MLP, see "
    "benchmarks/_pretrained/change.py; moved and along_inputs since the end of the "
    "first task along its inputs, along_inside and along_outside of the whole change",
    "fit": "rows of each task, those whose answer the context shortens, and those it "
    "drops because nothing of the answer is left",
    "protected": "after each task, by fan-in: mean and largest share of a kernel's "
    "inputs that is protected",
    "lines": "plain fine-tuning whose last state LiNeS moves back towards the "
    "pretrained model",
}


# glibc then asks Linux for huge pages, and large arrays are faster.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


SHARED = ("about", "fit")  # by all methods on a stream
KEPT = (*SHARED, "methods")


@dataclasses.dataclass
class Config:
    """Forgetting of a pretrained model, method by method."""

    streams: str = "installed"
    """By commas: instruct, instruct-reversed (both need --data), installed."""
    methods: str = "all"
    """By commas, in the order to run them; all, or levers."""
    seeds: int = 1
    """Runs of each method; seed 0, 1, ..."""
    data: Path = Path("data/instruct")
    """Folder of the tasks in TRACE's layout."""
    model: Path | None = None
    """As for `python -m examples.llm`."""
    out: Path = Path("benchmarks/results")
    cache: Path = Path("runs/pretrained")
    """For what all methods share."""


def _chosen(methods: str) -> list[str]:
    if methods == "all":
        return [*METHODS, *VARIANTS]
    if methods == "levers":
        return list(LEVERS)
    known, names = arms(), methods.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(
                f"--methods: got {name!r}, expected some of {', '.join(known)}; all, "
                "or levers."
            )
    return names


def _empty(stream: str) -> dict[str, Any]:
    return {
        "stream": stream,
        "command": f"python -m benchmarks.pretrained --streams {stream}"
        + (" --data DIR" if "tasks" in STREAMS[stream] else ""),
        "settings": settings(stream),
        "definitions": DEFINITIONS | MORE_DEFINITIONS,
        "machine": timing.machine(),
        "versions": versions(),
        "methods": {},
    }


def _measured(job: Job) -> dict[str, Any] | None:
    """What a process of its own finds; None if it failed."""
    part = Path(job.cache) / f"{job.stream}_{job.arm}.json"
    told = part.with_suffix(".job")
    part.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(dataclasses.asdict(job)))
    command = [sys.executable, "-m", cell.__name__, told, part]
    done = subprocess.run(command, env=HUGE_PAGES | os.environ)
    if done.returncode:
        return None
    found = json.loads(part.read_text())
    part.unlink()
    told.unlink()
    return {key: value for key, value in found.items() if key != "sweep"}


def _merged(held: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    if held is None:
        return found
    for key in ("rows", "lines"):
        if key in found:
            held[key] = held.get(key, []) + found[key]
    return held


def _path(out: Path, stream: str) -> Path:
    return out / f"pretrained_{stream.replace('-', '_')}.json"


def _measured_before(path: Path, method: str) -> dict[str, Any]:
    found = json.loads(path.read_text())["methods"] if path.exists() else {}
    if method not in found:
        raise SystemExit(f"{path}: {method} is not there yet, and is needed first.")
    return found[method]


def draw(out: Path) -> None:
    """All streams that were measured, side by side."""
    paths = {title: _path(out, stream) for stream, title in TITLES.items()}
    found = {t: json.loads(p.read_text()) for t, p in paths.items() if p.exists()}
    if found:
        picture.draw(out / "pretrained.png", found)


def run(config: Config, stream: str) -> None:
    """All methods on one stream; finished seeds are not run again."""
    path = _path(config.out, stream)
    result = _empty(stream)
    if path.exists():
        before = json.loads(path.read_text())
        result |= {key: before[key] for key in KEPT if key in before}
    for name in _chosen(config.methods):
        held = result["methods"].get(name)
        done = {row["seed"] for row in held["rows"]} if held else set()
        seeds = tuple(seed for seed in range(config.seeds) if seed not in done)
        if not seeds:
            continue
        tuning, rate = held and held["tuning"], None
        if name in LEVERS:
            rate = _measured_before(path, arms()[name].method)["tuning"]["rate"]
        elif tuning is None and stream in TUNED_ON:
            elsewhere = _path(config.out, TUNED_ON[stream])
            tuning = _measured_before(elsewhere, name)["tuning"]
        print(f"{stream}: {name}, seeds {seeds}", flush=True)
        job = Job(
            stream, name, str(config.data), str(config.model or ""), seeds,
            tuning, rate, result.get("about"), str(config.cache),
        )  # fmt: skip
        found = _measured(job)
        if found is None:
            print(f"{name}: nothing was measured, see above", flush=True)
            continue
        result |= {key: found.pop(key) for key in SHARED}
        result["methods"][name] = _merged(held, found)
        config.out.mkdir(parents=True, exist_ok=True)
        write(path, result)


def main(config: Config) -> None:
    for stream in config.streams.split(","):
        if stream not in STREAMS:
            raise SystemExit(
                f"--streams: got {stream!r}, expected some of {', '.join(STREAMS)}."
            )
        run(config, stream)
    draw(config.out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
