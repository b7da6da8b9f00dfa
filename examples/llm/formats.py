"""Readers of task files: JSON in three forms, plain text, prose of docstrings."""

import codecs
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from examples.llm.task_folders import CL_BENCHMARK, FILES, SPLITS, TRACE, task_folders
from examples.streams import domains, installed
from examples.streams.domains import DataError, Domain
from examples.streams.files import listing, visible

__all__ = [
    "CL_BENCHMARK",
    "INSTRUCTIONS",
    "TEXT",
    "TRACE",
    "Content",
    "Row",
    "detect",
    "read_prose",
    "text_content",
]

INSTRUCTIONS = "Natural Instructions files"
TEXT = "plain text"

TENTHS = (8, 1, 1)  # of a file without splits: to train, to tune, to test

VALID_SHARE = 0.1  # of a text's training part
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
LONG_PARAGRAPH = 200  # characters
LETTERS = 0.9  # share of letters, blanks and commas in prose


class Row(NamedTuple):
    """A prompt and the answer that follows it as it is; the prompt may be empty."""

    prompt: str
    answer: str


class Content(NamedTuple):
    """What a task's files hold.

    Attributes:
      parts: rows to train, to tune and to test on.
      metric: for a task of an unknown name.
      source: where it comes from, one line.
      kind: "rows" of prompt and answer; "text": each row is a whole text.
    """

    parts: tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]
    metric: str
    source: str
    kind: Literal["rows", "text"] = "rows"


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected this file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: found a file that is not JSON in UTF-8 ({error}), expected JSON."
        ) from error


def _text(path: Path, index: int, row: Any, key: str) -> str:
    """One entry of a row; of several valid outputs the first."""
    if not isinstance(row, dict):
        raise DataError(
            f"{path}: row {index} is {row!r:.80}, expected an object with {key!r}."
        )
    if key not in row:
        raise DataError(
            f"{path}: row {index} has the keys {', '.join(row) or 'none'}, expected "
            f"also {key!r}."
        )
    value = row[key]
    if key == "output" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise DataError(
            f"{path}: row {index} has {key} = {value!r:.80}, expected a string."
        )
    return value


def _checked(path: Path, rows: list[Row]) -> tuple[Row, ...]:
    if not rows:
        raise DataError(f"{path}: found no rows, expected at least one.")
    for index, row in enumerate(rows):
        if not row.answer.strip():
            raise DataError(
                f"{path}: the answer of row {index} is empty (its prompt begins "
                f"{row.prompt[:40]!r}), expected text."
            )
    return tuple(rows)


class _Form(NamedTuple):
    """How a file writes a row: two keys, and what its prompt is put between."""

    prompt: str
    answer: str
    before: str = ""
    after: str = ""


def _instructions_form(path: Path, content: dict) -> _Form:
    told = content.get("Definition", [])
    told = [told] if isinstance(told, str) else told
    if not isinstance(told, list) or not all(isinstance(line, str) for line in told):
        raise DataError(
            f"{path}: Definition is {told!r:.80}, expected a string or a list of them."
        )
    before = "\n".join([*told, ""]) + "Input: "
    return _Form("input", "output", before, "\nOutput:\n")


def _form(path: Path, content: Any, labels: list[str] | None) -> tuple[_Form, list]:
    """The form of a file and its rows."""
    if isinstance(content, dict) and isinstance(content.get("Instances"), list):
        return _instructions_form(path, content), content["Instances"]
    if not isinstance(content, list):
        found = type(content).__name__
        found = f"the keys {', '.join(content)}" if found == "dict" else found
        raise DataError(
            f'{path}: found {found}, expected a list of rows, or "Instances" with one.'
        )
    if content and isinstance(content[0], dict) and "sentence" in content[0]:
        before = f"Options: {', '.join(labels)}\n" if labels else ""
        return _Form("sentence", "label", before, "\nAnswer:\n"), content
    return _Form("prompt", "answer"), content


def read_rows(path: Path, labels: list[str] | None = None) -> tuple[Row, ...]:
    """The rows of a file, in whichever of three forms it has.

    Args:
      path: [{"prompt", "answer"}], [{"sentence", "label"}], or {"Instances":
        [{"input", "output"}]} with or without a "Definition".
      labels: from which a sentence's label is chosen; its prompt lists them.
    """
    form, found = _form(path, read_json(path), labels)
    rows = []
    for index, row in enumerate(found):
        prompt, answer = (_text(path, index, row, key) for key in form[:2])
        rows.append(Row(f"{form.before}{prompt}{form.after}", answer))
    return _checked(path, rows)


def read_labels(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    labels = read_json(path)
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise DataError(f"{path}: found {labels!r}, expected a list of strings.")
    return labels


def _read_folder(folder: Path, layout: str) -> Content:
    splits = SPLITS[layout]
    lacking = [f"{s}.json" for s in splits if not (folder / f"{s}.json").is_file()]
    if lacking:
        raise DataError(
            f"{folder}: found {listing(folder)}, expected also {' and '.join(lacking)}."
        )
    labels = read_labels(folder / "labels.json")
    train, valid, test = (read_rows(folder / f"{s}.json", labels) for s in splits)
    metric = "accuracy" if labels else "exact_match"
    return Content((train, valid, test), metric, str(folder))


def _bucket(row: Row) -> int:
    digest = hashlib.sha256(row.prompt.encode()).digest()
    return int.from_bytes(digest[:8]) % sum(TENTHS)


def _read_instructions(path: Path) -> Content:
    """Splits by a hash of the prompt, so no prompt is in two parts."""
    rows, first, parts = read_rows(path), 0, []
    for size, part in zip(TENTHS, ("train", "valid", "test"), strict=True):
        own = range(first, first + size)
        parts.append(tuple(row for row in rows if _bucket(row) in own))
        first += size
        if not parts[-1]:
            raise DataError(
                f"{path}: the {part} part of its {len(rows)} instances is empty "
                "(prompts are split 8 : 1 : 1 by a hash), expected more instances."
            )
    train, valid, test = parts
    return Content((train, valid, test), "rouge_l", str(path))


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


def text_content(domain: Domain) -> Content:
    """For continued pre-training; the tail of the training text is there to tune on."""
    train, test = (_decoded(domain, part) for part in ("train", "valid"))
    cut = len(train) - int(len(train) * VALID_SHARE)
    train, valid, test = ((Row("", x),) for x in (train[:cut], train[cut:], test))
    return Content((train, valid, test), "loss", domain.source, "text")


def _read_text(data: Path, name: str) -> Content:
    (domain,) = domains.load_folder(data, [name])
    return text_content(domain)


def _by_name(
    data: Path, paths: list[Path], name: Callable[[Path], str]
) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if name(path) in found:
            raise DataError(
                f"--data: {data} has {name(path)} twice, as {found[name(path)]} and as "
                f"{path}, expected one task of a name."
            )
        found[name(path)] = path
    return found


def detect(data: Path) -> tuple[str, list[str], Callable[[str], Content]]:
    """The layout of a folder, in words; the names of its tasks; their reader."""
    if not data.is_dir():
        raise DataError(f"--data: got {data}, expected a folder that exists.")
    if any((data / name).is_file() for name in FILES):
        raise DataError(
            f"--data: {data} has {listing(data)}, which is one task, expected the "
            f"folder that holds it: --data {data.parent} --tasks {data.name}."
        )
    if folders := task_folders(data):
        others = ("dev.json", "labels.json")
        cl = any((folder / name).is_file() for folder in folders for name in others)
        layout = CL_BENCHMARK if cl else TRACE
        found = _by_name(data, folders, lambda path: path.name)
        return layout, list(found), lambda name: _read_folder(found[name], layout)
    if files := visible(data.glob("*.json"), data):
        found = _by_name(data, files, lambda path: path.stem)
        return INSTRUCTIONS, list(found), lambda name: _read_instructions(found[name])
    if texts := visible(data.glob("*.txt"), data):
        found = {re.sub(r"(\.(train|valid))?\.txt$", "", p.name) for p in texts}
        return TEXT, sorted(found), lambda name: _read_text(data, name)
    raise DataError(
        f"--data: {data} has {listing(data)}, expected folders NAME with train.json, "
        "eval.json (or dev.json) and test.json, files NAME.json of Natural "
        "Instructions, or NAME.txt."
    )


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c in " ,." for c in paragraph)
    long = len(paragraph) >= LONG_PARAGRAPH and plain >= LETTERS * len(paragraph)
    return long and paragraph[0].isupper() and paragraph[-1] == "."


def read_prose(path: Path) -> str:
    """The paragraphs of a module's docstrings that are whole English sentences."""
    paragraphs = installed.read_docstrings(path).split("\n\n")
    flat = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n\n".join(p for p in flat if _is_prose(p))
