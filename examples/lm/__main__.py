"""python -m examples.lm: what each way of composing protection with Adam forgets."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.lm import installed, pictures, report
from examples.lm.data import DataError, Domain, check_lengths, load_folder
from examples.lm.methods import DEFAULT, METHODS
from examples.lm.model import PRESETS, Preset
from examples.lm.train import Trace, learn_stream

_NAMES = ", ".join(METHODS)
_METHODS_HELP = "Methods to compare, separated by commas, or all. " + " ".join(
    f"{name}: {method.about}." for name, method in METHODS.items()
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Learns a stream of text domains with a byte-level transformer, one method after
    the other, and shows what each forgets.

    Protected are the inputs of all Linear kernels inside the blocks. Embeddings,
    positions, LayerNorms and the output head are plain Adam in every method.
    """

    data: Path | None = None
    """Folder of <domain>.train.txt and <domain>.valid.txt, or of <domain>.txt. Without
    it: text that is installed with Python and the packages; nothing is downloaded."""
    domains: str | None = None
    """Domains to learn, in this order, separated by commas. Default: all."""
    methods: Annotated[str, tyro.conf.arg(help=_METHODS_HELP)] = ",".join(DEFAULT)
    preset: Literal["tiny", "default", "256m"] = "default"
    """Size of model and run; 256m (16 layers, width 1152) is for accelerators."""
    steps: int | None = None
    """Steps per domain. Default: the preset's."""
    seeds: int = 1
    """Runs per method; seed 0, 1, ..."""
    learning_rate: float | None = None
    """For every method. Default: each method's own, from a sweep."""
    threshold: float = 0.95
    """Share of the energy of a domain's layer inputs that is protected after it."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/lm")
    """Where results.json and the pictures go."""


class UsageError(ValueError):
    """An argument that cannot be used; the message is meant for the user."""


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _methods(config: Config) -> list[str]:
    names = list(METHODS) if config.methods == "all" else _listed(config.methods)
    for name in names:
        if name not in METHODS:
            raise UsageError(
                f"--methods: got {name!r}, expected some of {_NAMES}, or all."
            )
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"--methods: got {config.methods!r}, expected at least one of {_NAMES} and "
            "none twice."
        )
    return names


def _preset(config: Config) -> Preset:
    for flag, value in (("--steps", config.steps), ("--seeds", config.seeds)):
        if value is not None and value < 1:
            raise UsageError(f"{flag}: got {value}, expected at least 1.")
    if config.learning_rate is not None and not 0 < config.learning_rate < float("inf"):
        raise UsageError(
            f"--learning-rate: got {config.learning_rate}, expected a positive number."
        )
    if not 0 <= config.threshold <= 1:
        raise UsageError(
            f"--threshold: got {config.threshold}, expected a share from 0 to 1."
        )
    preset = PRESETS[config.preset]
    return dataclasses.replace(preset, steps=config.steps or preset.steps)


def _domains(config: Config, context: int, console: Console) -> list[Domain]:
    names = None if config.domains is None else _listed(config.domains)
    if config.data is None:
        domains, messages = installed.load_installed(names)
        for message in messages:
            console.print(message, soft_wrap=True)
    else:
        domains = load_folder(config.data, names)
    check_lengths(domains, context)
    for d in domains:
        console.print(
            f"{d.name}: {len(d.train):,} bytes to train on, {len(d.valid):,} held out "
            f"({d.source})",
            highlight=False,
            soft_wrap=True,
        )
    return domains


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )


def run(config: Config, console: Console, rows: list[dict]) -> None:
    """Runs all methods; `rows` and `results.json` grow by one with each that ends."""
    names, preset = _methods(config), _preset(config)
    domains = _domains(config, preset.context, console)
    settings = {
        **dataclasses.asdict(config),
        "data": None if config.data is None else str(config.data),
        "out": str(config.out),
        "methods": names,
        "domains": [domain.name for domain in domains],
        "preset": {"name": config.preset, **dataclasses.asdict(preset)},
    }
    about = report.describe(settings, domains)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out: got {config.out}, expected a folder: {error}."
        ) from error
    total = config.seeds * len(names) * len(domains) * preset.steps
    with _bar(console) as progress:
        bar = progress.add_task("compiling", total=total, state="")
        for seed in range(config.seeds):
            for name in names:

                def show(task: int, steps: int, trace: Trace, name=name, seed=seed):
                    where = f"{task + 1}/{len(domains)} {domains[task].name}"
                    progress.update(
                        bar,
                        advance=steps,
                        description=f"{name} seed {seed} {where}",
                        state=f"loss {trace.loss:.2f} overlap {trace.overlap:.2f} "
                        f"strength {trace.strength:.2f}",
                    )

                rate = config.learning_rate or METHODS[name].learning_rate
                done = learn_stream(
                    name,
                    domains,
                    preset,
                    seed=seed,
                    learning_rate=rate,
                    threshold=config.threshold,
                    report=show,
                )
                rows.append(report.summarize(name, seed, rate, done))
                report.write_results(config.out, about, rows)
                console.print(
                    f"{name} seed {seed}: final loss {rows[-1]['final_loss']:.3f}, "
                    f"forgetting {rows[-1]['forgetting']:.3f} ({done.seconds:.0f} s)",
                    highlight=False,
                )


def _conclude(config: Config, console: Console, rows: list[dict]) -> None:
    if not rows:
        console.print("no method finished, nothing written.")
        return
    console.print(report.table(rows))
    paths = pictures.draw(config.out)
    written = [config.out / "results.json", *paths]
    console.print("written:", *written, sep="\n  ", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    config = tyro.cli(Config, prog="python -m examples.lm", args=args)
    console, rows, code = Console(), [], 0
    try:
        run(config, console, rows)
    except (UsageError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("\nstopped; what was finished follows.")
        code = 130
    _conclude(config, console, rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
