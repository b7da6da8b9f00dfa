"""The loop that the examples share: one task after the other, compiled once.

A *run* is one seed at one learning rate. All runs of a method go through the same
program, side by side by `jax.vmap` on an accelerator and one per core on a CPU, and a
chunk of steps is one `lax.scan`: the program is compiled at the first chunk of the
first task and serves the whole feed. Between
chunks every task's test data is scored, which gives the anytime tensor; between tasks
the method's boundary (a basis grows, a Fisher is estimated) works run by run.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PORTION = 512  # test examples scored at once

__all__ = [
    "Data",
    "Feed",
    "History",
    "Memory",
    "Position",
    "Problem",
    "Runs",
    "learn",
    "empty_history",
    "loss_of",
    "start",
]


class Data(NamedTuple):
    """Examples of one task, or of several with a leading axis.

    Attributes:
      inputs: (n, ...).
      labels: (n, ...) int32.
      classes: (all classes,) bool, False for logits that do not take part.
    """

    inputs: Any
    labels: Any
    classes: Any


class Feed(NamedTuple):
    """What the loop needs of a feed.

    Attributes:
      names: of the tasks.
      batches: `(task, seed, first, steps) -> (steps, ...)`: what `Problem.batch` needs
        for these steps of a task, the same at every call with the same arguments.
      train: task -> its training data, as `Problem.batch` takes it.
      samples: task -> its `Data`, from which its boundary and the memory draw.
      test: `Data` with a leading axis of tasks.
      weight: (tasks, n) of the test examples, 0 for padding.
      masks: task being learned -> (tasks, all classes) bool, the classes that compete.
    """

    names: list[str]
    batches: Callable[[int, int, int, int], Any]
    train: Callable[[int], Any]
    samples: Callable[[int], Data]
    test: Data
    weight: Any
    masks: Callable[[int], Any]


class Problem(NamedTuple):
    """A model as the loop sees it; functions of one run.

    Attributes:
      init: key -> params.
      logits: (params, inputs) -> (batch, ..., all classes).
      batch: (task's training data, what `Stream.batches` gave) -> `Data`.
      capture: (params, inputs) -> layer inputs, a tree like params; runs eagerly.
      observe: (gradient, updates, opt_state, setting) -> scalars of a step by name.
      observed: the names of these scalars.
      convolves: XLA's CPU compiler is ten times slower with gradients of convolutions
        inside a loop than outside, so there each step becomes a call of its own.
    """

    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, Any], jax.Array]
    batch: Callable[[Any, Any], Data]
    capture: Callable[[Any, Any], Any]
    observe: Callable[..., dict[str, jax.Array]] = lambda *_: {}
    observed: tuple[str, ...] = ()
    convolves: bool = False


class Memory(NamedTuple):
    """A fixed number of examples of every finished task.

    Attributes:
      data: `Data` with a leading axis of tasks; zeros where nothing is stored yet.
      seen: (tasks,) bool.
    """

    data: Data
    seen: jax.Array


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


def loss_of(problem: Problem, params: Any, data: Data) -> jax.Array:
    """Mean cross-entropy in nats over the classes that take part."""
    logits = _masked(problem.logits(params, data.inputs), data.classes)
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()


def _masked(logits: jax.Array, classes: jax.Array) -> jax.Array:
    shape = (*classes.shape[:-1], *[1] * (logits.ndim - classes.ndim), -1)
    return jnp.where(classes.reshape(shape), logits, -1e30)


def over_runs(function: Callable) -> Callable:
    """`jax.vmap`; a single run keeps the faster unbatched program."""

    def call(*args):
        if len(jax.tree.leaves(args[0])[0]) > 1:
            return jax.vmap(function)(*args)
        one = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)

    return call


def _by_cores(function: Callable, *runs: Any) -> Any:
    """`function(*runs)`; on a CPU run by run, as many at a time as there are cores.

    A CPU gains nothing from batched products and loses much with batched convolutions,
    and one run's arrays fit its cache. Each run ends the same, bit for bit, whatever
    runs beside it.
    """
    count = len(jax.tree.leaves(runs)[0])
    if count == 1 or jax.default_backend() != "cpu":
        return function(*runs)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], runs) for i in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda x: jax.block_until_ready(function(*x)), parts))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *done)


@functools.partial(
    jax.jit, static_argnames=("problem", "method"), donate_argnames=("params", "state")
)
def _train(
    problem,
    method,
    setting,
    data,
    rates,
    strengths,
    params,
    state,
    memory,
    keys,
    batches,
):
    """A chunk of steps of every run; `batches` has axes (runs, steps, ...)."""

    def run(rate, strength, params, state, memory, key, batches):
        tx = method.build(rate, strength, setting)

        def step(carry, now):
            params, state, key = carry
            key, draw = jax.random.split(key)
            batch = problem.batch(data, now)
            objective = functools.partial(loss_of, problem)
            loss, gradient = jax.value_and_grad(objective)(params, batch)
            extra = {}
            if method.evidence is not None:
                extra = method.evidence(jax.grad(objective), params, memory, draw)
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

    return over_runs(run)(rates, strengths, params, state, memory, keys, batches)


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


def _in_portions(test: Data, weight: Any) -> tuple[Data, jax.Array]:
    """Test data as (tasks, portions, size, ...), padded with its own first examples."""
    count = weight.shape[1]
    size = min(PORTION, count)
    rows = np.arange(-(-count // size) * size) % count
    weight = np.where(np.arange(len(rows)) < count, weight[:, rows], 0.0)

    def split(x):
        x = np.asarray(x)[:, rows]
        return jnp.asarray(x.reshape(len(x), -1, size, *x.shape[2:]))

    inputs, labels = split(test.inputs), split(test.labels)
    weight = jnp.asarray(weight.reshape(labels.shape[:3]), jnp.float32)
    return Data(inputs, labels, test.classes), weight


@functools.partial(jax.jit, static_argnames="problem")
def _score(problem, test, weight, params):
    """Accuracy and loss, (runs, tasks), in portions so that memory stays small."""

    def run(params):
        def task(both):
            data, weight = both

            def portion(now):
                inputs, labels, weight = now
                logits = _masked(problem.logits(params, inputs), data.classes)
                right = logits.argmax(-1) == labels
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                over = tuple(range(1, labels.ndim))
                return weight @ right.mean(over), weight @ losses.mean(over)

            right, loss = jax.lax.map(portion, (data.inputs, data.labels, weight))
            return right.sum() / weight.sum(), loss.sum() / weight.sum()

        return jax.lax.map(task, (test, weight))

    return over_runs(run)(params)


def start(
    problem, method, setting, rates, strengths, seeds, feed: Feed, memory_size: int
) -> Runs:
    """The state of all runs before the first step."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    both = jax.vmap(lambda key: jax.random.split(key))(keys)
    params = jax.vmap(problem.init)(both[:, 0])
    initial = jax.vmap(lambda rate, k, p: method.build(rate, k, setting).init(p))
    memory = None
    if method.evidence is not None:
        like, runs, tasks = feed.samples(0), len(seeds), len(feed.names)
        room = (runs, tasks, memory_size)
        memory = Memory(
            Data(
                jnp.zeros((*room, *like.inputs.shape[1:]), like.inputs.dtype),
                jnp.zeros((*room, *like.labels.shape[1:]), jnp.int32),
                jnp.ones((runs, tasks, like.classes.shape[-1]), bool),
            ),
            jnp.zeros((runs, tasks), bool),
        )
    return Runs(params, initial(rates, strengths, params), memory, both[:, 1])


def _remembered(memory: Memory, data: Data, task: int, seeds) -> Memory:
    """The memory with some examples of a task in it, drawn anew for every run."""
    room = memory.data.labels.shape[2]
    chosen = np.stack(
        [
            np.random.default_rng([seed, task, 1]).choice(
                len(data.labels), room, replace=room > len(data.labels)
            )
            for seed in seeds
        ]
    )
    new = Data(
        np.asarray(data.inputs)[chosen],
        np.asarray(data.labels)[chosen],
        np.broadcast_to(np.asarray(data.classes), memory.data.classes[:, 0].shape),
    )
    put = jax.tree.map(lambda m, x: m.at[:, task].set(x), memory.data, new)
    return Memory(put, memory.seen.at[:, task].set(True))


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


def learn(
    problem: Problem,
    method: Any,
    setting: Any,
    feed: Feed,
    *,
    rates: Any,
    strengths: Any,
    seeds: list[int],
    steps: int,
    evaluations: int = 1,
    memory_size: int = 0,
    resume: tuple[Position, Runs, History] | None = None,
) -> Iterator[tuple[Position, Runs, History]]:
    """Learns the tasks and yields after every chunk, so that the caller can save.

    Args:
      problem: the model.
      method: from `examples.methods`; with `build`, `evidence` and `boundary`.
      setting: what `method.build` needs beside the learning rate.
      feed: the tasks.
      rates: (runs,) learning rates.
      strengths: (runs,) of penalties; methods without one ignore it.
      seeds: one per run: of the initial parameters, the order of batches, the memory.
      steps: optimizer steps per task, a multiple of `evaluations`.
      evaluations: per task, evenly spread; the last one at the task's end.
      memory_size: examples kept of every finished task, for methods with a memory.
      resume: what was yielded before an interruption; goes on after it, bit for bit.

    Yields:
      `Position` (the chunk that has just ended, boundary included), `Runs`, `History`.
    """
    if steps % evaluations:
        raise ValueError(
            f"steps is {steps}, expected a multiple of the {evaluations} evaluations."
        )
    rates = jnp.asarray(rates, jnp.float32)
    strengths = jnp.asarray(strengths, jnp.float32)
    tasks, chunk = len(feed.names), steps // evaluations
    if resume is None:
        runs = start(
            problem, method, setting, rates, strengths, seeds, feed, memory_size
        )
        history = empty_history(problem, len(seeds), tasks, evaluations)
        done = Position(0, 0)
    else:
        done, runs, history = resume
    test, weight = _in_portions(feed.test, np.asarray(feed.weight))
    for task in range(tasks):
        if (task, steps) <= done:
            continue
        data = jax.tree.map(jnp.asarray, feed.train(task))
        masks = jnp.asarray(feed.masks(task))
        test = test._replace(classes=masks)
        train = functools.partial(_train, problem, method, setting, data)
        if problem.convolves and jax.default_backend() == "cpu":
            train = functools.partial(_step_by_step, train)
        score = functools.partial(_score, problem, test, weight)
        if task == 0 and done == Position(0, 0):
            history.baseline[:], _ = _by_cores(score, runs.params)
        if runs.memory is not None:
            wide = jnp.broadcast_to(masks, runs.memory.data.classes.shape)
            stored = runs.memory.data._replace(classes=wide)
            runs = runs._replace(memory=runs.memory._replace(data=stored))
        for first in range(0, steps, chunk):
            if (task, first) < done:
                continue
            batches = [feed.batches(task, seed, first, chunk) for seed in seeds]
            batches = jax.tree.map(lambda *x: np.stack(x), *batches)
            params, state, keys, seen = _by_cores(
                train, rates, strengths, *runs, batches
            )
            runs = Runs(params, state, runs.memory, keys)
            at = first // chunk
            accuracy, loss = _by_cores(score, runs.params)
            history.accuracy[:, task, at] = accuracy
            history.loss[:, task, at] = loss
            for name, values in seen.items():
                history.curves[name][:, task, at] = values
            end = first + chunk
            if end == steps and method.boundary is not None:
                samples = feed.samples(task)
                runs = _boundary(problem, method, setting, runs, samples, task)
            if end == steps and runs.memory is not None:
                memory = _remembered(runs.memory, feed.samples(task), task, seeds)
                runs = runs._replace(memory=memory)
            yield Position(task, end), runs, history
