"""Runs of the shared loop that survive: a method's, its tuning's, a reference's.

Each continues from its last checkpoint under `out/checkpoints/<label>` and ends with
the same bits as a run that was never stopped.
"""

import contextlib
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamr import checkpoint
from examples.harness import loop
from examples.harness.example import Example, Reference, UsageError
from examples.harness.methods import named
from examples.harness.problem import Feed
from examples.harness.report import finite

TUNING_SEED = 1000  # of no reported run

__all__ = ["Stopped", "learn", "reference", "tune"]


class Stopped(Exception):
    """SIGTERM came, and everything is saved."""


def _map(function: Callable, history: dict) -> dict:
    """A new dict in the same order, which `jax.tree.map` would not keep."""
    return {
        name: _map(function, x) if isinstance(x, dict) else function(x)
        for name, x in history.items()
    }


def _as_json(history: loop.History) -> dict:
    return finite(_map(np.ndarray.tolist, history._asdict()))


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
    example: Example,
    name: str,
    feed: Feed,
    *,
    rates: Sequence[float],
    coefficients: Sequence[float],
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
      example: whose problem is learnt.
      name: of the method.
      feed: the tasks.
      rates: (runs,) learning rates.
      coefficients: (runs,), one for each learning rate; 0 where a method has none.
      seeds: one per run.
      steps: per task.
      evaluations: per task.
      every: seconds between checkpoints.
      report: called after every chunk; for a run that continues, also for its past.
      identity: what else the runs depend on, besides the example's identity.

    Returns:
      What was measured, and the wall time of all parts.

    Raises:
      UsageError: for a checkpoint of other hyperparameters or versions, or while
        another process learns there.
      Stopped: after SIGTERM.
    """
    start, before = time.perf_counter(), 0.0
    method = example.methods[name]
    setting = example.setting(name, len(feed.names))
    options = dict(seeds=list(seeds), steps=steps, evaluations=evaluations)
    options |= dict(rates=list(rates), coefficients=list(coefficients))
    options |= dict(memory_size=example.memory_size)
    saver = checkpoint.Checkpoints(
        folder,
        config={**example.identity, **(identity or {}), **options, "method": name},
        every=datetime.timedelta(seconds=every),
    )

    def place(step: int) -> loop.Position:
        task, within = divmod(step - 1, steps)
        return loop.Position(task, within + 1)

    with contextlib.ExitStack() as stack:
        with _for_the_user(RuntimeError):
            saver = stack.enter_context(saver)
        like = loop.start(
            example.problem, method, setting, jnp.asarray(rates, jnp.float32),
            jnp.asarray(coefficients, jnp.float32), seeds, feed, example.memory_size,
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
            example.problem, method, setting, feed, resume=resume, **options
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
    example: Example,
    name: str,
    rates: Sequence[float],
    coefficients: Sequence[float],
    **options: Any,
) -> dict[str, Any]:
    """The candidates' scores on the first tasks' validation data, and the best one.

    All pairs of rate and coefficient run side by side. Nothing of later tasks, no test
    data and no seed of a result is seen.
    """
    method, pairs = example.methods[name], list(itertools.product(rates, coefficients))
    history, _ = learn(
        folder / f"tuning-{name}", example, name, example.tuning(), steps=example.steps,
        rates=[rate for rate, _ in pairs], coefficients=[k for _, k in pairs],
        seeds=[TUNING_SEED] * len(pairs), identity={"part": "tuning"}, **options,
    )  # fmt: skip
    scores = example.score(history)
    usable = np.where(np.isfinite(scores), scores, -np.inf)
    candidates = [
        {"learning_rate": rate, **named(method, k), "score": float(score)}
        for (rate, k), score in zip(pairs, scores, strict=True)
    ]
    return {"candidates": candidates, "best": candidates[int(usable.argmax())]}


def reference(
    folder: Path,
    example: Example,
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
    for task in range(len(example.feed.names)):
        tasks = list(range(task + 1)) if kind == "joint" else [task]
        history, spent = learn(
            folder / f"{kind}-{task}", example, "adam", example.union(tasks),
            rates=[rate] * len(seeds), coefficients=[0.0] * len(seeds), seeds=seeds,
            steps=len(tasks) * example.steps, evaluations=len(tasks) * evaluations,
            identity={"part": kind, "union": tasks}, **options,
        )  # fmt: skip
        accuracy.append(history.accuracy[:, 0, -1, 0])
        loss.append(history.loss[:, 0, -1, 0])
        seconds += spent
    accuracy, loss = (np.stack(x, 1).tolist() for x in (accuracy, loss))
    return Reference(kind, rate, accuracy, loss, seconds)
