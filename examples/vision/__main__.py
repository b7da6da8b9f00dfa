"""python -m examples.vision: any method on any stream of images."""

import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from adamr import checkpoint
from examples import loop, pictures, results, streams
from examples.hooks import HOOKS
from examples.methods import METHODS, setting_for
from examples.vision.problem import feed, problem

DEFAULT = "adam,sgd,gpm,gpm_shared,ewc,agem,er"
TUNING_SEED, TUNING_TASKS = 1000, 3
_ABOUT = " ".join(f"{name}: {method.about}." for name, method in METHODS.items())


@dataclasses.dataclass(frozen=True)
class Config:
    """Learns a stream of image tasks, one method after the other, and shows what each
    forgets. The same command again goes on where an interrupted run stopped.
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
        str, tyro.conf.arg(help=f"Methods, by commas, or all. {_ABOUT}")
    ] = DEFAULT
    steps: int = 500
    """Optimizer steps per task."""
    batch: int = 10
    """Images per step."""
    evaluations: int = 5
    """Evaluations per task, on all tasks."""
    seeds: int = 1
    """Runs per method, side by side in one program; seed 0, 1, ..."""
    learning_rate: float | None = None
    """For every method. Default: each method's own."""
    lr_grid: str | None = None
    """Learning rates by commas: each method takes its best on the validation images of
    the first three tasks, with a seed that no run uses."""
    strength: float | None = None
    """Of penalties. Default: each method's own."""
    threshold: float = 0.97
    """Energy share of a task's layer inputs that subspace methods protect."""
    samples: int = 128
    """Images a task boundary looks at."""
    directions: int = 40
    """Gradient directions that OGD keeps per task."""
    memory: int = 50
    """Images per finished task that replay and constraint methods keep."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """A logger beside the JSON lines."""
    save_every: float = 30.0
    """Seconds between checkpoints."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/vision")
    """Where results, pictures and checkpoints go."""


class UsageError(ValueError):
    """An argument that cannot be used; the message is meant for the user."""


class Stopped(Exception):
    """SIGTERM came, and everything is saved."""


def _checked(config: Config) -> tuple[list[str], list[float]]:
    names = list(METHODS) if config.method == "all" else config.method.split(",")
    for name in names:
        if name not in METHODS:
            raise UsageError(
                f"--method: got {name!r}, expected some of {', '.join(METHODS)}, or "
                "all."
            )
    if len(set(names)) < len(names):
        raise UsageError(f"--method: got {config.method!r}, with a method twice.")
    for flag in ("steps", "batch", "evaluations", "seeds", "samples", "memory"):
        if getattr(config, flag) < 1:
            raise UsageError(f"--{flag}: got {getattr(config, flag)}, expected >= 1.")
    if config.steps % config.evaluations:
        raise UsageError(
            f"--steps: got {config.steps}, expected a multiple of the "
            f"{config.evaluations} evaluations."
        )
    try:
        grid = [float(rate) for rate in (config.lr_grid or "").split(",") if rate]
    except ValueError as error:
        raise UsageError(f"--lr-grid: got {config.lr_grid!r}: {error}.") from error
    given = [] if config.learning_rate is None else [config.learning_rate]
    if any(not 0 < rate < float("inf") for rate in (*grid, *given)):
        raise UsageError("--lr-grid, --learning-rate: expected positive numbers.")
    return names, grid


def _stream(config: Config) -> streams.Stream:
    options = {"scenario": config.scenario, "limit": config.limit}
    return streams.load(
        config.stream,
        data=config.data,
        tasks=config.tasks,
        **{name: value for name, value in options.items() if value is not None},
    )


def _setting(
    config: Config, made: Any, axes: Any, stream: streams.Stream, name: str
) -> Any:
    params = jax.eval_shape(made.init, jax.random.key(0))
    return setting_for(
        params,
        axes,
        tasks=len(stream.task_names),
        # Tasks that share their outputs share the head, too.
        unprotected=() if stream.scenario == "domain" else ("head",),
        threshold=config.threshold,
        samples=config.samples,
        new_directions=config.directions if name == "ogd" else 0,
    )


def _options(config: Config, name: str, rates: list[float], seeds: list[int]) -> dict:
    strength = config.strength
    if strength is None:
        strength = METHODS[name].strength or 0.0
    return dict(
        rates=rates,
        strengths=[strength] * len(rates),
        seeds=seeds,
        steps=config.steps,
        evaluations=config.evaluations,
        memory_size=config.memory,
    )


def tune(config: Config, name: str, stream: streams.Stream, grid: list[float]) -> dict:
    """The grid's accuracies on the first tasks' validation images, and the best rate.

    All rates run side by side. Nothing of later tasks, no test image and no seed of a
    result is seen.
    """
    first = streams.for_tuning(stream, min(TUNING_TASKS, len(stream.task_names)))
    made, axes = problem(
        config.model, first.train.x.shape[2:], stream.class_mask.shape[1]
    )
    setting = _setting(config, made, axes, first, name)
    options = _options(config, name, grid, [TUNING_SEED] * len(grid))
    chunks = loop.learn(
        made, METHODS[name], setting, feed(first, config.batch), **options
    )
    *_, (_, _, history) = chunks
    accuracy = history.accuracy[:, -1, -1].mean(-1)
    scores = np.where(np.isfinite(accuracy), accuracy, -1.0)
    return {
        "grid": grid,
        "accuracy": accuracy.tolist(),
        "best": grid[int(scores.argmax())],
    }


def _as_json(history: loop.History) -> dict:
    whole = {
        "accuracy": history.accuracy,
        "loss": history.loss,
        "baseline": history.baseline,
        "curves": history.curves,
    }
    return results.finite(jax.tree.map(lambda x: x.tolist(), whole))


def _from_json(saved: dict) -> loop.History:
    def numbers(x):
        return np.array(x, dtype=float)

    curves = {name: numbers(values) for name, values in saved["curves"].items()}
    parts = (numbers(saved[name]) for name in ("accuracy", "loss"))
    return loop.History(*parts, curves, numbers(saved["baseline"]))


def _events(history: loop.History, task: int, at: int, step: int) -> list[dict]:
    """One scalar record per run of the evaluation that has just ended."""
    return [
        {
            "run": run,
            "step": step,
            "task": task,
            "accuracy_so_far": float(
                history.accuracy[run, task, at, : task + 1].mean()
            ),
            "accuracy_on_task": float(history.accuracy[run, task, at, task]),
            **{name: float(x[run, task, at]) for name, x in history.curves.items()},
        }
        for run in range(len(history.accuracy))
    ]


def run(config: Config, name: str, stream, rate: float, advance, log) -> list[dict]:
    """All seeds of one method over the stream, from its last checkpoint on."""
    tasks, seeds = len(stream.task_names), list(range(config.seeds))
    made, axes = problem(
        config.model, stream.train.x.shape[2:], stream.class_mask.shape[1]
    )
    setting = _setting(config, made, axes, stream, name)
    source = feed(stream, config.batch)
    options = _options(config, name, [rate] * len(seeds), seeds)
    chunk = config.steps // config.evaluations
    identity = {**options, "method": name, "threshold": config.threshold}
    for field in ("stream", "data", "tasks", "scenario", "limit", "model", "batch"):
        identity[field] = getattr(config, field)
    identity |= {"samples": config.samples, "directions": config.directions}
    path = config.out / "events" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    start, seconds = time.perf_counter(), 0.0
    with (
        checkpoint.Checkpoints(
            config.out / "checkpoints" / name,
            config=identity,
            every=datetime.timedelta(seconds=config.save_every),
        ) as checkpoints,
        path.open("w") as events,
    ):

        def record(position, history):
            step = position.task * config.steps + position.step
            at = position.step // chunk - 1
            for event in _events(history, position.task, at, step):
                events.write(json.dumps(results.finite(event)) + "\n")
                label = f"{name}-{seeds[event.pop('run')]}"
                log(label, step, {k: v for k, v in event.items() if k != "step"})
            events.flush()

        first = loop.start(
            made, METHODS[name], setting, *_arrays(options), seeds, source,
            config.memory,
        )  # fmt: skip
        found, resume = checkpoints.restore(first), None
        history = loop.empty_history(made, len(seeds), tasks, config.evaluations)
        if found is not None:
            history = _from_json(found.metrics["history"])
            seconds = found.metrics["seconds"]
            last = loop.Position((found.step - 1) // config.steps, 0)
            last = last._replace(step=found.step - last.task * config.steps)
            resume = (last, found.state, history)
            for step in range(chunk, found.step + 1, chunk):
                task = (step - 1) // config.steps
                record(loop.Position(task, step - task * config.steps), history)
            advance(found.step, name)
        for position, runs, history in loop.learn(
            made, METHODS[name], setting, source, **options, resume=resume
        ):
            record(position, history)
            advance(chunk, f"{name} {position.task + 1}/{tasks}")
            step = position.task * config.steps + position.step
            spent = seconds + time.perf_counter() - start
            kept = {"history": _as_json(history), "seconds": spent}
            ended = step == tasks * config.steps
            checkpoints.save(step, runs, kept, force=ended)
            if checkpoints.stopping:
                raise Stopped
        spent = seconds + time.perf_counter() - start
    return [
        {
            "method": name,
            "about": METHODS[name].about,
            "seed": seed,
            "learning_rate": rate,
            "strength": options["strengths"][i],
            "metrics": results.summarize(history.accuracy[i], history.baseline[i]),
            "matrix": history.accuracy[i, :, -1].tolist(),
            "anytime": history.accuracy[i].tolist(),
            "loss": history.loss[i].tolist(),
            "curves": {k: v[i].ravel().tolist() for k, v in history.curves.items()},
            "seconds": spent,
        }
        for i, seed in enumerate(seeds)
    ]


def _arrays(options: dict) -> tuple:
    return tuple(
        jax.numpy.asarray(options[name], "float32") for name in ("rates", "strengths")
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeRemainingColumn(),
        console=console,
    )


def learn_all(config: Config, console: Console, about: dict, rows: list[dict]) -> None:
    """Every method; `rows` and `results.json` grow with each that ends."""
    names, grid = _checked(config)
    stream = _stream(config)
    console.print(streams.describe(stream), highlight=False, soft_wrap=True)
    config.out.mkdir(parents=True, exist_ok=True)
    log = HOOKS[config.log](config.out)
    settings = {**dataclasses.asdict(config), "out": str(config.out)}
    about |= {
        "config": settings,
        "stream": {"name": stream.name, "scenario": stream.scenario},
        "tasks": list(stream.task_names),
        "versions": results.versions(),
        "definitions": results.METRICS,
        "tuning": {},
    }
    total = len(names) * len(stream.task_names) * config.steps
    with _bar(console) as progress:
        bar = progress.add_task("compiling", total=total)

        def advance(steps, text):
            progress.update(bar, advance=steps, description=text)

        for name in names:
            rate = config.learning_rate or METHODS[name].learning_rate
            if grid:
                progress.update(bar, description=f"{name} tuning")
                about["tuning"][name] = tune(config, name, stream, grid)
                rate = about["tuning"][name]["best"]
            rows += run(config, name, stream, rate, advance, log)
            content = {**about, "runs": rows, "comparisons": results.comparisons(rows)}
            results.write(config.out / "results.json", content)


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 and 143 after Ctrl-C, SIGTERM."""
    config = tyro.cli(Config, prog="python -m examples.vision", args=args)
    console, about, rows, code = Console(), {}, [], 0
    if not console.is_terminal:
        console.width = 120
    try:
        learn_all(config, console, about, rows)
    except (UsageError, streams.DataError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("\nstopped; what was finished follows.")
        code = 130
    except Stopped:
        console.print("\nsaved; the same command goes on from here.")
        code = 143
    if rows:
        console.print(results.table(rows))
        paths = pictures.draw(config.out, {**about, "runs": rows})
        written = [config.out / "results.json", *paths]
        console.print("written:", *written, sep="\n  ", highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
