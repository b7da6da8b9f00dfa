"""The command line that the examples share: what is asked, tuned, run and written."""

import contextlib
import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console

from examples.harness import resume
from examples.harness.example import Done, Example, UsageError
from examples.harness.methods import Method
from examples.harness.progress import watch
from examples.harness.report import write
from examples.harness.resume import Stopped
from examples.harness.setting import THRESHOLD
from examples.streams.domains import DataError

TUNING_TASKS = 3

__all__ = [
    "TUNING_TASKS",
    "Common",
    "Options",
    "candidates",
    "chosen",
    "listed",
    "main",
    "make_folder",
    "settings",
    "terminable",
]


@dataclasses.dataclass(frozen=True)
class Common:
    """What every example asks. The steps of a task belong to the example, and so do
    `coefficient` and `coefficient_grid`, where methods have a coefficient.
    """

    method: str = "all"
    """Methods, by commas, or all."""
    seeds: int = 1
    """Runs per method; seed 0, 1, ..."""
    learning_rate: float | None = None
    """For every method. Default: each method's own."""
    lr_grid: str | None = None
    """Learning rates by commas: each method takes its best on validation data of the
    first tasks, with a seed that no run uses."""
    threshold: float = THRESHOLD
    """Energy share of a task's layer inputs that subspace methods protect."""
    save_every: float = 30.0
    """Seconds between checkpoints."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where results, pictures and checkpoints go."""


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """What the examples of the shared loop ask."""

    evaluations: int = 5
    """Evaluations per task, on all tasks."""
    reference: Literal["single", "joint"] | None = None
    """Also trains a new network with plain Adam for every task, on it alone or on all
    tasks up to it, and reports intransigence: what learning in sequence has lost."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """A logger in addition to the JSON lines."""


class Candidates(NamedTuple):
    """What tuning chooses from; one of each: nothing is tuned."""

    rates: list[float]
    coefficients: list[float]


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def settings(config: Common) -> dict[str, Any]:
    """The options as `results.json` has them."""
    whole = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in whole.items()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def chosen(config: Common, methods: dict[str, Any]) -> list[str]:
    names = list(methods) if config.method == "all" else listed(config.method)
    known = ", ".join(methods)
    for name in names:
        if name not in methods:
            raise UsageError(
                f"--method: got {name!r}, expected some of {known}, or all."
            )
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"--method: got {config.method!r}, expected at least one of {known} and "
            "none twice."
        )
    return names


def _numbers(config: Common, name: str, grid: str, least: str) -> list[float] | None:
    """The numbers of an option or of its grid; None if neither is given."""
    given = {_flag(key): getattr(config, key, None) for key in (name, grid)}
    given = {flag: value for flag, value in given.items() if value is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: got both, expected one of them.")
    for flag, value in given.items():
        try:
            numbers = [float(x) for x in listed(str(value))]
        except ValueError as error:
            raise UsageError(f"{flag}: got {value!r}: {error}.") from error
        if not numbers or len(set(numbers)) < len(numbers):
            raise UsageError(f"{flag}: got {value!r}, expected numbers and none twice.")
        for x in numbers:
            if not (0 < x < math.inf or x == 0 and least == "0"):
                raise UsageError(f"{flag}: got {x}, expected {least} or more.")
        return numbers
    return None


def _require_one_coefficient(owned: dict[str, Any]) -> None:
    """One number cannot be the strength of one method and the weight of another."""
    named = {name: own.name for name, own in owned.items() if own is not None}
    if len(set(named.values())) == 1:
        return
    got = ", ".join(f"{own} of {name}" for name, own in named.items())
    raise UsageError(
        f"--coefficient: {', '.join(owned)} have {got or 'none'}, expected methods "
        "that all have the same one: run them one by one, or leave it out."
    )


def candidates(
    config: Common,
    methods: dict[str, Any],
    *,
    also: Sequence[str] = (),
    may_be_0: Sequence[str] = (),
) -> dict[str, Candidates]:
    """Learning rates and coefficients of every method that runs or is in `also`.

    Whole numbers among the options are at least 1, those in `may_be_0` at least 0.

    Raises:
      UsageError: for an option that cannot be used.
    """
    names = chosen(config, methods)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name in may_be_0 else 1
        if type(value) is int and value < least:
            raise UsageError(
                f"{_flag(field.name)}: got {value}, expected at least {least}."
            )
    if not 0 <= config.threshold <= 1:
        raise UsageError(
            f"--threshold: got {config.threshold}, expected a share from 0 to 1."
        )
    if not 0 < config.save_every < math.inf:
        raise UsageError(
            f"--save-every: got {config.save_every}, expected a positive number."
        )
    rates = _numbers(config, "learning_rate", "lr_grid", "a positive number")
    coefficients = _numbers(config, "coefficient", "coefficient_grid", "0")
    if coefficients:
        _require_one_coefficient({name: methods[name].coefficient for name in names})

    def of(method: Any) -> Candidates:
        own = method.coefficient
        return Candidates(
            rates or [method.learning_rate],
            [0.0] if own is None else coefficients or [own.value],
        )

    return {name: of(methods[name]) for name in dict.fromkeys([*names, *also])}


def _total(config: Options, example: Example, methods: int, sweeps: int) -> int:
    """How many steps the command takes."""
    tasks = len(example.feed.names)
    whole = methods * tasks
    if sweeps:
        whole += sweeps * len(example.tuning().names)
    references = {None: 0, "single": tasks, "joint": tasks * (tasks + 1) // 2}
    return example.steps * (whole + references[config.reference])


def _learn_all(
    config: Options,
    choices: dict[str, Candidates],
    example: Example,
    console: Console,
    rows: list[dict],
) -> None:
    """Every method; `rows` and `results.json` grow with each that ends."""
    names, seeds = chosen(config, example.methods), list(range(config.seeds))
    sweeps = [name for name, (r, k) in choices.items() if len(r) * len(k) > 1]
    folder, tuning, reference = config.out / "checkpoints", {}, None
    options = {"evaluations": config.evaluations, "every": config.save_every}
    with watch(
        console, config.out, config.log, steps=example.steps,
        chunk=example.steps // config.evaluations,
        total=_total(config, example, len(names), len(sweeps)),
    ) as report:  # fmt: skip
        for name in sweeps:
            tuning[name] = resume.tune(
                folder, example, name, *choices[name], report=report(f"{name} tuning"),
                **options,
            )  # fmt: skip
            best, own = tuning[name]["best"], example.methods[name].coefficient
            coefficient = 0.0 if own is None else best[own.name]
            choices[name] = Candidates([best["learning_rate"]], [coefficient])
        if config.reference is not None:
            reference = resume.reference(
                folder, example, config.reference, choices["adam"].rates[0], seeds,
                report=report(f"{config.reference} reference"), **options,
            )  # fmt: skip
        for name in names:
            (rate,), (coefficient,) = choices[name]
            history, seconds = resume.learn(
                folder / name, example, name, example.feed, steps=example.steps,
                rates=[rate] * len(seeds), coefficients=[coefficient] * len(seeds),
                seeds=seeds, report=report(name, keep=True), **options,
            )  # fmt: skip
            done = Done(name, rate, coefficient, history, seconds, reference)
            rows += [example.row(done, seed) for seed in seeds]
            content = {**example.content(rows), "tuning": tuning}
            if reference is not None:
                content["reference"] = reference._asdict()
            write(config.out / "results.json", content)


def make_folder(out: Path) -> None:
    """The folder for results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: got {out}, expected a folder: {error}.") from error


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Stopped`, unless a run holds it back until it has saved."""

    def stop(number, frame):
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(
    kind: type[Options],
    methods: dict[str, Method],
    prepare: Callable[[Any, Console], Example],
    prog: str,
    args: Sequence[str] | None = None,
) -> int:
    """Reads the options, prepares the example, learns every method, shows the results.

    Args:
      kind: of the options.
      methods: by name.
      prepare: (options, console) -> the example.
      prog: name of the command.
      args: its arguments; None: those of the process.

    Returns:
      The exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    config = tyro.cli(kind, prog=prog, args=args)
    console, rows, code, example = Console(), [], 0, None
    if not console.is_terminal:
        console.width = 120
    try:
        with terminable():
            also = [] if config.reference is None else ["adam"]
            choices = candidates(config, methods, also=also)
            example = prepare(config, console)
            if example.steps % config.evaluations:
                raise UsageError(
                    f"--steps: got {example.steps}, expected a multiple of the "
                    f"{config.evaluations} evaluations."
                )
            make_folder(config.out)
            _learn_all(config, choices, example, console, rows)
    except (UsageError, DataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("\nstopped; what was finished follows.")
        code = 130
    except Stopped:
        console.print("\nsaved; the same command continues from here.")
        code = 143
    if example is not None and rows:
        console.print(example.table(rows))
        paths = example.draw(rows)
        written = [config.out / "results.json", *paths]
        console.print("written:", *written, sep="\n  ", highlight=False, soft_wrap=True)
    return code
