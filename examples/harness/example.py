"""What an example hands to the harness, and what the harness hands back to it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from examples.harness.loop import History
from examples.harness.methods import Method
from examples.harness.problem import Feed, Problem

__all__ = ["Done", "Example", "Reference", "UsageError"]


class UsageError(ValueError):
    """An argument that cannot be used; the message is meant for the user."""


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
    coefficient: float
    history: History
    seconds: float
    reference: Reference | None


class Example(NamedTuple):
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
      identity: what the runs depend on besides the arguments of `learn`; a checkpoint
        of another one is refused.
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
    score: Callable[[History], np.ndarray]
    steps: int
    memory_size: int
    identity: dict[str, Any]
    row: Callable[[Done, int], dict[str, Any]]
    content: Callable[[list[dict]], dict[str, Any]]
    table: Callable[[list[dict]], Table]
    draw: Callable[[list[dict]], list[Path]]
