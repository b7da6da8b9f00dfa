"""The loop that the examples share: one task after the other, compiled once.

A *run* is one seed at one learning rate. All runs of a method go through the same
program, side by side by `jax.vmap` on an accelerator and one per core on a CPU, and a
chunk of steps is one `lax.scan`: the program is compiled at the first chunk of the
first task and serves the whole feed. Between chunks every task's test data is scored,
which gives the anytime tensor; between tasks the method's boundary (a basis grows, a
Fisher is estimated) works run by run.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.harness.evaluate import accuracy_and_loss, in_portions
from examples.harness.parallel import by_cores, over_runs
from examples.harness.problem import Data, Feed, Problem, loss_of
from examples.harness.replay import empty_memory, remember, with_classes

__all__ = [
    "History",
    "Position",
    "Runs",
    "empty_history",
    "last",
    "learn",
    "start",
]


class Position(NamedTuple):
    task: int
    step: int


class Runs(NamedTuple):
    """State of all runs; every leaf has a leading axis of runs.

    Attributes:
      params: of the models.
      opt_state: of the optimizers.
      memory: `Memory`, or None for a method without one.
      keys: one PRNG key per run.
    """

    params: Any
    opt_state: Any
    memory: Any
    keys: jax.Array


class History(NamedTuple):
    """What was measured so far, as NumPy arrays with NaN for what is to come.

    Attributes:
      accuracy: (runs, tasks, evaluations, tasks).
      loss: the same in nats.
      curves: name -> (runs, tasks, evaluations), means over the chunk before.
      baseline: (runs, tasks) accuracy before the first step.
    """

    accuracy: np.ndarray
    loss: np.ndarray
    curves: dict[str, np.ndarray]
    baseline: np.ndarray


@functools.partial(
    jax.jit, static_argnames=("problem", "method"), donate_argnames=("params", "state")
)
def _train(
    problem,
    method,
    setting,
    data,
    rates,
    coefficients,
    params,
    state,
    memory,
    keys,
    batches,
):
    """A chunk of steps of every run; `batches` has axes (runs, steps, ...)."""

    def run(rate, coefficient, params, state, memory, key, batches):
        tx = method.build(rate, coefficient, setting)

        def step(carry, now):
            params, state, key = carry
            key, draw = jax.random.split(key)
            batch = problem.batch(data, now)
            objective = jax.value_and_grad(functools.partial(loss_of, problem))
            loss, gradient = objective(params, batch)
            extra = {}
            if method.evidence is not None:
                extra = method.evidence(problem, params, memory, draw)
            updates, state = tx.update(gradient, state, params, **extra)
            seen = problem.observe(gradient, updates, state, setting)
            params = optax.apply_updates(params, updates)
            return (params, state, key), {"loss": loss, **seen}

        first = (params, state, key)
        if len(jax.tree.leaves(batches)[0]) == 1:
            carry, seen = step(first, jax.tree.map(lambda x: x[0], batches))
        else:
            carry, seen = jax.lax.scan(step, first, batches)
        return *carry, jax.tree.map(jnp.mean, seen)

    return over_runs(run)(rates, coefficients, params, state, memory, keys, batches)


def _step_by_step(train: Callable, *run: Any) -> tuple:
    """`train(*run)` with one call per step instead of a scan over all."""
    *rest, params, state, memory, keys, batches = run
    history = []
    for i in range(len(jax.tree.leaves(batches)[0][0])):
        now = jax.tree.map(lambda x, i=i: x[:, i : i + 1], batches)
        params, state, keys, seen = train(*rest, params, state, memory, keys, now)
        history.append(seen)
    mean = jax.tree.map(lambda *x: jnp.stack(x).mean(0), *history)
    return params, state, keys, mean


def start(
    problem, method, setting, rates, coefficients, seeds, feed: Feed, memory_size: int
) -> Runs:
    """The state of all runs before the first step."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    both = jax.vmap(lambda key: jax.random.split(key))(keys)
    params = jax.vmap(problem.init)(both[:, 0])
    initial = jax.vmap(lambda rate, k, p: method.build(rate, k, setting).init(p))
    memory = None
    if method.evidence is not None:
        memory = empty_memory(feed, len(seeds), memory_size)
    return Runs(params, initial(rates, coefficients, params), memory, both[:, 1])


def _boundary(problem, method, setting, runs: Runs, data: Data, task: int):
    """The method's boundary for every run that has not diverged, one by one."""
    states = []
    for i in range(len(runs.keys)):
        one = jax.tree.map(lambda x, i=i: x[i], runs)
        key, state = jax.random.fold_in(one.keys, task), one.opt_state
        if all(np.isfinite(x).all() for x in jax.tree.leaves(one.params)):
            state = method.boundary(problem, setting, one.params, state, data, key)
        states.append(state)
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)
    return runs._replace(opt_state=together)


def empty_history(problem: Problem, runs: int, tasks: int, evaluations: int) -> History:
    def unknown(*shape):
        return np.full(shape, np.nan)

    names = ("loss", *problem.observed)
    curves = {name: unknown(runs, tasks, evaluations) for name in names}
    whole = (runs, tasks, evaluations, tasks)
    return History(unknown(*whole), unknown(*whole), curves, unknown(runs, tasks))


def last(chunks: Iterator[tuple[Position, Runs, History]]):
    """What `learn` yields at the end; a list of all would hold every task's state."""
    (end,) = deque(chunks, maxlen=1)
    return end


def learn(
    problem: Problem,
    method: Any,
    setting: Any,
    feed: Feed,
    *,
    rates: Any,
    coefficients: Any,
    seeds: list[int],
    steps: int,
    evaluations: int = 1,
    memory_size: int = 0,
    resume: tuple[Position, Runs, History] | None = None,
) -> Iterator[tuple[Position, Runs, History]]:
    """Learns the tasks and yields after every chunk, so that the caller can save.

    Args:
      problem: the model.
      method: with `build`, `evidence` and `boundary`, as in `harness.methods`.
      setting: what `method.build` needs besides its numbers.
      feed: the tasks.
      rates: (runs,) learning rates.
      coefficients: (runs,), one for each rate; methods without one ignore it.
      seeds: one per run: of the initial parameters, the order of batches, the memory.
      steps: optimizer steps per task, a multiple of `evaluations`.
      evaluations: per task, evenly spread; the last one at the task's end.
      memory_size: examples kept of every finished task, for methods with a memory.
      resume: what was yielded before an interruption; what follows has the same bits
        as without it.

    Yields:
      `Position` (the chunk that has just ended, boundary included), `Runs`, `History`.
    """
    if steps % evaluations:
        raise ValueError(
            f"steps is {steps}, expected a multiple of the {evaluations} evaluations."
        )
    rates = jnp.asarray(rates, jnp.float32)
    coefficients = jnp.asarray(coefficients, jnp.float32)
    tasks, chunk = len(feed.names), steps // evaluations
    if resume is None:
        runs = start(
            problem, method, setting, rates, coefficients, seeds, feed, memory_size
        )
        history = empty_history(problem, len(seeds), tasks, evaluations)
        done = Position(0, 0)
    else:
        done, runs, history = resume
    test, weight = in_portions(feed.test, np.asarray(feed.weight))
    for task in range(tasks):
        if (task, steps) <= done:
            continue
        data = jax.tree.map(jnp.asarray, feed.train(task))
        masks = jnp.asarray(feed.masks(task))
        test = test._replace(classes=masks)
        train = functools.partial(_train, problem, method, setting, data)
        if problem.convolves and jax.default_backend() == "cpu":
            train = functools.partial(_step_by_step, train)
        score = functools.partial(accuracy_and_loss, problem, test, weight)
        if task == 0 and done == Position(0, 0):
            history.baseline[:], _ = by_cores(score, runs.params)
        if runs.memory is not None:
            runs = runs._replace(memory=with_classes(runs.memory, masks))
        for first in range(0, steps, chunk):
            if (task, first) < done:
                continue
            batches = [feed.batches(task, seed, first, chunk) for seed in seeds]
            batches = jax.tree.map(lambda *x: np.stack(x), *batches)
            params, state, keys, seen = by_cores(
                train, rates, coefficients, *runs, batches
            )
            runs = Runs(params, state, runs.memory, keys)
            at = first // chunk
            accuracy, loss = by_cores(score, runs.params)
            history.accuracy[:, task, at] = accuracy
            history.loss[:, task, at] = loss
            for name, values in seen.items():
                history.curves[name][:, task, at] = values
            end = first + chunk
            if end == steps and method.boundary is not None:
                samples = feed.samples(task)
                runs = _boundary(problem, method, setting, runs, samples, task)
            if end == steps and runs.memory is not None:
                memory = remember(runs.memory, feed.samples(task), task, seeds)
                runs = runs._replace(memory=memory)
            yield Position(task, end), runs, history
