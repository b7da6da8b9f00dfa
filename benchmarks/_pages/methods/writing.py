"""The pages of docs/methods/ in Markdown."""

import inspect
import re
import textwrap
from pathlib import Path

from benchmarks._pages.methods import docstrings, verified
from benchmarks._pages.methods.families import FAMILIES, METHODS
from benchmarks._pages.methods.measure import Measured, read
from benchmarks._pages.methods.method import Family, Method
from benchmarks._pages.methods.probes import RANK, TASKS
from benchmarks._pages.methods.setting import SETTING

__all__ = ["FOLDER", "pages"]

FOLDER = Path(__file__).parents[3] / "docs" / "methods"
ROUTES = {
    "shared": "[shared](../glossary.md#shared-routing): both moments see g̃",
    "decoupled": "[decoupled](../glossary.md#decoupled-routing): v sees g",
    "recipe": "the recipe, `{call}`",
}
MARK = "<!-- Written by `python -m benchmarks._pages.methods`; do not edit. -->\n\n"

INDEX = """# Methods

Each method changes the gradient so that a new task does not overwrite old ones. The
last three columns say whether the method's promise survives Adam: under [shared
routing](../glossary.md#shared-routing), which is what you get when a
[modifier](../glossary.md#modifier) is put before Adam; under [decoupled
routing](../glossary.md#decoupled-routing); and in our [recipe](../glossary.md#recipe)
of that name. A dash means that there is nothing to compare: the method has a step of
its own, or makes no promise about a single step, or cannot be put on that route. The
name of a method leads to its equations, the lines for a task
[boundary](../glossary.md#boundary), what it costs, and what it was checked against.
"""

HOW = """## How this was measured

On a small model with two kernels of fan-in 64 and one bias, with {rank} protected
directions per kernel, or for all parameters together, and {tasks} old tasks. For the
promises every method takes 40 steps (penalties 400) on random gradients whose entries
differ widely in size, which is where Adam does most harm; the pages give the worst
step. The state is counted in numbers per parameter (Adam keeps 2, one for each moment),
the operations in the compiled update (Adam takes {adam}). What a method was checked
against are tests that passed when the page was written.

    python -m benchmarks._pages.methods

writes these pages from the code, the tests and `benchmarks/results/methods.json`, and
measures all of it anew.
"""

NAMES = """## The names in the code

The lines on these pages run with the names defined here: a small model, two tasks and
the usual loop.

```python
{setting}
```
"""


def slug(title: str) -> str:
    """The anchor of a heading, as the forge and Sphinx make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def plain(number: float) -> str:
    """0.33, 1756, and 3e-7 where it is small."""
    if number == 0 or 0.001 <= abs(number) < 1e6:
        return f"{number:g}"
    return f"{number:.0e}".replace("e-0", "e-")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 88, break_long_words=False, break_on_hyphens=False)


def kept(method: Method, number: float) -> bool:
    return method.promise is not None and number <= method.promise.most


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# The overview --------------------------------------------------------------------


def overview(family: Family, page: str, measured: dict[str, Measured]) -> str:
    rows = []
    for name, method in family.methods.items():
        numbers = measured[name].routes
        answers = [
            ("yes" if kept(method, numbers[r]) else "no") if r in numbers else "–"
            for r in ROUTES
        ]
        link = f"[{method.title}]({page}.md#{slug(method.title)})"
        rows.append([link, method.does, ", ".join(docstrings.papers(name)), *answers])
    head = f"## {family.title}\n\n{family.does}\n\n"
    return head + table(["method", "what it does", "paper", *ROUTES], rows) + "\n"


def index(measured: dict[str, Measured]) -> str:
    parts = [overview(f, page, measured) for page, f in FAMILIES.items()]
    how = HOW.format(rank=RANK, tasks=TASKS, adam=read()["adam_operations"])
    toctree = "```{toctree}\n:hidden:\n\n" + "\n".join(FAMILIES) + "\n```\n"
    names = NAMES.format(setting=SETTING)
    return MARK + "\n".join([INDEX, *parts, how, names, toctree])


# A method ------------------------------------------------------------------------


def promise(name: str, method: Method, numbers: dict[str, float]) -> str:
    if method.promise is None:
        return wrapped(
            "**Does it survive Adam?** Routes do not apply: the method has a step of "
            "its own, or makes no promise about a single step."
        )
    rows = [
        [
            ROUTES[route].format(call=docstrings.call(name)),
            "yes" if kept(method, number) else "no",
            plain(number),
        ]
        for route, number in numbers.items()
    ]
    head = f"**Does it survive Adam?** The promise is that {method.promise.words}."
    head = wrapped(head)
    return f"{head}\n\n" + table(["route", "kept", method.promise.number], rows)


def cost(found: Measured, adam: int) -> str:
    fields = ", ".join(f"`{name}` {plain(n)}" for name, n in found.state.items())
    total = plain(float(f"{sum(found.state.values()):.2g}"))
    further = {0: "None", 1: "One"}.get(found.gradients, str(found.gradients))
    return (
        f"**Cost.** State: {total} numbers per parameter ({fields}); Adam keeps 2. "
        f"Operations per parameter and step: {found.operations}; Adam takes {adam}. "
        f"Gradients to compute besides the usual one: {further.lower()}."
    )


def checked(method: Method, found: Measured) -> str:
    backing = verified.verified(method, found.passed)
    if not backing:
        return "**Checked against.** Nothing yet."
    *first, last = backing
    kinds = f"{', '.join(first)} and {last}" if first else last
    tests = "\n".join(f"- `{t}`" for tests in backing.values() for t in tests)
    return (
        f"**Checked against** {kinds}.\n\n"
        f"<details><summary>Tests, for developers</summary>\n\n{tests}\n\n</details>"
    )


def section(name: str, method: Method, found: Measured, adam: int) -> str:
    lines = inspect.cleandoc(method.lines)
    paper = docstrings.linked(docstrings.references(name))
    return "\n\n".join(
        [
            f"## {method.title}",
            wrapped(f"`{docstrings.call(name)}`. {method.does}"),
            wrapped(f"**What it keeps.** {method.keeps}"),
            f"```text\n{docstrings.equations(method.equations or name)}\n```",
            promise(name, method, found.routes),
            f"**In code**, with [these names](index.md#the-names-in-the-code).\n\n"
            f"```python\n{lines}\n```",
            wrapped(cost(found, adam)),
            wrapped(f"**Paper.** {paper}"),
            checked(method, found),
        ]
    )


def page(family: Family, measured: dict[str, Measured]) -> str:
    adam = read()["adam_operations"]
    sections = [section(n, m, measured[n], adam) for n, m in family.methods.items()]
    head = f"# {family.title}\n\n{family.intro.strip()}"
    return MARK + "\n\n".join([head, *sections]) + "\n"


def pages(measured: dict[str, Measured]) -> dict[str, str]:
    """File name -> text, of all pages."""
    missing = [name for name in METHODS if name not in measured]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not measured: "
            f"run python -m benchmarks._pages.methods {' '.join(missing)}"
        )
    written = {f"{name}.md": page(f, measured) for name, f in FAMILIES.items()}
    return {"index.md": index(measured), **written}
