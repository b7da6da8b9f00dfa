"""Runs that survive a kill: of a method, and of what its learning rate is chosen from.

Each continues from its last checkpoint and ends with the same bits as a run that was
never stopped.
"""

import contextlib
import datetime
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adamr import checkpoint
from examples.harness.example import UsageError
from examples.harness.report import write
from examples.harness.resume import Stopped
from examples.llm import measures, stream
from examples.llm.stream import History, Plan, Position

__all__ = ["TUNING_SEED", "TUNING_TASKS", "learn", "number_of", "total_steps", "tune"]

TUNING_SEED = 1000  # of no reported run
TUNING_TASKS = 2

Report = Callable[[Position, History], None]


def total_steps(steps: Sequence[int]) -> int:
    """Of tasks with so many steps each; the end of a task counts as a step."""
    return sum(steps) + len(steps)


def number_of(position: Position, steps: Sequence[int]) -> int:
    """The steps of `total_steps` that are done."""
    return total_steps(steps[: position.task]) + position.step


def _position(number: int, steps: Sequence[int]) -> Position:
    task = 0
    while number > steps[task] + 1:
        number -= steps[task] + 1
        task += 1
    return Position(task, number)


def _config(
    plan: Plan, identity: dict[str, Any], rate: float, coefficient: float, seed: int
) -> dict[str, Any]:
    """All that a run depends on, and what it measures."""
    return {
        **identity, "rate": rate, "coefficient": coefficient, "seed": seed,
        **plan.setting._asdict(), **plan.sizes._asdict(),
        "steps": list(plan.sizes.steps),
        "measured": sorted(stream.empty_history(0)),
    }  # fmt: skip


def learn(
    folder: Path,
    plan: Plan,
    *,
    rate: float,
    coefficient: float,
    seed: int,
    identity: dict[str, Any],
    every: float,
    report: Report,
) -> tuple[History, float]:
    """`stream.learn` from its last checkpoint on.

    Args:
      folder: of the checkpoints of this run alone.
      plan: method, model, tasks.
      rate, coefficient, seed: of the run.
      identity: what else it depends on; a checkpoint of another one is refused.
      every: seconds between checkpoints.
      report: called after every step.

    Returns:
      What was measured, and the wall time of all parts.

    Raises:
      UsageError: for a checkpoint of something else, or while another process learns.
      Stopped: after SIGTERM.
    """
    began, steps = time.perf_counter(), plan.sizes.steps
    config = _config(plan, identity, rate, coefficient, seed)
    end = total_steps(steps)
    with contextlib.ExitStack() as stack:
        try:
            saver = stack.enter_context(
                checkpoint.Checkpoints(
                    folder,
                    config=config,
                    keep=1,
                    every=datetime.timedelta(seconds=every),
                )  # fmt: skip
            )
            found = saver.restore(stream.start(plan, rate, coefficient))
        except (RuntimeError, ValueError) as error:
            raise UsageError(str(error)) from error
        resume, before = None, 0.0
        if found is not None:
            history, before = found.metrics["history"], found.metrics["seconds"]
            resume = _position(found.step, steps), found.state, history
            report(resume[0], history)
            if found.step == end:
                return history, before
        history: History = {}
        seconds = before
        for position, run, history in stream.learn(
            plan, rate=rate, coefficient=coefficient, seed=seed, resume=resume
        ):
            report(position, history)
            seconds = before + time.perf_counter() - began
            number = number_of(position, steps)
            saver.save(
                number, run, {"history": history, "seconds": seconds},
                force=number == end,
            )  # fmt: skip
            if saver.stopping:
                raise Stopped
    return history, seconds


def _measured(path: Path, config: dict[str, Any]) -> History:
    """By a finished run of which nothing else was kept."""
    found, config = json.loads(path.read_text()), json.loads(json.dumps(config))
    changed = [name for name in config if found["run"].get(name) != config[name]]
    if changed:
        raise UsageError(
            f"{path} is of a run with another {', '.join(changed)}: give another --out."
        )
    return found["history"]


def tune(
    folder: Path,
    plan: Plan,
    rates: Sequence[float],
    coefficient: float,
    *,
    report: Callable[[str], Report],
    **options: Any,
) -> dict[str, Any]:
    """The final loss of every rate on the first tasks' validation rows, and the best.

    Nothing of later tasks, no test row and no seed of a result is seen. Of a rate that
    was tried, what was measured is kept, and no checkpoint: each has a whole model.
    """
    losses = []
    for rate in rates:
        run = folder / f"rate-{rate:g}"
        numbers = {"rate": rate, "coefficient": coefficient, "seed": TUNING_SEED}
        config = _config(plan, options["identity"], **numbers)
        kept, watch = folder / f"{run.name}.json", report(f"rate {rate:g}")
        if kept.exists():
            history = _measured(kept, config)
            watch(_position(total_steps(plan.sizes.steps), plan.sizes.steps), history)
        else:
            history, _ = learn(run, plan, report=watch, **numbers, **options)
            write(kept, {"run": config, "history": history})
            shutil.rmtree(run)
        numbers = measures.of_losses(np.array(history["loss_matrix"], float))
        losses.append(numbers["final_loss"])
    usable = np.where(np.isfinite(losses), losses, np.inf)
    candidates = [
        {"learning_rate": rate, "final_loss": loss}
        for rate, loss in zip(rates, losses, strict=True)
    ]
    return {"candidates": candidates, "best": candidates[int(usable.argmin())]}
