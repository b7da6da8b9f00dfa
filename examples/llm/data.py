"""The tasks as arrays: what is trained on, scored, looked at and remembered."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from examples.llm.formats import Row
from examples.llm.tasks import Task, Tasks
from examples.llm.tokens import Encoded, Encoder, cuts, encode

__all__ = ["Part", "Stream", "prepare", "spread_rows"]


class Part(NamedTuple):
    """One task.

    Attributes:
      task: its rows as text.
      train: as arrays.
      test: the rows that losses are of; for tuning, the validation rows.
      prompts: the first rows of `test`, to be answered; none where loss is the metric.
    """

    task: Task
    train: Encoded
    test: Encoded
    prompts: tuple[Row, ...]


class Stream(NamedTuple):
    """What is learned in sequence, and the probe of what is forgotten besides.

    Attributes:
      parts: in the order in which they are learned.
      general: of which `train` can be protected before the first task.
    """

    parts: tuple[Part, ...]
    general: Part


def spread_rows(encoded: Encoded, count: int) -> Encoded:
    """Some rows, evenly spread."""
    n = len(encoded.tokens)
    rows = np.linspace(0, n - 1, min(count, n)).round().astype(int)
    return Encoded(*(x[rows] for x in encoded[:4]), 0, 0, 0, 0)


def _ignored(told: str) -> None:
    del told


def prepare(
    tasks: Tasks,
    encoder: Encoder,
    *,
    context: int,
    scored: int,
    generated: int = 0,
    held_out: Literal["test", "valid"] = "test",
    say: Callable[[str], None] = _ignored,
) -> Stream:
    """Encodes the tasks and says what did not fit into the context.

    Args:
      tasks: from `tasks.load`.
      encoder: of the model.
      context: tokens of a row.
      scored: rows that losses are of, at most, of each task.
      generated: rows that are answered, of each task.
      held_out: the part that rows to score and to answer come from.
      say: called with one line for what was cut.
    """

    def encoded(task: Task, part: str) -> Encoded:
        found = encode(task, part, encoder, context)
        if told := cuts(f"{task.name}, {part}", found):
            say(told)
        return found

    def part(task: Task) -> Part:
        train, test = encoded(task, "train"), encoded(task, held_out)
        test = spread_rows(test, scored)
        rows = getattr(task, held_out)
        kept = test.kept[:generated] if task.metric != "loss" else ()
        return Part(task, train, test, tuple(rows[i] for i in kept))

    return Stream(tuple(map(part, tasks.tasks)), part(tasks.general))
