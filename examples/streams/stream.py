"""What a stream is: plain arrays, one row of tasks after the other, and its scenario.

The three scenarios (van de Ven and Tolias, "Three scenarios for continual learning",
arXiv 1904.07734) differ in what is known when a prediction is made:

  task    the task is given; each task has outputs of its own (a multi-head network)
  domain  the task is not given; all tasks share their outputs
  class   the task is not given and the outputs are told apart over all tasks so far
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

SCENARIOS = {
    "task": "the task is given; outputs of other tasks are masked (multi-head)",
    "domain": "the task is not given; all tasks share all outputs",
    "class": "the task is not given; all outputs of the tasks so far compete",
}


class Part(NamedTuple):
    """Examples, stacked over tasks or (in a `Task`) of one.

    Attributes:
      x: (tasks, n, ...); images float32 (height, width, channels) or flat, text int32
        (context,).
      y: int32 (tasks, n) labels, or (tasks, n, context) next symbols; each is the
        output unit that should win.
      weight: float32 (tasks, n): 1 for an example, 0 for padding. A task with fewer
        examples than the longest one is padded with its own, so that all tasks have one
        shape. Means over examples have to use it.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray


class Task(NamedTuple):
    """One task of a `Stream`; the same shapes for every task of it."""

    id: int
    name: str
    scenario: str
    train: Part
    valid: Part
    test: Part
    classes: np.ndarray
    class_mask: np.ndarray


class Stream(NamedTuple):
    """Tasks in the order they are learned.

    Attributes:
      name: as in `load`.
      scenario: "task", "domain" or "class".
      about: how the tasks were made, one line.
      task_names: one a task; its position is the task's id.
      train: what to learn from.
      valid: held out from the training examples; for choices (see `for_tuning`).
      test: the data set's own test examples; for results.
      classes: int32 (tasks, k): the data set's class behind a task's k labels, in the
        order of its outputs.
      class_mask: bool (tasks, outputs): the outputs a task's labels are among.
      facts: what is known exactly of the construction: permutations, angles, overlap,
        entropy.
    """

    name: str
    scenario: str
    about: str
    task_names: tuple[str, ...]
    train: Part
    valid: Part
    test: Part
    classes: np.ndarray
    class_mask: np.ndarray
    facts: dict[str, Any]


def task(stream: Stream, index: int) -> Task:
    """Task `index` of the stream; its arrays are views."""
    if not 0 <= index < len(stream.task_names):
        raise IndexError(
            f"index: got {index}, expected 0 to {len(stream.task_names) - 1}."
        )
    parts = {
        name: Part(*(array[index] for array in getattr(stream, name)))
        for name in ("train", "valid", "test")
    }
    return Task(
        id=index,
        name=stream.task_names[index],
        scenario=stream.scenario,
        classes=stream.classes[index],
        class_mask=stream.class_mask[index],
        **parts,
    )


def output_mask(stream: Stream, learned: int, task: int) -> np.ndarray:
    """The outputs that compete on `task` when tasks 0 ... `learned` have been learned.

    While task t is learned: `output_mask(stream, t, t)`. Outputs outside are to be set
    to minus infinity before the softmax and the argmax.

    Returns:
      bool (outputs,). Task: those of the task. Domain: all. Class: those of all tasks
      learned so far, and of `task` where that is a later one.
    """
    if stream.scenario == "class":
        return stream.class_mask[: max(learned, task) + 1].any(0)
    return stream.class_mask[task]


def for_tuning(stream: Stream, tasks: int = 3) -> Stream:
    """The first tasks alone, with their validation examples in place of the test ones.

    A search for hyperparameters that runs on this cannot see a test example or a later
    task (the protocol of A-GEM, arXiv 1812.00420, which takes three tasks). Outputs
    and facts stay as in the whole stream.
    """
    count = len(stream.task_names)
    if not 1 <= tasks <= count:
        raise ValueError(f"tasks: got {tasks}, expected 1 to {count}.")
    train, valid = (
        Part(*(array[:tasks] for array in part))
        for part in (stream.train, stream.valid)
    )
    return stream._replace(
        task_names=stream.task_names[:tasks],
        train=train,
        valid=valid,
        test=valid,
        classes=stream.classes[:tasks],
        class_mask=stream.class_mask[:tasks],
    )


def batch_indices(
    part: Part, steps: int, batch: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows for `steps` batches, epoch after epoch, each in a new order, no padding.

    Args:
      part: of one `Task`.
      steps: the same for every task: then one compilation serves them all.
      batch: rows a step.
      rng: source of the order.

    Returns:
      int32 (steps, batch).
    """
    rows = np.flatnonzero(part.weight)
    epochs = -(-steps * batch // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    return order[: steps * batch].reshape(steps, batch).astype(np.int32)


def stack(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], sizes: Sequence[int]
) -> Part:
    """Examples of task after task in arrays of one shape.

    Args:
      examples: (x, y) of each task, made one at a time: only one is held twice.
      sizes: how many examples each task has.
    """
    rows, x, y = max(sizes), None, None
    for index, (own_x, own_y) in enumerate(examples):
        if x is None or y is None:
            x = np.empty((len(sizes), rows, *own_x.shape[1:]), own_x.dtype)
            y = np.empty((len(sizes), rows, *own_y.shape[1:]), np.int32)
        x[index, : len(own_x)], y[index, : len(own_y)] = own_x, own_y
        again = np.arange(len(own_x), rows) % len(own_x)
        x[index, len(own_x) :], y[index, len(own_y) :] = own_x[again], own_y[again]
    weight = np.arange(rows) < np.asarray(sizes)[:, None]
    return Part(x, y, weight.astype(np.float32))


def number_outputs(
    scenario: str, classes: np.ndarray, known: Sequence[str] = tuple(SCENARIOS)
) -> tuple[Callable[[int, np.ndarray], np.ndarray], np.ndarray]:
    """How a task's labels become outputs.

    Args:
      scenario: one of `known`.
      classes: (tasks, k) class behind each label of each task. Tasks that repeat
        classes (a permuted stream) get outputs of their own in the task and class
        scenarios: a class there is a pair of task and label.
      known: the scenarios that make sense for the stream.

    Returns:
      The function (task, label) -> output, and the class mask (tasks, outputs).
    """
    if scenario not in known:
        raise ValueError(f"scenario: got {scenario!r}, expected {' or '.join(known)}.")
    tasks, k = classes.shape
    if scenario == "domain":
        return lambda task, label: label, np.ones((tasks, k), bool)
    disjoint = len(np.unique(classes)) == classes.size
    ids = classes if disjoint else np.arange(tasks * k).reshape(tasks, k)
    mask = np.zeros((tasks, ids.max() + 1), bool)
    np.put_along_axis(mask, ids, True, axis=1)
    return lambda task, label: ids[task][label], mask


def describe(stream: Stream) -> str:
    """The lines to print when a run starts: scenario, head, tasks, sizes."""
    scenario = stream.scenario
    lines = [
        f"{stream.name}: {stream.about}",
        f"scenario: {scenario}-incremental: {SCENARIOS[scenario]}",
        f"outputs: {stream.class_mask.shape[1]}, examples {stream.train.x.shape[2:]} "
        f"{stream.train.x.dtype}",
    ]
    for index, name in enumerate(stream.task_names):
        sizes = ", ".join(
            f"{int(getattr(stream, part).weight[index].sum())} {part}"
            for part in ("train", "valid", "test")
        )
        lines.append(f"task {index}: {name} ({sizes})")
    return "\n".join(lines)
