"""What is seen of runs while they last: a progress bar, JSON lines, a logger."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.harness import loop
from examples.harness.loggers import HOOKS
from examples.harness.report import finite

Report = Callable[[loop.Position, loop.History], None]

__all__ = ["Report", "bar_on", "watch"]


def bar_on(console: Console) -> Progress:
    """A progress bar whose tasks have a field `state`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _events(history: loop.History, task: int, at: int, step: int) -> Iterator[dict]:
    """One record of scalars per run of an evaluation."""
    for run, accuracy in enumerate(history.accuracy[:, task, at]):
        yield {
            "run": run,
            "step": step,
            "task": task,
            "accuracy_so_far": float(accuracy[: task + 1].mean()),
            "accuracy_on_task": float(accuracy[task]),
            **{name: float(x[run, task, at]) for name, x in history.curves.items()},
        }


@contextlib.contextmanager
def watch(
    console: Console, out: Path, logger: str, *, steps: int, chunk: int, total: int
) -> Iterator[Callable[..., Report]]:
    """What makes the reports that `resume.learn` calls.

    Args:
      console: where the bar is.
      out: `events/<label>.jsonl` and the logger's files go there.
      logger: key of `HOOKS`.
      steps: per task.
      chunk: steps between two evaluations.
      total: steps of the whole command.

    Yields:
      (label, keep) -> report; with keep it also writes and logs every evaluation.
    """
    (out / "events").mkdir(parents=True, exist_ok=True)
    with (
        bar_on(console) as progress,
        HOOKS[logger](out) as log,
        contextlib.ExitStack() as opened,
    ):
        bar = progress.add_task("compiling", total=total, state="")

        def move(label: str, position: loop.Position, history: loop.History) -> None:
            at = position.task, position.step // chunk - 1
            means = {k: x[:, *at].mean() for k, x in history.curves.items()}
            progress.update(
                bar,
                advance=chunk,
                description=f"{label} {position.task + 1}/{history.loss.shape[1]}",
                state=" ".join(f"{name} {x:.2f}" for name, x in means.items()),
            )

        def write(lines: IO[str], label: str, position, history) -> None:
            at = position.step // chunk - 1
            step = position.task * steps + position.step
            for event in _events(history, position.task, at, step):
                lines.write(json.dumps(finite(event)) + "\n")
                log(f"{label}-{event.pop('run')}", event.pop("step"), event)
            lines.flush()

        def make(label: str, keep: bool = False) -> Report:
            if not keep:
                return lambda position, history: move(label, position, history)
            lines = opened.enter_context((out / f"events/{label}.jsonl").open("w"))

            def report(position, history):
                write(lines, label, position, history)
                move(label, position, history)

            return report

        yield make
