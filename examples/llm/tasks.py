"""Tasks for a pretrained language model: rows of prompt and answer, from any layout.

DIR/NAME/{train,eval,test}.json     TRACE folders: lists of {"prompt", "answer"}
DIR/[GROUP/]NAME/{train,dev,test}.json, labels.json      O-LoRA's CL_Benchmark
DIR/NAME.json                       Natural Instructions: Definition and Instances
DIR/NAME.txt, or NAME.train.txt and NAME.valid.txt       plain text
no DIR                              text that is installed with Python

formats.py reads the files. A task of the name `General` is never trained on: it is
the probe of what a model forgets. A folder without one is probed with English prose
from the documentation of installed packages.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from examples.llm import formats, task_folders
from examples.llm.formats import Content, Row
from examples.streams import installed
from examples.streams.domains import DataError
from examples.streams.more_text import MORE_SOURCES

__all__ = ["GENERAL", "KNOWN", "Known", "Tasks", "Task", "load", "one_line"]

GENERAL = "General"
PROBE_BYTES = 300_000


class Known(NamedTuple):
    """What a benchmark says about one of its tasks."""

    metric: str
    epochs: int | None = None


# In the order in which they are learned: TRACE's, then that of the small tasks.
KNOWN = {
    "C-STANCE": Known("exact_match", 5),
    "FOMC": Known("exact_match", 3),
    "MeetingBank": Known("rouge_l", 7),
    "Py150": Known("code_similarity", 5),
    "ScienceQA": Known("first_letter", 3),
    "NumGLUE-cm": Known("exact_match", 5),
    "NumGLUE-ds": Known("exact_match", 5),
    "20Minuten": Known("sari", 7),
    "WikiSQL": Known("sql"),
    "DSTC8-json": Known("json"),
    "TLDR-ko": Known("chrf"),
    "Banking-intent": Known("accuracy"),
    "TLDR-shell": Known("edit_similarity"),
    "PubMedQA": Known("accuracy"),
    "GSM8K-short": Known("number"),
    GENERAL: Known("loss"),
}

# A model that was trained on English and on code has much to learn from them.
INSTALLED = ("translations", "font_metrics", "character_tables")
SOURCES = {
    name: source
    for name, source in (installed.SOURCES | MORE_SOURCES).items()
    if name != "library_docs"  # the probe is made of them
}
PROBE = installed.Source(
    "English prose: paragraphs of whole sentences from the docstrings of "
    f"{', '.join(installed.DOCUMENTED)}",
    installed.SOURCES["library_docs"].belongs,
    formats.read_prose,
    most=PROBE_BYTES,
)


class Task(NamedTuple):
    """One task.

    Attributes:
      name: as in tables and pictures.
      train: rows to train on.
      valid: rows to tune on.
      test: rows to report.
      metric: a name in `scores.METRICS`, or "loss": cross-entropy alone.
      kind: "rows" of prompt and answer; "text": each row is a whole text, which is cut
        into windows.
      source: where it comes from, one line.
      epochs: that the benchmark trains for; None where it says nothing.
    """

    name: str
    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    metric: str
    kind: Literal["rows", "text"]
    source: str
    epochs: int | None = None


class Tasks(NamedTuple):
    """What `load` found.

    Attributes:
      tasks: in the order in which they are learned.
      general: the probe of what the model forgets.
      layout: of the folder, in words.
      notes: what the user should know, one line each.
    """

    tasks: tuple[Task, ...]
    general: Task
    layout: str
    notes: tuple[str, ...]


def one_line(task: Task) -> bool:
    """Whether no training answer has a line feed: then a generated one ends there.

    One at its end does not count; after one at its beginning the answer would be empty.
    """
    return not any("\n" in row.answer.rstrip() for row in task.train)


def _choose(names: Sequence[str] | None, found: Sequence[str], where: str) -> list[str]:
    """The tasks asked for, in that order; without names all, known ones first."""
    offered = [name for name in found if name != GENERAL]
    if names is None:
        rank = {name: index for index, name in enumerate(KNOWN)}
        chosen = sorted(offered, key=lambda name: (rank.get(name, len(rank)), name))
    else:
        chosen = [name.strip() for name in names]
    for name in chosen:
        if name == GENERAL:
            raise DataError(
                f"--tasks: got {GENERAL}, which measures what the model forgets and is "
                f"never trained on, expected some of {', '.join(offered) or 'none'}."
            )
        if name not in offered:
            raise DataError(
                f"--tasks: {name!r} is not in {where}, expected some of "
                f"{', '.join(offered) or 'none: it has no task'}."
            )
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(
            f"--tasks: got {', '.join(chosen) or 'no task'} from {where}, expected at "
            f"least one task and none twice, of {', '.join(offered) or 'none'}."
        )
    return chosen


def _task(name: str, content: Content) -> Task:
    known = KNOWN.get(name) if content.kind == "rows" else None
    metric, epochs = known or (content.metric, None)
    return Task(
        name,
        *content.parts,
        metric=metric,
        kind=content.kind,
        source=content.source,
        epochs=epochs,
    )


@functools.cache
def _probe() -> Task:
    (domain,), _ = installed.load_installed([GENERAL], {GENERAL: PROBE})
    return _task(GENERAL, formats.text_content(domain))


def _load_installed(names: Sequence[str] | None) -> Tasks:
    asked = INSTALLED if names is None else names
    asked = _choose(asked, list(SOURCES), "the installed text")
    domains, messages = installed.load_installed(asked, SOURCES)
    if names is not None and messages:
        raise DataError(f"--tasks: {' '.join(messages)}")
    tasks = tuple(_task(d.name, formats.text_content(d)) for d in domains)
    return Tasks(tasks, _probe(), "installed text", tuple(messages))


def load(data: Path | None, names: Sequence[str] | None = None) -> Tasks:
    """Reads the tasks in a folder, or those that are installed with Python.

    Args:
      data: a folder in one of the layouts above; None: installed text.
      names: tasks to learn, in that order; None: all, in the benchmark's order where
        it has one, then by name.

    Raises:
      DataError: if the folder has no known layout, a task lacks a part, a row is not
        as the layout says, or the names are not those of tasks.
    """
    if data is None:
        return _load_installed(names)
    layout, found, read = formats.detect(data)
    chosen = _choose(names, found, f"--data {data}")
    tasks = tuple(_task(name, read(name)) for name in chosen)
    notes = [f"{data}: {layout}.", *filter(None, [task_folders.left_out(data)])]
    for task in tasks:
        if task.kind == "rows" and task.name not in KNOWN:
            notes.append(
                f"{task.name}: no metric is known for a task of this name, "
                f"{task.metric} is taken."
            )
    if GENERAL in found:
        general = _task(GENERAL, read(GENERAL))
    else:
        general = _probe()
        notes.append(f"{GENERAL}: {data} has none, taken instead: {general.source}.")
    return Tasks(tasks, general, layout, tuple(notes))
