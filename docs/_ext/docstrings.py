"""The docstrings of adamr, which are plain text, as reStructuredText for autodoc.

an indented block after a blank line    a literal block: equations keep their lines
`name`                                  a link, if the reference has it; else code
docs/evidence/how.md, arXiv:2103.09762  a link to the page, to the paper
Returns, References                     fields; napoleon reads the other sections
"Guarantee: …", "Trap: …"               the first word in bold
"""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable
from typing import Any

import adamr

Find = Callable[[str], str | None]

FIELDS = ("Returns:", "References:")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
PAGE = re.compile(r"\bdocs/(\w+(?:/\w+)*)(\.md|/)(?!\w)")
# Of what reStructuredText takes for markup only *emphasis* is meant.
SPECIAL = re.compile(r"(?<!\w)(\*\w+\*)(?!\w)|([*|\\]|_(?=\W|$))")
EXTRA = re.compile(r"Extra arguments? of `update`:$")


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Runs of lines between blank ones; a block or a section may hold blank lines."""
    found: list[str] = []
    for part in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
        block = part.startswith("    ")
        if found and part[0] == " " and (found[-1][0] == " " or not block):
            found[-1] += f"\n\n{part}"
        else:
            found.append(part)
    return [part.split("\n") for part in found]


def code(text: str, find: Find) -> str:
    """Inline code, linked to its place in the reference if it has one."""
    shown, target = re.sub(r"\s+", " ", text), find(text)
    return f":py:obj:`{shown} <{target}>`" if target else f"``{shown}``"


def page(found: re.Match[str]) -> str:
    """A link to a page of the documentation, with its title."""
    name, end = found.groups()
    return f":doc:`/{name}`" if end == ".md" else f":doc:`/{name}/index`"


def marked_up(text: str, find: Find) -> str:
    """Prose with its `code` marked up and nothing else taken for markup."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"\0{code(part, find)}\0"
        else:
            part = SPECIAL.sub(lambda at: at[1] or f"\\{at[2]}", part)
            part = ARXIV.sub(r"`\g<0> <https://arxiv.org/abs/\1>`__", part)
            parts[i] = PAGE.sub(page, part)
    # Markup begins and ends at a space, or at one that is escaped and not shown.
    text = re.sub(r"(?<=[^\s(])\0(?=[:`])", r"\\ ", "".join(parts))
    return re.sub(r"(?<=`)\0(?=[^\s.,;:)])", r"\\ ", text).replace("\0", "")


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


def field(name: str, body: list[str], find: Find) -> list[str]:
    """`:name: body`, its lines indented below it."""
    text = marked_up("\n".join(line.strip() for line in body), find)
    return textwrap.indent(f":{name}: {text}", "   ").lstrip().split("\n")


def as_rst(lines: list[str], find: Find) -> list[str]:
    """A docstring as reStructuredText, except the sections that napoleon reads.

    Args:
      lines: of the docstring, without its common indentation.
      find: from the text of inline code to the full name that the reference has for
        it, or None.

    Returns:
      Lines of reStructuredText.
    """
    made = []
    for paragraph in paragraphs(lines):
        first, *rest = paragraph
        if first.startswith("    "):
            made += literal(paragraph)
        elif first.startswith(">>>"):
            made += paragraph
        elif first.startswith("=="):
            # A table's columns stay as wide as they are, so nothing is escaped in it.
            made += [line.replace("*", "∗") for line in paragraph]
        elif first in FIELDS:
            made += field(first.rstrip(":").lower(), rest, find)
        elif first.startswith("References: "):
            made += field("references", [first.split(": ", 1)[1], *rest], find)
        else:
            first = EXTRA.sub("Extra arguments:", first)
            text = marked_up("\n".join([first, *rest]), find)
            made += re.sub(r"^([A-Z][a-z]+:) (?=\S)", r"**\1** ", text).split("\n")
        made.append("")
    return made


def room_of(module: str) -> types.ModuleType:
    """`adamr.routing` of `adamr.routing.carrier`."""
    room = getattr(adamr, (module.split(".") + [""])[1], None)
    return room if isinstance(room, types.ModuleType) else adamr


def full_name(text: str, module: str) -> str | None:
    """The name in the reference of what a docstring of this module calls `text`."""
    text = text.removeprefix("adamr.")
    parts = text.split(".")
    owner: Any = adamr
    if not hasattr(adamr, parts[0]):
        # A word alone, such as rank, is more often an argument than a name.
        if len(parts) > 1 or not re.search(r"[A-Z]|[a-z]_", text):
            return None
        owner = room_of(module)
    found = owner
    for part in parts:
        if not hasattr(found, part) or part.startswith("_"):
            return None
        found = getattr(found, part)
    if isinstance(found, types.ModuleType):
        return found.__name__ if found.__name__.startswith("adamr.") else None
    for place in (adamr, room_of(getattr(found, "__module__", ""))):
        if getattr(place, parts[-1], None) is found:
            return f"{place.__name__}.{parts[-1]}"
    return ".".join([owner.__name__, *parts])


def on_docstring(app, what, name, value, options, lines):
    if lines and lines[0].startswith(f"{getattr(value, '__name__', '')}("):
        lines[:] = []  # of a NamedTuple without one, which then repeats its fields
        return
    module = getattr(value, "__module__", None) or name
    try:
        arguments = set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        arguments = set()

    def find(text: str) -> str | None:
        called = re.match(r"[\w.]+(?=\(|$)", text)
        if not called or called[0] in arguments or "<" in text:
            return None
        return full_name(called[0], module)

    lines[:] = as_rst(lines, find)


def with_names(signature: str, value: Any) -> str:
    """The signature, with the names of defaults that are functions."""
    for parameter in inspect.signature(value).parameters.values():
        default = parameter.default
        if isinstance(default, types.FunctionType):
            shown = re.sub(" at 0x[0-9a-f]+", "", repr(default))
            known = vars(inspect.getmodule(value)).items()
            name = next((name for name, x in known if x is default), shown)
            signature = signature.replace(shown, name)
    return signature


def on_signature(app, what, name, value, options, signature, returned):
    if signature and callable(value):
        return with_names(signature, value), returned


def setup(app):
    app.connect("autodoc-process-signature", on_signature)
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
