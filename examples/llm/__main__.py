"""python -m examples.llm: what a pretrained model forgets when it is fine-tuned."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro
from rich.console import Console

from examples.harness import cli, meshes
from examples.harness.example import UsageError
from examples.harness.progress import bar_on
from examples.harness.report import write
from examples.harness.resume import Stopped
from examples.llm import dry_run, pictures, report, runs
from examples.llm.methods import METHODS
from examples.llm.options import MAY_BE_0, Config
from examples.llm.plans import Loaded, identity, load_all, planner
from examples.llm.stream import Position
from examples.streams.domains import DataError

Watch = Callable[[str, int], runs.Report]
Say = Callable[[str], None]


@contextlib.contextmanager
def _watched(console: Console, steps: Sequence[int], total: int) -> Iterator[Watch]:
    """Makes the reports of runs: (label, tasks) -> report."""
    with bar_on(console) as progress:
        bar = progress.add_task("compiling", total=total, state="")
        done: dict[str, int] = {}

        def make(label: str, tasks: int) -> runs.Report:
            def move(position: Position, history: dict) -> None:
                done[label] = runs.number_of(position, steps)
                last = (history["train_loss"][position.task] or [None])[-1]
                progress.update(
                    bar,
                    completed=sum(done.values()),
                    description=f"{label} {position.task + 1}/{tasks}",
                    state="" if last is None else f"loss {last:.3f}",
                )

            return move

        yield make


def _total(config: Config, choices: dict[str, cli.Candidates], loaded: Loaded) -> int:
    """How many steps the command takes."""
    whole = runs.total_steps(loaded.steps)
    first = runs.total_steps(loaded.steps[: len(loaded.tuning.parts)])
    tuned = sum(len(c.rates) for c in choices.values() if len(c.rates) > 1)
    return len(choices) * config.seeds * whole + tuned * first


def _learn_all(
    config: Config,
    choices: dict[str, cli.Candidates],
    loaded: Loaded,
    console: Console,
    content: dict[str, Any],
) -> None:
    """Every method; `results.json` grows with each run that ends."""
    plan, tasks = planner(loaded, config), len(loaded.stream.parts)
    with _watched(console, loaded.steps, _total(config, choices, loaded)) as watch:
        for name, (rates, (coefficient, *_)) in choices.items():
            folder, rate = config.out / "checkpoints" / name, rates[0]
            options = {
                "coefficient": coefficient,
                "identity": identity(loaded, config, name),
                "every": config.save_every,
            }
            if len(rates) > 1:
                tuned = content["tuning"][name] = runs.tune(
                    folder / "tuning", plan(name, tuning=True), rates,
                    report=lambda label, name=name: watch(
                        f"{name}, {label}", len(loaded.tuning.parts)
                    ),
                    **options,
                )  # fmt: skip
                rate = tuned["best"]["learning_rate"]
            whole = plan(name)
            for seed in range(config.seeds):
                history, seconds = runs.learn(
                    folder / f"seed-{seed}", whole, rate=rate, seed=seed,
                    report=watch(f"{name}, seed {seed}", tasks), **options,
                )  # fmt: skip
                content["methods"].append(
                    report.row(name, seed, rate, coefficient, history, seconds)
                )
                write(config.out / "results.json", content)


def _show(config: Config, content: dict[str, Any], console: Console) -> None:
    console.print(report.table(content["methods"]))
    paths = pictures.draw(config.out, content)
    written = [config.out / "results.json", *paths]
    console.print("written:", *written, sep="\n  ", highlight=False, soft_wrap=True)


def _run(config: Config, console: Console, say: Say) -> None:
    """Checks the options, learns, and shows what was finished, whatever ends it."""
    choices = cli.candidates(config, METHODS, may_be_0=MAY_BE_0)
    if config.dry_run:
        name, (_, (coefficient, *_)) = next(iter(choices.items()))
        dry_run.run(config, name, coefficient, say)
        return
    if config.cpu_devices is not None:
        meshes.simulate(config.cpu_devices)
    cli.make_folder(config.out)
    loaded = load_all(config, say)
    content = report.describe(cli.settings(config), loaded)
    content |= {"tuning": {}, "methods": []}
    try:
        _learn_all(config, choices, loaded, console, content)
    finally:
        if content["methods"]:
            _show(config, content, console)


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for bad input, 130 after Ctrl-C, 143: SIGTERM."""
    config = tyro.cli(Config, prog="python -m examples.llm", args=args)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    try:
        with cli.terminable():
            _run(config, console, say)
    except (UsageError, DataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\nstopped; the same command continues from its last checkpoint.")
        return 130
    except Stopped:
        say("\nsaved; the same command continues from here.")
        return 143
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
