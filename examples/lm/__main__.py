"""python -m examples.lm: what each way of composing protection with Adam forgets."""

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from examples.harness import cli, loop
from examples.harness.example import Example
from examples.harness.problem import Feed
from examples.lm import pictures, report
from examples.lm.methods import DEFAULT, METHODS
from examples.lm.model import PRESETS
from examples.lm.problem import THRESHOLD, feed, for_tuning, problem, setting
from examples.streams import installed
from examples.streams.domains import Domain, check_lengths, load_folder

_ABOUT = " ".join(f"{name}: {method.about}." for name, method in METHODS.items())


@dataclasses.dataclass(frozen=True)
class Config(cli.Options):
    """Learns a stream of text domains with a byte-level transformer, one method after
    the other, and shows what each forgets. The same command again continues where an
    interrupted run stopped.

    The inputs of all Linear kernels inside the blocks are protected. Embeddings,
    positions, LayerNorms and the output head get plain Adam in all methods except
    gpm_si.
    """

    data: Path | None = None
    """Folder of <domain>.train.txt and <domain>.valid.txt, or of <domain>.txt. Without
    it: text that is installed with Python and the packages; nothing is downloaded."""
    domains: str | None = None
    """Domains to learn, in this order, separated by commas. Default: all."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Methods to compare, by commas, or all. {_ABOUT}",
            aliases=["--methods"],
        ),
    ] = ",".join(DEFAULT)
    preset: Literal["tiny", "default", "256m"] = "default"
    """Size of model and run; 256m (16 layers, width 1152) is for accelerators."""
    steps: int | None = None
    """Steps per domain. Default: the preset's."""
    threshold: float = THRESHOLD
    """Share of the energy of a domain's layer inputs that is protected after it."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/lm")
    """Where results, pictures and checkpoints go."""


def _domains(config: Config, console: Console) -> list[Domain]:
    names = None if config.domains is None else cli.listed(config.domains)
    if config.data is None:
        domains, messages = installed.load_installed(names)
        for message in messages:
            console.print(message, soft_wrap=True)
    else:
        domains = load_folder(config.data, names)
    check_lengths(domains, PRESETS[config.preset].context)
    for d in domains:
        console.print(
            f"{d.name}: {len(d.train):,} bytes to train on, {len(d.valid):,} held out "
            f"({d.source})",
            highlight=False,
            soft_wrap=True,
        )
    return domains


def _checksum(domain: Domain) -> str:
    return hashlib.sha256(domain.train.tobytes() + domain.valid.tobytes()).hexdigest()


def _score(history: loop.History) -> np.ndarray:
    """Minus the mean loss over all domains in the end."""
    return -history.loss[:, -1, -1].mean(-1)


def prepare(config: Config, console: Console) -> Example:
    """The text, the transformer and how results are told."""
    preset = PRESETS[config.preset]
    preset = dataclasses.replace(preset, steps=config.steps or preset.steps)
    domains = _domains(config, console)
    names = [domain.name for domain in domains]
    sizes = dataclasses.asdict(preset)
    about = report.describe(
        {
            **cli.settings(config),
            "methods": cli.listed(config.method),
            "domains": names,
            "preset": {"name": config.preset, **sizes},
        },
        domains,
    )

    def tuning() -> Feed:
        first = for_tuning(domains[: cli.TUNING_TASKS])
        check_lengths(first, preset.context)
        return feed(first, preset)

    def content(rows: list[dict]) -> dict[str, Any]:
        return {**about, "methods": rows}

    return Example(
        methods=METHODS,
        problem=problem(
            PRESETS[config.preset]
        ),  # for any number of steps: compiled once
        feed=feed(domains, preset),
        tuning=tuning,
        union=lambda tasks: feed(domains, preset, [tasks]),
        setting=lambda name, tasks: setting(preset, tasks, config.threshold),
        score=_score,
        steps=preset.steps,
        memory_size=0,
        identity={
            "preset": sizes,
            "threshold": config.threshold,
            "domains": {domain.name: _checksum(domain) for domain in domains},
        },
        row=functools.partial(report.summarize, steps=preset.steps),
        content=content,
        table=report.table,
        draw=lambda rows: pictures.draw(config.out),
    )


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(Config, METHODS, prepare, "python -m examples.lm", args)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
