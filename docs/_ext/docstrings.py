"""The docstrings of adamr, which are plain text, as reStructuredText for autodoc.

    an indented block after a blank line    a literal block: equations keep their lines
    `name`                                  a link, if the reference has it; else code
    Returns, References                     fields; napoleon reads the other sections
    "Guarantee: …", "Trap: …"               the first word in bold
"""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator

FIELDS = ("Returns:", "References:")
EXTRA = re.compile(r"Extra arguments? of `update`:$")


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones; an indented run may hold blank lines."""
    text = "\n".join(lines).strip("\n")
    for part in re.split(r"\n{2,}(?=\S)|\n{2,}(?= {4})(?<! )", text):
        yield part.split("\n")


def code(name: str, target: str | None) -> str:
    """Inline code, linked to its place in the reference if it has one."""
    shown = re.sub(r"\s+", " ", name)
    return f":py:obj:`{shown} <{target}>`" if target else f"``{shown}``"


def marked_up(text: str, find: Callable[[str], str | None]) -> str:
    """Prose with its `code` marked up and nothing else taken for markup."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            after = parts[i + 1][:1]
            parts[i] = code(part, find(part)) + ("\\ " if after.isalnum() else "")
        else:
            parts[i] = re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
    return "".join(parts)


def literal(block: list[str]) -> list[str]:
    """A block of equations or of code, its lines kept."""
    text = textwrap.dedent("\n".join(block))
    try:
        ast.parse(text)
        language = "python"
    except SyntaxError:
        language = "text"
    body = textwrap.indent(text, "   ").split("\n")
    return [f".. code-block:: {language}", "", *body]


def field(name: str, body: list[str], find: Callable) -> list[str]:
    """`:name: body`, its lines indented below it."""
    text = marked_up("\n".join(line.strip() for line in body), find)
    return textwrap.indent(f":{name}: {text}", "   ").lstrip().split("\n")


def as_rst(lines: list[str], find: Callable[[str], str | None]) -> list[str]:
    """A docstring as reStructuredText, except the sections that napoleon reads.

    Args:
      lines: of the docstring, without its common indentation.
      find: from the text of inline code to the full name that the reference has for
        it, or None.

    Returns:
      Lines of reStructuredText.
    """
    made = []
    for lines_of_one in paragraphs(lines):
        first, *rest = lines_of_one
        if first.startswith("    "):
            made += literal(lines_of_one)
        elif first.startswith(">>>"):
            made += lines_of_one
        elif first.startswith("=="):
            # A table's columns stay as wide as they are, so nothing is escaped in it.
            made += [line.replace("*", "∗") for line in lines_of_one]
        elif first in FIELDS:
            made += field(first.rstrip(":").lower(), rest, find)
        elif first.startswith("References: "):
            body = [first.removeprefix("References: "), *rest]
            made += field("references", body, find)
        else:
            first = EXTRA.sub("Extra arguments:", first)
            text = marked_up("\n".join([first, *rest]), find)
            text = re.sub(r"^([A-Z][a-z]+:) (?=\S)", r"**\1** ", text)
            made += text.split("\n")
        made.append("")
    return made


def is_generated(value, lines: list[str]) -> bool:
    """Whether Python wrote the docstring, `Name(field, …)`, of a NamedTuple."""
    name = getattr(value, "__name__", "")
    return bool(lines) and lines[0].startswith(f"{name}(")


def reference(name: str) -> dict[str, str]:
    """Text of inline code -> its full name in the reference, as a module sees it.

    Args:
      name: of what is documented; from its own room, names that cannot be taken for an
        argument's are found without the room.
    """
    import adamr

    found = {}
    room = getattr(adamr, (name.split(".") + [""])[1], None)
    if isinstance(room, types.ModuleType):
        for short, value in vars(room).items():
            if re.search(r"[A-Z]|[a-z]_", short) and short[0] != "_":
                if not isinstance(value, types.ModuleType):
                    found[short] = f"{room.__name__}.{short}"
    for short, value in vars(adamr).items():
        if isinstance(value, types.ModuleType):
            found[short] = found[f"adamr.{short}"] = f"adamr.{short}"
        elif not short.startswith("_"):
            found[short] = found[f"adamr.{short}"] = f"adamr.{short}"
    return found


def on_docstring(app, what, name, value, options, lines):
    if is_generated(value, lines):
        lines[:] = []
        return
    known = reference(getattr(value, "__module__", None) or name)
    try:
        arguments = set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        arguments = set()

    def find(text: str) -> str | None:
        called = re.match(r"[\w.]+(?=\(|$)", text)
        if not called or called[0] in arguments or "<" in text:
            return None
        return known.get(called[0])

    lines[:] = as_rst(lines, find)


def setup(app):
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
