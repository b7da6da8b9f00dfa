"""Steps per second of the shared loop against a plain Python loop, and with more seeds.

    [NPROC=1] python -m benchmarks.throughput [--quick]

Permuted digits, Adam, MLPs of several widths, nothing but training and one evaluation
per task. All take turns, a task each:

    plain     a Python loop over one jitted step, batches gathered by NumPy
    logged    the same, and the loss is fetched after each step, to be logged
    loop      `harness.loop.learn`: chunks of steps in `lax.scan`
    seeds     the same with five seeds

Targets, for the widths of the digits' MLP (256, 256): loop >= 5 x plain in steps per
second; seeds <= 2 x the time of loop. What a loop in Python costs in addition to the
step is about the same for all widths, so the ratio is bounded by the arithmetic of the
step: `products` is the time of its matrix products at the speed of large ones on one
core.

NPROC=1 keeps XLA from handing parts of a small step to other threads, which costs more
than it gains; but several seeds then wait for each other.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks._speed import limits, timing
from examples import streams
from examples.harness import loop, report
from examples.harness.methods import METHODS
from examples.harness.setting import setting_for
from examples.vision.problem import feed, problem

RATE, SEEDS = 1e-3, 5


@dataclasses.dataclass
class Config:
    """Steps per second of the shared loop against a plain Python loop."""

    steps: int = 2000
    """Optimizer steps per task."""
    tasks: int = 6
    """Tasks; the first one compiles and is not counted."""
    batch: int = 10
    """Images per step."""
    widths: tuple[int, ...] = (256, 64, 16)
    """Of the two hidden layers, a network each."""
    quick: bool = False
    """Few steps: does it run at all?"""
    out: Path = Path("benchmarks/results")


def plain(
    made: Any, stream: streams.Stream, steps: int, batch: int, logged: bool
) -> Iterator[float]:
    """Seconds per task of a loop as it is usually written."""
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
    state, losses = tx.init(params), []
    for index in range(len(stream.task_names)):
        task = streams.task(stream, index)
        rng = np.random.default_rng([0, index])
        start = time.perf_counter()
        for rows in streams.batch_indices(task.train, steps, batch, rng):
            x, y = task.train.x[rows], task.train.y[rows]
            params, state, loss = step(params, state, x, y)
            if logged:
                losses.append(float(loss))
        for x, y in zip(stream.test.x, stream.test.y, strict=True):
            accuracy(params, x, y)
        jax.block_until_ready(params)
        yield time.perf_counter() - start


def shared(
    made: Any, axes: Any, stream: streams.Stream, steps: int, batch: int, seeds: int
) -> Iterator[float]:
    """Seconds per task of the shared loop."""
    params = jax.eval_shape(made.init, jax.random.key(0))
    setting = setting_for(params, axes, tasks=len(stream.task_names))
    chunks = loop.learn(
        made, METHODS["adam"], setting, feed(stream, batch), rates=[RATE] * seeds,
        coefficients=[0.0] * seeds, seeds=list(range(seeds)), steps=steps,
    )  # fmt: skip
    while True:
        start = time.perf_counter()
        if (chunk := next(chunks, None)) is None:
            return
        jax.block_until_ready(chunk[1].params)
        yield time.perf_counter() - start


def products(width: int, inputs: int, outputs: int, batch: int) -> float:
    """Seconds of a step's matrix products at the speed of large ones on one core."""
    kernels = [inputs * width, width * width, width * outputs]
    operations = 2 * batch * (3 * sum(kernels) - kernels[0])  # no gradient of the input
    a = jnp.ones((1024, 1024))
    seconds = limits.seconds_per_call(jax.jit(jnp.matmul), a, a, calls=2)
    cores = int(os.environ.get("NPROC", os.cpu_count() or 1))
    return operations / (2 * 1024**3 / seconds / cores)


def measure(width: int, stream: streams.Stream, steps: int, batch: int) -> dict:
    """All four on one network, a task each in turn."""
    shape = stream.train.x.shape[2:]
    made, axes = problem("mlp", shape, 10, hidden=(width, width))
    rivals = {
        "plain": plain(made, stream, steps, batch, logged=False),
        "logged": plain(made, stream, steps, batch, logged=True),
        "loop": shared(made, axes, stream, steps, batch, 1),
        "seeds": shared(made, axes, stream, steps, batch, SEEDS),
    }
    turns = [
        {name: next(each) for name, each in rivals.items()} for _ in stream.task_names
    ]
    seconds = {name: [turn[name] for turn in turns[1:]] for name in rivals}
    per_step = {name: float(np.median(x)) / steps for name, x in seconds.items()}
    return {
        "steps per second": {name: 1 / x for name, x in per_step.items()},
        "loop / plain, in steps per second": per_step["plain"] / per_step["loop"],
        "loop / logged, in steps per second": per_step["logged"] / per_step["loop"],
        f"{SEEDS} seeds / 1 seed, in time": per_step["seeds"] / per_step["loop"],
        "products, seconds per step": products(width, int(np.prod(shape)), 10, batch),
        "seconds per task": seconds,
    }


def main(config: Config) -> None:
    steps = 50 if config.quick else config.steps
    tasks = 3 if config.quick else config.tasks
    stream = streams.load("permuted-digits", tasks=tasks)
    found = {}
    for width in config.widths:
        found[width] = measure(width, stream, steps, config.batch)
        for name, value in found[width].items():
            print(width, name, value, sep=": ")
    config.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": timing.machine(),
        "versions": report.versions(),
        "config": {"steps": steps, "tasks": tasks, "batch": config.batch},
        "NPROC": os.environ.get("NPROC"),
        "by width": found,
    }
    threads = os.environ.get("NPROC")
    name = f"throughput-nproc{threads}.json" if threads else "throughput.json"
    report.write(config.out / name, content)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.throughput"))
