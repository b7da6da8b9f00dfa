"""Runs of the shared loop that survive: a method's, its tuning's, a reference's.

Each goes on from its last checkpoint under `out/checkpoints/<label>` and ends in the
bits of a run that was never stopped.
"""

import contextlib
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from adamr import checkpoint
from examples.harness import loop, results
from examples.harness.methods import Method
from examples.harness.problem import Feed, Problem

TUNING_SEED = 1000  # of no reported run

__all__ = [
    "Bench",
    "Done",
    "Reference",
    "Stopped",
    "UsageError",
    "learn",
    "reference",
    "tune",
]


class UsageError(ValueError):
    """An argument that cannot be used; the message is meant for the user."""


class Stopped(Exception):
    """SIGTERM came, and everything is saved."""


class Reference(NamedTuple):
    """What the network reaches on each task when it is not learnt in sequence.

    Attributes:
      kind: "single" (task k alone) or "joint" (tasks 0 ... k together).
      learning_rate: of plain Adam.
      accuracy: (runs, tasks) as lists, on the test data of each task.
      loss: the same in nats.
      seconds: wall time of all.
    """

    kind: str
    learning_rate: float
    accuracy: list[list[float]]
    loss: list[list[float]]
    seconds: float


class Done(NamedTuple):
    """All seeds of one method, from 0 up, over the whole stream."""

    name: str
    learning_rate: float
    strength: float
    history: loop.History
    seconds: float
    reference: Reference | None


class Bench(NamedTuple):
    """A problem, its tasks and how its results are told, as an example gives them.

    Attributes:
      methods: name -> `Method`; "adam" is the one that references train with.
      problem: the network.
      feed: the tasks, with their test data.
      tuning: () -> the first tasks, with validation data in place of the test data.
      union: tasks -> a feed of one task, their training data together, tested on the
        last of them.
      setting: (method's name, number of tasks) -> what `Method.build` needs.
      score: `History` -> (runs,) by which tuning chooses; higher is better.
      steps: per task.
      memory_size: examples kept of every finished task.
      identity: what the runs depend on beside the arguments of `learn`; a checkpoint of
        another one is refused.
      row: (`Done`, run) -> what `results.json` has on one run.
      content: rows -> `results.json`.
      table: rows -> what is printed in the end.
      draw: rows -> paths of the pictures.
    """

    methods: dict[str, Method]
    problem: Problem
    feed: Feed
    tuning: Callable[[], Feed]
    union: Callable[[Sequence[int]], Feed]
    setting: Callable[[str, int], Any]
    score: Callable[[loop.History], np.ndarray]
    steps: int
    memory_size: int
    identity: dict[str, Any]
    row: Callable[[Done, int], dict[str, Any]]
    content: Callable[[list[dict]], dict[str, Any]]
    table: Callable[[list[dict]], Table]
    draw: Callable[[list[dict]], list[Path]]


def _map(function: Callable, history: dict) -> dict:
    """A new dict in the same order, which `jax.tree.map` would not keep."""
    return {
        name: _map(function, x) if isinstance(x, dict) else function(x)
        for name, x in history.items()
    }


def _as_json(history: loop.History) -> dict:
    return results.finite(_map(np.ndarray.tolist, history._asdict()))


def _from_json(saved: dict) -> loop.History:
    return loop.History(**_map(functools.partial(np.array, dtype=float), saved))


@contextlib.contextmanager
def _for_the_user(kind: type[Exception]):
    try:
        yield
    except kind as error:
        raise UsageError(str(error)) from error


def learn(
    folder: Path,
    bench: Bench,
    name: str,
    feed: Feed,
    *,
    rates: Sequence[float],
    strengths: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    evaluations: int,
    every: float,
    report: Callable[[loop.Position, loop.History], None],
    identity: dict[str, Any] | None = None,
) -> tuple[loop.History, float]:
    """`loop.learn` from its last checkpoint on.

    Args:
      folder: of the checkpoints of these runs alone.
      bench: whose problem is learnt.
      name: of the method.
      feed: the tasks.
      rates: (runs,) learning rates.
      strengths: (runs,) of penalties.
      seeds: one per run.
      steps: per task.
      evaluations: per task.
      every: seconds between checkpoints.
      report: called after every chunk; of a run that goes on, for its past, too.
      identity: what else the runs depend on, beside the bench's identity.

    Returns:
      What was measured, and the wall time of all parts.

    Raises:
      UsageError: for a checkpoint of other hyperparameters or versions, or while
        another process learns there.
      Stopped: after SIGTERM.
    """
    start, before = time.perf_counter(), 0.0
    method = bench.methods[name]
    setting = bench.setting(name, len(feed.names))
    options = dict(seeds=list(seeds), steps=steps, evaluations=evaluations)
    options |= dict(rates=list(rates), strengths=list(strengths))
    options |= dict(memory_size=bench.memory_size)
    saver = checkpoint.Checkpoints(
        folder,
        config={**bench.identity, **(identity or {}), **options, "method": name},
        every=datetime.timedelta(seconds=every),
    )

    def place(step: int) -> loop.Position:
        task, within = divmod(step - 1, steps)
        return loop.Position(task, within + 1)

    with contextlib.ExitStack() as stack:
        with _for_the_user(RuntimeError):
            saver = stack.enter_context(saver)
        like = loop.start(
            bench.problem, method, setting, jnp.asarray(rates, jnp.float32),
            jnp.asarray(strengths, jnp.float32), seeds, feed, bench.memory_size,
        )  # fmt: skip
        with _for_the_user(ValueError):
            found = saver.restore(like)
        history, resume = None, None
        if found is not None:
            history, before = (found.metrics[key] for key in ("history", "seconds"))
            history = _from_json(history)
            resume = (place(found.step), found.state, history)
            for step in range(1, found.step + 1):
                if step % (steps // evaluations) == 0:
                    report(place(step), history)
        seconds = before
        for position, runs, history in loop.learn(
            bench.problem, method, setting, feed, resume=resume, **options
        ):
            report(position, history)
            step = position.task * steps + position.step
            seconds = before + time.perf_counter() - start
            kept = {"history": _as_json(history), "seconds": seconds}
            saver.save(step, runs, kept, force=step == steps * len(feed.names))
            if saver.stopping:
                raise Stopped
    assert history is not None  # there is at least one chunk
    return history, seconds


def tune(
    folder: Path,
    bench: Bench,
    name: str,
    rates: Sequence[float],
    strengths: Sequence[float],
    **options: Any,
) -> dict[str, Any]:
    """The candidates' scores on the first tasks' validation data, and the best one.

    All pairs of rate and strength run side by side. Nothing of later tasks, no test
    data and no seed of a result is seen.
    """
    pairs = list(itertools.product(rates, strengths))
    history, _ = learn(
        folder / f"tuning-{name}", bench, name, bench.tuning(), steps=bench.steps,
        rates=[rate for rate, _ in pairs], strengths=[k for _, k in pairs],
        seeds=[TUNING_SEED] * len(pairs), identity={"part": "tuning"}, **options,
    )  # fmt: skip
    scores = bench.score(history)
    usable = np.where(np.isfinite(scores), scores, -np.inf)
    candidates = [
        {"learning_rate": rate, "strength": strength, "score": float(score)}
        for (rate, strength), score in zip(pairs, scores, strict=True)
    ]
    return {"candidates": candidates, "best": candidates[int(usable.argmax())]}


def reference(
    folder: Path,
    bench: Bench,
    kind: str,
    rate: float,
    seeds: Sequence[int],
    *,
    evaluations: int,
    **options: Any,
) -> Reference:
    """A new network with plain Adam for every task k, tested on it.

    "single" learns task k alone, with the steps of one task; "joint" learns tasks
    0 ... k together, with the steps that the sequence has had by then.
    """
    accuracy, loss, seconds = [], [], 0.0
    for task in range(len(bench.feed.names)):
        tasks = list(range(task + 1)) if kind == "joint" else [task]
        history, spent = learn(
            folder / f"{kind}-{task}", bench, "adam", bench.union(tasks),
            rates=[rate] * len(seeds), strengths=[0.0] * len(seeds), seeds=seeds,
            steps=len(tasks) * bench.steps, evaluations=len(tasks) * evaluations,
            identity={"part": kind, "union": tasks}, **options,
        )  # fmt: skip
        accuracy.append(history.accuracy[:, 0, -1, 0])
        loss.append(history.loss[:, 0, -1, 0])
        seconds += spent
    accuracy, loss = (np.stack(x, 1).tolist() for x in (accuracy, loss))
    return Reference(kind, rate, accuracy, loss, seconds)
