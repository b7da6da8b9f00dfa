"""The streams of the evidence: what is learned, by which network, for how long."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._evidence.problems import language_problem
from examples import streams
from examples.harness.problem import Problem
from examples.harness.setting import SAMPLES, THRESHOLD
from examples.lm.model import Preset
from examples.lm.problem import THRESHOLD as TEXT_THRESHOLD
from examples.lm.problem import UNPROTECTED
from examples.vision.problem import problem

__all__ = ["BENCHES", "ON_TWO_CORES", "Bench", "Made", "make"]

# Orders of the shared text domains, by how much the domains have in common.
LOW = (
    "novel_dickens csv_tables french_novels c_nginx spanish_novels python_stdlib "
    "german_law latex_logic"
)
HIGH = (
    "novel_dickens novel_hardy novel_cbronte novel_eliot novel_thackeray "
    "novel_gaskell novel_collins novel_trollope"
)
MIXED = (
    "wikipedia chinese_poetry pubmed german_law latex_logic french_novels cli_help "
    "dialogue python_stdlib math_word js_eslint shakespeare c_nginx bible_kjv "
    "csv_tables us_code"
)
LM = Preset(32, 64, 2, 4, steps=150, batch=16, eval_windows=0)


class Bench(NamedTuple):
    """One stream of the evidence.

    Attributes:
      stream: name for `examples.streams.load`.
      options: of the stream.
      data: below the data folder; None: the data is installed.
      model: of `examples.vision`, or "lm".
      measure: "accuracy", or "loss" in nats per byte.
      steps: optimizer steps per task.
      batch: examples per step.
      seeds: runs of every method; the headlines may have more.
      threshold: energy share that subspaces protect.
      samples: examples that a task boundary looks at.
      max_rank: of a basis; None: the fan-in.
      rates: learning rates of the sweep.
      sgd_factor: plain SGD sweeps these rates times this.
      strengths: method -> two of its coefficients, swept with a thinned grid of rates;
        the committed results have them under this name.
    """

    stream: str
    options: dict[str, Any]
    data: str | None
    model: str
    measure: str
    steps: int
    batch: int
    seeds: int
    threshold: float
    samples: int
    max_rank: int | None
    rates: tuple[float, ...]
    sgd_factor: float
    strengths: dict[str, tuple[float, float]]


_IMAGE_RATES = (1e-4, 2e-4, 4e-4, 7e-4, 1e-3, 2e-3, 4e-3, 7e-3, 1e-2, 2e-2)
_TEXT_RATES = (1e-4, 2.2e-4, 4.6e-4, 1e-3, 2.2e-3, 4.6e-3)
_FAST_RATES = (4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2, 2.2e-2)
_SLOW_RATES = (2e-5, 5e-5, 1e-4, 3e-4, 1e-3, 3e-3)
_STRENGTHS = {
    "si": (0.03, 0.3), "gpm_si": (0.03, 0.3), "gem": (0.05, 0.5),
    "gem_mean": (0.05, 0.5), "p_mgem": (0.05, 0.5), "p_mgem_mean": (0.05, 0.5),
    "d_mgem_mean": (0.05, 0.5),
    "replay_0.5_weighted": (0.2, 1.0), "replay_1_weighted": (0.2, 1.0),
}  # fmt: skip
_IMAGE_STRENGTHS = {"ewc": (30.0, 300.0), **_STRENGTHS}
_TEXT_STRENGTHS = {"ewc": (1.0, 30.0), **_STRENGTHS}


def _digits(stream: str, steps: int) -> Bench:
    return Bench(
        stream, {}, None, "mlp", "accuracy", steps, 10, 5, THRESHOLD, SAMPLES, None,
        _IMAGE_RATES, 100.0, _IMAGE_STRENGTHS,
    )  # fmt: skip


def _text(domains: str | None, rates: tuple[float, ...] = _TEXT_RATES) -> Bench:
    """None: eight domains that are installed with Python and the packages."""
    options, data, count = {"context": LM.context, "limit": 2500}, None, 8
    if domains is not None:
        names, data = domains.split(), "text"
        count = len(names)
        options |= {"domains": names, "tasks": count}
    return Bench(
        f"text-{count}", options, data, "lm", "loss",
        LM.steps, LM.batch, 3, TEXT_THRESHOLD, SAMPLES, None, rates, 1000.0,
        _TEXT_STRENGTHS,
    )  # fmt: skip


def _cifar(model: str, steps: int, samples: int, max_rank: int | None) -> Bench:
    return Bench(
        "split-cifar100", {"limit": 2000}, "vision/cifar100.npz", model, "accuracy",
        steps, 10, 3, THRESHOLD, samples, max_rank, _SLOW_RATES, 100.0,
        _IMAGE_STRENGTHS,
    )  # fmt: skip


BENCHES = {
    "permuted-digits": _digits("permuted-digits", 500),
    "split-digits": _digits("split-digits", 200),
    "text-low-8": _text(LOW),
    "text-high-8": _text(HIGH, _FAST_RATES),
    "text-mixed-16": _text(MIXED),
    "text-installed": _text(None),
    "split-cifar100": _cifar("mlp", 100, SAMPLES, 256),
    "split-cifar100-resnet18": _cifar("resnet18", 500, 32, None),
}  # fmt: skip


ON_TWO_CORES = [name for name in BENCHES if not name.endswith("resnet18")]


class Made(NamedTuple):
    """A bench with its data in memory; `axes` are those of the network's kernels."""

    bench: Bench
    stream: streams.Stream
    problem: Problem
    axes: Any
    unprotected: tuple[str, ...]


@functools.cache
def make(name: str, data: Path) -> Made:
    """Reads the data of a bench from the folder `data`."""
    bench = BENCHES[name]
    stream = streams.load(
        bench.stream,
        data=None if bench.data is None else data / bench.data,
        **bench.options,
    )
    if bench.model == "lm":
        return Made(bench, stream, *language_problem(LM), UNPROTECTED)
    made = problem(bench.model, stream.train.x.shape[2:], stream.class_mask.shape[1])
    shared = () if stream.scenario == "domain" else ("head",)
    return Made(bench, stream, *made, shared)
