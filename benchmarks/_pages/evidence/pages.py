"""Prose, numbers and tables put together: the content of every file that is written."""

import re
import textwrap
from pathlib import Path

from benchmarks._pages.evidence.cells import as_csv, as_html, cells
from benchmarks._pages.evidence.facts import fact
from benchmarks._pages.evidence.pretrained_tables import for_readers, rates
from benchmarks._pages.evidence.results import ROOT
from benchmarks._pages.evidence.tables import TABLES, headlines
from benchmarks._pages.tables import written

__all__ = ["FOLDER", "GUIDE", "TEXTS", "filled", "files", "page", "wrapped"]

FOLDER = ROOT / "docs" / "evidence"
GUIDE = ROOT / "docs" / "which_method.md"
PRETRAINED = ROOT / "docs" / "pretrained.md"
TEXTS = sorted((Path(__file__).parent / "text").glob("*.md"))
WIDTH = 90
SOURCE = """
<!-- Written by `python -m benchmarks._pages.evidence` from {path}: edit that. -->
"""


def filled(text: str) -> str:
    """The text with every `{{ fact }}` and `{{ table NAME }}` replaced."""

    def told(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return (
            TABLES[arguments[0]](*arguments[1:]) if name == "table" else fact(found[1])
        )

    return re.sub(r"\{\{\s+(.+?)\s+\}\}", told, text, flags=re.DOTALL)


def wrapped(text: str) -> str:
    """Paragraphs and items of lists in lines of equal length again."""
    parts = re.split(r"(^```.*?^```$|\n\n)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(map(_lines, parts))


def _lines(block: str) -> str:
    if not block.strip() or re.match(r"```|\||#|!\[|<", block):
        return block
    items = re.split(r"\n(?=- )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), WIDTH, break_long_words=False,
            break_on_hyphens=False, subsequent_indent="  " * item.startswith("- "),
        )
        for item in items
    )  # fmt: skip


def page(text: Path) -> str:
    """What is written for a file of `TEXTS`."""
    source = SOURCE.format(path=text.relative_to(ROOT).as_posix())
    return wrapped(filled(text.read_text())) + source


def files() -> dict[Path, str]:
    """Every file that the command writes, with its content."""
    made = {FOLDER / text.name: page(text) for text in TEXTS}
    lines = cells()
    made[FOLDER / "cells.csv"] = as_csv(lines)
    made[FOLDER / "cells.html"] = as_html(lines)
    made[GUIDE] = written(GUIDE.read_text(), "headlines", headlines())
    guide = written(PRETRAINED.read_text(), "pairs", for_readers())
    made[PRETRAINED] = written(guide, "rates", rates())
    return made
