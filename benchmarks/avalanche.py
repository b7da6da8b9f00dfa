"""The shared loop against Avalanche on permuted MNIST: throughput and accuracy.

    NPROC=1 python -m benchmarks.avalanche --data mnist.npz --python AVALANCHE_PYTHON

Avalanche needs PyTorch and lives in an interpreter of its own (`pip install
avalanche-lib`). Both sides get the same arrays, the same batches in the same order, the
same initial weights of the same network (784-256-256-10, no biases), plain SGD with the
same rate, on one core (NPROC=1 here; there one thread or all, whichever is faster). The
methods mean the same thing:

    naive   nothing against forgetting
    ewc     Σ_k λ F_k (θ - θ_k)² in the loss, F_k the mean over a task's batches of the
            squared gradient of a batch's mean loss (Avalanche's definition); λ there is
            strength / 2 here
    agem    memory of the same size per task; each step a reference gradient on one
            batch drawn from all memories; projected where the product is negative
    agem_N  the same with N examples in the reference gradient, whose matrix products
            then are most of the step on both sides

Training steps per second leave out the first task, in which ours compiles and neither
has a past to protect; boundaries count. Ours include the evaluation after each task,
Avalanche's do not. `everything` is all runs with data, compilation and evaluation.
"""

import dataclasses
import functools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import adamr
from benchmarks._speed import timing
from examples import streams
from examples.harness import loop, report, statistics
from examples.harness.methods import METHODS
from examples.harness.problem import Data, loss_of
from examples.harness.replay import memory_gradient
from examples.harness.setting import setting_for
from examples.vision.problem import feed, problem

# Without the paths of the machine; the settings are written next to it.
COMMAND = "NPROC=1 python -m benchmarks.avalanche --data mnist.npz --python PYTHON"
RIVAL = Path(__file__).parent / "_speed" / "avalanche_rival.py"


@dataclasses.dataclass
class Config:
    """The shared loop against Avalanche on permuted MNIST."""

    data: Path
    """MNIST: a file or folder that `examples.streams` reads."""
    python: Path
    """An interpreter in which `import avalanche` works."""
    tasks: int = 4
    """Permutations."""
    steps: int = 320
    """Steps per task: one epoch over steps x batch images."""
    batch: int = 10
    """Images per step."""
    seeds: int = 4
    """Runs per method."""
    rate: float = 0.05
    """Of SGD."""
    strength: float = 100.0
    """Of EWC, in the convention with 1/2."""
    memory: int = 60
    """Images per task that A-GEM keeps; `agem_N` draws as many at each step."""
    test: int = 500
    """Test images per task."""
    out: Path = Path("benchmarks/results")


@functools.partial(jax.jit, static_argnames=("problem", "batch"))
def fisher_of_batches(problem, params, data: Data, batch: int):
    """Mean over batches of the squared gradient of the batch's mean loss."""

    def squares(total, part):
        objective = functools.partial(loss_of, problem)
        gradient = jax.grad(objective)(params, Data(*part, data.classes))
        return jax.tree.map(lambda s, g: s + g * g, total, gradient), None

    parts = tuple(x.reshape(-1, batch, *x.shape[1:]) for x in data[:2])
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(squares, zeros, parts)
    return jax.tree.map(lambda s: s / len(parts[0]), total)


def methods(batch: int, memory: int) -> dict:
    """Avalanche's strategies as the loop runs them, on plain SGD."""

    def consolidate(problem, setting, params, opt_state, data, key):
        del setting, key
        fisher = fisher_of_batches(problem, params, data, batch)
        return adamr.consolidate(opt_state, params, fisher)

    def agem(count: int):
        return METHODS["agem"]._replace(
            build=lambda rate, *_: optax.chain(
                adamr.agem_constraint(), optax.sgd(rate)
            ),
            evidence=functools.partial(memory_gradient, count=count),
        )

    return {
        "naive": METHODS["sgd"],
        "ewc": METHODS["sgd"]._replace(
            build=lambda rate, k, _: optax.chain(
                adamr.quadratic_penalty(k), optax.sgd(rate)
            ),
            boundary=consolidate,
        ),
        "agem": agem(batch),
        f"agem_{memory}": agem(memory),
    }


def learn(made, axes, method, stream, config: Config, seeds: list[int]) -> dict:
    """Like the rival's `run`; several seeds at once, the first one's accuracies."""
    start = before = time.perf_counter()
    params = jax.eval_shape(made.init, jax.random.key(0))
    chunks = loop.learn(
        made, method, setting_for(params, axes, tasks=config.tasks),
        feed(stream, config.batch), rates=[config.rate] * len(seeds),
        coefficients=[config.strength] * len(seeds), seeds=seeds, steps=config.steps,
        memory_size=config.memory,
    )  # fmt: skip
    seconds, history = [], None
    for _, runs, history in chunks:  # noqa: B007
        jax.block_until_ready(runs)
        seconds.append(time.perf_counter() - before)
        before = time.perf_counter()
    assert history is not None
    return {
        "accuracy": history.accuracy[0, :, -1].tolist(),
        "seconds": seconds,
        "everything": before - start,
    }


def rival(made, stream, config: Config, names: list[str], seeds: list[int]) -> dict:
    """Avalanche on the same arrays, batches and initial weights."""
    source, zeros = feed(stream, config.batch), jnp.zeros(len(seeds))
    rows = [
        [
            source.batches(task, seed, 0, config.steps).ravel()
            for task in range(config.tasks)
        ]
        for seed in seeds
    ]
    start = loop.start(made, METHODS["sgd"], None, zeros, zeros, seeds, source, 0)
    head, *layers = jax.tree.leaves(start.params)
    kernels = [*layers, head]
    arrays = {"x": stream.train.x, "y": stream.train.y, "rows": np.array(rows)}
    arrays |= {"test_x": stream.test.x, "test_y": stream.test.y}
    arrays |= {f"kernel{i}": np.asarray(kernel) for i, kernel in enumerate(kernels)}
    settings = {
        "methods": names, "seeds": seeds, "layers": len(kernels), "batch": config.batch,
        "rate": config.rate, "strength": config.strength, "memory": config.memory,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("s.npz", "settings.json", "r.json")]
        np.savez(paths[0], **arrays)
        paths[1].write_text(json.dumps(settings))
        subprocess.run([config.python, "-P", RIVAL, *paths], check=True)
        return json.loads(paths[2].read_text())


def compared(ours: list[dict], theirs: list[dict], steps: int) -> dict:
    """Accuracies after the last task and steps per second of one method."""
    final = {
        "ours": [np.mean(run["accuracy"][-1]) for run in ours],
        "avalanche": [np.mean(run["accuracy"][-1]) for run in theirs],
    }
    seconds = {
        side: np.median([run["seconds"][1:] for run in runs])
        for side, runs in (("ours", ours), ("avalanche", theirs))
    }
    everything = {
        "ours": sum(run["everything"] for run in ours),
        "avalanche": sum(run["everything"] for run in theirs),
    }
    total = steps * sum(len(run["seconds"]) for run in ours)
    return {
        "accuracy": {
            side: statistics.interval(values) for side, values in final.items()
        },
        "accuracy per seed": final,
        "accuracy, ours - avalanche": statistics.paired(*final.values()),
        "steps per second": {side: steps / s for side, s in seconds.items()},
        "ratio": seconds["avalanche"] / seconds["ours"],
        "steps per second, everything": {s: total / x for s, x in everything.items()},
        "ratio, everything": everything["avalanche"] / everything["ours"],
    }


def main(config: Config) -> None:
    rows = config.steps * config.batch
    stream = streams.load(
        "permuted-mnist", data=str(config.data), tasks=config.tasks, limit=rows
    )
    stream = stream._replace(
        test=streams.Part(*(x[:, : config.test] for x in stream.test))
    )
    made, axes = problem("mlp", stream.train.x.shape[2:], 10)
    seeds, ours, together = list(range(config.seeds)), {}, {}
    for name, method in methods(config.batch, config.memory).items():
        ours[name] = [
            learn(made, axes, method, stream, config, [seed]) for seed in seeds
        ]
        together[name] = learn(made, axes, method, stream, config, seeds)
    theirs = rival(made, stream, config, list(ours), seeds)
    found = {
        name: compared(own, theirs["runs"][name], config.steps)
        | {
            "steps per second, seeds side by side": len(seeds)
            * config.steps
            / float(np.median(together[name]["seconds"][1:]))
        }
        for name, own in ours.items()
    }
    for name, figures in found.items():
        print(name, json.dumps(figures, indent=1, default=float))
    settings = {**dataclasses.asdict(config), "data": config.data.name}
    del settings["python"], settings["out"]
    config.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": timing.machine() | {"command": COMMAND},
        "versions": {**report.versions(), **theirs["versions"]},
        "config": settings,
        "threads": {
            "ours": os.environ.get("NPROC", os.cpu_count()),
            "avalanche": theirs["threads"],
        },
        "methods": found,
    }
    report.write(config.out / "avalanche.json", content)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.avalanche"))
