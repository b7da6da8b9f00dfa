"""Prose, numbers and tables put together: the content of every file that is written."""

import re
from pathlib import Path

from benchmarks._pages.evidence.cells import as_csv, as_html, cells
from benchmarks._pages.evidence.facts import fact
from benchmarks._pages.evidence.results import ROOT
from benchmarks._pages.evidence.tables import TABLES, headlines
from benchmarks._pages.tables import written

__all__ = ["FOLDER", "README", "TEXTS", "filled", "files"]

FOLDER = ROOT / "docs" / "evidence"
README = ROOT / "README.md"
TEXTS = sorted((Path(__file__).parent / "text").glob("*.md"))
SOURCE = """
<!-- Written by `python -m benchmarks._pages.evidence` from {path}: edit that. -->
"""


def filled(text: str) -> str:
    """The text with every `{{ fact }}` and `{{ table NAME }}` replaced."""

    def told(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return TABLES[arguments[0]](*arguments[1:]) if name == "table" else fact(found[1])

    return re.sub(r"\{\{\s+(.+?)\s+\}\}", told, text, flags=re.DOTALL)


def files() -> dict[Path, str]:
    """Every file that the command writes, with its content."""
    made = {
        FOLDER / text.name: filled(text.read_text())
        + SOURCE.format(path=text.relative_to(ROOT).as_posix())
        for text in TEXTS
    }
    lines = cells()
    made[FOLDER / "cells.csv"] = as_csv(lines)
    made[FOLDER / "cells.html"] = as_html(lines)
    made[README] = written(README.read_text(), "headlines", headlines())
    return made
