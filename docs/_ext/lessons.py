"""Sphinx: the lessons of examples/ as notebooks of docs/lessons/.

A lesson is a Python file whose cells begin with `# %%`. Its text is in the comments of
cells that begin with `# %% [markdown]`. Before the pages are read, each lesson becomes
a notebook beside docs/lessons/index.md, which MyST-NB then runs. The notebooks are not
committed: on the forge the links of that page lead to the files, in the documentation
to the notebooks.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

ROOT = Path(__file__).parents[2]
MARK = "# %%"

__all__ = ["LESSONS", "notebook", "setup"]

LESSONS = sorted((ROOT / "examples").glob("0[1-9]_*.py"))


def notebook(source: str) -> nbformat.NotebookNode:
    """The notebook of a lesson.

    Raises:
      ValueError: for code before the first cell, or in a text cell.
    """
    cells, blocks = [], ("\n" + source).split(f"\n{MARK}")
    if blocks[0].strip():
        raise ValueError(f"lesson begins with {blocks[0].strip()!r}, expected {MARK}.")
    for number, block in enumerate(blocks[1:]):
        kind, _, body = block.partition("\n")
        if kind.strip() == "[markdown]":
            lines = body.strip().splitlines()
            wrong = [line for line in lines if not line.startswith("#")]
            if wrong:
                raise ValueError(f"text cell has {wrong[0]!r}, expected a comment.")
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            cell = v4.new_markdown_cell(text)
        else:
            cell = v4.new_code_cell(body.strip())
        cell.id = f"cell-{number}"  # the same at each build, so that nothing runs twice
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return made


def write(app: Any) -> None:
    folder = Path(app.srcdir) / "lessons"
    for lesson in LESSONS:
        text = nbformat.writes(notebook(lesson.read_text(encoding="utf-8")))
        path = folder / f"{lesson.stem}.ipynb"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def link_notebooks(app: Any, docname: str, source: list[str]) -> None:
    del app
    if docname == "lessons/index":
        file = r"\]\(\.\./\.\./examples/(0[1-9]_\w+)\.py\)"
        source[0] = re.sub(file, r"](\1.ipynb)", source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("source-read", link_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
