"""One method on one stream: its sweep, its seeds, what it forgot, and where it went.

    python -m benchmarks._pretrained.cell JOB.json OUT.json

A process of its own, so that peak memory is that of one method. `OUT.json` grows with
every rate that is tried and every seed, and a second process continues from there.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import adamr
from adamr.state import held_subspace
from adamr.subspaces.subspace import layout, rank
from benchmarks._pretrained import change, lines
from benchmarks._pretrained.streams import Arm, arms, config, grid
from examples.harness.report import commit, write
from examples.llm import measures, plans, stream
from examples.llm.data import spread_rows
from examples.llm.methods import METHODS
from examples.llm.options import Config
from examples.llm.plans import Loaded
from examples.llm.runs import TUNING_SEED
from examples.llm.stream import Plan
from examples.llm.task_ends import Run
from examples.llm.tasks import Task
from examples.llm.tokens import encode

__all__ = ["Job", "main"]

OLD_ROWS = 48  # rows of the first task along which the change is measured


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
      stream, arm: names in `streams`.
      data, model: as the command line has them; "" for the default model.
      seeds: the seeds that are still to run.
      tuning: of an earlier process; None: to be done. With `rate`, none is needed.
      about: `_about` of the results that are there already; None: there are none.
      cache: folder for what all methods share.
    """

    stream: str
    arm: str
    data: str
    model: str
    seeds: tuple[int, ...]
    tuning: dict[str, Any] | None
    rate: float | None
    about: dict[str, Any] | None
    cache: str


def _last(steps: Iterator[tuple[Any, Run, dict]]) -> tuple[Run, dict]:
    for _, run, history in steps:  # noqa: B007
        pass
    return run, history


def _score(plan: Plan, rate: float, coefficient: float) -> tuple[Run, float]:
    """The final loss on the first tasks' validation rows."""
    run, history = _last(
        stream.learn(plan, rate=rate, coefficient=coefficient, seed=TUNING_SEED)
    )
    numbers = measures.of_losses(np.array(history["loss_matrix"], float))
    return run, numbers["final_loss"]


def _tuned(
    plan: Plan, name: str, sweep: list[list[Any]], keep: Callable[[], None]
) -> dict[str, Any]:
    """Three rates; at the best, the other coefficients.

    Args:
      plan: of the first tasks.
      name: of the method.
      sweep: rate, coefficient, loss (None: diverged) of what was tried before; grows.
      keep: called whenever it has grown.
    """
    rates, (default, *others) = grid(name, METHODS[name])
    best_run = None

    def best() -> list[Any]:
        return min(sweep, key=lambda x: math.inf if x[2] is None else x[2])

    def attempt(rate: float, coefficient: float) -> None:
        nonlocal best_run
        if any(x[:2] == [rate, coefficient] for x in sweep):
            return
        began = time.perf_counter()
        run, loss = _score(plan, rate, coefficient)
        sweep.append([rate, coefficient, loss if math.isfinite(loss) else None])
        keep()
        if name == "adam" and best() is sweep[-1]:
            best_run = run
        seconds = time.perf_counter() - began
        print(f"  {rate:g}, {coefficient:g}: {loss:.3f} ({seconds:.0f} s)", flush=True)

    for rate in rates:
        attempt(rate, default)
    at = best()[0]
    for coefficient in others:
        attempt(at, coefficient)
    rate, coefficient, _ = best()
    found = {"rate": rate, "coefficient": coefficient, "sweep": sweep}
    if name == "adam":
        if best_run is None:  # it was tried by an earlier process
            best_run, _ = _score(plan, rate, coefficient)
        found["lines_alpha"] = lines.tuned(plan, best_run)
    return found


def _rooms(opt_state: Any) -> dict[str, list[float]] | None:
    """By fan-in: the mean and the largest share of it that is protected."""
    try:
        subspace = held_subspace(opt_state)
    except ValueError:
        return None
    if not isinstance(subspace, adamr.Subspace):
        return None  # both sides of OSFT
    found: dict[str, list[float]] = {}
    for count, basis, weights in zip(rank(subspace), *subspace, strict=True):
        if basis is not None:
            n = layout(basis, weights).fan_in
            found.setdefault(str(n), []).append(float(np.mean(count)) / n)
    return {n: [float(np.mean(x)), float(np.max(x))] for n, x in found.items()}


def _learned(
    plan: Plan, tuning: dict[str, Any], seed: int, cache: Path
) -> tuple[dict[str, Any], Run]:
    """One run over the whole stream: its row, and the model at its end."""
    learner, first = plan.learner, plan.stream.parts[0]
    before, met, peak, rooms = {}, {}, 0, []
    began = time.perf_counter()
    for position, run, history in stream.learn(  # noqa: B007
        plan, rate=tuning["rate"], coefficient=tuning["coefficient"], seed=seed
    ):
        if position.step <= plan.sizes.steps[position.task]:
            continue
        rooms.append(_rooms(run.opt_state))
        if not before:  # what follows is the benchmark's own memory
            peak = measures.peak_memory()["resident"]
            before = change.kernels_of(learner, run.trained, run.base)
            rows = spread_rows(first.train, OLD_ROWS)
            met = change.met_by(learner, run.trained, run.base, rows)
        seconds = time.perf_counter() - began
        print(f"  {position.task + 1} tasks in {seconds:.0f} s", flush=True)
    after = change.kernels_of(learner, run.trained, run.base)
    pretrained = change.kernels_of(learner, learner.trained, learner.base)
    where = change.moved(before, after, met)
    where |= change.share_of_singular(pretrained, after, cache)
    row = {
        "seed": seed,
        "commit": commit(),
        **_numbers(history),
        "change": where,
        "protected": None if rooms[0] is None else rooms,
        "seconds": seconds,
        "cores": _cores(),
        "seconds_per_step": float(np.median(history["step_seconds"])),
        "boundary_seconds": history["boundary_seconds"],
        "peak_memory": peak,
    }
    return row, run


def _cores() -> int | None:
    """That this process may use, which are fewer under `taskset`."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own else os.cpu_count()


def _numbers(history: dict[str, Any]) -> dict[str, Any]:
    losses = np.array(history["loss_matrix"], float)
    scores = np.array(history["score_matrix"], float)
    answered = bool(np.isfinite(scores[-1]).all())
    return {
        **measures.of_losses(losses),
        "general_loss_before": history["general"][0],
        "general_loss_after": history["general"][-1],
        "kl": history["kl"],
        **({"metrics": measures.of_scores(scores)} if answered else {}),
        "loss_matrix": history["loss_matrix"],
        "score_matrix": history["score_matrix"] if answered else None,
        "general": history["general"],
    }


SHARED = (
    "dtype", "steps", "batch", "scored", "lora_rank", "threshold", "capacity",
    "captured", "general", "memory",
)  # fmt: skip


def _about(loaded: Loaded, told: Config) -> dict[str, Any]:
    """What results must have in common to stand in one table."""
    rows = hashlib.sha256()
    for part in (*loaded.stream.parts, loaded.stream.general):
        for array in (*part.train[:2], *part.test[:2]):  # tokens, what is an answer
            rows.update(repr((array.dtype.str, array.shape)).encode())
            rows.update(array.tobytes())
    return {
        "model": loaded.model.folder.name,
        "context": loaded.context,
        "tasks": plans.identity(loaded, told, "")["tasks"],
        "rows": rows.hexdigest(),
        **{key: getattr(told, key) for key in SHARED},
    }


def _require(found: dict[str, Any], about: dict[str, Any], where: str) -> None:
    changed = [f"{k} {found.get(k)}, not {x}" for k, x in about.items()
               if found.get(k) != x]  # fmt: skip
    if changed:
        raise SystemExit(f"{where} has results of {'; '.join(changed)}: give another.")


def _fit(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Of every task's rows: how many there are, and how many the context cuts."""

    def counts(task: Task, part: str) -> dict[str, int]:
        found = encode(task, part, loaded.encoder, loaded.context)
        whole = {key: getattr(found, key) for key in ("shortened", "dropped")}
        return {"rows": len(found.tokens) + found.dropped, **whole}

    tasks = [task for task in loaded.tasks.tasks if task.kind == "rows"]
    return {
        t.name: {part: counts(t, part) for part in ("train", "test")} for t in tasks
    }


def main(job: Job, out: Path) -> None:
    arm = arms()[job.arm]
    model = Path(job.model) if job.model else None
    data = Path(job.data)
    told = config(job.stream, arm, data, model)
    loaded = plans.load_all(told, lambda line: None)  # `_fit` tells what was cut
    about = _about(loaded, config(job.stream, Arm(arm.method, {}, {}), data, model))
    if job.about is not None:
        _require(job.about, about, "--out")
    plan_of = plans.planner(loaded, told)

    def plan(tuning: bool = False) -> Plan:
        made = plan_of(arm.method, tuning=tuning)
        return made._replace(setting=made.setting._replace(**arm.setting))

    result: dict[str, Any] = {"tuning": job.tuning, "sweep": [], "rows": []}
    if out.exists():
        result |= json.loads(out.read_text())
        _require(result.get("about", {}), about, "--cache")
    result |= {"about": about, "fit": _fit(loaded)}

    def keep() -> None:
        write(out, result)

    if result["tuning"] is None and job.rate is None:
        sweep = result["sweep"]
        result["tuning"] = _tuned(plan(tuning=True), arm.method, sweep, keep)
    elif result["tuning"] is None:
        _, (coefficient, *_) = grid(arm.method, METHODS[arm.method])
        result["tuning"] = {"rate": job.rate, "coefficient": coefficient}
    tuning = result["tuning"]
    keep()
    for seed in job.seeds:
        if any(row["seed"] == seed for row in result["rows"]):
            continue
        row, run = _learned(plan(), tuning, seed, Path(job.cache))
        if seed != job.seeds[0]:  # the process has measured before
            row["peak_memory"] = None
        result["rows"].append(row)
        if "lines_alpha" in tuning:
            result.setdefault("lines", []).append(
                lines.row(plan(), run, row, tuning["lines_alpha"])
            )
        keep()


if __name__ == "__main__":
    main(Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
