"""Steps per second of the shared loop against a plain Python loop, and with more seeds.

    python -m benchmarks.throughput [--quick]

One stream (permuted digits), one network (64-256-256-10), Adam, batch 10, nothing but
training and one evaluation per task:

    plain     a Python loop over one jitted step, batches gathered by NumPy
    loop      `examples.loop.learn`: chunks of steps in `lax.scan`
    seeds     the same with five seeds side by side

Targets: loop >= 5 x plain in steps per second; seeds <= 2 x the time of loop.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

from benchmarks import _timing
from examples import loop, results, streams
from examples.methods import METHODS, setting_for
from examples.vision.problem import feed, problem

BATCH, RATE, SEEDS = 10, 1e-3, 5


@dataclasses.dataclass
class Config:
    """Steps per second of the shared loop against a plain Python loop."""

    steps: int = 2000
    """Optimizer steps per task."""
    tasks: int = 6
    """Tasks; the first one compiles and is not counted."""
    quick: bool = False
    """Few steps: does it run at all?"""
    out: Path = Path("benchmarks/results")


def plain(stream: streams.Stream, steps: int) -> list[float]:
    """Seconds per task of a loop as it is usually written."""
    made, _ = problem("mlp", stream.train.x.shape[2:], 10)
    tx = optax.adam(RATE)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = made.logits(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def accuracy(params, x, y):
        return (made.logits(params, x).argmax(-1) == y).mean()

    params = made.init(jax.random.key(0))
    state, seconds = tx.init(params), []
    for index in range(len(stream.task_names)):
        task = streams.task(stream, index)
        rng = np.random.default_rng([0, index])
        start = time.perf_counter()
        for rows in streams.batch_indices(task.train, steps, BATCH, rng):
            params, state, _ = step(
                params, state, task.train.x[rows], task.train.y[rows]
            )
        for x, y in zip(stream.test.x, stream.test.y, strict=True):
            accuracy(params, x, y)
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - start)
    return seconds


def shared(stream: streams.Stream, steps: int, seeds: int) -> list[float]:
    """Seconds per task of the shared loop."""
    made, axes = problem("mlp", stream.train.x.shape[2:], 10)
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(params, axes, tasks=len(stream.task_names))
    chunks = loop.learn(
        made, METHODS["adam"], setting, feed(stream, BATCH), rates=[RATE] * seeds,
        strengths=[0.0] * seeds, seeds=list(range(seeds)), steps=steps,
    )  # fmt: skip
    seconds, start = [], time.perf_counter()
    for _, runs, _ in chunks:
        jax.block_until_ready(runs.params)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def main(config: Config) -> None:
    steps = 50 if config.quick else config.steps
    tasks = 3 if config.quick else config.tasks
    stream = streams.load("permuted-digits", tasks=tasks)
    seconds = {
        "plain": plain(stream, steps)[1:],
        "loop": shared(stream, steps, 1)[1:],
        "seeds": shared(stream, steps, SEEDS)[1:],
    }
    per_step = {name: float(np.median(x)) / steps for name, x in seconds.items()}
    figures = {
        "steps per second": {name: 1 / x for name, x in per_step.items()},
        "loop / plain, in steps per second": per_step["plain"] / per_step["loop"],
        f"{SEEDS} seeds / 1 seed, in time": per_step["seeds"] / per_step["loop"],
    }
    for name, value in figures.items():
        print(name, value, sep=": ")
    config.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": _timing.machine(),
        "versions": results.versions(),
        "config": {"steps": steps, "tasks": tasks, "batch": BATCH},
        "seconds per task": seconds,
        **figures,
    }
    results.write(config.out / "throughput.json", content)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.throughput"))
