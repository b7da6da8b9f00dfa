"""What makes shared routing forget: interventions on the moments, one at a time.

    python -m benchmarks.interventions [--quick] [--data FOLDER]

Two streams (permuted digits and an MLP, text domains and a byte transformer), three
ways to keep v, and the arms of `_evidence/arms.py`. Each arm has its own learning rate
from an equal sweep on the first tasks' validation data, with seeds of its own, and is
also run at the rate that all arms have in common. An interrupted run continues where it
stopped if the settings are the same; remove `--work` after a change of code.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro

import adamr
from adamr import diagnostics, metrics
from benchmarks._evidence.arms import ALPHA, ARMS, method_for
from benchmarks._evidence.pictures import draw_interventions, draw_motion
from benchmarks._evidence.problems import language_problem, mlp_problem
from benchmarks._speed import timing
from examples import streams
from examples.harness import loop, report, statistics
from examples.harness.problem import Problem
from examples.harness.setting import THRESHOLD, Setting, setting_for
from examples.lm.model import Preset
from examples.vision.problem import feed

SWEEP_SEED, SWEEP_TASKS = 100, 3
UNPROTECTED = ("embedding", "position", "norm", "head")  # of the transformer
MEASURES = ("final", "learned", "forgetting", "motion")


@dataclasses.dataclass
class Config:
    """Interventions on what the moments see."""

    data: Path | None = None
    """Folder of text, one <domain>.txt or <domain>.train.txt and .valid.txt for each
    domain; the installed text by default."""
    quick: bool = False
    """The arms of the 2 x 2 and of the denominator, fewer tasks and steps."""
    seeds: int = 4
    """Runs of each arm, side by side."""
    only: tuple[str, ...] = ()
    """Arms to run; all by default."""
    out: Path = Path("benchmarks/results")
    work: Path = Path("runs/interventions.json")
    """What is done so far."""


class Scene(NamedTuple):
    """A stream, a model, and how they are run.

    Attributes:
      stream: of `examples.streams`.
      problem: of the shared loop; it observes motion along U.
      setting: of the methods.
      batch, steps: per task.
      rates: of the sweep.
      common: the rate that all arms are also run at.
      accuracy: whether accuracies are reported, or losses in nats.
    """

    stream: streams.Stream
    problem: Problem
    setting: Setting
    batch: int
    steps: int
    rates: tuple[float, ...]
    common: float
    accuracy: bool


def _observe(gradient, updates, opt_state, setting):
    """‖UᵀΔ‖ / ‖Uᵀg‖: motion along old directions per unit of the raw gradient."""
    del setting
    subspace = adamr.get_subspace(opt_state)
    seen = diagnostics.effective_learning_rate(gradient, updates, subspace)
    return {"motion": seen.total}


def _scene(stream, made, axes, unprotected, threshold, **options) -> Scene:
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(
        params, axes, tasks=1, unprotected=unprotected, threshold=threshold
    )
    made = made._replace(observe=_observe, observed=("motion",))
    return Scene(stream, made, setting, **options)


def digits(tasks: int, steps: int) -> Scene:
    stream = streams.load("permuted-digits", tasks=tasks)
    made, axes = mlp_problem(64, 10, (100, 100))
    return _scene(
        stream, made, axes, (), THRESHOLD, batch=10, steps=steps,
        rates=(1e-4, 3e-4, 1e-3, 3e-3), common=1e-3, accuracy=True,
    )  # fmt: skip


def text(tasks: int, steps: int, data: Path | None) -> Scene:
    preset = Preset(32, 32, 2, 4, steps=steps, batch=8, eval_windows=1)
    stream = streams.load(
        "text-8", tasks=tasks, data=data, context=preset.context, limit=2000
    )
    made, axes = language_problem(preset)
    return _scene(
        stream, made, axes, UNPROTECTED, THRESHOLD, batch=preset.batch, steps=steps,
        rates=(3e-4, 1e-3, 3e-3, 1e-2), common=3e-3, accuracy=False,
    )  # fmt: skip


def _runs(scene: Scene, stream, method, rates, seeds) -> dict[str, np.ndarray]:
    """The measures of runs with these rates and seeds, each (runs,)."""
    chunks = loop.learn(
        scene.problem, method, scene.setting, feed(stream, scene.batch),
        rates=rates, coefficients=[0.0] * len(rates), seeds=list(seeds),
        steps=scene.steps,
    )  # fmt: skip
    _, _, history = loop.last(chunks)
    whole = history.accuracy if scene.accuracy else -history.loss
    sign = 1.0 if scene.accuracy else -1.0
    found = {
        "final": sign
        * np.array([metrics.average_accuracy(m) for m in whole[:, :, -1]]),
        "learned": sign
        * np.array([metrics.learning_accuracy(m) for m in whole[:, :, -1]]),
        "forgetting": np.array([metrics.forgetting(m) for m in whole[:, :, -1]]),
    }
    motion = history.curves["motion"][:, 1:].mean(axis=(1, 2))
    return {**found, "motion": motion / np.asarray(rates)}


def sweep(scene: Scene, method) -> tuple[float, list[float]]:
    """The rate of the best final value on the first tasks' validation data, and all."""
    tasks = min(SWEEP_TASKS, len(scene.stream.task_names))
    stream = streams.for_tuning(scene.stream, tasks)
    seeds = [SWEEP_SEED] * len(scene.rates)
    final = _runs(scene, stream, method, scene.rates, seeds)["final"]
    score = np.where(np.isfinite(final), final if scene.accuracy else -final, -np.inf)
    return scene.rates[int(np.argmax(score))], final.tolist()


def measure(scene: Scene, name: str, variant: str, seeds: Sequence[int]) -> dict:
    """One arm: its sweep, and runs at its own rate and at the common one."""
    method = method_for(name, variant)
    own, swept = sweep(scene, method)
    made = {"about": ARMS[name].about, "sweep": swept}
    for which, rate in (("own", own), ("common", scene.common)):
        if which == "common" and rate == own:
            made[which] = dict(made["own"])
            continue
        found = _runs(scene, scene.stream, method, [rate] * len(seeds), seeds)
        made[which] = {"rate": rate}
        for measured in MEASURES:
            mean, half = statistics.interval(found[measured])
            values = found[measured].tolist()
            summary = {"mean": mean, "half_width": half, "values": values}
            made[which][measured] = summary
    return made


def _paired(rows: list[dict], against: str) -> None:
    """Adds each arm's difference to `against` over common seeds, at either rate."""
    for row in rows:
        base = next(
            r for r in rows
            if (r["stream"], r["v"], r["arm"]) == (row["stream"], row["v"], against)
        )  # fmt: skip
        for which in ("own", "common"):
            row[which][f"final - {against}"] = statistics.paired(
                row[which]["final"]["values"], base[which]["final"]["values"]
            )


def cells(config: Config) -> list[tuple[str, str, str]]:
    """(stream, way to keep v, arm) in the order they are run."""
    names = config.only or tuple(ARMS)
    if config.quick and not config.only:
        names = ("none", "route_both", "route_first", "route_second")
        names += ("v from mixture", "v from c g", "both, rate of first")
    return [
        (stream, variant, name)
        for name in names
        for stream in ("digits", "text")
        for variant in ARMS[name].variants
        if not (config.quick and variant == "fan_in")
    ]


def run(config: Config, scenes: dict[str, Scene]) -> list[dict]:
    """All cells, taken up where an earlier run with the same settings stopped."""
    about = {
        "seeds": config.seeds,
        "quick": config.quick,
        "data": config.data and config.data.name,
        "steps": {name: scene.steps for name, scene in scenes.items()},
        "tasks": {n: list(scene.stream.task_names) for n, scene in scenes.items()},
    }
    rows = []
    if config.work.exists():
        saved = json.loads(config.work.read_text())
        rows = saved["rows"] if saved["about"] == about else []
    for stream, variant, name in cells(config):
        key = {"stream": stream, "v": variant, "arm": name}
        if any(key.items() <= row.items() for row in rows):
            continue
        row = {**key, **measure(scenes[stream], name, variant, range(config.seeds))}
        rows.append(row)
        config.work.parent.mkdir(parents=True, exist_ok=True)
        report.write(config.work, {"about": about, "rows": rows})
        own = {m: row["own"][m]["mean"] for m in MEASURES}
        numbers = " ".join(f"{m} {x:.3f}" for m, x in own.items())
        print(
            f"{stream:7} {variant:11} {name:20} {row['own']['rate']:g} {numbers}",
            flush=True,
        )
    return rows


def main(config: Config) -> None:
    scenes = {"digits": digits(4, 150), "text": text(3, 80, config.data)}
    if config.quick:
        scenes = {"digits": digits(3, 60), "text": text(3, 30, config.data)}
        config = dataclasses.replace(config, seeds=min(config.seeds, 3))
    rows = run(config, scenes)
    if "route_both" in {row["arm"] for row in rows}:
        _paired(rows, "route_both")
    content = {
        "machine": timing.machine(),
        "versions": report.versions(),
        "config": {
            "alpha": ALPHA,
            "seeds": config.seeds,
            "quick": config.quick,
            "sweep": {n: scene.rates for n, scene in scenes.items()},
            "steps": {n: scene.steps for n, scene in scenes.items()},
            "tasks": {n: list(scene.stream.task_names) for n, scene in scenes.items()},
            "data": config.data and config.data.name,
        },
        "rows": rows,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    report.write(config.out / "interventions.json", content)
    draw_interventions(content, config.out / "interventions.png")
    draw_motion(content, config.out / "interventions_motion.png")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.interventions"))
