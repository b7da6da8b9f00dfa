"""python -m examples.vision: any method on any stream of images."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from examples import streams
from examples.harness import cli, loop, pictures, report, statistics
from examples.harness.example import Done, Example, UsageError
from examples.harness.methods import METHODS, named
from examples.harness.setting import DIRECTIONS, SAMPLES, setting_for
from examples.vision.problem import feed, problem, union

DEFAULT = "adam,sgd,gpm,gpm_shared,ewc,agem,er"
_ABOUT = " ".join(f"{name}: {method.about}." for name, method in METHODS.items())


@dataclasses.dataclass(frozen=True)
class Config(cli.Options):
    """Learns a stream of image tasks, one method after the other, and shows what each
    forgets. The same command again continues where an interrupted run stopped.
    """

    stream: str = "permuted-digits"
    """One of `python -m examples.streams`."""
    data: str | None = None
    """Where the images are; the digits are installed with scikit-learn."""
    tasks: int | None = None
    """Number of tasks. Default: the stream's usual one."""
    scenario: Literal["task", "domain", "class"] | None = None
    """What is known at test time. Default: the stream's usual one."""
    limit: int | None = None
    """Training images per task, at most. Default: all."""
    model: Literal["mlp", "resnet18", "alexnet", "linen_mlp"] = "mlp"
    """Network."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Methods, by commas, or all. {_ABOUT}", aliases=["--methods"]
        ),
    ] = DEFAULT
    steps: int = 500
    """Optimizer steps per task."""
    batch: int = 10
    """Images per step."""
    coefficient: float | None = None
    """Of every penalty, constraint and replay: strength of EWC, c of SI,
    memory_strength of GEM, weight of replay. Default: each method's own."""
    coefficient_grid: str | None = None
    """Coefficients by commas: each method that has one takes its best, as with the
    learning rates and together with them."""
    samples: int = SAMPLES
    """Images a task boundary looks at."""
    directions: int = DIRECTIONS
    """Gradient directions that OGD keeps per task."""
    memory: int = 50
    """Images per finished task that replay and constraint methods keep."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/vision")
    """Where results, pictures and checkpoints go."""


# What results depend on besides method, rates, coefficients, seeds and steps.
_IDENTITY = (
    "stream", "data", "tasks", "scenario", "limit", "model", "batch", "threshold",
    "samples", "directions",
)  # fmt: skip


def _stream(config: Config) -> streams.Stream:
    options = {"scenario": config.scenario, "limit": config.limit}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return streams.load(
            config.stream, data=config.data, tasks=config.tasks, **options
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _score(history: loop.History) -> np.ndarray:
    """Accuracy over all tasks in the end."""
    return history.accuracy[:, -1, -1].mean(-1)


def _row(done: Done, run: int) -> dict[str, Any]:
    accuracy, baseline = done.history.accuracy[run], done.history.baseline[run]
    reference = done.reference and done.reference.accuracy[run]
    curves = done.history.curves.items()
    return {
        "method": done.name,
        "about": METHODS[done.name].about,
        "seed": run,
        "learning_rate": done.learning_rate,
        **named(METHODS[done.name], done.coefficient),
        "metrics": statistics.summarize(accuracy, baseline, reference),
        "matrix": accuracy[:, -1].tolist(),
        "anytime": accuracy.tolist(),
        "loss": done.history.loss[run].tolist(),
        "curves": {name: values[run].ravel().tolist() for name, values in curves},
        "seconds": done.seconds,
    }


def prepare(config: Config, console: Console) -> Example:
    """The stream, the network and how results are told."""
    stream = _stream(config)
    console.print(streams.describe(stream), highlight=False, soft_wrap=True)
    tasks = list(stream.task_names)
    made, axes = problem(
        config.model, stream.train.x.shape[2:], stream.class_mask.shape[1]
    )
    params = jax.eval_shape(made.init, jax.random.key(0))

    def setting(name: str, tasks: int):
        return setting_for(
            params,
            axes,
            tasks=tasks,
            # Tasks with the same outputs have the same head.
            unprotected=() if stream.scenario == "domain" else ("head",),
            threshold=config.threshold,
            samples=config.samples,
            new_directions=config.directions if name == "ogd" else 0,
        )

    def content(rows: list[dict]) -> dict[str, Any]:
        return {
            "config": cli.settings(config),
            "stream": {"name": stream.name, "scenario": stream.scenario},
            "tasks": tasks,
            "versions": report.versions(),
            "definitions": statistics.METRICS,
            "runs": rows,
            "comparisons": statistics.comparisons(rows),
        }

    first = streams.for_tuning(stream, min(cli.TUNING_TASKS, len(tasks)))
    return Example(
        methods=METHODS,
        problem=made,
        feed=feed(stream, config.batch),
        tuning=lambda: feed(first, config.batch),
        union=functools.partial(union, stream, config.batch),
        setting=setting,
        score=_score,
        steps=config.steps,
        memory_size=config.memory,
        identity={name: getattr(config, name) for name in _IDENTITY},
        row=_row,
        content=content,
        table=report.table,
        draw=lambda rows: pictures.draw(config.out, content(rows)),
    )


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(Config, METHODS, prepare, "python -m examples.vision", args)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
