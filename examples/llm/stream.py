"""One method learns one task after the other; what it knows is measured in between."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llm import measures
from examples.llm.data import Part, Stream, spread_rows
from examples.llm.errors import ModelError
from examples.llm.learner import Learner, logits_on, mean_loss
from examples.llm.memory import give_back
from examples.llm.methods import Method
from examples.llm.placement import kept, places_of, put_rows, settled, started
from examples.llm.task_ends import Run, Setting
from examples.llm.tokens import Encoded, batch_rows, take

__all__ = [
    "History",
    "Plan",
    "Position",
    "Sizes",
    "base_logits",
    "learn",
    "start",
    "train_step",
]

KL_ROWS = 8  # general rows on which predictions are compared with the base model's
Answer = Callable[[Any, Any, Part], dict[str, float]]


class Position(NamedTuple):
    """How far a run is: steps of a task that are done; its end counts as one more."""

    task: int
    step: int


class Sizes(NamedTuple):
    """How much is learned, and from how much.

    Attributes:
      steps: of each task.
      batch: rows a step.
      general: rows of general text that are protected before the first task.
      memory: rows of every finished task that replay keeps.
    """

    steps: tuple[int, ...]
    batch: int
    general: int
    memory: int


# What was measured so far, as JSON has it.
History = dict[str, Any]


def empty_history(tasks: int) -> History:
    return {
        "loss_matrix": [[None] * tasks for _ in range(tasks)],
        "score_matrix": [[None] * tasks for _ in range(tasks)],
        "scores": [],
        "general": [],
        "kl": None,
        "train_loss": [[] for _ in range(tasks)],
        "step_seconds": [],
        "boundary_seconds": [],
        "peak_memory": {},
    }


class Plan(NamedTuple):
    """All that runs of one method have in common.

    Attributes:
      learner: the pretrained model.
      method: from `methods`, for what the learner trains.
      setting: of protection.
      sizes: of steps, batches and memories.
      stream: the tasks.
      probe: from `base_logits`.
      answer: (trained, base, part) -> scores of generated answers, the metric first.
      build: (learning rate, coefficient) -> optimizer. One function for all runs of a
        method, so that its step is compiled once.
    """

    learner: Learner
    method: Method
    setting: Setting
    sizes: Sizes
    stream: Stream
    probe: tuple[Any, ...]
    answer: Answer
    build: Callable[[Any, Any], optax.GradientTransformation]


@functools.partial(
    jax.jit,
    static_argnames=("forward", "penalty", "build", "places"),
    donate_argnames=("trained", "opt_state"),
)
def train_step(
    forward, penalty, build, places, rate, coefficient, trained, base, opt_state, batch,
    memory,
):  # fmt: skip
    """One step; parameters and state, which lie at `places`, and the loss."""

    @jax.value_and_grad
    def loss_on(trained, rows):
        return measures.answer_loss(forward(trained, base, rows[0]), *rows)

    extra = {}
    if memory is None:
        loss, gradient = loss_on(trained, batch)
    else:
        # In a loop: side by side, both would hold their activations at once.
        both = jax.tree.map(lambda *rows: jnp.stack(rows), batch, memory)
        losses, gradients = jax.lax.map(functools.partial(loss_on, trained), both)
        loss, gradient = jax.tree.map(lambda x: x[0], (losses, gradients))
        # No answer counts before the first task is finished: the mean is 0/0.
        extra["memory_gradient"] = jax.tree.map(
            lambda g: jnp.where(jnp.any(memory[1]), g[1], 0.0), gradients
        )
    if penalty is not None:
        pull = jax.grad(penalty)(trained, opt_state)
        gradient = jax.tree.map(lambda g, p: g + coefficient * p, gradient, pull)
    tx = build(rate, coefficient)
    updates, opt_state = tx.update(gradient, opt_state, trained, **extra)
    trained = optax.apply_updates(trained, updates)
    return *kept((trained, opt_state), places), loss


def start(plan: Plan, rate: float, coefficient: float) -> Run:
    """The pretrained model and a fresh optimizer; fresh buffers, which steps donate."""
    trained = jax.tree.map(jnp.copy, plan.learner.trained)
    tx, mesh = plan.build(rate, coefficient), plan.learner.model.mesh
    run = Run(trained, plan.learner.base, started(tx, trained, mesh))
    return settled(run, mesh)


def base_logits(learner: Learner, general: Encoded) -> tuple[Any, ...]:
    """Tokens and answers of a few rows, and the logits of the pretrained model."""
    tokens, answer = take(general, np.arange(min(KL_ROWS, len(general.tokens))))
    found = logits_on(learner, learner.trained, learner.base, tokens)
    if np.isnan(found).any():
        raise ModelError(
            f"{learner.model.folder}: the model predicts NaN on general text, expected "
            "numbers: are its weights complete?"
        )
    return tokens, answer, np.asarray(found)


def _kl(learner: Learner, run: Run, probe: tuple[Any, ...]) -> float:
    tokens, answer, before = probe
    after = logits_on(learner, run.trained, run.base, tokens)
    return float(measures.kl_to_base(before, after, answer))


def _replayed(
    plan: Plan, task: int, step: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn from the memories of all finished tasks alike.

    Before there is one, rows of which nothing counts.
    """
    rng = np.random.default_rng([seed, task, step, 1])
    old = [spread_rows(p.train, plan.sizes.memory) for p in plan.stream.parts[:task]]
    count = plan.sizes.batch
    if not old:
        train, rows = plan.stream.parts[0].train, np.zeros(count, int)
        return train.tokens[rows], np.zeros_like(train.answer[rows])
    drawn = [old[i] for i in rng.integers(len(old), size=count)]
    rows = [(memory, rng.integers(len(memory.tokens))) for memory in drawn]
    tokens = np.stack([memory.tokens[i] for memory, i in rows])
    return tokens, np.stack([memory.answer[i] for memory, i in rows])


def _as_wide(rows: tuple[np.ndarray, ...], width: int) -> tuple[np.ndarray, ...]:
    """Tokens and answers with padding, which counts nothing."""
    more = (0, 0), (0, width - rows[0].shape[1])
    return tuple(np.pad(x, more) for x in rows)


def _measure(plan: Plan, run: Run, task: int, history: History) -> None:
    """Losses and scores of all tasks so far, and of general text."""
    at = run.trained, run.base
    for j, part in enumerate(plan.stream.parts[: task + 1]):
        history["loss_matrix"][task][j] = mean_loss(plan.learner, *at, part.test)
        if part.prompts:
            scores = plan.answer(*at, part)
            history["scores"].append({"after": task, "task": j, **scores})
            history["score_matrix"][task][j] = next(iter(scores.values()))
    general = plan.stream.general.test
    history["general"].append(mean_loss(plan.learner, *at, general))


def _diverged(run: Run, history: History) -> bool:
    general = np.array(history["general"][-1:], float)
    numbers = general, *jax.tree.leaves(run.trained)
    return not all(bool(jnp.isfinite(x).all()) for x in numbers)


def _between(
    plan: Plan,
    function: Callable[..., Run],
    run: Run,
    part: Part,
    key: jax.Array,
    history: History,
    count: int | None = None,
) -> Run:
    """What a method does between two tasks, with some rows of one, timed.

    A run that has diverged stays as it is: nothing can be read off it.
    """
    if _diverged(run, history):
        return run
    began = time.perf_counter()
    give_back()
    rows = spread_rows(part.train, plan.setting.captured if count is None else count)
    run = function(plan.learner, plan.setting, run, rows, key)
    run = settled(run, plan.learner.model.mesh)
    jax.block_until_ready(run.trained)
    give_back()
    history["boundary_seconds"].append(time.perf_counter() - began)
    return run


def _begin(plan: Plan, run: Run, key: jax.Array) -> tuple[Run, History]:
    """Measures general text and protects it, where the method can."""
    history = empty_history(len(plan.stream.parts))
    general, count = plan.stream.general, plan.sizes.general
    loss = mean_loss(plan.learner, run.trained, run.base, general.test)
    history["general"].append(loss)
    if plan.method.protects_general and count:
        end = plan.method.end
        run = _between(plan, end, run, general, key, history, count)
    return run, history


def _trained_step(
    plan: Plan, run: Run, numbers: tuple[float, float], task: int, step: int, seed: int
) -> tuple[Run, float]:
    part, sizes, mesh = plan.stream.parts[task], plan.sizes, plan.learner.model.mesh
    rows = batch_rows(task, seed, step, sizes.batch, len(part.train.tokens))
    batch, memory = take(part.train, rows), None
    if plan.method.replays:
        memory = _replayed(plan, task, step, seed)
        batch = _as_wide(batch, memory[0].shape[1])
    places = places_of((run.trained, run.opt_state), mesh)
    trained, state, loss = train_step(
        plan.learner.forward, plan.method.penalty, plan.build, places, *numbers,
        run.trained, run.base, run.opt_state,
        *put_rows((batch, memory), mesh),
    )  # fmt: skip
    return Run(trained, run.base, state), float(loss)


def learn(
    plan: Plan,
    *,
    rate: float,
    coefficient: float,
    seed: int,
    resume: tuple[Position, Run, History] | None = None,
) -> Iterator[tuple[Position, Run, History]]:
    """Learns the tasks and yields after every step and at the end of every task.

    Args:
      plan: method, model, tasks.
      rate: learning rate.
      coefficient: ignored by a method without one.
      seed: of the order of rows and of what is drawn at boundaries.
      resume: what was yielded before an interruption; what follows has the same bits.

    Yields:
      `Position`, `Run`, history. The first is before the first step, general text
      protected.
    """
    method, key = plan.method, jax.random.key(seed)
    if resume is None:
        run = start(plan, rate, coefficient)
        run, history = _begin(plan, run, jax.random.fold_in(key, 0))
        done = Position(0, 0)
        yield done, run, history
    else:
        done, run, history = resume
    parts = zip(plan.stream.parts, plan.sizes.steps, strict=True)
    for task, (part, steps) in enumerate(parts):
        if (task, steps + 1) <= done:
            continue
        if done <= (task, 0) and method.start is not None:
            draw = jax.random.fold_in(key, 2 * task + 1)
            run = _between(plan, method.start, run, part, draw, history)
        for step in range(steps):
            if (task, step) < done:
                continue
            began = time.perf_counter()
            run, loss = _trained_step(plan, run, (rate, coefficient), task, step, seed)
            history["train_loss"][task].append(loss)
            history["step_seconds"].append(time.perf_counter() - began)
            yield Position(task, step + 1), run, history
        _measure(plan, run, task, history)
        if task + 1 == len(plan.stream.parts):
            history["kl"] = _kl(plan.learner, run, plan.probe)
        elif method.end is not None:
            draw = jax.random.fold_in(key, 2 * task + 2)
            run = _between(plan, method.end, run, part, draw, history)
        history["peak_memory"] = measures.peak_memory(history["peak_memory"])
        yield Position(task, steps + 1), run, history
