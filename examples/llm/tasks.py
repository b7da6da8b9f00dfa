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

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from examples.llm import formats
from examples.llm.formats import Row
from examples.streams import installed
from examples.streams.domains import DataError, Domain
from examples.streams.more_text import MORE_SOURCES

__all__ = ["GENERAL", "KNOWN", "Known", "Tasks", "Task", "load", "one_line"]

GENERAL = "General"
VALID_SHARE = 0.1  # of a text's training part
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


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
INSTALLED = ("translations", "font_metrics", "character_tables", "c_headers")
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
    """Whether no training answer has a line feed: then a generated one ends there."""
    return not any("\n" in row.answer.strip() for row in task.train)


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


def _decoded(domain: Domain, part: str) -> str:
    """The text; a character that was cut in two at the end of a part is left out."""
    raw = bytes(getattr(domain, part)).lstrip(CONTINUATION)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        raise DataError(
            f"--data: {' and '.join(domain.files[part])} is not UTF-8 ({error.reason} "
            f"at byte {error.start}), expected text in UTF-8."
        ) from error
    if not text.strip():
        raise DataError(
            f"--data: the {part} text of {domain.name} ({domain.source}) is empty, "
            "expected text."
        )
    return text


def _of_text(domain: Domain) -> Task:
    """Continued pre-training; the tail of the training text is there to tune on."""
    train, test = (_decoded(domain, part) for part in ("train", "valid"))
    cut = len(train) - int(len(train) * VALID_SHARE)
    parts = ((Row("", text),) for text in (train[:cut], train[cut:], test))
    return Task(domain.name, *parts, metric="loss", kind="text", source=domain.source)


def _from_installed(
    names: Sequence[str], sources: dict
) -> tuple[list[Task], list[str]]:
    domains, messages = installed.load_installed(names, sources)
    return [_of_text(domain) for domain in domains], messages


def _probe() -> Task:
    (task,), _ = _from_installed([GENERAL], {GENERAL: PROBE})
    return task


def _load_installed(names: Sequence[str] | None) -> Tasks:
    asked = INSTALLED if names is None else names
    asked = _choose(asked, list(SOURCES), "the installed text")
    tasks, messages = _from_installed(asked, SOURCES)
    if names is not None and messages:
        raise DataError(f"--tasks: {' '.join(messages)}")
    return Tasks(tuple(tasks), _probe(), "installed text", tuple(messages))


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
    chosen = _choose(names, list(found), f"--data {data}")
    notes = [f"{data}: {layout}."]

    def task(name):
        if layout == formats.TEXT:
            return _of_text(read(name))
        content = read(name)
        known = KNOWN.get(name, Known(content.metric))
        return Task(
            name,
            *content.parts,
            metric=known.metric,
            kind="rows",
            source=str(found[name]),
            epochs=known.epochs,
        )

    tasks = [task(name) for name in chosen]
    for own in tasks:
        if own.kind == "rows" and own.name not in KNOWN:
            notes.append(
                f"{own.name}: no metric is known for a task of this name, {own.metric} "
                "is taken."
            )
    general = task(GENERAL) if GENERAL in found else _probe()
    if GENERAL not in found:
        notes.append(f"{GENERAL}: {data} has none, taken instead: {general.source}.")
    return Tasks(tuple(tasks), general, layout, tuple(notes))
